"""``clockwork worker`` and ``clockwork gateway``: processes of this machine that join a server on another."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from clockwork_serve.config import Settings
from clockwork_serve.errors import ClockworkError, ConfigError
from clockwork_serve.serve.gateway.access import check_access_files
from clockwork_serve.serve.gateway.settings import check_gateways
from clockwork_serve.serve.remote.config import FAR_GATEWAY, FAR_NAME, check_joining, check_store
from clockwork_serve.serve.supervisor.config import device_configs, heard_soon
from clockwork_serve.serve.supervisor.limits import check_limits
from clockwork_serve.serve.supervisor.processes import (
    Launch,
    Supervisor,
    gateway_launches,
    pinned_cores,
    to_stderr,
)
from clockwork_serve.serve.supervisor.run_dir import Ports, RunDir, addresses
from clockwork_serve.serve.supervisor.server import Stopping, run_unless
from clockwork_serve.serve.worker.host import WorkerConfig

# ------------------------------------------------------------
# Runs processes that join a server on another machine, and restarts them when they die.


CHECK_INTERVAL_S: Final = 0.1


class ChildrenEnded(ClockworkError):
    """A process keeps failing, or the server refuses it; the message has its last lines."""


def run_until_stopped(launches: Callable[[Path], Sequence[Launch]], drain_s: float) -> int:
    """Run processes until SIGTERM, SIGINT or SIGHUP; returns the exit status. For the main thread.

    ``launches`` is called with a private folder. ``drain_s`` is how long each process has to stop; a second
    signal kills all at once. Raises :class:`ChildrenEnded` if one keeps failing, or the server refuses it.
    """
    run_dir = RunDir("")
    try:
        return uvloop.run(_run(launches(run_dir.path), drain_s))
    finally:
        run_dir.close()


async def _run(launches: Sequence[Launch], drain_s: float) -> int:
    stopping = Stopping()
    supervisor = Supervisor(to_stderr)
    try:
        for launch in launches:
            supervisor.start(launch)
        while not stopping.requested.is_set():
            if (why := supervisor.why_failing()) is not None:
                raise ChildrenEnded(why)
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.requested.wait(), CHECK_INTERVAL_S)
        ended = asyncio.gather(*[supervisor.stop(name, drain_s) for name in supervisor.names])
        return 0 if await run_unless(stopping.forced, ended) else stopping.status
    finally:
        await supervisor.kill()


# ------------------------------------------------------------
# ``clockwork worker``: a worker process for each device of this machine, which joins a server on another.


UNRESPONSIVE_S: Final = 40.0
"""A worker that returns no heartbeat for this long is killed. The server knows how long its actions may take,
but cannot kill a process here; on its own machine the default for one that has work is 30 s and 10 s of
grace."""


def worker_launches(settings: Settings, run_dir: Path) -> list[Launch]:
    """A process for each device; device and process are named after the machine.

    Raises :class:`ConfigError`.
    """
    machine = machine_of(settings)
    devices = [
        msgspec.structs.replace(device, device=f"{machine}.{device.device}")
        for device in device_configs(settings)
    ]
    for device in devices:
        if not FAR_NAME.fullmatch(device.device):
            raise ConfigError(
                f"machine_name: expected a name such that a device is called NAME.cpu:0; found "
                f"{device.device}; give --machine-name"
            )
    pins, _ = pinned_cores(settings, len(devices))
    found = []
    for device, cpus in zip(devices, pins, strict=True):
        worker = WorkerConfig(
            run_dir=str(run_dir), name=device.device, devices=(device,), settings=settings, elsewhere=True
        )
        found.append(Launch.of(f"worker-{device.device}", "worker", worker, UNRESPONSIVE_S, cpus))
    return found


def run_workers(settings: Settings) -> int:
    """Run workers as :func:`run_until_stopped`. Raises :class:`ConfigError` if a setting is missing."""
    check_joining(settings, "a worker")
    check_store(settings)
    settings = heard_soon(settings) if "," in settings.controller else settings
    check_limits(settings, device_configs(settings), joining=True)
    return run_until_stopped(lambda run_dir: worker_launches(settings, run_dir), settings.drain_s)


def machine_of(settings: Settings) -> str:
    """The name of this machine at the server."""
    return settings.machine_name or socket.gethostname().partition(".")[0]


# ------------------------------------------------------------
# ``clockwork gateway``: gateways of this machine for a server on another. Their ports are held here, so that
# they stay reserved while a gateway restarts.


ENDING_S: Final = 1.0  # how long a gateway may take to end once it has drained


def run_gateways(settings: Settings, on_listening: Callable[[dict[str, str]], None] = lambda at: None) -> int:
    """Run gateways as :func:`run_until_stopped`.

    ``on_listening`` gets the addresses (``http``, ``grpc``, ``metrics``) once their ports are held. Raises
    :class:`ConfigError` if a setting is missing, a port cannot be had, or a file cannot be used.
    """
    check_joining(settings, "a gateway")
    settings = heard_soon(settings) if "," in settings.controller else settings
    check_gateways(settings)
    machine = machine_of(settings)
    if not FAR_GATEWAY.fullmatch(f"{machine}.gateway-0"):
        raise ConfigError(
            f"machine_name: expected a name such that a gateway is called NAME.gateway-0; found "
            f"{machine!r:.80}; give --machine-name"
        )
    check_access_files(settings)
    check_limits(settings, (), joining=True)
    ports = Ports(settings.host, settings.ports)
    try:
        on_listening(addresses(settings.host, ports.number_by_name, tls=bool(settings.tls_certificate)))

        def launches(run_dir: Path) -> list[Launch]:
            return gateway_launches(settings, run_dir, ports.number_by_name, machine)

        return run_until_stopped(launches, settings.drain_s + ENDING_S)
    finally:
        ports.close()
