"""Lower bounds for the oracle: the least cost of each request, and prices of exec lane time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from clockwork_serve.sim.constants import Network, Noise
from clockwork_serve.units import NS_PER_US

# ------------------------------------------------------------
# The least cost of each request under any policy.
#
# All times are ns as float64 (exact up to 2**53). Requests are kept sorted by model, then by the first
# instant at which they can run.


Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class OracleRequests(Protocol):
    """Open-loop requests in any order: when sent (ns), index of their model, SLO (ns)."""

    @property
    def times_ns(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def models(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def slos_ns(self) -> Sequence[int]: ...  # noqa: D102


class ModelCosts(Struct, frozen=True, kw_only=True):
    """One model: durations of a batch of each size and of a LOAD, in ns, and the pages of its weights."""

    infer_ns: dict[int, int]
    load_ns: int
    pages: int

    def at_least(self, noise: Noise) -> ModelCosts:
        """The same with the shortest durations that noise allows."""
        infer_less = -round(min(0.0, noise.infer_us[0][1]) * NS_PER_US)
        load_less = -round(min(0.0, noise.load_us[0][1]) * NS_PER_US)
        return ModelCosts(
            infer_ns={size: max(1, lasts - infer_less) for size, lasts in self.infer_ns.items()},
            load_ns=max(1, self.load_ns - load_less),
            pages=self.pages,
        )


class Costs:
    """Requests that can be served at all, sorted by (model, release), and their least costs.

    ``release``: the first instant at which a request can run. ``end``: the last at which its run may end.
    ``lane_ns``: its least share of an exec lane, in the largest batch that it could be part of. ``group``:
    the most requests that one LOAD could serve together with it, all of them waiting when it starts; 0 if
    it cannot wait. ``shortest_ns``: the shortest run of its model. ``load_ns`` and ``pages``: of its model.
    """

    __slots__ = (
        "end", "group", "lane_ns", "load_ns", "model", "pages", "release", "shortest_ns",
        "source", "weight",
    )  # fmt: skip

    def __init__(
        self, requests: OracleRequests, models: Sequence[ModelCosts], network: Network, *,
        loads_from_ns: int | None, most_pages: int, weights: Sequence[float] | None,
    ) -> None:  # fmt: skip
        """``loads_from_ns``: no LOAD starts earlier; None: weights may be resident from the start.

        ``most_pages``: the most pages that a device has.
        """
        infer = _Durations(models)
        model = np.asarray(requests.models, dtype=np.int64)
        sent = np.asarray(requests.times_ns, dtype=np.float64)
        slo = np.asarray(requests.slos_ns, dtype=np.float64)
        weight = np.ones(len(sent)) if weights is None else np.asarray(weights, dtype=np.float64)
        way_ns = network.gateway_ns + network.worker_ns
        release, end = sent + way_ns, sent + slo - way_ns
        if loads_from_ns is not None:
            release = np.maximum(release, loads_from_ns + infer.load_ns[model])
        usable = (
            (end - release >= infer.shortest_ns[model]) & (weight > 0) & (infer.pages[model] <= most_pages)
        )
        at = np.flatnonzero(usable)
        at = at[np.lexsort((sent[at], release[at], model[at]))]
        self.source: Ints = at
        self.model: Ints = model[at]
        self.release: Floats = release[at]
        self.end: Floats = end[at]
        self.weight: Floats = weight[at]
        self.load_ns: Floats = infer.load_ns[self.model]
        self.pages: Floats = infer.pages[self.model]
        self.shortest_ns: Floats = infer.shortest_ns[self.model]
        self.lane_ns = self._least_lane_ns(infer)
        latest_load = self.end - self.shortest_ns - self.load_ns
        self.group: Floats = np.zeros(len(at))
        fits = np.flatnonzero(latest_load >= sent[at])
        self.group[fits] = self._companions(fits, sent[at][fits], latest_load[fits])

    def only(self, chosen: NDArray[np.bool_]) -> Costs:
        """A subset of the requests, each with its cost among all."""
        costs = copy(self)
        for name in Costs.__slots__:
            setattr(costs, name, getattr(self, name)[chosen])
        return costs

    def longer_loads(self, extra_ns: float) -> Costs:
        """The same with longer LOADs in the costs, without changing which requests can be served."""
        costs = copy(self)
        costs.load_ns = self.load_ns + extra_ns
        return costs

    def _least_lane_ns(self, infer: _Durations) -> Floats:
        """Least over sizes b of infer(b) / min(b, requests that can share a batch of size b with it)."""
        least = np.full(len(self.model), np.inf)
        for size, lasts in infer.by_size.items():
            lasts_ns = lasts[self.model]
            latest = self.end - lasts_ns
            fits = np.flatnonzero(latest >= self.release)
            companions = self._companions(fits, self.release[fits], latest[fits])
            least[fits] = np.minimum(least[fits], lasts_ns[fits] / np.minimum(companions, size))
        return least

    def _companions(self, at: Ints, opens: Floats, closes: Floats) -> Floats:
        """For each interval [opens, closes]: the most intervals of its model with one common instant in it.

        ``opens`` ascends within a model. The count of intervals is largest where one of them opens.
        """
        if not len(at):
            return np.zeros(0)
        span = closes.max() - opens.min() + 1.0
        base = np.cumsum(np.diff(self.model[at], prepend=self.model[at[0]]) != 0) * span - opens.min()
        opened, closed = opens + base, closes + base
        depth = np.searchsorted(opened, opened, "right") - np.searchsorted(np.sort(closed), opened, "left")
        first = np.searchsorted(opened, opened, "left")
        last = np.searchsorted(opened, closed, "right")
        return range_best(depth.astype(np.float64), first, last, np.maximum)


class _Durations:
    """The models' durations as arrays by model: ``by_size[b]`` is inf where a model has no batch size b."""

    def __init__(self, models: Sequence[ModelCosts]) -> None:
        sizes = sorted({size for one in models for size in one.infer_ns})
        self.by_size = {
            size: np.array([float(one.infer_ns.get(size, np.inf)) for one in models]) for size in sizes
        }
        self.load_ns = np.array([float(one.load_ns) for one in models])
        self.pages = np.array([float(one.pages) for one in models])
        self.shortest_ns: Floats = np.min(list(self.by_size.values()), axis=0)


def range_best(
    values: Floats, first: NDArray[Any], last: NDArray[Any], better: Callable[[Floats, Floats], Floats]
) -> Floats:
    """``better`` (np.maximum or np.minimum) over values[first:last], for each pair; none may be empty.

    Overlapping halves of power-of-two length, one length after the other: O((values + pairs) log(longest)).
    """
    width = last - first
    level = np.frexp(width.astype(np.float64))[1] - 1
    best = np.empty(len(first))
    table = values
    for power in range(int(level.max()) + 1 if len(level) else 0):
        at = np.flatnonzero(level == power)
        best[at] = better(table[first[at]], table[last[at] - (1 << power)])
        table = better(table[: -(1 << power)], table[1 << power :]) if len(table) > 1 << power else table
    return best


# ------------------------------------------------------------
# Prices of exec lane time, slot by slot, that minimise the bound; any prices give a valid one.


MOST_SLOTS = 4096
MOST_PAIRS = 400_000
"""The most pairs of a request and a slot that it can use; slots are made longer to stay below it."""
EXACT_UP_TO = 512  # up to this many requests, slots begin and end exactly where requests can
TURNS = 2000
CHECKS_WITHOUT_GAIN = 10
"""The search ends after this many checks, every ``LOOK`` iterations, without an improvement by 1e-5."""
LOOK = 20
QUANTUM = 1e-3
"""Of many requests, those whose costs differ by less than this share are merged, at the lesser cost."""


class Groups(Struct, frozen=True):
    """Requests that are nearly equal: their first slot, the slot after their last, lane time and weight."""

    first: Ints
    last: Ints
    lane_ns: Floats
    weight: Floats


class LanePrices:
    """A price for each slot of time, per ns of lane: ``prices``, by slot between two ``edges``."""

    __slots__ = ("_first", "_groups", "_last", "_slots_ns", "edges", "prices")

    def __init__(self, costs: Costs) -> None:
        release, end = costs.release, costs.end
        if len(release) <= EXACT_UP_TO:
            self._cut(costs, np.unique(np.concatenate((release, end))))
            return
        low, high = float(release.min()), float(end.max())
        narrow = float(np.quantile(end - release, 0.1)) / 4
        slots = int(min(MOST_SLOTS, max(1.0, (high - low) / narrow)))
        self._cut(costs, np.linspace(low, high, slots + 1))
        while slots > 1 and int((self._groups.last - self._groups.first).sum()) > MOST_PAIRS:
            slots = (slots + 1) // 2
            self._cut(costs, np.linspace(low, high, slots + 1))

    def _cut(self, costs: Costs, edges: Floats) -> None:
        self.edges: Floats = edges
        self._first: Ints = np.maximum(np.searchsorted(edges, costs.release, "right") - 1, 0)
        self._last: Ints = np.maximum(np.searchsorted(edges, costs.end, "left"), self._first + 1)
        self._slots_ns: Floats = np.diff(edges)
        self.prices: Floats = np.zeros(len(self._slots_ns))
        self._groups = self._merged(costs)

    def _merged(self, costs: Costs) -> Groups:
        if len(costs.lane_ns) <= EXACT_UP_TO:
            return Groups(self._first, self._last, costs.lane_ns, costs.weight)
        each = costs.lane_ns / costs.weight
        rank = np.floor(np.log(each) / QUANTUM).astype(np.int64)
        rank -= rank.min()
        key = (self._first * len(self.edges) + self._last) * (int(rank.max()) + 1) + rank
        _, one, group = np.unique(key, return_index=True, return_inverse=True)
        weight = np.bincount(group, costs.weight).astype(np.float64)
        least = np.full(len(one), np.inf)
        np.minimum.at(least, group, each)
        return Groups(self._first[one], self._last[one], np.asarray(least * weight, dtype=np.float64), weight)

    @property
    def lasts_ns(self) -> float:
        """The time from the first instant at which a request can run to the last."""
        return float(self.edges[-1] - self.edges[0])

    def at_least(self) -> Floats:
        """The least price in each request's window."""
        return range_best(self.prices, self._first, self._last, np.minimum)

    def rent(self, devices: int) -> float:
        """The total price of all lanes."""
        return devices * float(self.prices @ self._slots_ns)

    def improve(self, devices: int) -> float:
        """Set prices under which the bound by exec lanes alone is (nearly) least; returns that bound.

        This is a linear program: requests buy lane time in the slots of their windows, at most what they
        need, and no slot sells more than it has. Solved by the primal-dual method of Chambolle and Pock, with
        the steps of Pock and Chambolle (2011): requests buy more where they gain, prices rise where too much
        is bought.
        """
        groups = self._groups
        width = groups.last - groups.first
        begin = np.cumsum(width) - width
        who = np.repeat(np.arange(len(width)), width)
        slot = np.arange(len(who)) - begin[who] + groups.first[who]
        slots = len(self._slots_ns)
        unit, usual = float(self._slots_ns.mean()) * devices, float(np.median(groups.weight / groups.lane_ns))
        have, need = self._slots_ns * devices / unit, groups.lane_ns / unit
        gain = (groups.weight / groups.lane_ns / usual)[who]
        bought, price, spare = np.zeros(len(who)), np.ones(slots), np.zeros(len(width))
        slot_step = 1.0 / np.maximum(np.bincount(slot, minlength=slots), 1)
        best, waited = float(groups.weight.sum()), 0
        for turn in range(1, TURNS + 1):
            more = np.maximum(bought + 0.5 * (gain - price[slot] - spare[who]), 0.0)
            ahead, bought = 2 * more - bought, more
            price = np.maximum(price + slot_step * (np.bincount(slot, ahead, slots) - have), 0.0)
            spare = np.maximum(spare + (np.add.reduceat(ahead, begin) - need) / width, 0.0)
            if turn % LOOK == 0:
                bound = self._bound(price * usual, devices)
                waited = 0 if bound < best * (1 - 1e-5) else waited + 1
                if bound < best:
                    best, self.prices = bound, price * usual
                if waited == CHECKS_WITHOUT_GAIN:
                    break
        return best

    def _bound(self, prices: Floats, devices: int) -> float:
        groups = self._groups
        floor = range_best(prices, groups.first, groups.last, np.minimum)
        earned = np.maximum(groups.weight - groups.lane_ns * floor, 0.0)
        return devices * float(prices @ self._slots_ns) + float(earned.sum())
