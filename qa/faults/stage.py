"""The environment of a fault: what an act may use, and where it records what it did and when."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harness.http_load import infer_message
from harness.server import EXEC_LANE, LOAD_LANE, Server
from harness.serving import until
from qa.faults.setups import Setup

DEATH_S: Final = 10.0
STUCK_S: Final = 10.0


class NotMeasured(Exception):
    """This machine does not permit it; the message says what is missing."""


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
        handle = os.pidfd_open(pid)
        try:
            now_ns = time.monotonic_ns()
            self.mark()
            signal.pidfd_send_signal(handle, number)
            if name.startswith("gateway") and number in (signal.SIGKILL, signal.SIGTERM):
                # All of it: sockets live longer than the memory.
                select.select([handle], [], [], DEATH_S)
                self.resets.append((now_ns, time.monotonic_ns()))
        finally:
            os.close(handle)
        return pid

    def stick(self, name: str) -> None:
        """Stop the process of that name, until it is ended for not answering; that is marked, too."""
        pid = self.server.pid(name)
        handle = os.pidfd_open(pid)
        try:
            now_ns = time.monotonic_ns()
            self.mark()
            signal.pidfd_send_signal(handle, signal.SIGSTOP)
            if not select.select([handle], [], [], STUCK_S)[0]:
                self.wrong.append(f"{name} was stopped for {STUCK_S:g} s and not ended")
            self.mark()
            if name.startswith("gateway"):  # what it held went with it
                self.resets.append((now_ns, time.monotonic_ns()))
        finally:
            os.close(handle)

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
        import numpy as np

        x = np.zeros((1, 4), np.float32)
        x[0, 0] = first
        return infer_message(
            self.server.http_url, model, [("x", "FP32", x.shape, x.tobytes())], slo_ms=slo_ms
        )


Act = Callable[[Stage], None]
"""Does a fault, and returns when it is over; it runs in a thread of its own while the load goes on."""
