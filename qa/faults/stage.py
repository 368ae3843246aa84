"""What faults are done to (repositories, devices, a load), and what an act may use and records."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec

import numpy as np

from clockwork_serve.config import Settings
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import GIB, MIB
from harness import repositories
from harness.http_load import infer_message
from harness.server import EXEC_LANE, LOAD_LANE, Server, Start
from harness.serving import until

WIDE: Final = 64
BAD: Final = '''"""Echoes, until it is told by its first number to do something else."""

import ctypes
import os
import resource
import time


def mischief(mood):
    if mood == 1:
        raise ValueError("one is not served")
    if mood == 2:
        os._exit(3)
    if mood == 3:
        ctypes.string_at(0)
    if mood == 4:
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
        try:
            kept = []
            while True:
                kept.append(bytearray(16 << 20))
        finally:
            kept.clear()
            resource.setrlimit(resource.RLIMIT_AS, before)
    if mood == 5:
        while True:
            pass
    if mood == 6:
        time.sleep(1 << 30)
    if mood == 7:
        ctypes.PyDLL(None).sleep(1 << 30)


class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        mischief(int(inputs["x"].reshape(-1)[0]))
        return {"y": inputs["x"]}

    def unload(self):
        pass
'''
WELL, RAISES, EXITS, SEGFAULTS, EATS_MEMORY, LOOPS, SLEEPS, KEEPS_THE_GIL = range(8)


@dataclass(frozen=True, slots=True)
class Setup:
    """``models``: those that the load asks, ``rate_rps`` in all. ``device_ms``: what one request takes."""

    models: tuple[str, ...]
    rate_rps: float
    slo_ms: float
    write: Callable[[Path], None]
    devices: tuple[DeviceConfig, ...]
    device_ms: float = 0.0
    gateways: int = 1
    controllers: int = 1

    def start(self, root: Path, cache: Path, run_dir: Path, small: dict[str, int]) -> Start:
        """The configuration of its server; ``small`` file systems by folder."""
        return Start(
            server=ServerConfig(
                settings=Settings(
                    repository=str(root), http_port=0, grpc_port=0, metrics_port=0,
                    gateways=self.gateways, controllers=self.controllers, log_level="warning", drain_s=2.0,
                ),
                store=StoreConfig(cache_dir=str(cache)), devices=self.devices,
                controller=ControllerConfig(), run_dir=str(run_dir),
            ),
            small=small,
        )  # fmt: skip


def _emulated(count: int, infer_ms: float, load_ms: float) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for number in range(count):
            repositories.emulated(root, f"m{number}", {1: infer_ms}, load_ms=load_ms)

    return write


def _real(count: int) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for number in range(count):
            repositories.layers(root, f"m{number}", width=WIDE, depth=3, seed=number)
        repositories.python_model(root, "bad", BAD)

    return write


def _devices(kind: str, count: int, **more: Any) -> tuple[DeviceConfig, ...]:
    more |= {"kind": kind, "apart": kind == "emulated"}
    return tuple(DeviceConfig(device=f"{kind}:{number}", **more) for number in range(count))


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"m{number}" for number in range(count))


_ROOM: Final[dict[str, Any]] = {"memory_bytes": 64 * MIB}
SETUPS: Final[dict[str, Setup]] = {
    "two": Setup(_names(4), 90, 200, _emulated(4, 10, 2), _devices("emulated", 2, **_ROOM), 10),
    "two70": Setup(_names(4), 140, 200, _emulated(4, 10, 2), _devices("emulated", 2, **_ROOM), 10),
    "gateways": Setup(
        _names(4), 90, 200, _emulated(4, 10, 2), _devices("emulated", 2, **_ROOM), 10, gateways=2
    ),
    "standby": Setup(
        _names(4), 90, 200, _emulated(4, 10, 2), _devices("emulated", 2, **_ROOM), 10, controllers=2
    ),
    "long": Setup(_names(2), 14, 600, _emulated(2, 100, 2), _devices("emulated", 2, **_ROOM), 100),
    "swap": Setup(_names(8), 60, 400, _emulated(8, 5, 15), _devices("emulated", 2, memory_bytes=3 * MIB), 20),
    "real": Setup(_names(4), 80, 200, _real(4), _devices("cpu", 1, **_ROOM)),
    "large": Setup(_names(4), 80, 200, _real(4), _devices("cpu", 1, memory_bytes=GIB)),
    "realswap": Setup(_names(8), 80, 200, _real(8), _devices("cpu", 1, memory_bytes=MIB)),
    "real2": Setup(_names(4), 80, 200, _real(4), _devices("cpu", 2, **_ROOM)),
}
"""``two``: 45 % of two devices, 90 % of one. ``swap``, ``realswap``: not all models fit in memory. ``large``:
memory that takes its time to be taken."""

# ------------------------------------------------------------
# The environment of a fault.

DEATH_S: Final = 10.0


class NotMeasured(Exception):
    """This machine does not permit it; the message says what is missing."""


@contextmanager
def handle_of(pid: int) -> Iterator[int]:
    """A descriptor of a process: what it is told, no other process of that number is."""
    handle = os.pidfd_open(pid)
    try:
        yield handle
    finally:
        os.close(handle)


@dataclass(slots=True)
class Stage:
    """One row's. ``short``: acts that repeat do so less often.

    ``marks``: instants at which something was done; ``resets``: (from, until) in which connections may have
    been reset, because their gateway was killed or their link was cut. ``wrong`` is judged, ``notes`` shown.
    """

    server: Server
    setup: Setup
    root: Path
    cache: Path
    short: bool
    start_ns: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    marks: list[int] = field(default_factory=list)
    resets: list[tuple[int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    restarts_s: list[float] = field(default_factory=list)
    restart: Callable[[], None] = lambda: None
    extra: dict[str, Any] = field(default_factory=dict)

    def mark(self) -> None:
        """Now something is done."""
        self.marks.append(time.monotonic_ns())

    def sleep(self, seconds: float) -> None:
        """Wait, unless the run was stopped."""
        self.stopped.wait(seconds)

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the process of that name, and mark it; its pid."""
        pid = self.server.pid(name)
        with handle_of(pid) as handle:
            now_ns = time.monotonic_ns()
            self.mark()
            signal.pidfd_send_signal(handle, number)
            if name.startswith("gateway") and number in (signal.SIGKILL, signal.SIGTERM):
                # All of it: sockets live longer than the memory.
                select.select([handle], [], [], DEATH_S)
                self.resets.append((now_ns, time.monotonic_ns()))
        return pid

    def busy(self, lane: str, patience_s: float = 3.0) -> str:
        """A worker whose lane is at work at this instant; looked for again and again."""
        number = {"load": LOAD_LANE, "exec": EXEC_LANE}[lane]
        found: str = until(f"a {lane} lane is busy", lambda: self.server.busy(number), patience_s, 0.0005)
        return found

    def workers(self) -> list[str]:
        """Those that should run."""
        return [f"worker-{device.device}" for device in self.setup.devices]

    def infer(self, model: str, first: float, slo_ms: float = 1000.0) -> bytes:
        """A request whose first number is that."""
        x = np.zeros((1, 4), np.float32)
        x[0, 0] = first
        return infer_message(
            self.server.http_url, model, [("x", "FP32", x.shape, x.tobytes())], slo_ms=slo_ms
        )


Act = Callable[[Stage], None]
"""Does a fault, and returns when it is over; it runs in a thread of its own while the load goes on."""
P = ParamSpec("P")


def made(act: Callable[Concatenate[Stage, P], None]) -> Callable[P, Act]:
    """An act of some arguments: called with them it gives what is done to a stage."""

    def with_arguments(*args: P.args, **kwargs: P.kwargs) -> Act:
        return lambda stage: act(stage, *args, **kwargs)

    return with_arguments
