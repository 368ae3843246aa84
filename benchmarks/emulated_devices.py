"""What a worker process of emulated devices costs, and how late its actions start and end.

    python -m benchmarks.emulated_devices [--devices 12] [--batch 8] [--seconds 5] [--rounds 3] [--json FILE]

The process is a real one; this one stands in for its controller, over the link that serves. *Busy*: each
exec lane has an INFER that runs and one that waits, so that an end is also a start. *At instants*: each INFER
has a window that opens while its lane is free, at an instant that is told a few milliseconds ahead. It is
late to start by what passes after its window has opened, and late to end by what passes after its duration.
"""

from __future__ import annotations

import asyncio
import logging
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from clockwork_lab.reproduce.real_controller import PROFILE, ROW, catalogue
from clockwork_serve.config import Settings
from clockwork_serve.devices.emulated import emulated_config
from clockwork_serve.messages import (
    Call,
    CodeAdded,
    CodeReady,
    Extent,
    Frame,
    Infer,
    Load,
    ModelAdded,
    Result,
    Role,
    Status,
    Window,
    WorkerJoined,
)
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway.requests import Slots
from clockwork_serve.serve.supervisor.processes import Child, Launch
from clockwork_serve.serve.transport import SOCKET_NAME, Link, hello, listen
from clockwork_serve.serve.worker.host import WorkerConfig
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S, NS_PER_US
from harness.machine import cpu_ns
from harness.report import Outcome, finish, parser, quantile, table

FAR_NS: Final = 3600 * NS_PER_S
AHEAD_NS: Final = 5 * NS_PER_MS
"""How long before its window opens an INFER is sent."""
PAUSE_SHARE: Final = 0.3
"""The longest pause of a lane between two INFERs, as a share of their duration."""
GRACE_S: Final = 2.0
SHARES: Final = (0.5, 0.99, 1.0)


@dataclass(slots=True)
class Told:
    """Of one stretch: what the process used, and how late its INFERs were."""

    infers: int = 0
    failed: int = 0
    cpu_us: float = 0.0
    started_late_us: list[float] = field(default_factory=list)
    ended_late_us: list[float] = field(default_factory=list)

    def row(self, name: str, batch: int) -> dict[str, Any]:
        """For machines."""
        return {
            "case": name, "infers": self.infers, "failed": self.failed,
            "infer_us": self.cpu_us / max(1, self.infers),
            "request_us": self.cpu_us / max(1, self.infers * batch),
            "started_late": {str(share): quantile(self.started_late_us, share) for share in SHARES},
            "ended_late": {str(share): quantile(self.ended_late_us, share) for share in SHARES},
        }  # fmt: skip


class StandIn:
    """The controller of one worker process; keeps its exec lanes at work for a while."""

    def __init__(self, devices: int, batch: int, seed: int) -> None:
        self.configs = tuple(emulated_config(f"emulated:{number}", PROFILE) for number in range(devices))
        self.code, self.model = _code_and_model(catalogue(self.configs[0], 16, 1))
        self.batch = batch
        self.length_ns = self.code.profiles[0].infer_ns[batch]
        self.rng = random.Random(seed)
        self.told = Told()
        self._slots = Slots(64 * MIB)
        inputs = [InputTensor("x", "FP32", (1, ROW), bytes(4 * ROW))]
        slots = [self._slots.fill(inputs, output_bytes=64) for _ in range(batch)]
        self._calls = {
            config.device: tuple(
                Call(request_id=f"r{at}", rows=1, tensors=slot.encoded)
                for at, slot in enumerate(slots)
                if slot
            )
            for config in self.configs
        }
        self._sent: dict[int, int] = {}  # by action id, when its window opens
        self._count = 0
        self._ready = 0
        self._changed = asyncio.Event()
        self._joined = False
        self._link: Link | None = None
        self._until_ns = 0
        self._timed = False

    async def stretch(self, pid: int, seconds: float, *, timed: bool) -> Told:
        """Keep all lanes at work, back to back or each at an instant; returns once all has ended."""
        self.told, self._timed = Told(), timed
        begun_ns = time.monotonic_ns()
        self._until_ns = begun_ns + round(seconds * NS_PER_S)
        used_ns = cpu_ns(pid)
        for config in self.configs:
            for _ in range(1 if timed else 2):
                self._infer(config.device, begun_ns)
        await self._until(lambda: not self._sent)
        self.told.cpu_us = (cpu_ns(pid) - used_ns) / NS_PER_US
        return self.told

    async def prepare(self) -> None:
        """Return once all devices hold the model."""
        await self._until(lambda: self._joined)
        self._send(CodeAdded(code=self.code.code, profiles=self.code.profiles), self.model)
        await self._until(lambda: self._ready == len(self.configs))
        for config in self.configs:
            self._count += 1
            self._sent[self._count] = 0
            self._send(
                Load(
                    action_id=self._count, device=config.device, model=self.model.model.key,
                    code_id=self.code.code.code_id, weights=self.model.model.weights, extent=self._extent,
                    version=1, window=Window(0, time.monotonic_ns() + FAR_NS), expected_ns=0,
                )
            )  # fmt: skip
        await self._until(lambda: not self._sent)

    def on_link(self, link: Link) -> None:
        """The worker has connected."""
        self._link = link

    def on_frames(self, link: Link, frames: list[Frame]) -> None:
        """What the worker says."""
        for frame in frames:
            match frame:
                case WorkerJoined():
                    self._joined = True
                case CodeReady(ok=True):
                    self._ready += 1
                case Result():
                    self._ended(frame)
                case _:
                    pass
        self._changed.set()

    @property
    def _extent(self) -> Extent:
        pages = -(-self.model.model.weights.size // self.configs[0].page_bytes)
        return Extent(0, pages)

    async def _until(self, done: Any) -> None:
        while not done():
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 30)

    def _send(self, *frames: Frame) -> None:
        assert self._link is not None
        for frame in frames:
            self._link.send(frame)

    def _infer(self, device: str, earliest_ns: int) -> None:
        self._count += 1
        self._sent[self._count] = earliest_ns
        self._send(
            Infer(
                action_id=self._count, device=device, model=self.model.model.key,
                code_id=self.code.code.code_id, extent=self._extent, version=1, batch=self.batch,
                calls=self._calls[device], window=Window(earliest_ns, earliest_ns + FAR_NS),
                expected_ns=self.length_ns,
            )
        )  # fmt: skip

    def _ended(self, result: Result) -> None:
        earliest_ns, told = self._sent.pop(result.action_id), self.told
        if result.status is not Status.OK:
            told.failed += 1
        elif result.outputs:
            told.infers += 1
            lasted_ns = result.ended_ns - result.started_ns
            told.ended_late_us.append((lasted_ns - self.length_ns) / NS_PER_US)
            if self._timed:
                told.started_late_us.append((result.started_ns - earliest_ns) / NS_PER_US)
        if result.ended_ns < self._until_ns:
            pause_ns = AHEAD_NS + round(self.rng.uniform(0, PAUSE_SHARE * self.length_ns))
            self._infer(result.device, result.ended_ns + (pause_ns if self._timed else 0))


def _code_and_model(frames: list[Frame]) -> tuple[CodeAdded, ModelAdded]:
    code, model = frames
    assert isinstance(code, CodeAdded)
    assert isinstance(model, ModelAdded)
    return code, model


async def measure(
    devices: int, batch: int, seconds: float, rounds: int, seed: int, *, realtime: bool = False
) -> list[tuple[str, Told]]:
    """Both cases in turns."""
    stand_in = StandIn(devices, batch, seed)
    found: list[tuple[str, Told]] = []
    with tempfile.TemporaryDirectory(prefix="clockwork-") as folder:
        socket = Path(folder) / SOCKET_NAME
        listener = await listen(
            socket, hello(Role.CONTROLLER, "controller"), stand_in.on_link, stand_in.on_frames, lambda _: None
        )
        config = WorkerConfig(
            run_dir=folder, name="worker-0", devices=stand_in.configs,
            settings=Settings(log_level="warning", realtime=realtime),
        )  # fmt: skip
        child = Child(Launch.of("worker-0", "worker", config), logging.getLogger(__name__).debug)
        try:
            await stand_in.prepare()
            for _ in range(rounds):
                found.append(("busy", await stand_in.stretch(child.pid, seconds, timed=False)))
                found.append(("at instants", await stand_in.stretch(child.pid, seconds, timed=True)))
        finally:
            await child.stop(GRACE_S)
            listener.close()
    return found


def main() -> int:
    """Measure and show."""
    options = parser(__doc__)
    options.add_argument("--devices", type=int, default=12)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--seconds", type=float, default=5.0, help="of each case in each round")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--realtime", action="store_true", help="whatever else wants the cores: SCHED_FIFO")
    given = options.parse_args()
    outcome = Outcome("benchmarks.emulated_devices")
    found = uvloop.run(
        measure(given.devices, given.batch, given.seconds, given.rounds, given.seed, realtime=given.realtime)
    )
    rows = [told.row(name, given.batch) for name, told in found]
    late = tuple(f"{what} late, {share:g}" for what in ("start", "end") for share in SHARES)
    print(f"{given.devices} devices in one process, batches of {given.batch}; us\n")
    print(
        table(
            ("", "INFERs", "CPU an INFER", "a request", *late),
            [
                (row["case"], row["infers"], f"{row['infer_us']:.1f}", f"{row['request_us']:.2f}",
                 *(f"{us:.0f}" for what in ("started_late", "ended_late") for us in row[what].values()))
                for row in rows
            ],
        )
    )  # fmt: skip
    outcome.none("INFERs that failed", [told for _, told in found if told.failed])
    outcome.figures = {"devices": given.devices, "batch": given.batch, "cases": rows}
    return finish(outcome, given.json)


if __name__ == "__main__":
    raise SystemExit(main())
