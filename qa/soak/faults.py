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

from qa.soak.serving import ROOT, Up, processes

NONE, HOSTILE = "none", "hostile clients"
TURNS: Final = (
    NONE, "cpu/worker killed", HOSTILE, "cpu/gateway killed", NONE, "emulated/worker killed",
    "cpu/worker stopped", HOSTILE, "emulated/gateway killed", NONE, "cpu/gateway stopped",
    "emulated/worker stopped", "cpu/controller stopped",
)  # fmt: skip
"""In this order, again and again; the first is quiet, for what else is learned from it."""
HELD: Final = 50
"""Slow connections of hostile clients."""


@dataclass(slots=True)
class Done:
    """What a fault excuses: answers that a killed gateway owed, failures of a killed worker's requests."""

    server: str = ""
    gateway_died: bool = False
    worker_died: bool = False
    hostile: bool = False
    killed: int = 0


class Faults:
    """Carries them out, from the thread of a leg."""

    def __init__(self, ups: list[Up], seed: int, on_gateway: Callable[[], None]) -> None:
        self._ups, self._on_gateway = ups, on_gateway
        self._dice = random.Random(seed)
        self._attacker: subprocess.Popen[bytes] | None = None

    def begin(self, fault: str, seconds: float) -> Done:
        """Have it happen now, in a leg that lasts so much longer."""
        if fault == NONE:
            return Done()
        if fault == HOSTILE:
            up = self._dice.choice(self._ups)
            self._attack(up, seconds)
            return Done(up.name, hostile=True)
        who, _, what = fault.rpartition(" ")
        server = who.partition("/")[0]
        name, pid = self._dice.choice(
            [(name, pid) for name, pid in processes(self._ups).items() if name.startswith(who)]
        )
        gateway, worker = "gateway" in name, "worker" in name
        if gateway and server == "cpu":
            self._on_gateway()
        if what == "stopped":
            self._stop(pid, self._dice.uniform(0.05, min(0.7, seconds / 4)))
            return Done(server, worker_died=not gateway, gateway_died=gateway)
        os.kill(pid, signal.SIGKILL)
        return Done(server, gateway_died=gateway, worker_died=worker, killed=pid)

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

    def _stop(self, pid: int, seconds: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)

    def _attack(self, up: Up, seconds: float) -> None:
        server = up.server
        options = {
            "http": server.http_port, "grpc": server.grpc_port, "metrics": server.metrics_port,
            "seconds": max(1.0, seconds - 2), "rate": 20, "held": HELD, "seed": self._dice.randrange(1 << 30),
            "core": max(os.sched_getaffinity(0)),
        }  # fmt: skip
        more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "qa.hostile.traffic", *more]
        self._attacker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
