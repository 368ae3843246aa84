"""A gateway whose loop is timed: the CPU time of its turns, and how long Python's lock was not to be had.

Its controller answers at once, from a process of its own, as ``controller`` on the command line.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from clockwork_serve.config import Settings
from clockwork_serve.messages import Ask, Frame, Reply
from clockwork_serve.serve.child import configure, freeze_live_objects
from clockwork_serve.serve.driver import use_batch_policy
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.processes.gateway import GatewayServers
from clockwork_serve.serve.transport import Link
from clockwork_serve.units import MIB
from harness.machine import anonymous_bytes, children
from harness.stand_in import Served, StandIn

ROWS_MAX: Final = 8
MODELS: Final = {
    "two": Served("FP32", (2,), (2,), ROWS_MAX),
    "image": Served("FP32", (3, 224, 224), (1000,), ROWS_MAX),
    "text": Served("BYTES", (1,), (2,), ROWS_MAX),
    "words": Served("BYTES", (-1,), (2,)),
    "open": Served("FP32", (-1, -1), (2,)),
    "ids": Served("INT64", (-1,), (2,)),
    "flags": Served("BOOL", (-1,), (2,)),
    "map": Served("FP32", (2,), (21, 128, 128)),
}
PROBE_S: Final = 0.001


class Controller(StandIn):
    """Of all :data:`MODELS`; it can answer no questions."""

    def _answer_all(self, link: Link, frames: list[Frame]) -> None:
        super()._answer_all(link, frames)
        for frame in frames:
            if isinstance(frame, Ask):
                link.send(Reply(ask_id=frame.ask_id, ok=False, code=503, body=b'{"error":"nobody knows"}'))


class TimedSelector(selectors.EpollSelector):
    """Between two waits is one turn of the loop; ``longest_ns`` of them in CPU time of the loop's thread."""

    def __init__(self) -> None:
        super().__init__()
        self.longest_ns = 0
        self._began_ns = time.thread_time_ns()

    def select(self, timeout: float | None = None) -> Any:
        """Wait, and time what came before."""
        self.longest_ns = max(self.longest_ns, time.thread_time_ns() - self._began_ns)
        found = super().select(timeout)
        self._began_ns = time.thread_time_ns()
        return found


class LockProbe(threading.Thread):
    """Wants Python's lock a thousand times a second; ``longest_ns`` is how late it got it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest_ns = 0
        self.on = False

    def run(self) -> None:
        """Until the process ends."""
        while True:
            before = time.monotonic_ns()
            time.sleep(PROBE_S if self.on else 0.05)
            late_ns = time.monotonic_ns() - before - int(PROBE_S * 1e9)
            if self.on:
                self.longest_ns = max(self.longest_ns, late_ns)


async def _gateway(run_dir: str, selector: TimedSelector) -> None:
    use_batch_policy()
    config = GatewayConfig(
        settings=Settings(
            http_port=0, grpc_port=0, metrics_port=None, slo_ms=60_000, gateway_memory=512 * MIB
        ),
        run_dir=run_dir,
        name="g0",
    )
    servers = GatewayServers(config)
    await servers.start(lambda: freeze_live_objects(50_000, 20, 100))
    servers.http.codec.start_soon()
    while not servers.gateway.link.ready:  # noqa: ASYNC110 - once, for a moment
        await asyncio.sleep(0.01)
    probe = LockProbe()
    probe.start()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps(servers.port_by_name), flush=True)
    while line := await reader.readline():
        found = {
            "loop_ms": selector.longest_ns / 1e6, "lock_ms": probe.longest_ns / 1e6,
            "used_bytes": servers.gateway.slots.used_bytes, "received": servers.gateway.counters().received,
        }  # fmt: skip
        probe.on = line.strip() == b"probe"
        print(json.dumps(found), flush=True)
        # Not this very turn, which is not a message's.
        await asyncio.sleep(0)
        selector.longest_ns = probe.longest_ns = 0


class Measured:
    """A gateway in a process of its own, and what its loop did since it was asked last."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.ports: dict[str, int] = json.loads(self._line())

    def taken(self, *, probe: bool = False) -> dict[str, float]:
        """``loop_ms`` and ``lock_ms`` since the last time; whether the lock is probed until the next."""
        assert self._process.stdin is not None
        print("probe" if probe else "", file=self._process.stdin, flush=True)
        found: dict[str, float] = json.loads(self._line())
        return found

    @property
    def memory_bytes(self) -> int:
        """What it and its processes have resident."""
        return sum(anonymous_bytes(pid) for pid in (self._process.pid, *children(self._process.pid)))

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the measured gateway ended")
        return line


@contextmanager
def measured_gateway() -> Iterator[Measured]:
    """A timed gateway with its controller until the end of the block."""
    command = [sys.executable, "-m", "benchmarks.heaviest.gateway"]
    with tempfile.TemporaryDirectory(prefix="cw-") as run_dir:
        controller = subprocess.Popen([*command, "controller", run_dir], stdout=subprocess.PIPE, text=True)
        assert controller.stdout is not None
        controller.stdout.readline()
        process = subprocess.Popen(
            [*command, "gateway", run_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            yield Measured(process)
        finally:
            for each in (process, controller):
                each.kill()
                each.wait()


async def _controller(run_dir: str) -> None:
    await Controller(MODELS).listen(run_dir)
    print("up", flush=True)
    await asyncio.Event().wait()


def main(side: str, run_dir: str) -> None:
    """Run one side until it is killed."""
    if side == "controller":
        asyncio.run(_controller(run_dir))
        return
    configure("gateway", "critical", "text")
    selector = TimedSelector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(_gateway(run_dir, selector))


if __name__ == "__main__":
    main(*sys.argv[1:])
