"""Timers as data (no clock is read), and retry slots."""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace
from typing import Final

from clockwork_serve.controller.record import Record
from clockwork_serve.units import NS_PER_MS, NS_PER_S

# ------------------------------------------------------------
# Timers in a lazy heap: at most one live entry for each, corrected when it surfaces.


NEVER_NS: Final = 1 << 62
"""Later than any instant."""


STALL_CHECK_NS: Final = 25 * NS_PER_MS
"""Interval of the check whether a device with work is stalled."""


class Timer(Record):
    """An instant at which something is to be done; subclasses say what."""

    __slots__ = ("at_ns", "entry_ns", "order")

    def __init__(self, order: int) -> None:
        self.at_ns = NEVER_NS
        """When it fires."""
        self.entry_ns = NEVER_NS
        """The instant of its live entry in the heap: never later than ``at_ns``."""
        self.order = order
        """Breaks ties between timers of the same instant."""

    def __lt__(self, other: Timer) -> bool:
        return self.order < other.order


class Timers(Record):
    """Pending timers by instant."""

    __slots__ = ("heap",)

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, Timer]] = []
        """(instant, order, timer); stale where the timer's ``entry_ns`` differs. No timer fires before the
        first instant.
        """

    def set(self, timer: Timer, at_ns: int) -> None:
        """Set a timer to fire at ``at_ns`` (``NEVER_NS``: not at all)."""
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
        """Remove and return the first timer that fires by ``now_ns``; None if there is none."""
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
# Retry slots: rejected clients are advised to retry one after another, as fast as a device could serve them.
#
# With the same advice, all clients that were rejected at once would return at once, and most would be
# rejected again. So each has a slot of its own. It is advice, not a reservation: no lane is kept free.


RETRY_MAX_NS: Final = 2 * NS_PER_S
"""The latest slot, from now: many clients do not retry, or retry sooner, and leave later slots unused."""


class RetrySlots(Record):
    """Hands out the retry slots of a device."""

    __slots__ = ("_next_ns",)

    def __init__(self) -> None:
        self._next_ns = 0

    def slot_ns(self, soonest_ns: int, cost_ns: int, now_ns: int) -> int:
        """The next slot, not before ``soonest_ns``, for a request that needs ``cost_ns`` of the device."""
        slot_ns = max(soonest_ns, min(self._next_ns, now_ns + RETRY_MAX_NS))
        self._next_ns = slot_ns + cost_ns
        return slot_ns
