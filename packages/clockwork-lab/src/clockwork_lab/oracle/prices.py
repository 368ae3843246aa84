"""Searches for the prices with the least bound; any prices give a valid bound."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from msgspec import Struct

from clockwork_lab.oracle.costs import Costs, Floats, LanePrices
from clockwork_lab.oracle.weights import Online, Stays

TURNS = 80  # iterations of the ellipsoid method: more improve the bound by less than 0.1 %
SCALES = (3.0, 40.0)  # upper ends of the ranges searched, as multiples of the usual prices


class Found(Struct, frozen=True, kw_only=True):
    """A bound, the prices per ns of an exec lane, a load lane and a page that give it; what each brings."""

    bound: float
    prices: tuple[float, float, float]
    rents: dict[str, float]
    foresight: bool


class Market:
    """The resources: ``lanes`` for exec, and load lanes and pages of ``devices`` from ``start_ns`` on."""

    def __init__(self, costs: Costs, lanes: LanePrices, devices: int, pages: int, start_ns: float) -> None:
        self.costs = costs
        self.lanes = lanes
        self.devices = devices
        self.pages = pages
        self.start_ns = start_ns
        self.lasts_ns = float(costs.end.max()) - start_ns
        self._alone = lanes.improve(devices)
        self._floor = lanes.at_least()
        self._rent = lanes.rent(devices)
        self._alone_factor = float(self._floor.any())
        if not self._floor.any():
            flat = 1.0 / float(costs.lane_ns.max())
            self._floor = np.full(len(costs.lane_ns), flat)
            self._rent = devices * flat * lanes.lasts_ns

    def rents(self, prices: Floats) -> dict[str, float]:
        """The total price of all resources."""
        total_ns = self.devices * self.lasts_ns
        return {
            "exec": self._rent * float(prices[0]), "load": total_ns * float(prices[1]),
            "pages": total_ns * self.pages * float(prices[2]),
        }  # fmt: skip

    def lanes_alone(self) -> Found:
        """The bound by exec lanes alone."""
        return self.found(np.array([self._alone_factor, 0.0, 0.0]), self._alone, foresight=True)

    def value(self, factor: float) -> Floats:
        """What each request gains less the price of its lane time."""
        return np.maximum(self.costs.weight - self.costs.lane_ns * self._floor * factor, 0.0)

    def found(self, prices: Floats, bound: float, *, foresight: bool) -> Found:
        """The bound with its prices."""
        rents = self.rents(prices)
        lane_ns = self.devices * self.lanes.lasts_ns
        each = (rents["exec"] / lane_ns, float(prices[1]), float(prices[2]))
        return Found(bound=bound, prices=each, rents=rents, foresight=foresight)

    def scale(self) -> Floats:
        """Prices at which a usual run, LOAD or wait for the next request costs what one request gains."""
        costs = self.costs
        usual, paid = float(np.median(costs.weight)), costs.lane_ns * self._floor
        models = 1 + int(np.count_nonzero(np.diff(costs.model)))
        per_model = len(costs.model) / models / self.lasts_ns
        return usual * np.array([
            1.0 / float(np.median(paid[paid > 0.0])), 1.0 / float(np.median(costs.load_ns)),
            per_model / float(np.median(costs.pages)),
        ])  # fmt: skip


def with_foresight(market: Market, *, warm: bool) -> Found:
    """The least bound for policies that know all arrivals: by exec lanes alone, or with LOADs and pages."""
    costs = market.costs
    if costs.pages[np.flatnonzero(np.diff(costs.model, prepend=-1))].sum() <= market.pages:
        return market.lanes_alone()  # all weights fit on every device
    stays = Stays(costs, market.start_ns, warm=warm)

    def bound_at(prices: Floats) -> float:
        worth = stays.worth(market.value(float(prices[0])), float(prices[1]), float(prices[2]))
        return sum(market.rents(prices).values()) + worth

    best = _least(bound_at, market.scale())
    return min((market.lanes_alone(), market.found(*best, foresight=True)), key=lambda found: found.bound)


def without_foresight(market: Market, online: Online) -> Found:
    """The least bound for policies that know only rates, with a constant price of exec lanes."""
    lane_ns = market.devices * market.lanes.lasts_ns
    total_ns = market.devices * market.lasts_ns
    scale = market.scale()
    scale[0] = float(np.median(market.costs.weight) / np.median(market.costs.lane_ns))

    def rents(prices: Floats) -> dict[str, float]:
        exec_price, load_price, page_price = prices.tolist()
        return {
            "exec": lane_ns * exec_price, "load": total_ns * load_price,
            "pages": total_ns * market.pages * page_price,
        }  # fmt: skip

    prices, bound = _least(lambda point: sum(rents(point).values()) + online.worth(*point.tolist()), scale)
    return Found(bound=bound, prices=tuple(prices.tolist()), rents=rents(prices), foresight=False)


def _least(bound_at: Callable[[Floats], float], scale: Floats) -> tuple[Floats, float]:
    """The minimum over prices of the usual scale, and of a larger one for unusual requests."""
    for factor in SCALES:
        prices, bound = _ellipsoid(bound_at, factor * scale)
        if (prices < 0.9 * factor * scale).all():
            break  # the function is convex: this is the global minimum
    return prices, bound


def _ellipsoid(bound_at: Callable[[Floats], float], top: Floats) -> tuple[Floats, float]:
    """The minimum of a convex function over prices from 0 to ``top``, with gradients by differences."""
    axes = len(top)
    point, shape = top / 2, np.diag(axes * (top / 2) ** 2)
    best, best_point = np.inf, point
    for _ in range(TURNS):
        low = int(np.argmin(point / top))
        if point[low] < 0:
            slope = -np.eye(axes)[low]
        else:
            bound = bound_at(point)
            if bound < best:
                best, best_point = bound, point.copy()
            step = np.maximum(point, top * 1e-3) * 1e-3
            slope = np.array([bound_at(point + move) - bound for move in np.diag(step)]) / step
        length = float(slope @ shape @ slope) ** 0.5
        if not length:
            break
        cut = shape @ slope / length
        point = point - cut / (axes + 1)
        shape = axes**2 / (axes**2 - 1) * (shape - 2 / (axes + 1) * np.outer(cut, cut))
    return best_point, best
