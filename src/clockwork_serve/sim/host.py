"""A simulated worker: the real worker's machine, on lanes that take about the profile's time.

It never chooses: what happens on it follows from the machine, the profile, the dice and the faults.
"""

from __future__ import annotations

from heapq import heappush
from typing import Any

from clockwork_serve.messages import Action, CodeAdded, DeviceSpec, Infer, Load, Profile, Result, Status
from clockwork_serve.sim.dice import Draws
from clockwork_serve.sim.tally import Busy, Tally
from clockwork_serve.worker import Worker
from clockwork_serve.worker.events import (
    LaneDone,
    Prepare,
    Prepared,
    Retire,
    Retired,
    Start,
    WorkerEffect,
    WorkerEvent,
)

Entry = tuple[int, int, int, Any, Any]
"""One thing to happen: (when in ns, order, kind, whom it concerns, what)."""

TO_WORKER, LANE_DONE, TO_CONTROLLER, CLIENT, WAKE, CALL = range(6)
"""Kinds of entries."""

LEAST_NS = 1_000
"""Nothing on a lane takes less."""

NOTHING = tuple((b"",) * count for count in range(1025))
"""Outputs of so many calls."""

FAR_NS = 1 << 62


class World:
    """What all parts of a simulation share: the heap of what will happen, the dice, the counts.

    ``truth`` is how long things really take, by code; the controller's profiles may differ.
    """

    __slots__ = (
        "heap", "infer_noise", "jitter", "load_noise", "order", "prepare_ns", "tally", "truth",
        "worker_delay_ns",
    )  # fmt: skip

    def __init__(
        self, truth: dict[str, Profile], tally: Tally, worker_delay_ns: int, prepare_ns: int
    ) -> None:
        self.heap: list[Entry] = []
        self.order = 0
        self.truth = truth
        self.tally = tally
        self.worker_delay_ns = worker_delay_ns
        self.prepare_ns = prepare_ns
        self.jitter: Draws | None = None
        self.infer_noise: Draws | None = None
        self.load_noise: Draws | None = None

    def at(self, when_ns: int, kind: int, whom: Any, what: Any) -> None:
        """Let something happen."""
        self.order += 1
        heappush(self.heap, (when_ns, self.order, kind, whom, what))

    def delay_ns(self) -> int:
        """How long the next message between controller and worker takes."""
        jitter = self.jitter
        return self.worker_delay_ns if jitter is None else self.worker_delay_ns + jitter.next()


class Host:
    """One worker process and its devices."""

    __slots__ = (
        "answered_ns", "devices", "extra_delay_ns", "gone", "heard_ns", "hung_until_ns", "machine", "name",
        "skew_ns", "slowness", "specs", "wake_ns", "world",
    )  # fmt: skip

    def __init__(self, name: str, specs: tuple[DeviceSpec, ...], world: World) -> None:
        self.name = name
        self.specs = specs
        self.world = world
        self.machine = Worker(specs)
        self.gone = False
        """It crashed: nothing that concerns it happens any more; another one may have come in its place."""
        self.hung_until_ns = 0
        """Until then it is stopped, as by SIGSTOP."""
        self.skew_ns = 0
        """By how much its clock, as converted by the transport, is ahead."""
        self.slowness: dict[str, float] = {}
        """By device: durations are so many times the usual."""
        self.extra_delay_ns = 0
        """Added to each message from and to it."""
        self.heard_ns = 0
        """When the last message to it arrives: links keep the order."""
        self.answered_ns = 0
        """When the last message from it arrives."""
        self.wake_ns = FAR_NS

    def send(self, action: Action | CodeAdded, now_ns: int) -> None:
        """The controller sends it something."""
        world = self.world
        when_ns = now_ns + world.delay_ns() + self.extra_delay_ns
        when_ns = max(when_ns, self.heard_ns)
        self.heard_ns = when_ns
        world.order += 1
        heappush(world.heap, (when_ns, world.order, TO_WORKER, self, action))

    def observe(self, event: WorkerEvent, now_ns: int) -> None:
        """Its machine hears of something."""
        self.machine.observe(event, now_ns + self.skew_ns)

    def decide(self, now_ns: int) -> None:
        """Let its machine decide, and do so."""
        machine = self.machine
        for effect in machine.decide(now_ns + self.skew_ns):
            if type(effect) is Start:
                self._start(effect, now_ns)
            else:
                self._tell(effect, now_ns)
        wake_ns = machine.next_wakeup_ns()
        if wake_ns is not None:
            wake_ns = max(wake_ns - self.skew_ns, now_ns + 1)
            if wake_ns != self.wake_ns:
                self.wake_ns = wake_ns
                self.world.at(wake_ns, WAKE, self, wake_ns)
        else:
            self.wake_ns = FAR_NS

    def _start(self, effect: Start, now_ns: int) -> None:
        world, action = self.world, effect.action
        outputs: tuple[bytes, ...] = ()
        if type(action) is Infer:
            lasts_ns = world.truth[action.code_id].infer_ns[action.batch]
            if world.infer_noise is not None:
                lasts_ns += world.infer_noise.next()
            outputs = NOTHING[len(action.calls)]
        elif type(action) is Load:
            lasts_ns = world.truth[action.code_id].load_ns(action.weights.size)
            if world.load_noise is not None:
                lasts_ns += world.load_noise.next()
        else:
            lasts_ns = LEAST_NS
        if self.slowness:
            lasts_ns = int(lasts_ns * self.slowness.get(effect.device, 1.0))
        lasts_ns = max(lasts_ns, LEAST_NS)
        end_ns = now_ns + lasts_ns
        self._count(action, lasts_ns, now_ns)
        skew_ns = self.skew_ns
        done = LaneDone(
            action_id=action.action_id, device=effect.device, lane=effect.lane, status=Status.OK,
            started_ns=now_ns + skew_ns, ended_ns=end_ns + skew_ns, run_ns=lasts_ns, outputs=outputs,
        )  # fmt: skip
        world.order += 1
        heappush(world.heap, (end_ns, world.order, LANE_DONE, self, done))

    def _count(self, action: Action, lasts_ns: int, now_ns: int) -> None:
        tally = self.world.tally
        if now_ns >= tally.warmup_ns:
            _add(tally.busy, action, lasts_ns)
        if tally.bucket_ns:
            _add(tally.busy_row(now_ns), action, lasts_ns)

    def _tell(self, effect: WorkerEffect, now_ns: int) -> None:
        """A message to the controller, or a chore."""
        world = self.world
        if isinstance(effect, Prepare):
            done = Prepared(device=effect.device, code_id=effect.code.code_id)
            world.at(now_ns + world.prepare_ns, LANE_DONE, self, done)
            return
        if isinstance(effect, Retire):
            world.at(
                now_ns + LEAST_NS, LANE_DONE, self, Retired(device=effect.device, code_id=effect.code_id)
            )
            return
        if isinstance(effect, Result) and effect.status is not Status.OK:
            world.tally.busy.refused += 1
        when_ns = now_ns + world.delay_ns() + self.extra_delay_ns
        when_ns = max(when_ns, self.answered_ns)
        self.answered_ns = when_ns
        world.order += 1
        heappush(world.heap, (when_ns, world.order, TO_CONTROLLER, self, effect))


def _add(busy: Busy, action: Action, lasts_ns: int) -> None:
    if type(action) is Infer:
        busy.exec_ns += lasts_ns
        busy.infers += 1
    elif type(action) is Load:
        busy.load_ns += lasts_ns
        busy.loads += 1
    else:
        busy.unloads += 1
