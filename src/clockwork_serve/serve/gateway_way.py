"""How long what a gateway reads and says is on the way, while its core is busy: deadlines are the client's.

A request may have waited in its socket before it was read, and an answer waits for its turn before it is
written. The second is measured, from when a lane ended until the response was given to the socket; the first
takes about as long, since it is the same loop that has to come round. Plans leave room for both.
"""

from __future__ import annotations

from typing import Final

from clockwork_serve.controller.delays import LASTS_NS, Worst

BOTH: Final = 1.5
"""In and out, of which seldom both are the longest. Measured at twice what a core can do: with 1, 0.6 % of
answers were late, with 2 none, and 4 % fewer were in time than with 1."""
SHARE: Final = 2
"""At most this part of the time that a request has is left for the way: a half."""
NEVER_NS: Final = 1 << 62


class Way:
    """The longest way of the last answers."""

    __slots__ = ("_ended_ns", "_heard_ns", "_worst")

    def __init__(self) -> None:
        self._worst = Worst()
        self._ended_ns = NEVER_NS  # of what is being answered, the lane that ended first
        self._heard_ns = 0

    def ended(self, ended_ns: int) -> None:
        """A lane ended at that instant, and its answer is about to leave."""
        self._ended_ns = min(self._ended_ns, ended_ns)

    def left(self, now_ns: int) -> None:
        """All such answers left."""
        if self._ended_ns != NEVER_NS:
            if now_ns > self._heard_ns + LASTS_NS:
                self._worst.clear()
            self._heard_ns = now_ns
            self._worst.add(now_ns - self._ended_ns)
            self._ended_ns = NEVER_NS

    def of(self, given_ns: int, now_ns: int) -> int:
        """What to leave of the time that a request was given."""
        if now_ns > self._heard_ns + LASTS_NS:
            return 0
        return min(int(BOTH * self._worst.value), given_ns // SHARE)
