"""Queues that hope for one lane, by the latest start of their heads; it judges none."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

from clockwork_serve.controller.timers import NEVER_NS, Timer

if TYPE_CHECKING:
    from clockwork_serve.controller.cluster import LaneBelief
    from clockwork_serve.controller.queues import Queue

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
