"""Requests that wait, by model and by what may share a batch, earliest deadline first."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from clockwork_serve.controller.life import REQUEST_LIFE, RequestState, RequestStep
from clockwork_serve.messages import Code, Model, Request

if TYPE_CHECKING:
    from clockwork_serve.controller.cluster import Residency


class Waiter:
    """A request that is not over yet, and what we know of it."""

    __slots__ = ("action_id", "alone", "cold", "demand_ns", "due_ns", "queue", "request", "retries", "state")

    def __init__(self, request: Request, due_ns: int, demand_ns: int, queue: Queue) -> None:
        self.request = request
        self.due_ns = due_ns
        """When its execution must have ended, by plan: a little before the deadline."""
        self.demand_ns = demand_ns
        """What it adds to its model's demand while it waits."""
        self.queue = queue
        self.state = RequestState.WAITING
        self.action_id: int | None = None
        """The INFER that carries it; None unless SENT or SPENT."""
        self.cold = False
        """Its weights were on no device when it arrived."""
        self.alone = False
        """It shared a batch that failed, and may not share one again."""
        self.retries = 0
        """How often it was in flight on a worker that was lost."""

    def step(self, step: RequestStep) -> None:
        """Move on by the table; a step that is not in it is a bug."""
        after = REQUEST_LIFE[self.state].get(step)
        assert after is not None, f"{self.request.request_id}: {step.value} while {self.state.value}"
        self.state = after


class Queue:
    """Requests of one model that may share a batch: equal signature, one row each, or each alone.

    ``sizes`` are the batch sizes to choose from, as (requests, batch size to run), ascending.
    """

    __slots__ = ("dues", "model", "order", "signature", "sizes", "waiters")

    def __init__(
        self, model: ServedModel, signature: str, sizes: tuple[tuple[int, int], ...], order: int
    ) -> None:
        self.model = model
        self.signature = signature
        self.sizes = sizes
        self.order = order
        """Creation order: makes ties between queues definite."""
        self.dues: list[int] = []
        """``due_ns`` of each of ``waiters``, ascending."""
        self.waiters: list[Waiter] = []
        """All and only requests WAITING here."""

    def __len__(self) -> int:
        return len(self.waiters)

    def add(self, waiter: Waiter) -> bool:
        """Put a request in its place; true if it is the first now."""
        at = bisect_right(self.dues, waiter.due_ns)
        self.dues.insert(at, waiter.due_ns)
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
        taken = self.waiters[first : first + count]
        del self.dues[first : first + count]
        del self.waiters[first : first + count]
        return taken

    def check(self) -> None:
        """Assert the invariants."""
        assert self.dues == sorted(self.dues)
        assert self.dues == [waiter.due_ns for waiter in self.waiters]
        assert all(waiter.state is RequestState.WAITING for waiter in self.waiters)
        assert all(waiter.queue is self for waiter in self.waiters)


class ServedModel:
    """A model that is served: its queues, its demand and where its weights are."""

    __slots__ = (
        "code", "demand_ns", "load_key", "model", "order", "queues", "removed", "residencies", "shares",
        "waiting",
    )  # fmt: skip

    def __init__(self, model: Model, code: Code, order: int) -> None:
        self.model = model
        self.code = code
        self.order = order
        self.queues: dict[tuple[str, int, bool], Queue] = {}
        """Queue by (signature, rows, alone)."""
        self.residencies: dict[str, Residency] = {}
        """Weights by device: all and only those LOADING or READY."""
        self.waiting = 0
        """Requests in all queues together."""
        self.demand_ns = 0
        """Lane time that the waiting requests ask for, weighted by how soon they want it."""
        self.shares: dict[str, int] = {}
        """How much of ``demand_ns`` each device is counted for; sums to it where there is any device."""
        self.load_key: int | None = None
        """Its priority in the scheduler's heap of LOAD candidates; None if it is not there."""
        self.removed = False

    def queue(self, signature: str, rows: int, *, alone: bool, order: int) -> Queue:
        """The queue for such requests, made at need."""
        key = (signature, rows, alone)
        queue = self.queues.get(key)
        if queue is None:
            queue = Queue(self, signature, self._sizes(rows, alone=alone), order)
            self.queues[key] = queue
        return queue

    def fits(self, rows: int) -> bool:
        """Whether a request of so many rows can be run at all."""
        return 1 <= rows <= self.model.batch_sizes[-1]

    def _sizes(self, rows: int, *, alone: bool) -> tuple[tuple[int, int], ...]:
        sizes = self.model.batch_sizes
        if rows > 1:
            return ((1, next(size for size in sizes if size >= rows)),)
        if alone or not self.code.batched:
            return ((1, sizes[0]),)
        return tuple((size, size) for size in sizes)
