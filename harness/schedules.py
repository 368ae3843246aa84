"""Arrival instants of open-loop loads; a seed decides everything."""

from __future__ import annotations

import random
from collections.abc import Iterator


def poisson(rate: float, seconds: float, rng: random.Random) -> Iterator[int]:
    """Instants in ns from 0 of a Poisson process of ``rate`` per second."""
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(rate)) < seconds:
        yield round(now_s * 1e9)
