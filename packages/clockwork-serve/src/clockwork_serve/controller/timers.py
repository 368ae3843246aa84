"""Pending instants: timers, deadlines of requests, queues that wait for a lane."""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Final

from clockwork_serve.controller.life import SENT, WAITING
from clockwork_serve.controller.queues import Waiter

if TYPE_CHECKING:
    from clockwork_serve.controller.devices import LaneBelief
    from clockwork_serve.controller.queues import Queue


# ------------------------------------------------------------
# A few pending instants, each with its subject; at most one entry a subject, corrected when it surfaces.


NEVER_NS: Final = 1 << 62
"""A time that never comes."""


class Timer:
    """A subject's instant. Whatever else the subject is, a subclass says."""

    __slots__ = ("at_ns", "entry_ns", "order")

    def __init__(self, order: int) -> None:
        self.at_ns = NEVER_NS
        """When it fires."""
        self.entry_ns = NEVER_NS
        """Where it is in the heap: never later than ``at_ns``, unless it never fires."""
        self.order = order
        """Makes ties definite."""

    def __lt__(self, other: Timer) -> bool:
        return self.order < other.order


class Timers:
    """Pending timers by instant."""

    __slots__ = ("heap",)

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, Timer]] = []
        """(instant, order, timer); stale where the timer's ``entry_ns`` is another. None is due before the
        first instant.
        """

    def set(self, timer: Timer, at_ns: int) -> None:
        """Fire at ``at_ns`` (``NEVER_NS``: not at all), whatever was set before."""
        timer.at_ns = at_ns
        if at_ns < timer.entry_ns:
            timer.entry_ns = at_ns
            heappush(self.heap, (at_ns, timer.order, timer))

    def next_ns(self) -> int:
        """The earliest instant pending; ``NEVER_NS`` if there is none."""
        heap = self.heap
        while heap:
            entry_ns, order, timer = heap[0]
            at_ns = timer.at_ns
            if timer.entry_ns != entry_ns:
                heappop(heap)
            elif at_ns == entry_ns:
                return entry_ns
            else:
                timer.entry_ns = at_ns
                if at_ns == NEVER_NS:
                    heappop(heap)
                else:
                    heapreplace(heap, (at_ns, order, timer))
        return NEVER_NS

    def due(self, now_ns: int) -> Timer | None:
        """Take out the first timer whose instant has come."""
        heap = self.heap
        while heap and heap[0][0] <= now_ns:
            entry_ns, order, timer = heappop(heap)
            if timer.entry_ns != entry_ns:
                continue
            if timer.at_ns == entry_ns:
                timer.at_ns = timer.entry_ns = NEVER_NS
                return timer
            timer.entry_ns = timer.at_ns
            if timer.at_ns != NEVER_NS:
                heappush(heap, (timer.at_ns, order, timer))
        return None


# ------------------------------------------------------------
# When requests must have been answered; it answers none.
#
# Nearly every request is over long before its deadline, so deadlines lie unsorted in buckets of 4 ms, and
# only those of a bucket whose time has come are put in order.


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
    """As in the authors' code: a request that waits hears at its due time, one that was sent at its deadline.

    The due time may be the later one, where the policy's floor is above what was asked for.
    """

    __slots__ = ()

    def expect(self, waiter: Waiter) -> None:
        """A request came."""
        self._look_again(waiter, waiter.due_ns)

    def passed(self, now_ns: int) -> list[Waiter]:
        """Take out requests that are to hear now, in the order of these times."""
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


# ------------------------------------------------------------
# Queues that hope for one lane, by the latest start of their heads; it judges none.


STALE_MIN: Final = 64
"""A heap of twice as many entries as after its last clearing, and this many more, is cleared again."""


class Watch(Timer):
    """The queues of a lane.

    A queue has at most one live entry on all lanes, never later than its head's latest start: it is
    corrected when it surfaces. The timer fires when the first can no longer start in time if nothing happens.
    """

    __slots__ = ("behind_ns", "first_ns", "full", "heap", "lane")

    def __init__(self, lane: LaneBelief, order: int) -> None:
        super().__init__(order)
        self.lane = lane
        self.heap: list[tuple[int, int, Queue]] = []
        """(latest start, queue order, queue); stale unless the queue's ``watch`` and ``place_ns`` say so."""
        self.first_ns = NEVER_NS
        """The earliest latest start: once the lane is not free before, the promise is broken."""
        self.behind_ns = 0
        """The timer is early enough while no more work than this waits behind the running action."""
        self.full = STALE_MIN
        """With so many entries, the heap is cleared of stale ones."""

    def place(self, queue: Queue, latest_ns: int) -> bool:
        """Watch a queue here from now on; true if its promise may break before any other."""
        queue.watch = self
        queue.place_ns = latest_ns
        heap = self.heap
        heappush(heap, (latest_ns, queue.order, queue))
        if len(heap) > self.full:
            heap[:] = [entry for entry in heap if entry[2].watch is self and entry[2].place_ns == entry[0]]
            heapify(heap)
            self.full = 2 * len(heap) + STALE_MIN
        return latest_ns < self.first_ns

    def surface(self, start_ns: int) -> list[Queue]:
        """Take out all queues whose heads can no longer start in time if the lane is free at ``start_ns``."""
        surfaced: list[Queue] = []
        heap = self.heap
        while heap:
            latest_ns, _, queue = heap[0]
            if queue.watch is self and queue.place_ns == latest_ns:
                if queue.dues and latest_ns >= start_ns:
                    break
                queue.watch = None
                if queue.dues:
                    surfaced.append(queue)
            heappop(heap)
        return surfaced

    def clear(self) -> list[Queue]:
        """Take out all queues: the lane is gone."""
        found = []
        for latest_ns, _, queue in self.heap:
            if queue.watch is self and queue.place_ns == latest_ns:
                queue.watch = None
                found.append(queue)
        self.heap.clear()
        self.first_ns = NEVER_NS
        return found
