"""When those who are told to come again should: one after another, as fast as a device could serve them.

Told the same, all who were refused in one instant would come again in one instant, and almost all in vain.
So each is told a turn of its own. Nothing is kept free for it: a turn is advice, not a reservation.
"""

from __future__ import annotations

from typing import Final

from clockwork_serve.units import NS_PER_S

RETURNS_MAX_NS: Final = 2 * NS_PER_S
"""No turn is later than this: many never come again, or sooner than told, and others would wait for them."""


class Returns:
    """The turns that were given on a device."""

    __slots__ = ("_next_ns",)

    def __init__(self) -> None:
        self._next_ns = 0

    def turn_ns(self, soonest_ns: int, cost_ns: int, now_ns: int) -> int:
        """The next turn, not before ``soonest_ns``; who takes it will use ``cost_ns`` of the device."""
        turn_ns = max(soonest_ns, min(self._next_ns, now_ns + RETURNS_MAX_NS))
        self._next_ns = turn_ns + cost_ns
        return turn_ns
