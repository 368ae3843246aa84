"""``clockwork worker``: a worker process for each device of this machine, which join a server elsewhere.

It keeps them running, and serves nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import uvloop
from msgspec import Struct

from clockwork_serve.devices import DeviceConfig, profile_kind
from clockwork_serve.errors import ClockworkError, ConfigError
from clockwork_serve.serve.launches import pinned_cores
from clockwork_serve.serve.machine_config import FAR_NAME, MachineConfig
from clockwork_serve.serve.supervisor import Launch, Supervisor
from clockwork_serve.serve.worker_process import WorkerConfig

LOOK_S: Final = 0.1
_log = logging.getLogger(__name__)


class FarWorkersConfig(Struct, frozen=True, kw_only=True):
    """``devices`` are called as the server will call them; ``machine`` lacks their kinds."""

    devices: tuple[DeviceConfig, ...]
    machine: MachineConfig
    run_dir: str = ""
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
                    f"worker_name: expected a name such that a device is called NAME.cpu:0; found "
                    f"{device.device}; give --worker-name"
                )


class WorkersEnded(ClockworkError):
    """A worker cannot run, or the server does not take it; the message holds its last words."""


def launches(config: FarWorkersConfig, run_dir: Path) -> list[Launch]:
    """A process for each device. Raises :class:`ConfigError`."""
    pins = pinned_cores(len(config.devices), os.sched_getaffinity(0)) if config.pin else {}
    found = []
    for number, device in enumerate(config.devices):
        worker = WorkerConfig(
            run_dir=str(run_dir), name=device.device, devices=(device,), pin_cpus=pins.get(number, ()),
            realtime=config.realtime, log_level=config.log_level, log_format=config.log_format,
            machine=msgspec.structs.replace(config.machine, kinds=(profile_kind(device),)),
        )  # fmt: skip
        found.append(Launch.of(f"worker-{device.device}", "worker", worker))
    return found


def run(config: FarWorkersConfig) -> int:
    """Run them until SIGTERM or SIGINT; the exit status. For the main thread.

    Raises :class:`WorkersEnded` if one cannot run or is not let in.
    """
    run_dir = Path(tempfile.mkdtemp(prefix="clockwork-", dir=os.environ.get("XDG_RUNTIME_DIR")))
    try:
        return uvloop.run(_run(config, run_dir))
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


async def _run(config: FarWorkersConfig, run_dir: Path) -> int:
    loop = asyncio.get_running_loop()
    signals: deque[int] = deque()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal(number: int) -> None:
        signals.append(number)
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    supervisor = Supervisor(_to_stderr)
    try:
        for launch in launches(config, run_dir):
            supervisor.start(launch)
        while not first.is_set():
            if (why := supervisor.hopeless()) is not None:
                raise WorkersEnded(why)
            with suppress(TimeoutError):
                await asyncio.wait_for(first.wait(), LOOK_S)
        insisted = asyncio.ensure_future(second.wait())
        together = asyncio.gather(*[supervisor.stop(name, config.drain_s) for name in supervisor.names])
        await asyncio.wait((insisted, together), return_when=asyncio.FIRST_COMPLETED)
        insisted.cancel()
        if together.done():
            return 0
        together.cancel()
        return 128 + signals[-1]
    finally:
        await supervisor.kill()


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
