"""Requests that wait, by model and by what may share a batch, earliest deadline first."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

from clockwork_serve.controller.life import (
    NEVER,
    REQUEST_AFTER,
    REQUEST_STATES,
    REQUEST_STEPS,
    WAITING,
)
from clockwork_serve.messages import LEAST_PRIORITY, USUAL_PRIORITY, Call, Code, Model, Request

if TYPE_CHECKING:
    from clockwork_serve.controller.devices import Residency, Strategy
    from clockwork_serve.controller.timers import Watch


BAND_NS: Final = 1 << 58
"""A class of priority is so far from the next on an axis of keys: farther than any two instants."""


def level(priority: int) -> int:
    """The class of a priority: 1 (most urgent) to 15; 0 stands for the usual one."""
    if priority <= 0:
        return USUAL_PRIORITY
    return min(priority, LEAST_PRIORITY)


class Waiter:
    """A request that is not over yet, and what we know of it."""

    __slots__ = (
        "alone", "cold", "demand_ns", "due_ns", "held", "queue", "request", "retries", "slo_ns", "state",
    )  # fmt: skip

    def __init__(
        self, request: Request, due_ns: int, slo_ns: int, demand_ns: int, queue: Queue, *, cold: bool
    ) -> None:
        self.request = request
        self.due_ns = due_ns
        """When its execution must have ended, by plan: a little before the deadline; see ``Belief.due_ns``."""
        self.slo_ns = slo_ns
        """As in its request, which computes it anew each time."""
        self.demand_ns = demand_ns
        """What it adds to its model's demand while it waits."""
        self.queue = queue
        self.state: int = WAITING
        self.cold = cold
        """Its weights were on no device when it arrived."""
        self.alone = False
        """It shared a batch that failed, and may not share one again."""
        self.retries = 0
        """How often it was in flight on a worker that was lost."""
        self.held = 0
        """How many actions keep its tensors beside the one that it waits for: those of workers that hung,
        and, once it is SPENT, whichever it was in."""

    def step(self, step: int) -> None:
        """Move on by the table; a step that is not in it is a bug."""
        after = REQUEST_AFTER[self.state][step]
        assert after != NEVER, (
            f"{self.request.request_id}: {REQUEST_STEPS[step]} while {REQUEST_STATES[self.state]}"
        )
        self.state = after


class Queue:
    """Requests of one model that may share a batch: equal class and signature, one row each, or each alone.

    ``sizes`` are the batch sizes to choose from, as (requests, batch size to run), ascending.
    """

    __slots__ = (
        "alone", "band_ns", "doubted", "dues", "floors", "least", "level", "model", "order", "place_ns",
        "rows", "signature", "sizes", "strategies", "waiters", "watch",
    )  # fmt: skip

    def __init__(
        self, model: ServedModel, signature: str, rows: int, order: int, *, alone: bool, priority: int = 0
    ) -> None:
        self.model = model
        self.level = level(priority)
        self.band_ns = (self.level - USUAL_PRIORITY) * BAND_NS
        """Added to the keys of its strategies, so that any of a more urgent class comes first."""
        self.signature = signature
        self.rows = rows
        self.alone = alone
        self.sizes = model.sizes(rows, alone=alone)
        self.order = order
        """Creation order: makes ties between queues definite."""
        self.dues: list[int] = []
        """``due_ns`` of each of ``waiters``, ascending."""
        self.waiters: list[Waiter] = []
        """All and only requests WAITING here."""
        self.strategies: tuple[Strategy, ...] = ()
        """One per device that has the weights READY."""
        self.floors: dict[int, int] = {}
        """By batch (requests): those due before this are given up at that size; a policy's to use."""
        self.least = self.sizes[0][1]
        """The least batch size that the policy will run this queue at; see ``Belief.require``."""
        self.doubted = False
        """The rejecting layer is to judge it."""
        self.watch: Watch | None = None
        """Where the rejecting layer has its entry, at ``place_ns``."""
        self.place_ns = 0

    def __len__(self) -> int:
        return len(self.waiters)

    def add(self, waiter: Waiter) -> bool:
        """Put a request in its place; true if it is the first now."""
        dues, due_ns = self.dues, waiter.due_ns
        if not dues or dues[-1] <= due_ns:
            dues.append(due_ns)
            self.waiters.append(waiter)
            return len(dues) == 1
        at = bisect_right(dues, due_ns)
        dues.insert(at, due_ns)
        self.waiters.insert(at, waiter)
        return at == 0

    def remove(self, waiter: Waiter) -> None:
        """Take one request out."""
        at = bisect_left(self.dues, waiter.due_ns)
        while self.waiters[at] is not waiter:
            at += 1
        del self.dues[at]
        del self.waiters[at]

    def take(self, first: int, count: int) -> list[Waiter]:
        """Take ``count`` requests out, from place ``first``."""
        if count == len(self.waiters):
            taken, self.waiters = self.waiters, []
            self.dues.clear()
            return taken
        taken = self.waiters[first : first + count]
        del self.dues[first : first + count]
        del self.waiters[first : first + count]
        return taken

    def check(self) -> None:
        """Assert the invariants."""
        assert self.dues == sorted(self.dues)
        assert self.dues == [waiter.due_ns for waiter in self.waiters]
        assert all(waiter.state == WAITING for waiter in self.waiters)
        assert all(waiter.queue is self for waiter in self.waiters)
        for strategy in self.strategies:
            assert strategy.queue is self
            assert strategy.residency is self.model.residencies[strategy.device.name]


class ServedModel:
    """A model that is served: its queues, its demand and where its weights are."""

    __slots__ = (
        "base_ns", "batch", "code", "code_id", "demand_ns", "heat", "key", "load_key", "main", "model",
        "order", "pace_at_ns", "pace_ns", "priority", "quarantined", "queue_limit", "queues", "removed",
        "residencies", "sole", "stirred", "waiting",
    )  # fmt: skip

    def __init__(self, model: Model, code: Code, order: int) -> None:
        self.model = model
        self.key = model.key
        self.queue_limit = model.queue_limit
        self.code = code
        self.code_id = code.code_id
        self.order = order
        self.priority = model.priority
        self.main: Queue | None = None
        """The queue of ordinary requests (no signature, one row, the model's class), once there was one; it
        stays.
        """
        self.queues: dict[tuple[str, int, bool, int], Queue] = {}
        """Queue by (signature, rows, alone, class): ``main``, and others that are not empty."""
        self.residencies: dict[str, Residency] = {}
        """Weights by device: all and only those LOADING or READY."""
        self.sole: Residency | None = None
        """The only one of them, if there is exactly one."""
        self.waiting = 0
        """Requests in all queues together."""
        self.demand_ns = 0
        """Lane time that the waiting requests ask for, weighted by how soon they want it."""
        self.heat = 0
        """How much it is asked for, if the policy keeps account of that; see ``heat``."""
        self.base_ns = 0
        """Batch-1 time by the first profile known; 0 until asked for."""
        self.pace_ns = 0
        """How long one of many requests takes at least, if known; see ``backlog``."""
        self.batch = 1
        """How many run together then."""
        self.pace_at_ns = 0
        """When that was looked up."""
        self.stirred = False
        """Its demand or where it is changed since the policy last looked; see ``Belief.stirred``."""
        self.load_key: int | None = None
        """Its priority in the scheduler's heap of LOAD candidates; None if it is not there."""
        self.removed = False
        self.quarantined = False
        """It takes devices down and is not served; nobody may wait for it, so ``queue_limit`` is 0."""

    def share_ns(self, residency: Residency) -> int:
        """How much of the demand a device that has the weights is counted for."""
        return self.demand_ns if residency is self.sole else residency.share_ns

    def enter(self, residency: Residency) -> None:
        """A LOAD of the weights is sent; a device that has them alone takes the whole demand."""
        sole = self.sole
        if sole is not None:
            sole.share_ns = self.demand_ns
            self.sole = None
        elif not self.residencies:
            self.sole = residency
            residency.device.load_ns += self.demand_ns
        self.residencies[residency.device.name] = residency

    def leave(self, residency: Residency) -> None:
        """Weights are gone from a device."""
        residency.device.load_ns -= self.share_ns(residency)
        residency.share_ns = 0
        del self.residencies[residency.device.name]
        self.sole = None
        if len(self.residencies) == 1:
            self.sole = sole = next(iter(self.residencies.values()))
            sole.device.load_ns += self.demand_ns - sole.share_ns
            sole.share_ns = 0

    def band_ns(self) -> int:
        """Of the most urgent class that waits for it."""
        least_ns = 0
        first = True
        for queue in self.queues.values():
            if queue.dues and (first or queue.band_ns < least_ns):
                least_ns = queue.band_ns
                first = False
        return least_ns

    def find(self, request: Request, *, alone: bool) -> Queue | None:
        """The queue for such requests, if there is one."""
        return self.queues.get((request.signature, request.rows, alone, level(request.priority)))

    def open(self, signature: str, rows: int, order: int, *, alone: bool, priority: int = 0) -> Queue:
        """Make the queue for such requests."""
        queue = Queue(self, signature, rows, order, alone=alone, priority=priority)
        self.queues[signature, rows, alone, queue.level] = queue
        if not signature and rows == 1 and not alone and queue.level == level(self.priority):
            self.main = queue
        return queue

    def fits(self, rows: int) -> bool:
        """Whether a request of so many rows can be run at all."""
        return 1 <= rows <= self.model.batch_sizes[-1]

    def sizes(self, rows: int, *, alone: bool) -> tuple[tuple[int, int], ...]:
        """What a queue of such requests may run as, (requests, batch size), ascending."""
        sizes = self.model.batch_sizes
        if rows > 1:
            return ((1, next(size for size in sizes if size >= rows)),)
        if alone or not self.code.batched:
            return ((1, sizes[0]),)
        return tuple([(size, size) for size in sizes])


def calls_of(waiters: list[Waiter]) -> tuple[Call, ...]:
    """What a worker is told of requests."""
    if len(waiters) == 1:
        return (_call(waiters[0].request),)
    return tuple([_call(waiter.request) for waiter in waiters])


def _call(request: Request) -> Call:
    return Call(request_id=request.request_id, rows=request.rows, tensors=request.tensors)


def half_slack_ns(waiters: list[Waiter]) -> int:
    """The latest end that leaves half of everyone's slack; each has the slack of when it came."""
    least_ns = waiters[0].due_ns + waiters[0].request.deadline_ns
    for waiter in waiters:
        both_ns = waiter.due_ns + waiter.request.deadline_ns
        if both_ns < least_ns:  # noqa: PLR1730 - min() costs 100 ns more
            least_ns = both_ns
    return least_ns // 2
