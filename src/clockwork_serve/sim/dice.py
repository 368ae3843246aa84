"""The one source of chance in a simulation: named streams of one seed, drawn in blocks."""

from __future__ import annotations

import numpy as np

from clockwork_serve.sim.constants import Quantiles
from clockwork_serve.units import NS_PER_US

BLOCK = 1 << 14


class Draws:
    """An endless row of ints; the same (seed, stream) gives the same row in any process."""

    __slots__ = ("_at", "_block", "_generator", "_shares", "_values")

    def __init__(self, seed: int, stream: int, quantiles_us: Quantiles) -> None:
        self._generator = np.random.Generator(np.random.PCG64([seed, stream]))
        self._shares = np.array([share for share, _ in quantiles_us])
        self._values = np.array([value * NS_PER_US for _, value in quantiles_us])
        self._block: list[int] = []
        self._at = 0

    def next(self) -> int:
        """One draw, in ns."""
        at = self._at
        if at == len(self._block):
            uniform = self._generator.random(BLOCK)
            self._block = np.rint(np.interp(uniform, self._shares, self._values)).astype(np.int64).tolist()
            at = 0
        self._at = at + 1
        return self._block[at]


def uniform_us(least_ns: int, most_ns: int) -> Quantiles:
    """Quantiles of a uniform distribution, for bounds in ns."""
    return ((0.0, least_ns / NS_PER_US), (1.0, most_ns / NS_PER_US))
