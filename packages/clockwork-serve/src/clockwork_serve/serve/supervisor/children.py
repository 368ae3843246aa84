"""``clockwork worker`` and ``clockwork gateway``: processes of this machine that join a server elsewhere."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
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
from clockwork_serve.serve.remote.config import FAR_GATEWAY, FAR_NAME, check_joining
from clockwork_serve.serve.supervisor.config import device_configs
from clockwork_serve.serve.supervisor.processes import Launch, Supervisor, gateway_launches, pinned_cores
from clockwork_serve.serve.supervisor.run_dir import Ports, addresses
from clockwork_serve.serve.supervisor.server import Stopping, unless
from clockwork_serve.serve.worker.host import WorkerConfig

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


def worker_launches(settings: Settings, run_dir: Path) -> list[Launch]:
    """A process for each device, which the server will call as its process. Raises :class:`ConfigError`."""
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
    pins = pinned_cores(len(devices), os.sched_getaffinity(0)) if settings.pin else {}
    found = []
    for number, device in enumerate(devices):
        worker = WorkerConfig(
            run_dir=str(run_dir), name=device.device, devices=(device,), settings=settings, elsewhere=True,
            pin_cpus=pins.get(number, ()),
        )  # fmt: skip
        found.append(Launch.of(f"worker-{device.device}", "worker", worker, SILENCE_S))
    return found


def run_workers(settings: Settings) -> int:
    """As :func:`run_until_stopped`. Raises :class:`ConfigError` for what is missing."""
    check_joining(settings, "a worker")
    return run_until_stopped(lambda run_dir: worker_launches(settings, run_dir), settings.drain_s)


def machine_of(settings: Settings) -> str:
    """What the server will call this machine."""
    return settings.machine_name or socket.gethostname().partition(".")[0]


# ------------------------------------------------------------
# ``clockwork gateway``: gateways of this machine for a server elsewhere.
#
# It holds their ports and keeps them running, and serves nothing itself.


ENDING_S: Final = 1.0
"""For a gateway to end in, once it has drained."""


def run_gateways(settings: Settings, on_listening: Callable[[dict[str, str]], None] = lambda at: None) -> int:
    """As :func:`run_until_stopped`. ``on_listening`` is told the addresses once their ports are held.

    Raises :class:`ConfigError` for what is missing, a port that is not to be had, or a file that will not do.
    """
    check_joining(settings, "a gateway")
    check_gateways(settings)
    machine = machine_of(settings)
    if not FAR_GATEWAY.fullmatch(f"{machine}.gateway-0"):
        raise ConfigError(
            f"machine_name: expected a name such that a gateway is called NAME.gateway-0; found "
            f"{machine!r:.80}; give --machine-name"
        )
    check_access_files(settings)
    ports = Ports(settings.host, settings.ports)
    try:
        on_listening(addresses(settings.host, ports.number_by_name, tls=bool(settings.tls_certificate)))

        def launches(run_dir: Path) -> list[Launch]:
            return gateway_launches(settings, run_dir, ports.number_by_name, machine)

        return run_until_stopped(launches, settings.drain_s + ENDING_S)
    finally:
        ports.close()
