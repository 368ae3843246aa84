"""What is done to the server of a soak while it is asked: one thing a leg, in turn."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.soak.serving import ROOT, Processes

NONE, HOSTILE = "none", "hostile clients"
TURNS: Final = (
    NONE, "worker-cpu:0 killed", HOSTILE, "gateway killed", NONE, "worker-emulated killed", "worker stopped",
    HOSTILE, NONE, "gateway stopped", "both workers killed", "controller stopped",
)  # fmt: skip
"""In this order, again and again; the first is quiet, for what else is learned from it."""
HELD: Final = 50
"""Slow connections of hostile clients."""


@dataclass(slots=True)
class Done:
    """What a fault excuses: answers that a killed gateway owed, failures of a killed worker's requests."""

    gateway_died: bool = False
    worker_died: bool = False
    hostile: bool = False
    killed: tuple[int, ...] = ()


class Faults:
    """Carries them out, from the thread of a leg."""

    def __init__(self, server: Processes, seed: int, on_gateway: Callable[[], None]) -> None:
        self._server, self._on_gateway = server, on_gateway
        self._dice = random.Random(seed)
        self._attacker: subprocess.Popen[bytes] | None = None

    def begin(self, fault: str, seconds: float) -> Done:
        """Have it happen now, in a leg that lasts so much longer."""
        names = self._server.names
        if fault == NONE:
            return Done()
        if fault == HOSTILE:
            self._attack(seconds)
            return Done(hostile=True)
        who, _, what = fault.rpartition(" ")
        chosen = [name for name in names if name.startswith(who.removesuffix("s").removeprefix("both "))]
        if who in {"gateway", "worker"}:
            chosen = [self._dice.choice(chosen)]
        pids = [pid for name in chosen if (pid := self._server.pid(name)) is not None]
        if what == "stopped":
            self._stop(pids, self._dice.uniform(0.05, min(0.7, seconds / 4)))
            return Done(worker_died=who != "controller", gateway_died=who == "gateway")
        if who == "gateway":
            self._on_gateway()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return Done(gateway_died=who == "gateway", worker_died=who != "gateway", killed=tuple(pids))

    def end(self) -> dict[str, Any]:
        """Whatever goes on still ends; how many attacks there were."""
        if self._attacker is None:
            return {}
        out, _ = self._attacker.communicate(timeout=120)
        self._attacker = None
        return {"attacker said": out.decode()[-200:]}

    def close(self) -> None:
        """Leave no process behind."""
        if self._attacker is not None:
            self._attacker.kill()
            self._attacker.wait()

    def _stop(self, pids: list[int], seconds: float) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def _attack(self, seconds: float) -> None:
        server = self._server
        options = {
            "http": server.http_port, "grpc": server.grpc_port, "metrics": server.metrics_port,
            "seconds": max(1.0, seconds - 2), "rate": 20, "held": HELD, "seed": self._dice.randrange(1 << 30),
            "core": max(os.sched_getaffinity(0)),
        }  # fmt: skip
        more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "benchmarks.hostile_traffic", *more]
        self._attacker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
