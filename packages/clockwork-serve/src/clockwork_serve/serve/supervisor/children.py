"""``clockwork worker`` and ``clockwork gateway``: processes of this machine that join a server elsewhere."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import uvloop
from msgspec import Struct

from clockwork_serve.devices import DeviceConfig, profile_kind
from clockwork_serve.errors import ClockworkError, ConfigError
from clockwork_serve.serve.gateway.access import check_door
from clockwork_serve.serve.processes.worker import WorkerConfig
from clockwork_serve.serve.remote.config import FAR_GATEWAY, FAR_NAME, FarServer, MachineConfig
from clockwork_serve.serve.supervisor.config import GatewaysConfig
from clockwork_serve.serve.supervisor.processes import Launch, Supervisor, gateway_launches, pinned_cores
from clockwork_serve.serve.supervisor.run_dir import Ports, addresses
from clockwork_serve.serve.supervisor.server import Stopping, unless

# ------------------------------------------------------------
# Keeps processes running that join a server elsewhere; what they are for it does not know.


LOOK_S: Final = 0.1


class ChildrenEnded(ClockworkError):
    """One cannot run, or the server does not take it; the message holds its last words."""


def run_until_stopped(launches: Callable[[Path], Sequence[Launch]], drain_s: float) -> int:
    """Run these, given a private folder, until SIGTERM or SIGINT; the exit status. For the main thread.

    A second signal ends them at once. Raises :class:`ChildrenEnded` if one cannot run or is not let in.
    """
    run_dir = Path(tempfile.mkdtemp(prefix="clockwork-", dir=os.environ.get("XDG_RUNTIME_DIR")))
    try:
        return uvloop.run(_run(launches(run_dir), drain_s))
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


async def _run(launches: Sequence[Launch], drain_s: float) -> int:
    stopping = Stopping()
    supervisor = Supervisor(_to_stderr)
    try:
        for launch in launches:
            supervisor.start(launch)
        while not stopping.asked.is_set():
            if (why := supervisor.hopeless()) is not None:
                raise ChildrenEnded(why)
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.asked.wait(), LOOK_S)
        stopped = await unless(stopping.insisted, _stop(supervisor, drain_s))
        return 0 if stopped else stopping.status
    finally:
        await supervisor.kill()


async def _stop(supervisor: Supervisor, drain_s: float) -> None:
    await asyncio.gather(*[supervisor.stop(name, drain_s) for name in supervisor.names])


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


# ------------------------------------------------------------
# ``clockwork worker``: a worker process for each device of this machine, which join a server elsewhere.
#
# It keeps them running, and serves nothing itself.


SILENCE_S: Final = 40.0
"""Who does not answer for so long is ended. The server, which knows what it is at, cannot reach a process
here; at home it gives one that has work 30 s and a grace of 10, unless told otherwise."""


class FarWorkersConfig(Struct, frozen=True, kw_only=True):
    """``devices`` are called as the server will call them; ``machine`` lacks their kinds."""

    devices: tuple[DeviceConfig, ...]
    machine: MachineConfig
    realtime: bool = False
    pin: bool = False
    drain_s: float = 10.0
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        """Check the names. Raises :class:`ConfigError`."""
        for device in self.devices:
            if not FAR_NAME.fullmatch(device.device):
                raise ConfigError(
                    f"machine_name: expected a name such that a device is called NAME.cpu:0; found "
                    f"{device.device}; give --machine-name"
                )


def worker_launches(config: FarWorkersConfig, run_dir: Path) -> list[Launch]:
    """A process for each device. Raises :class:`ConfigError`."""
    pins = pinned_cores(len(config.devices), os.sched_getaffinity(0)) if config.pin else {}
    found = []
    for number, device in enumerate(config.devices):
        worker = WorkerConfig(
            run_dir=str(run_dir), name=device.device, devices=(device,), pin_cpus=pins.get(number, ()),
            realtime=config.realtime, log_level=config.log_level, log_format=config.log_format,
            machine=msgspec.structs.replace(config.machine, kinds=(profile_kind(device),)),
        )  # fmt: skip
        found.append(Launch.of(f"worker-{device.device}", "worker", worker, SILENCE_S))
    return found


def run_workers(config: FarWorkersConfig) -> int:
    """As :func:`far_children.run`."""
    return run_until_stopped(lambda run_dir: worker_launches(config, run_dir), config.drain_s)


# ------------------------------------------------------------
# ``clockwork gateway``: gateways of this machine for a server elsewhere.
#
# It holds their ports and keeps them running, and serves nothing itself.


ENDING_S: Final = 1.0
"""For a gateway to end in, once it has drained."""


class FarGatewaysConfig(GatewaysConfig, frozen=True, kw_only=True):
    """``machine`` is what the server will call this one."""

    machine: str
    server: FarServer

    def __post_init__(self) -> None:
        """Check the name, too. Raises :class:`ConfigError`."""
        GatewaysConfig.__post_init__(self)
        if not FAR_GATEWAY.fullmatch(f"{self.machine}.gateway-0"):
            raise ConfigError(
                f"machine_name: expected a name such that a gateway is called NAME.gateway-0; found "
                f"{self.machine!r:.80}; give --machine-name"
            )


def run_gateways(
    config: FarGatewaysConfig, on_listening: Callable[[dict[str, str]], None] = lambda at: None
) -> int:
    """As :func:`far_children.run`. ``on_listening`` is told the addresses once their ports are held.

    Raises :class:`ConfigError` for a port that is not to be had, or files of the door that will not do.
    """
    check_door(config.door, config.host)
    ports = Ports(config.host, config.ports)
    try:
        on_listening(addresses(config.host, ports.number_by_name, tls=config.door.tls is not None))

        def launches(run_dir: Path) -> list[Launch]:
            prefix = f"{config.machine}."
            return gateway_launches(config, run_dir, ports.number_by_name, config.server, prefix)

        return run_until_stopped(launches, config.drain_s + ENDING_S)
    finally:
        ports.close()
