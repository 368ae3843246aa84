"""How many requests each gateway may have on their way here: what is heard within a few milliseconds.

It computes what :class:`messages.Intake` announces, from how fast requests were heard of late, and nothing
else: which requests wait, and which are refused, is for others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Final

from clockwork_serve.messages import Frame, Intake, Request
from clockwork_serve.serve.transport import Link
from clockwork_serve.units import ms

DELAY_NS: Final = ms(2)
"""Requests on their way are heard within about so long, even when more come than can be heard."""
LEAST: Final = 32
"""So many may always be on their way, by all gateways together: a turn of a controller that is not busy."""
LEAST_EACH: Final = 16
MOST: Final = 4096
FIRST: Final = 256
WEIGHT: Final = 8
"""The mean is over about so many announcements."""


class _Pace:
    """Of one gateway: requests heard and not announced yet, and the mean time from one to the next."""

    __slots__ = ("gap_ns", "heard", "last_ns", "most")

    def __init__(self, now_ns: int) -> None:
        self.heard = 0
        self.most = FIRST
        self.gap_ns = DELAY_NS // FIRST
        self.last_ns = now_ns


class Hearing:
    """Methods are for the loop's own thread."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._paces: dict[Link, _Pace] = {}

    def welcome(self, link: Link) -> None:
        """A gateway is there."""
        self._paces[link] = _Pace(self._clock())
        link.send(Intake(heard=0, most=FIRST))

    def forget(self, link: Link) -> None:
        """It is gone."""
        self._paces.pop(link, None)

    def heard(self, link: Link, frames: Collection[Frame]) -> None:
        """Frames came; now and then the gateway is told, after the turn that they cause."""
        pace = self._paces.get(link)
        if pace is None:
            return
        pace.heard += _requests(frames)
        if 4 * pace.heard < pace.most:
            return
        now_ns = self._clock()
        gap_ns = (now_ns - pace.last_ns) // pace.heard
        pace.gap_ns += (gap_ns - pace.gap_ns) // WEIGHT
        least = max(LEAST_EACH, LEAST // len(self._paces))
        pace.most = min(MOST, max(least, DELAY_NS // max(1, pace.gap_ns)))
        link.send(Intake(heard=pace.heard, most=pace.most))
        pace.heard, pace.last_ns = 0, now_ns


def _requests(frames: Collection[Frame]) -> int:
    return sum([type(frame) is Request for frame in frames])
