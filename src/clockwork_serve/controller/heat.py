"""How much a model is asked for, as one number that needs no clock to compare; it decides nothing.

Requests count by an exponential window: one of age t counts 2**(-t / HALF_LIFE). Kept as the logarithm of
the sum as it would be at time zero, a number changes only when a request comes, and any two compare as the
windows do at any instant: log2(sum over requests of 2**(arrival / HALF_LIFE)).
"""

from __future__ import annotations

from math import log2
from typing import Final

from clockwork_serve.units import NS_PER_S

HALF_LIFE_NS: Final = 30 * NS_PER_S

ONE: Final = 1 << 20
"""A factor of two."""

BASE: Final = 1 << 50
"""Above any count of uses, so that heat is never below what least-recently-used order put there."""

LOST: Final = 40 * ONE
"""A difference beyond which the smaller adds nothing."""


def hotter(heat: int, arrival_ns: int) -> int:
    """The heat with one more request."""
    one = BASE + arrival_ns * ONE // HALF_LIFE_NS
    less = heat - one if heat > one else one - heat
    more = heat if heat > one else one  # noqa: FURB136 - max() costs 100 ns more
    return more if less > LOST else more + int(ONE * log2(1.0 + 2.0 ** (-less / ONE)))
