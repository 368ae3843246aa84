"""What came in the last minutes, and the same again as it is likely to come soon.

A model whose rate has clearly changed counts with what it has now; all others share one straight trend, if
there is a clear one. Clear is what the bursts of the minutes before do not explain.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from clockwork_serve.messages import Request
from clockwork_serve.units import NS_PER_S

BUCKET_NS: Final = 5 * NS_PER_S
"""Rates are of stretches of this length."""
BUCKETS: Final = 60
"""So many of them are known."""
FIRST_BUCKETS: Final = 4
"""Nothing is said before so many are known."""
WINDOW_BUCKETS: Final = 12
"""At least so many are played again, where there are not too many requests."""
ENOUGH: Final = 1_000
"""More than these are played again only if fewer buckets than that would not do."""
MOST: Final = 20_000
"""Requests that are kept, and that one simulation plays."""
HEAVY: Final = 0.02
"""A model with this share of all requests is looked at by itself."""
FEWEST: Final = 3
"""So many buckets before a step show what was before it."""
STEP_SIGMAS: Final = 5.0
"""A change by so many standard deviations is a step."""
TREND_SIGMAS: Final = 2.5
FASTEST: Final = 4.0
"""A trend is followed until the load is so many times what it was; a step is believed whatever it is."""

Floats = npt.NDArray[np.float64]
Whose = tuple[int, str, int]
"""Priority, tenant, and how soon a request is to be decided, in ns: as requests have them."""
_Kept = tuple[int, int, int, int]
"""When a request arrived; its model, its SLO in ns, and whose it is; as numbers."""


@dataclass(slots=True, frozen=True)
class LikelyLoad:
    """Requests that may come within ``window_ns``: four columns, in order of time from 0.

    ``models`` and ``whose`` are indices into ``names`` and ``classes``.
    """

    window_ns: int
    times_ns: npt.NDArray[np.int64]
    models: npt.NDArray[np.int64]
    slos_ns: npt.NDArray[np.int64]
    whose: npt.NDArray[np.int64]
    names: tuple[str, ...]
    classes: tuple[Whose, ...]

    @property
    def rate_rps(self) -> float:
        """Requests a second."""
        return self.times_ns.size * NS_PER_S / self.window_ns


class RecentDemand:
    """Takes requests as they come; memory does not grow with their number."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._classes: dict[Whose, int] = {}
        self._kept: deque[_Kept] = deque(maxlen=MOST)
        self._counts: dict[int, Counter[int]] = {}
        """By number of a bucket, requests by model."""
        self._began_ns: int | None = None

    def observe(self, request: Request) -> None:
        """The next request."""
        at_ns = request.arrival_ns
        if self._began_ns is None:
            self._began_ns = at_ns
        model = self._names.setdefault(request.model, len(self._names))
        whose = (request.priority, request.tenant, request.decide_ns)
        known = self._classes.setdefault(whose, len(self._classes))
        self._kept.append((at_ns, model, max(1, request.slo_ns), known))
        bucket = self._counts.get(at_ns // BUCKET_NS)
        if bucket is None:
            bucket = self._counts[at_ns // BUCKET_NS] = Counter()
            for old in [one for one in self._counts if one < at_ns // BUCKET_NS - 2 * BUCKETS]:
                del self._counts[old]
        bucket[model] += 1

    def likely(self, now_ns: int, ahead_ns: int) -> LikelyLoad | None:
        """The load of the last minutes as it is likely to be ``ahead_ns`` from now; None at the beginning."""
        end = now_ns // BUCKET_NS
        if self._began_ns is None:
            return None
        begin = max(end - BUCKETS, -(-self._began_ns // BUCKET_NS))
        if end - begin < FIRST_BUCKETS:
            return None
        models = sorted({model for at in range(begin, end) for model in self._counts.get(at, ())})
        counts = np.zeros((len(models), end - begin))
        for at in range(begin, end):
            found = self._counts.get(at, Counter())
            counts[:, at - begin] = [found[model] for model in models]
        levels, after = _levels(counts, ahead_ns / BUCKET_NS)
        from_ns, end_ns = self._window(end, counts)
        rows = [one for one in self._kept if from_ns <= one[0] < end_ns]
        window_ns = end_ns - from_ns
        wanted, since_ns = np.zeros(len(self._names)), np.full(len(self._names), from_ns)
        wanted[models] = levels * (window_ns / BUCKET_NS)
        since_ns[models] = np.where(after > 0, np.maximum(from_ns, (end - after) * BUCKET_NS), from_ns)
        return self._again(rows, from_ns, window_ns, since_ns, wanted)

    def _window(self, end: int, counts: Floats) -> tuple[int, int]:
        """From when until before when requests are played again."""
        back = counts.sum(axis=0)[::-1].cumsum()
        buckets = max(WINDOW_BUCKETS, int(np.searchsorted(back, ENOUGH)) + 1)
        from_ns, end_ns = (end - min(buckets, len(back))) * BUCKET_NS, end * BUCKET_NS
        if len(self._kept) == MOST and self._kept[0][0] > from_ns:  # so many come that earlier ones are gone
            return self._kept[0][0], max(end_ns, self._kept[-1][0] + 1)
        return from_ns, end_ns

    def _again(
        self, kept: Sequence[_Kept], from_ns: int, window_ns: int, since_ns: npt.NDArray[np.int64],
        wanted: Floats,
    ) -> LikelyLoad:  # fmt: skip
        """The ``wanted`` number of each model: what came since its step, less of it, or more than once."""
        rows = np.array(kept, np.int64).reshape(-1, 4)
        rows = rows[rows[:, 0] >= since_ns[rows[:, 1]]]
        dice = np.random.default_rng(len(rows))  # the same requests, the same load
        there = np.bincount(rows[:, 1], minlength=wanted.size)
        times = wanted[rows[:, 1]] / np.maximum(there[rows[:, 1]], 1)
        copies = np.floor(times + dice.random(len(rows))).astype(np.int64)
        chosen = np.repeat(rows, copies, axis=0)
        number = np.arange(len(chosen)) - np.repeat(copies.cumsum() - copies, copies)
        # All second copies come as late behind the first, all third ones, ...: bursts stay what they are.
        # What came since a step fills the time before it.
        slice_ns = window_ns - (since_ns[chosen[:, 1]] - from_ns)
        offset_ns = np.where(slice_ns < window_ns, number * slice_ns, number * 0.6180339887 % 1 * window_ns)
        at_ns = (chosen[:, 0] - from_ns + offset_ns.astype(np.int64)) % window_ns
        order = np.argsort(at_ns, kind="stable")[:MOST]
        if order.size == MOST:
            window_ns = int(at_ns[order[-1]]) + 1
        return LikelyLoad(
            window_ns, at_ns[order], chosen[order, 1], chosen[order, 2], chosen[order, 3], tuple(self._names),
            tuple(self._classes),
        )  # fmt: skip


def _levels(counts: Floats, ahead: float) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Requests a bucket of each model, so many buckets after the last; and how long ago it made a step, or 0.

    Models that make up little of the load are looked at together: any of their bursts would seem a step.
    """
    levels, after = counts.mean(axis=1), np.zeros(len(counts), np.int64)
    heavy = np.maximum(levels, counts[:, -1]) > HEAVY * max(1.0, float(levels.sum()))
    for at in np.flatnonzero(heavy):
        level, after[at] = _level(counts[at], ahead)
        if after[at]:
            levels[at] = level
    others = after == 0
    rest = counts[others].sum(axis=0)
    if rest.sum():
        level, after[others] = _level(rest, ahead)
        levels[others] *= level / rest.mean()
    return levels, after


def _level(counts: Floats, ahead: float) -> tuple[float, int]:
    """A rate since its last step, or along its trend, if that fits better; and how long ago the step was."""
    size, mean = counts.size, float(counts.mean())
    after = np.arange(1, size - FEWEST + 1)  # so many buckets after a step, if there was one then
    new = counts[::-1].cumsum()[after - 1] / after
    old = (counts.sum() - new * after) / (size - after)
    squares = float(counts @ counts)
    misfit = np.maximum(0.0, squares - after * new**2 - (size - after) * old**2)
    bursts = np.maximum(1.0, misfit / np.maximum(1, size - 2) / max(mean, 1e-9))
    variance = bursts * np.maximum(old, 1 / size) * (1 / after + 1 / (size - after))
    sigmas = np.abs(new - old) / np.sqrt(variance)
    best = int(np.argmax(sigmas))
    at = np.arange(size) - (size - 1) / 2
    slope = float(at @ counts / (at @ at))
    off = max(0.0, squares - size * mean**2 - slope**2 * float(at @ at))
    if sigmas[best] > STEP_SIGMAS and misfit[best] <= off:
        return float(new[best]), int(after[best])
    deviation = float(np.sqrt(max(mean, off / max(1, size - 2)) / (at @ at)))
    if abs(slope) <= TREND_SIGMAS * deviation:
        return mean, 0
    reached = mean + slope * ((size - 1) / 2 + ahead)
    return min(FASTEST * mean, max(mean / FASTEST, reached)), 0
