"""A worker that does not report, in a world of its own."""

from __future__ import annotations

import msgspec

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
    ControllerEffect,
    Infer,
    Load,
    Quarantined,
    Readiness,
    Status,
    Unload,
    WorkerHung,
)
from clockwork_serve.units import NS_PER_MS, ms
from tests.controller.honest import World, device, model

FLOOR_MS, GRACE_MS = 100, 200
WORDS = (WorkerHung, Readiness, Quarantined)


class Stubborn(World):
    """A world whose workers may be stuck: what they are sent then is kept, and answered when told to."""

    def __init__(self, **settings: object) -> None:
        wanted = {"policy": "default", "hang_ns": ms(FLOOR_MS), "hang_grace_ns": ms(GRACE_MS), **settings}
        super().__init__(msgspec.convert(wanted, ControllerConfig))
        self.stuck: set[str] = set()
        self.stuck_infers: set[str] = set()
        """Devices of which the exec lane alone is stuck."""
        self.kept: list[Load | Unload | Infer] = []
        self.said: list[tuple[float, WorkerHung | Readiness | Quarantined]] = []

    def _execute(self, action: Load | Unload | Infer) -> None:
        stuck = self.stuck | self.stuck_infers if isinstance(action, Infer) else self.stuck
        if action.device in stuck:
            self.kept.append(action)
        else:
            super()._execute(action)

    def _perform(self, effects: list[ControllerEffect]) -> None:
        self.said += [(self.now_ns / NS_PER_MS, one) for one in effects if isinstance(one, WORDS)]
        super()._perform(effects)

    def hung(self) -> list[tuple[str, bool, bool]]:
        """Of each word of a worker that hung: who, whether it hangs, whether to end it."""
        return [(one.worker, bool(one.why), one.end) for _, one in self.said if isinstance(one, WorkerHung)]

    def hung_ms(self, *, end: bool = False) -> float:
        """When such a word was first said."""
        return next(at for at, one in self.said if isinstance(one, WorkerHung) and one.end is end)

    def release(self, name: str, status: Status = Status.OK) -> None:
        """A device goes on: it answers all that it owes, then new work."""
        self.stuck.discard(name)
        owed, self.kept = self.kept, []
        for action in owed:
            self.reply(action, status, self.now_ns, self.now_ns + ms(1))


def world_of(*devices: str, settings: dict[str, object] | None = None, measured: bool = True) -> Stubborn:
    """Workers of one device each; the first one has run models ``a`` and ``b`` before."""
    world = Stubborn(**(settings or {}))
    world.serve(model("a"), model("b"))
    for at, name in enumerate(devices):
        world.join(device(name), worker=f"w{at}")
    if measured:
        for one in ("a", "b"):
            world.ask(one, slo_ms=500, until_ms=50)
    world.run(until_ms=1000)
    world.said.clear()
    return world
