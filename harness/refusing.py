"""A worker that refuses actions for random reasons, until it refused so many; run by ``python -m``.

It is the server's own worker around the server's own brain. An action that is refused never reaches the
brain; its result says, as any refusal of a worker does, what the device holds.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec import Struct

from clockwork_serve.devices import build
from clockwork_serve.messages import Action, Infer, Load, Result, Status, Unload
from clockwork_serve.serve import child
from clockwork_serve.serve.worker.host import WorkerConfig, WorkerHost
from clockwork_serve.worker import Worker, WorkerEffect, WorkerEvent

REASONS = tuple(status for status in Status if status is not Status.OK)


class RefusalPlan(Struct, frozen=True, kw_only=True):
    """How many actions to refuse in all, and with which chance each; ``counts`` is the file that says so."""

    worker: WorkerConfig
    seed: int
    refusals: int
    chance: float
    counts: str


class RefusingBrain:
    """A worker's brain that is not told of some actions."""

    def __init__(self, brain: Worker, plan: RefusalPlan) -> None:
        self._brain = brain
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._refused: list[Result] = []
        self._counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._brain, name)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits, or is to be refused."""
        return self._brain.idle and not self._refused

    def observe(self, event: WorkerEvent, now_ns: int) -> None:
        """Pass an event on, or keep an action to refuse it."""
        left = self._plan.refusals - self._counts.total()
        if isinstance(event, Load | Unload | Infer) and left and self._random.random() < self._plan.chance:
            self._refuse(event, now_ns)
        else:
            self._brain.observe(event, now_ns)

    def decide(self, now_ns: int) -> list[WorkerEffect]:
        """What the brain decides, and the refusals, which say what is held after that."""
        effects = self._brain.decide(now_ns)
        refused, self._refused = self._refused, []
        if refused:
            Path(self._plan.counts).write_bytes(msgspec.json.encode(self._counts))
        return effects + [msgspec.structs.replace(one, held=self._brain.held(one.device)) for one in refused]

    def _refuse(self, action: Action, now_ns: int) -> None:
        status = self._random.choice(REASONS)
        self._counts[f"{type(action).__name__.upper()} {status}"] += 1
        self._refused.append(
            Result(
                action_id=action.action_id, device=action.device, status=status, started_ns=now_ns,
                ended_ns=now_ns, message="refused by chance",
            )
        )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the worker whose plan is the JSON in ``argv[1]``; returns its exit status."""
    plan = msgspec.json.decode(argv[1], type=RefusalPlan)
    child.prepare(plan.worker.name, plan.worker.settings)
    devices = {each.device: build(each) for each in plan.worker.devices}

    async def serve(stop: asyncio.Event) -> None:
        host = WorkerHost(plan.worker, devices)
        host.executors.worker = cast("Worker", RefusingBrain(host.executors.worker, plan))
        await host.run(stop)

    try:
        return child.run_until_stopped(serve)
    finally:
        for device in devices.values():
            device.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
