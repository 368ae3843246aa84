"""A generator of calls per minute like those of the Azure Functions trace of 2019; it reads no trace.

Calibrated to 500 functions of day 1, minutes 480 to 959 (InVitro's sample, 3.04 million calls). A function is
of one of four kinds; kinds are shares of all functions, of which ``rare`` ones often have no call in 8 hours:

    busy       calls in nearly every minute: 97 % of all calls. A Pareto law of rates (rank-size slope -1.87)
    periodic   timers and pollers of 2 to 120 minutes, mostly in phase with the clock: spikes at :00, :30, ...
    irregular  rates lognormal, minutes negative binomial with a Fano factor of their own
    rare       a few minutes in 8 hours, mostly at the full hour

Minutes are drawn hour by hour, so that a longer run begins like a shorter one and holds no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from clockwork_serve.workload.processes import Floats

HOUR: Final = 60

SHARES: Final = {"busy": 65, "periodic": 135, "irregular": 194, "rare": 212}
"""Parts of all functions. Of the 212 rare ones, half have a call in 8 hours: together 500 that have."""

BUSY_LEAST_PER_H: Final = 60.0
BUSY_MOST_PER_H: Final = 1.22e6
"""The Pareto law is cut here, so that the mean rate of a function is what the whole trace has: 9,638 calls a
second of 46,000 functions (figure 9 of the paper). Uncut, one function of many would carry most calls."""
RANK_SIZE_SLOPE: Final = 1.87
STEADY: Final = 52 / 65
"""Share of busy functions that make the same number of calls each minute, but for a slip now and then."""
STEADY_CV: Final = 0.02
SLIP: Final = 0.03

PERIODS: Final = {2: 8, 3: 10, 4: 6, 5: 47, 10: 10, 15: 15, 20: 2, 30: 7, 60: 28, 120: 2}
IN_PHASE: Final = 0.84
MANY_CALLS: Final = 0.05

IRREGULAR_LOG10_PER_H: Final = (0.95, 0.9, 0.65)
FANO_LOG10: Final = (0.0, 0.27, 1.0)
"""log10 of calls per hour and of the Fano factor: median, spread below it and above it."""

RARE_ACTIVE_PER_H: Final = 0.0875
"""Active minutes: 0.7 in 8 hours on average, so that of those with any 70 % have one, 24 % two, 6 % three."""

MOST_CV: Final = 0.9
USUAL_CV: Final = 1.1
BURSTY_CV: Final = (4.0, 13.0)
"""Gaps inside a minute: 1.1 and 13 are measured on two services of 2023; how many are bursty is a choice."""


def _clock(peaks: dict[int, float]) -> Floats:
    """Weights of the minutes of an hour, of mean 1: some against the others."""
    weights = np.ones(HOUR)
    for minute, weight in peaks.items():
        weights[minute] = weight
    scaled: Floats = weights / weights.mean()
    return scaled


IRREGULAR_CLOCK: Final = _clock(
    {0: 3.2, 5: 1.5, 10: 1.7, 15: 1.8, 20: 1.9, 25: 1.3, 30: 2.4, 35: 1.4, 40: 1.8, 45: 1.8, 50: 1.7, 55: 1.4}
)
RARE_CLOCK: Final = _clock({0: 20.0, 30: 5.5, 48: 4.5})


class GeneratedTrace:
    """Functions drawn from a seed, the busiest first, and their calls in any minute.

    ``dice`` gives a generator for a number: 0 for the functions, 1 + h for hour h. ``per_h``: expected calls
    per hour of each function; ``cv``: coefficient of variation of its gaps inside a minute; ``kinds``: its
    kind. ``first``: the minute of the clock at which it begins; ``minutes``: how many it has (None: no end).
    """

    def __init__(
        self, functions: int, dice: Callable[[int], np.random.Generator], first: int = 0,
        minutes: int | None = None,
    ) -> None:  # fmt: skip
        self._dice = dice
        self._first = first
        self._minutes = minutes
        self._hour = -1
        self._counts = np.empty((0, functions), dtype=np.int32)
        rng = dice(0)
        kinds = _kinds(functions, rng)
        per_h = np.zeros(functions)
        self.steady = np.zeros(functions, dtype=bool)
        self.period = np.ones(functions, dtype=np.int64)
        self.phase = np.zeros(functions, dtype=np.int64)
        self.fano = np.ones(functions)
        self.calls = np.ones(functions)
        self._draw_busy(np.flatnonzero(kinds == "busy"), per_h, rng)
        self._draw_periodic(np.flatnonzero(kinds == "periodic"), per_h, rng)
        self._draw_irregular(np.flatnonzero(kinds == "irregular"), per_h, rng)
        self._draw_rare(np.flatnonzero(kinds == "rare"), per_h, rng)
        bursty = np.exp(rng.uniform(np.log(BURSTY_CV[0]), np.log(BURSTY_CV[1]), functions))
        cv = np.where(rng.random(functions) < MOST_CV, USUAL_CV, bursty)
        order = np.argsort(-per_h, kind="stable")
        self.kinds, self.per_h, self.cv = kinds[order], per_h[order], cv[order]
        self.steady, self.period, self.phase = self.steady[order], self.period[order], self.phase[order]
        self.fano, self.calls = self.fano[order], self.calls[order]

    def minute(self, index: int) -> np.ndarray | None:
        """The calls of every function in a minute; None behind the last one."""
        if self._minutes is not None and index >= self._minutes:
            return None
        hour, minute = divmod(self._first + index, HOUR)
        if hour != self._hour:
            self._counts, self._hour = self._draw_hour(hour), hour
        row: np.ndarray = self._counts[minute]
        return row

    def _draw_busy(self, chosen: np.ndarray, per_h: Floats, rng: np.random.Generator) -> None:
        power = 1.0 / RANK_SIZE_SLOPE
        least, most = BUSY_LEAST_PER_H**-power, BUSY_MOST_PER_H**-power
        # One from each of as many equal parts of the law: a few of the busiest decide the sum of all.
        parts = (rng.permutation(chosen.size) + rng.random(chosen.size)) / max(1, chosen.size)
        rates = (least - parts * (least - most)) ** -RANK_SIZE_SLOPE
        steady = rng.random(chosen.size) < STEADY
        rates[steady] = np.floor(rates[steady] / HOUR) * HOUR
        per_h[chosen] = rates
        self.steady[chosen] = steady
        # Varying ones: CV of minute counts, 0.07 to 0.8 in the sample.
        spread = 0.2 * 10.0 ** (0.35 * rng.standard_normal(chosen.size))
        self.fano[chosen] = 1.0 + spread**2 * rates / HOUR

    def _draw_periodic(self, chosen: np.ndarray, per_h: Floats, rng: np.random.Generator) -> None:
        weights = np.array(list(PERIODS.values()), dtype=np.float64)
        period = rng.choice(np.array(list(PERIODS)), chosen.size, p=weights / weights.sum())
        many = np.rint(1 + rng.exponential(3.0, chosen.size))
        calls = np.where(rng.random(chosen.size) < MANY_CALLS, many, 1.0)
        off = (rng.random(chosen.size) * period).astype(np.int64)
        self.period[chosen] = period
        self.phase[chosen] = np.where(rng.random(chosen.size) < IN_PHASE, 0, off)
        self.calls[chosen] = calls
        per_h[chosen] = calls * HOUR / period

    def _draw_irregular(self, chosen: np.ndarray, per_h: Floats, rng: np.random.Generator) -> None:
        per_h[chosen] = _skewed(*IRREGULAR_LOG10_PER_H, chosen.size, rng)
        self.fano[chosen] = _skewed(*FANO_LOG10, chosen.size, rng)

    def _draw_rare(self, chosen: np.ndarray, per_h: Floats, rng: np.random.Generator) -> None:
        # Calls in an active minute: 1 for most, 2 at the 90th and 19 at the 99th percentile.
        calls = np.rint(np.maximum(1.0, 10.0 ** (-0.7 + 0.85 * rng.standard_normal(chosen.size))))
        self.calls[chosen] = calls
        per_h[chosen] = RARE_ACTIVE_PER_H * calls

    def _draw_hour(self, hour: int) -> np.ndarray:
        rng = self._dice(1 + hour)
        counts = np.zeros((HOUR, self.kinds.size), dtype=np.int32)
        busy = self.kinds == "busy"
        for chosen, draw in (
            (busy & self.steady, self._steady),
            (busy & ~self.steady, self._varying),
            (self.kinds == "irregular", self._irregular),
            (self.kinds == "rare", self._rare),
        ):
            places = np.flatnonzero(chosen)
            counts[:, places] = draw(places, rng)
        periodic = np.flatnonzero(self.kinds == "periodic")
        now = hour * HOUR + np.arange(HOUR)[:, None]
        counts[:, periodic] = (now % self.period[periodic] == self.phase[periodic]) * self.calls[periodic]
        return counts

    def _steady(self, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        usual = self.per_h[chosen] / HOUR
        counts = np.rint(usual * (1 + STEADY_CV * rng.standard_normal((HOUR, chosen.size))))
        slips = rng.random(counts.shape) < SLIP
        slipped: np.ndarray = np.maximum(counts + slips - np.roll(slips, 1, axis=0), 0)
        return slipped

    def _varying(self, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _negative_binomial(np.tile(self.per_h[chosen] / HOUR, (HOUR, 1)), self.fano[chosen], rng)

    def _irregular(self, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        mean = self.per_h[chosen] / HOUR * IRREGULAR_CLOCK[:, None]
        fano = self.fano[chosen]
        counts = np.empty(mean.shape)
        wild, tame = fano > 1, fano <= 1
        counts[:, wild] = _negative_binomial(mean[:, wild], fano[wild], rng)
        # Below Poisson: as even as whole numbers allow.
        whole = np.floor(mean[:, tame])
        counts[:, tame] = whole + (rng.random(whole.shape) < mean[:, tame] - whole)
        return counts

    def _rare(self, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        chance = RARE_ACTIVE_PER_H / HOUR * RARE_CLOCK[:, None]
        counts: np.ndarray = (rng.random((HOUR, chosen.size)) < chance) * self.calls[chosen]
        return counts


def _kinds(functions: int, rng: np.random.Generator) -> np.ndarray:
    """The kind of every function: shares exact but for rounding, order random."""
    total = sum(SHARES.values())
    edges = np.rint(np.cumsum(list(SHARES.values())) / total * functions).astype(np.int64)
    return rng.permutation(np.repeat(np.array(list(SHARES)), np.diff(edges, prepend=0)))


def _skewed(median: float, below: float, above: float, size: int, rng: np.random.Generator) -> Floats:
    """Ten to the power of a normal number whose spread differs below and above its median."""
    spread = rng.standard_normal(size)
    powers: Floats = 10.0 ** (median + spread * np.where(spread < 0, below, above))
    return powers


def _negative_binomial(mean: Floats, fano: Floats, rng: np.random.Generator) -> np.ndarray:
    """Counts of variance ``fano`` (above 1) times their mean: a Poisson whose rate is gamma."""
    excess = fano - 1.0
    counts: np.ndarray = rng.poisson(rng.standard_gamma(mean / excess) * excess)
    return counts
