"""Prices of exec lane time, slot by slot, that make the bound small; none makes it wrong."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from clockwork_serve.sim.oracle_costs import Costs, Floats, Ints, range_best

MOST_SLOTS = 4096
MOST_PAIRS = 400_000
"""Slots are made longer until there are no more pairs of a request and a slot that it can use."""
EXACT_UP_TO = 512
"""So few requests get slots that begin and end exactly where requests can."""
TURNS = 2000
PATIENCE = 10
"""Looks, each after ``LOOK`` turns, without an improvement by 1e-5 that end the search."""
LOOK = 20
QUANTUM = 1e-3
"""Requests whose cost differs by this share are merged, at the lesser cost, where there are many."""


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
        """From the first instant at which a request can run to the last."""
        return float(self.edges[-1] - self.edges[0])

    def at_least(self) -> Floats:
        """The least price in each request's window: no share of a lane that it may use is cheaper."""
        return range_best(self.prices, self._first, self._last, np.minimum)

    def rent(self, devices: int) -> float:
        """What all lanes are worth together."""
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
                if waited == PATIENCE:
                    break
        return best

    def _bound(self, prices: Floats, devices: int) -> float:
        groups = self._groups
        floor = range_best(prices, groups.first, groups.last, np.minimum)
        earned = np.maximum(groups.weight - groups.lane_ns * floor, 0.0)
        return devices * float(prices @ self._slots_ns) + float(earned.sum())
