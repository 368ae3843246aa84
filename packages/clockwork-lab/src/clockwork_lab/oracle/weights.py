"""The gain of requests whose weights must be loaded and kept, at given prices of LOADs and pages.

The price of LOAD lanes is per ns; the price of pages is per page and ns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from clockwork_lab.oracle.costs import Costs, Floats, Ints, ModelCosts
from clockwork_serve.units import NS_PER_S

DEEP = 512  # models with more requests are bounded request by request instead of by their best stays


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
        self._rows = [first[: int(np.searchsorted(-count, -row, "left"))] + row for row in range(rows)]
        self._first = first
        self._split = self._splits(costs)
        self._at: Ints = np.concatenate((first[:0], *self._rows))  # all rows, one behind the other

    def _splits(self, costs: Costs) -> list[Ints]:
        """By row: the first request of the model whose stay with this one may be of the shortest kind.

        Each is its place in a table with a row of all models for each of ours.
        """
        splits, split = [], self._first.copy()
        for at in self._rows:
            split = split[: len(at)]
            limit = self._closes[at] - costs.shortest_ns[at]
            while True:
                behind = (split < at) & (self._opens[split] < limit)
                if not behind.any():
                    break
                split = split + behind
            splits.append((split - self._first[: len(at)]) * len(self._first) + np.arange(len(at)))
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
        at, models = self._at, len(self._first)
        value, load, price = value[at], load[at], hold[at]
        opening, closing = price * self._opens[at], price * self._closes[at]
        shortest = price * self._costs.shortest_ns[at]
        since_start = price * np.maximum(0.0, self._closes[at] - self._start_ns)
        best, earned = np.zeros(models), np.zeros(models)
        lean = np.zeros((len(self._rows), models))  # best before this request, less all values before it
        long = np.full((len(self._rows) + 1, models), -np.inf)  # the most of lean plus hold * opening, so far
        end = 0
        for row, split in enumerate(self._split):
            active = len(split)
            here, end = slice(end, end + active), end + active
            most, sum_so_far, before = best[:active], earned[:active], lean[row, :active]
            np.subtract(most, sum_so_far, out=before)
            np.maximum(long[row, :active], before + opening[here], out=long[row + 1, :active])
            sum_so_far += value[here]
            stay = np.maximum(lean.take(split) - shortest[here], long.take(split) - closing[here])
            np.maximum(most, sum_so_far - load[here] + stay, out=most)
            if self._warm:
                np.maximum(most, sum_so_far - since_start[here], out=most)
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


# ------------------------------------------------------------
# A bound for policies without foresight, if arrivals are Poisson with known rates.
#
# A policy with foresight keeps exactly the weights that are needed again soon; others cannot. **Why it is a
# bound** (in expectation, for any policy, even one that knows the rates). Requests that are served arrived
#
# * while their weights occupied pages. Whether they do is decided before the arrival, which is independent of
# it; so these requests come at the model's rate times the time that its weights are there, and that time is
# what pages are charged for. What such a request pays for its lane follows from how many of its model came
# within a window before it (known) and after it (Poisson, independent): a batch has at most all of these.
# The best times to have the weights are those in which the first number is such that the gain exceeds the
# charge.
# * or before the LOAD that serves them started. Each then pays for that LOAD as if the most requests that can
# wait for one LOAD together with it shared it.
#
# The duration of a LOAD is not known before it begins, so LOADs take load lane time by their mean; whether
# one fits before a deadline is decided by the shortest.
#
# Served requests scatter about the bound by at most about the square root of their number.


MOST = 24  # the largest number of arrivals in a window that is distinguished; more suffice for any batch


class Chances:
    """What models with Poisson arrivals gain, by the number of arrivals in the window before an instant."""

    def __init__(
        self, costs: Costs, models: Sequence[ModelCosts], rates_rps: Sequence[float], lasts_ns: float
    ) -> None:
        """``lasts_ns``: the time over which requests arrive."""
        present, first = np.unique(costs.model, return_index=True)
        rate = np.array([rates_rps[one] for one in present]) / NS_PER_S
        can_wait = np.minimum.reduceat(costs.group, first) > 0
        curves: dict[tuple[tuple[int, int], ...], int] = {}
        curve = [curves.setdefault(tuple(models[one].infer_ns.items()), len(curves)) for one in present]
        columns = (
            rate, costs.pages[first], np.maximum.reduceat(costs.end - costs.release, first),
            np.maximum.reduceat(costs.weight, first), np.minimum.reduceat(costs.weight, first),
            np.where(can_wait, costs.load_ns[first], np.inf), costs.shortest_ns[first], curve,
        )  # fmt: skip
        alike, one, count = np.unique(np.column_stack(columns), axis=0, return_index=True, return_counts=True)
        self._rate, self._pages, room, self._weight, self._least, self._load_ns, self._alone_ns, _ = alike.T
        self._chance = _poisson(self._rate * (room - self._alone_ns))
        self._lane_ns = np.array(
            [_lane_ns(models[present[at]], wide) for at, wide in zip(one, room, strict=True)]
        )
        # a model without requests is not in the sample: the others represent it
        self._times_ns = lasts_ns * count / -np.expm1(-self._rate * lasts_ns)

    def worth(self, lane_price: float, load_price: float, page_price: float) -> float:
        """An upper bound on the gain of requests whose weights are resident on arrival, less pages' prices.

        It is beyond the gain that the least of them is counted with anyway, waiting alone for a LOAD.
        """
        gain = np.maximum(self._weight[:, None] - lane_price * self._lane_ns, 0.0)
        before = np.stack(
            [(self._chance * gain[:, seen : seen + MOST + 1]).sum(axis=1) for seen in range(MOST + 1)], axis=1
        )
        alone = self._least - lane_price * self._alone_ns - np.maximum(load_price, 1e-300) * self._load_ns
        before -= np.maximum(alone, 0.0)[:, None]
        profit = np.maximum(self._rate[:, None] * before - page_price * self._pages[:, None], 0.0)
        return float((self._chance * profit).sum(axis=1) @ self._times_ns)


class Online:
    """The bound at given prices, where models of at least ``frequent_rps`` count as frequent."""

    def __init__(
        self, costs: Costs, models: Sequence[ModelCosts], rates_rps: Sequence[float], frequent_rps: float,
        start_ns: float, lasts_ns: float, *, warm: bool, longer_ns: float = 0.0,
    ) -> None:  # fmt: skip
        """``longer_ns``: by how much the mean of a LOAD exceeds its least duration."""
        frequent = np.asarray(rates_rps, dtype=np.float64)[costs.model] >= frequent_rps
        self._often = costs.only(frequent)
        self._seldom = costs.only(~frequent).longer_loads(longer_ns)
        self._stays = Stays(self._often, start_ns, warm=warm)
        self._chances = Chances(self._seldom, models, rates_rps, lasts_ns) if not frequent.all() else None

    def worth(self, lane_price: float, load_price: float, page_price: float) -> float:
        """An upper bound on the gain of all requests, less the prices of lanes, LOADs and pages."""
        often, seldom = self._often, self._seldom
        known = np.maximum(often.weight - often.lane_ns * lane_price, 0.0)
        total = self._stays.worth(known, load_price, page_price)
        if self._chances is not None:
            share = seldom.lane_ns * lane_price + seldom.load_ns * load_price / np.maximum(seldom.group, 1.0)
            total += float(np.maximum(seldom.weight - share, 0.0)[seldom.group > 0].sum())
            total += self._chances.worth(lane_price, load_price, page_price)
        return total


def _poisson(mean: Floats) -> Floats:
    """By model, the probabilities of 0..MOST arrivals; the last is that of MOST or more."""
    count = np.arange(MOST)
    logs = np.array([math.lgamma(one + 1.0) for one in count])
    with np.errstate(divide="ignore"):
        chance = np.exp(count * np.log(np.maximum(mean, 1e-300))[:, None] - mean[:, None] - logs)
    return np.concatenate((chance, np.maximum(0.0, 1.0 - chance.sum(axis=1, keepdims=True))), axis=1)


def _lane_ns(model: ModelCosts, room_ns: float) -> Floats:
    """The least lane time of a request by how many others are near: 0..2 MOST."""
    company = np.arange(1.0, 2 * MOST + 2)
    company[MOST:] = np.inf
    least = np.full(len(company), np.inf)
    for size, lasts in model.infer_ns.items():
        if lasts <= room_ns:
            least = np.minimum(least, lasts / np.minimum(company, size))
    return least
