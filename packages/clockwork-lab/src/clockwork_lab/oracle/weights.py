"""The gain of requests whose weights must be loaded and kept, at given prices of LOADs and pages.

The price of LOAD lanes is per ns; the price of pages is per page and ns.
"""

from __future__ import annotations

import numpy as np

from clockwork_lab.oracle.costs import Costs, Floats, Ints

DEEP = 512
"""Models with more requests are bounded request by request instead of by their best stays."""


class Stays:
    """The best stays of each model on devices, as a table: row k holds the k-th request of every model.

    A stay serves a run of its model's requests from one LOAD on. It lasts at least from the last instant at
    which its first request can start to the first instant at which its last one can end.
    """

    def __init__(self, costs: Costs, start_ns: float, *, warm: bool) -> None:
        self._costs = costs
        self._start_ns = start_ns
        self._warm = warm
        self._opens = _latest_opening(costs)
        self._closes: Floats = np.asarray(costs.release + costs.shortest_ns)
        _, first, count = np.unique(costs.model, return_index=True, return_counts=True)
        deep = count > DEEP
        self._deep: Ints = np.flatnonzero(np.repeat(deep, count))
        self._heads: Ints = np.searchsorted(self._deep, first[deep])
        order = np.argsort(-count[~deep], kind="stable")
        first, count = first[~deep][order], count[~deep][order]
        rows = int(count[0]) if len(count) else 0
        self._active = [int(np.searchsorted(-count, -row, "left")) for row in range(rows)]
        self._rows = [first[:active] + row for row, active in enumerate(self._active)]
        self._first = first
        self._split = self._splits(costs, count)

    def _splits(self, costs: Costs, count: Ints) -> list[Ints]:
        """By row: the first request of the model whose stay with this one may be of the shortest kind."""
        splits, split = [], self._first.copy()
        for at in self._rows:
            split = split[: len(at)]
            limit = self._closes[at] - costs.shortest_ns[at]
            while True:
                behind = (split < at) & (self._opens[split] < limit)
                if not behind.any():
                    break
                split = split + behind
            splits.append(split - self._first[: len(at)])
        return splits

    def worth(self, value: Floats, load_price: float, page_price: float) -> float:
        """An upper bound on what all requests gain, each ``value`` less the prices of LOADs and pages."""
        costs = self._costs
        load = costs.load_ns * load_price + costs.load_ns * costs.pages * page_price
        hold = costs.pages * page_price
        return self._shallow(value, load, hold) + self._deeper(value, load, hold)

    def _shallow(self, value: Floats, load: Floats, hold: Floats) -> float:
        """Row by row: ``best`` is the most that the requests of a model so far can gain."""
        if not self._rows:
            return 0.0
        models = len(self._first)
        best, earned = np.zeros(models), np.zeros(models)
        lean = np.zeros((len(self._rows), models))  # best before this request, less all values before it
        long = np.full((len(self._rows) + 1, models), -np.inf)  # the most of lean plus hold * opening, so far
        for row, (at, split) in enumerate(zip(self._rows, self._split, strict=True)):
            active = len(at)
            columns = np.arange(active)
            lean[row, :active] = best[:active] - earned[:active]
            price = hold[at]
            long[row + 1, :active] = np.maximum(
                long[row, :active], lean[row, :active] + price * self._opens[at]
            )
            earned[:active] += value[at]
            shortest = lean[split, columns] - price * self._costs.shortest_ns[at]
            longer = long[split, columns] - price * self._closes[at]
            stay = earned[:active] - load[at] + np.maximum(shortest, longer)
            best[:active] = np.maximum(best[:active], stay)
            if self._warm:
                kept = earned[:active] - price * np.maximum(0.0, self._closes[at] - self._start_ns)
                best[:active] = np.maximum(best[:active], kept)
        return float(best.sum())

    def _deeper(self, value: Floats, load: Floats, hold: Floats) -> float:
        """Each request pays a LOAD or the hold since the one before, whichever is less."""
        at = self._deep
        if not len(at):
            return 0.0
        gap = np.diff(self._closes[at], prepend=self._closes[at[0]])
        gap[self._heads] = 0.0 if self._warm else np.inf
        slack = self._opens[at] - self._closes[at]
        with np.errstate(invalid="ignore"):
            keep = np.nan_to_num(hold[at] * gap, nan=0.0, posinf=np.inf)
        cost = np.minimum(np.maximum(load[at] - hold[at] * np.maximum(slack, 0.0), 0.0), keep)
        return float(np.maximum(value[at] - cost, 0.0).sum())


def _latest_opening(costs: Costs) -> Floats:
    """The last instant at which a stay that serves this request may begin, made ascending within each model.

    If a request with a late deadline arrives before one with an early deadline, the later request is given
    the other's deadline: a relaxation, and the only one that mixed SLOs within one model need.
    """
    latest = costs.end - costs.shortest_ns
    if not len(latest):
        return latest
    span = latest.max() - latest.min() + 1.0
    base = np.cumsum(np.diff(costs.model, prepend=costs.model[0]) != 0) * span
    return np.asarray(np.maximum.accumulate(latest + base) - base)
