"""Limits (``ulimit``) that all processes of a server inherit: enough for its settings, or an error.

What a setting reserves is computed from it. What libraries take beside that was measured on processes that
serve small models, and rounded up; a test holds running processes against it.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.devices.arena import available_bytes
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.supervisor.processes import workers_of
from clockwork_serve.units import MIB

# Address space, in bytes. A supervisor has what Python and numpy take here, which grows with the cores; a
# compiler and a gateway have that and more, a worker, where numpy may have one thread, does not.
COMPILER_BYTES: Final = 384 * MIB
GATEWAY_BYTES: Final = 256 * MIB
GRPC_BYTES: Final = 256 * MIB  # the stacks of gRPC's threads, most of all
WORKER_BYTES: Final = 640 * MIB
TORCH_BYTES: Final = 1024 * MIB

# Open files.
SUPERVISOR_FILES: Final = 24
CHILD_FILES: Final = 3  # what a supervisor has for each process: its log, its heartbeats, its end
CONTROLLER_FILES: Final = 24
WORKER_FILES: Final = 40
GATEWAY_FILES: Final = 42  # with 16 connections, of clients or to accept next

TORCH_KINDS: Final = ("torch-cpu", "cuda")
HOST_KINDS: Final = ("cpu", "torch-cpu")  # whose memory is the host's
_amount: Final = attrgetter("amount")
_UNLIMITED: Final = 1 << 62
_log = logging.getLogger(__name__)


class Need(NamedTuple):
    """What one process needs of a limit, and of what that is made up."""

    process: str
    amount: int
    parts: str


def check_limits(settings: Settings, devices: tuple[DeviceConfig, ...], *, joining: bool = False) -> None:
    """Raise soft limits that are too low for these settings, for this process and those that it starts.

    ``joining``: of a server elsewhere there are only these devices here, or, without any, gateways. Raises
    :class:`ConfigError` if a hard limit is too low, or a device's memory is more than the host has left.
    """
    _check_memory(devices)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        need = max(address_needs(settings, devices, address_space_bytes(), joining=joining), key=_amount)
        if _least(hard) < need.amount:
            raise ConfigError(
                f"address space (ulimit -v): expected at least {_mib(need.amount)}, for {need.process} "
                f"({need.parts}); found a limit of {_mib(hard)}; raise it (ulimit -v unlimited; "
                "LimitAS=infinity in a unit of systemd), or lower what is named"
            )
        if soft < need.amount:
            _raise_soft(resource.RLIMIT_AS, "address space (ulimit -v)", soft, hard)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = max(file_needs(settings, devices, joining=joining), key=_amount)
    if _least(hard) < need.amount:
        raise ConfigError(
            f"open files (ulimit -n): expected at least {need.amount}, for {need.process} ({need.parts}); "
            f"found a limit of {hard}; raise it (ulimit -n 4096; LimitNOFILE=4096 in a unit of systemd; "
            "--ulimit nofile=4096 of a container)"
        )
    if soft != hard:
        _raise_soft(resource.RLIMIT_NOFILE, "open files (ulimit -n)", soft, hard)
    if _least(hard) < settings.max_connections and (not joining or not devices):
        _log.warning(
            "max_connections: %d wanted, but the system allows a process %d files (ulimit -n)",
            settings.max_connections, hard,
        )  # fmt: skip


def _check_memory(devices: tuple[DeviceConfig, ...]) -> None:
    available = available_bytes()
    for each in devices:
        needs = {"host_memory": each.pool_bytes}
        if each.kind in HOST_KINDS:
            scratch = each.workspace_bytes + each.io_bytes
            needs |= {"device_memory": each.memory_bytes, "scratch_memory": scratch}
        for name, needed in needs.items():
            if available is not None and needed > available:
                raise ConfigError(
                    f"{name}: expected at most {available // MIB} MiB, which are available on this host; "
                    f"found {_mib(needed)} for {each.device}; lower it"
                )


def address_needs(
    settings: Settings, devices: tuple[DeviceConfig, ...], supervisor_bytes: int, *, joining: bool = False
) -> Iterator[Need]:
    """The address space that each process needs, in bytes; ``supervisor_bytes`` is what this one has."""
    yield Need("the supervisor", supervisor_bytes, "Python")
    torch = any(each.kind in TORCH_KINDS for each in devices)
    if not joining:
        compiler_bytes = TORCH_BYTES if torch else COMPILER_BYTES
        yield Need("compiling models", supervisor_bytes + compiler_bytes, "Python and runtimes")
    for name, group in workers_of(devices):
        mapped = 0 if joining else settings.gateways * settings.gateway_memory
        if joining or settings.listen_machines:
            mapped += 2 * max(settings.io_memory, settings.gateway_memory)
        reserved = [each for each in group if each.kind != "emulated"]
        memory = sum(each.memory_bytes + each.io_bytes for each in reserved)
        libraries = TORCH_BYTES if group[0].kind in TORCH_KINDS else WORKER_BYTES
        parts = (
            f"device_memory and scratch_memory {_mib(memory)}, gateway_memory {_mib(mapped)}, "
            f"Python and libraries {_mib(libraries)}"
        )
        if group[0].kind == "cuda":
            yield Need(name, _UNLIMITED, "a GPU's driver reserves all that there is")
        yield Need(name, memory + mapped + libraries, parts)
    if not joining or not devices:
        libraries = supervisor_bytes + GATEWAY_BYTES + (0 if settings.grpc_port is None else GRPC_BYTES)
        parts = (
            f"gateway_memory {_mib(settings.gateway_memory)}, max_body {_mib(settings.max_body)}, "
            f"Python and {'HTTP' if settings.grpc_port is None else 'gRPC'} {_mib(libraries)}"
        )
        yield Need("a gateway", settings.gateway_memory + settings.max_body + libraries, parts)


def file_needs(
    settings: Settings, devices: tuple[DeviceConfig, ...], *, joining: bool = False
) -> Iterator[Need]:
    """The open files that each process needs."""
    workers = len(workers_of(devices))
    gateways = 0 if joining and devices else settings.gateways
    others = 0 if joining else 1 + settings.controllers + bool(settings.listen_machines)
    children = workers + gateways + others
    yield Need(
        "the supervisor",
        SUPERVISOR_FILES + CHILD_FILES * children,
        f"{CHILD_FILES} for each of {children} processes",
    )
    if not joining:
        yield Need("the controller", CONTROLLER_FILES + children, f"a link to each of {children} processes")
    if workers:
        yield Need("a worker", WORKER_FILES + gateways, "links, devices and files of weights")
    if gateways:
        yield Need("a gateway", GATEWAY_FILES + gateways, "ports, links and 16 connections")


def address_space_bytes() -> int:
    """The address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _raise_soft(which: int, name: str, soft: int, hard: int) -> None:
    resource.setrlimit(which, (hard, hard))
    _log.debug("%s: raised from %d to %d", name, soft, hard)


def _least(limit: int) -> int:
    """A limit as a number that can be compared."""
    return _UNLIMITED if limit == resource.RLIM_INFINITY else limit


def _mib(nbytes: int) -> str:
    return "no limit" if nbytes == _UNLIMITED else f"{-(-nbytes // MIB)} MiB"
