"""Pending deadlines of requests.

Nearly every request is over before its deadline, so deadlines are kept unsorted in buckets of 4 ms, and a
bucket is sorted only when its time has come.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from clockwork_serve.controller.cluster import Waiter
from clockwork_serve.controller.life import SENT
from clockwork_serve.controller.timers import NEVER_NS, Timer, Timers

BUCKET_BITS: Final = 22
"""Binary logarithm of a bucket's width in ns: 4.2 ms."""


class Deadlines(Timer):
    """A timer for the deadlines of all requests that are WAITING or SENT; those that are over leave lazily.

    It is never set later than the earliest deadline of a request that is not over.
    """

    __slots__ = ("_buckets", "_near", "_opened", "_order", "_timers")

    def __init__(self, timers: Timers) -> None:
        super().__init__(-1)
        self._timers = timers
        self._near: list[tuple[int, str, Waiter]] = []
        """Heap of (deadline, request id, request) of opened buckets."""
        self._buckets: dict[int, list[Waiter]] = {}
        """Buckets not opened yet: requests by ``deadline >> BUCKET_BITS``."""
        self._order: list[int] = []
        """Heap of the keys of ``_buckets``."""
        self._opened = -1
        """All buckets up to this one are open."""

    def add(self, waiter: Waiter) -> None:
        """Add a request that was admitted."""
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
        """Remove and return the unanswered requests whose deadline has passed, by deadline."""
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
        """Drop requests that are over from the front, and set the timer again."""
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
        """Assert that the deadline of each of these unanswered requests is pending."""
        here = {waiter.request.request_id for _, _, waiter in self._near}
        here.update(waiter.request.request_id for bucket in self._buckets.values() for waiter in bucket)
        assert sorted(self._order) == sorted(self._buckets)
        for waiter in waiters:
            request_id = waiter.request.request_id
            assert request_id in here, f"{request_id} has no deadline pending"
