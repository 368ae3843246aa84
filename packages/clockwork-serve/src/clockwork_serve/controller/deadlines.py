"""When requests must have been answered; it answers none.

Nearly every request is over long before its deadline, so deadlines lie unsorted in buckets of 4 ms, and
only those of a bucket whose time has come are put in order.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from clockwork_serve.controller.cluster import Waiter
from clockwork_serve.controller.life import SENT, WAITING
from clockwork_serve.controller.timers import NEVER_NS, Timer, Timers

BUCKET_BITS: Final = 22
"""A bucket is so many bits of nanoseconds wide: 4.2 ms."""


class Deadlines(Timer):
    """Deadlines of all requests that are WAITING or SENT, and of some that are over.

    It is set no later than the earliest of those not over.
    """

    __slots__ = ("_buckets", "_near", "_opened", "_order", "_timers")

    def __init__(self, timers: Timers) -> None:
        super().__init__(-1)
        self._timers = timers
        self._near: list[tuple[int, str, Waiter]] = []
        """Heap of (deadline, request id, request) of buckets that were opened."""
        self._buckets: dict[int, list[Waiter]] = {}
        """Requests by ``deadline >> BUCKET_BITS``, not opened yet."""
        self._order: list[int] = []
        """Heap of the keys of ``_buckets``."""
        self._opened = -1
        """All buckets up to this one are open."""

    def expect(self, waiter: Waiter) -> None:
        """A request came."""
        deadline_ns = waiter.request.deadline_ns
        key = deadline_ns >> BUCKET_BITS
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket.append(waiter)
            return
        if key <= self._opened:
            heappush(self._near, (deadline_ns, waiter.request.request_id, waiter))
        else:
            self._buckets[key] = [waiter]
            heappush(self._order, key)
            deadline_ns = key << BUCKET_BITS
        if deadline_ns < self.at_ns:
            self._timers.set(self, deadline_ns)

    def passed(self, now_ns: int) -> list[Waiter]:
        """Take out requests that are not answered though their deadline has come, in its order."""
        while self._order and self._order[0] << BUCKET_BITS <= now_ns:
            for waiter in self._buckets.pop(heappop(self._order)):
                if waiter.state <= SENT:
                    heappush(self._near, (waiter.request.deadline_ns, waiter.request.request_id, waiter))
        self._opened = max(self._opened, now_ns >> BUCKET_BITS)
        passed: list[Waiter] = []
        while self._near and self._near[0][0] <= now_ns:
            waiter = heappop(self._near)[2]
            if waiter.state <= SENT:
                passed.append(waiter)
        return passed

    def correct(self) -> None:
        """Set the timer anew: requests that are over need none."""
        near, order = self._near, self._order
        while near and near[0][2].state > SENT:
            heappop(near)
        while order:
            bucket = self._buckets[order[0]]
            while bucket and bucket[-1].state > SENT:
                bucket.pop()
            if bucket:
                break
            del self._buckets[heappop(order)]
        at_ns = order[0] << BUCKET_BITS if order else NEVER_NS
        self._timers.set(self, near[0][0] if near and near[0][0] < at_ns else at_ns)

    def check(self, waiters: list[Waiter]) -> None:
        """Assert that each of these requests, none answered yet, is here."""
        here = {waiter.request.request_id for _, _, waiter in self._near}
        here.update(waiter.request.request_id for bucket in self._buckets.values() for waiter in bucket)
        assert sorted(self._order) == sorted(self._buckets)
        for waiter in waiters:
            request_id = waiter.request.request_id
            assert request_id in here, f"{request_id} has no deadline pending"


class InternalDeadlines(Deadlines):
    """As in the authors' code: a request that waits expires at its due time, a sent one at its deadline.

    The due time may be the later one, where the policy's floor is above what was asked for.
    """

    __slots__ = ()

    def expect(self, waiter: Waiter) -> None:
        """A request came."""
        self._look_again(waiter, waiter.due_ns)

    def passed(self, now_ns: int) -> list[Waiter]:
        """Take out requests that expire now, in the order of these times."""
        passed: list[Waiter] = []
        while self._near and self._near[0][0] <= now_ns:
            waiter = heappop(self._near)[2]
            deadline_ns = waiter.request.deadline_ns
            if waiter.state == SENT and deadline_ns > now_ns:
                self._look_again(waiter, deadline_ns)
            elif waiter.state in {WAITING, SENT}:
                passed.append(waiter)
        return passed

    def _look_again(self, waiter: Waiter, at_ns: int) -> None:
        heappush(self._near, (at_ns, waiter.request.request_id, waiter))
        if at_ns < self.at_ns:
            self._timers.set(self, at_ns)
