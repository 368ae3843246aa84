"""The servers of a soak, each of processes of its own: their models, and what is done to them while asked."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness import repositories
from harness.server import Server, Start
from harness.serving import Metrics, read_metrics
from qa.books import ports
from qa.hostile import traffic

QUICK, SLOW = 24, 4
WIDE, LONG = 64, 16
REPLACED, UNLOADED = 2, 2
"""Models that change while it goes on: whose weights are replaced, and that come and go."""
START_S: Final = 180.0
_KINDS: Final = ("keeper", "controller", "worker", "gateway")


@dataclass(slots=True)
class Up:
    """One server that is up, of processes of its own, so that each of them can be watched and killed."""

    name: str
    server: Server
    offset: int = 0
    """Requests that gateways received which were killed, below zero."""
    heard: int = 0
    """Good answers until the last quiet moment."""
    late: int = 0
    """Answers counted as late until then."""
    over: int = 0
    """Good answers that came after their clients had been told that their deadline was over."""

    @property
    def gateways(self) -> int:
        """How many it was told to have."""
        return self.server.start.server.settings.gateways

    def metrics(self) -> Metrics:
        """Those of the whole server."""
        return read_metrics(self.server.facts["metrics"])

    def log(self) -> list[str]:
        """All that its processes have said."""
        return self.server.log.read_text(errors="replace").splitlines()


def processes(ups: list[Up]) -> dict[str, int]:
    """All processes of all servers but those that only help for a while: ``cpu/gateway-0``."""
    return {
        f"{up.name}/{name}": pid
        for up in ups
        for name, pid in up.server.pids().items()
        if name.partition("-")[0] in _KINDS
    }


@contextmanager
def served(folder: Path, kind: str, gateways: int) -> Iterator[Up]:
    """A server that is ready, whose device has memory for some of its models, until the end of the block."""
    memory = (4 if kind == "cpu" else 12) * MIB
    config = ServerConfig(
        settings=Settings(
            repository=str(folder / "models"), http_port=0, grpc_port=0, metrics_port=0, gateways=gateways,
            gateway_memory=32 * MIB, max_body=8 * MIB, log_level="warning",
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=(DeviceConfig(device=f"{kind}:0", kind=kind, memory_bytes=memory),),
    )  # fmt: skip
    server = Server(Start(server=config), folder / "server.log")
    try:
        server.wait_ready(START_S)
        yield Up(kind, server)
        server.stop()
    finally:
        server.close()


def write_emulated(root: Path) -> None:
    """The models of the server with an emulated device."""
    for index in range(QUICK):
        slower = 1 + index % 4 / 4
        infer_ms = {1: 1.0 * slower, 2: 1.4 * slower, 4: 2.0 * slower, 8: 3.2 * slower}
        repositories.emulated(root, f"e{index}", infer_ms, load_ms=2)
    for index in range(SLOW):
        repositories.emulated(root, f"f{index}", {1: 5, 2: 7, 4: 10}, load_ms=4)


def write_onnx(root: Path) -> None:
    """The models of the server that computes."""
    for index in range(QUICK):
        repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
    for index in range(SLOW):
        repositories.layers(root, f"d{index}", width=128, depth=4, seed=index)
    for name, count in (("r", REPLACED), ("x", UNLOADED)):
        for index in range(count):
            repositories.one_matrix(root, f"{name}{index}", repositories.matrix_of(index, WIDE, LONG))


# ------------------------------------------------------------
# One thing a leg, in turn.

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

    def end(self) -> None:
        """Whatever goes on still ends."""
        if self._attacker is not None:
            self._attacker.communicate(timeout=120)
            self._attacker = None

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
        self._attacker = traffic.start(
            ports(up.server.facts), seconds=max(1.0, seconds - 2), rate=20, held=HELD,
            seed=self._dice.randrange(1 << 30),
        )  # fmt: skip
