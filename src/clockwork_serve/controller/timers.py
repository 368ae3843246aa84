"""Pending instants, and turns: what comes when, without a clock."""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace
from typing import Final

from clockwork_serve.controller.record import Record
from clockwork_serve.units import NS_PER_S

# ------------------------------------------------------------
# A few pending instants, each with its subject; at most one entry a subject, corrected when it surfaces.


NEVER_NS: Final = 1 << 62
"""A time that never comes."""


class Timer(Record):
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


class Timers(Record):
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
# When those who are told to come again should: one after another, as fast as a device could serve them.
#
# Told the same, all who were refused in one instant would come again in one instant, and almost all in vain.
# So each is told a turn of its own. Nothing is kept free for it: a turn is advice, not a reservation.


RETRY_MAX_NS: Final = 2 * NS_PER_S
"""No turn is later than this: many never come again, or sooner than told, and others would wait for them."""


class RetrySlots(Record):
    """The turns that were given on a device."""

    __slots__ = ("_next_ns",)

    def __init__(self) -> None:
        self._next_ns = 0

    def slot_ns(self, soonest_ns: int, cost_ns: int, now_ns: int) -> int:
        """The next turn, not before ``soonest_ns``; who takes it will use ``cost_ns`` of the device."""
        slot_ns = max(soonest_ns, min(self._next_ns, now_ns + RETRY_MAX_NS))
        self._next_ns = slot_ns + cost_ns
        return slot_ns
