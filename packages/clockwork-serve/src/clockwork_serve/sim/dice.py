"""Random durations of a simulation: numbered streams of one seed, drawn in blocks for speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from clockwork_serve.sim.constants import Quantiles
from clockwork_serve.units import NS_PER_US

BLOCK = 1 << 14


class Draws:
    """An endless sequence of ints; the same (seed, stream) gives the same sequence in any process.

    ``next()`` is one draw, in ns. It is bound to a generator, which costs half of a method.
    """

    __slots__ = ("next",)

    def __init__(self, seed: int, stream: int, quantiles_us: Quantiles) -> None:
        self.next: Callable[[], int] = _drawn(seed, stream, quantiles_us).__next__


def _drawn(seed: int, stream: int, quantiles_us: Quantiles) -> Iterator[int]:
    generator = np.random.Generator(np.random.PCG64([seed, stream]))
    shares = np.array([share for share, _ in quantiles_us])
    values = np.array([value * NS_PER_US for _, value in quantiles_us])
    while True:
        yield from np.rint(np.interp(generator.random(BLOCK), shares, values)).astype(np.int64).tolist()


def uniform_us(least_ns: int, most_ns: int) -> Quantiles:
    """Quantiles of a uniform distribution, for bounds in ns."""
    return ((0.0, least_ns / NS_PER_US), (1.0, most_ns / NS_PER_US))
