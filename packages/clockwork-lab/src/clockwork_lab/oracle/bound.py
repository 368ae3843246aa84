"""An upper bound on how many requests of an open-loop workload any scheduler can serve in time.

The constraints that it keeps: an INFER runs uninterrupted and alone on its device's exec lane, for the
profile's duration at its batch size, and serves requests of one model that have reached the worker and whose
responses reach the client in time, while the model's weights are resident; a LOAD occupies the device's load
lane and, until the weights are evicted, their pages. The rest is relaxed, as follows.

**Why it is a bound** (weak duality). Take any schedule, and any nonnegative prices: l(t) for exec lane time,
n for load lane time, m for a page in use. No schedule uses more than the available resources, so

    served <= served + sum of l(t) (D - exec lanes busy at t) + n (D T - load lane time)
                     + m (D P T - page time)
            = D sum of l + n D T + m D P T                                     (the value of all resources)
              + sum over models of (requests served - what they, their LOADs and their pages cost).

The last sum is bounded model by model:

* A request's share of its batch's run is at least c = min over sizes b of infer(b) / min(b, g(b)), where
  g(b) is the most requests of its model that could start together with it in a batch of size b. The run
  lies between the request's reaching the worker and the last instant that is in time, so it costs at least
  c times the least l in between.
* Weights on several devices at once cost no less than on one of them at a time, so a model's residence is a
  set of disjoint stays, each with a LOAD (none if it begins warm). A stay that serves requests i..j lasts
  at least from the last instant at which i can start to the first at which j can end. The best set of stays
  is found by dynamic programming over the model's requests (exact if deadlines ascend with arrivals; else
  deadlines are enlarged until they do, which allows more). Models with very many requests are bounded
  request by request: each pays for a LOAD or for keeping the weights since the request before, whichever is
  less.

Every price gives a bound; the least one found is returned. If ``rates_rps`` are given, arrivals are taken to
be Poisson, and policies without foresight are bounded too, in expectation (see ``oracle.weights``): with
thousands of cold models they can serve far fewer requests than with foresight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from clockwork_lab.oracle.costs import Costs, LanePrices, ModelCosts, OracleRequests
from clockwork_lab.oracle.prices import Market, with_foresight, without_foresight
from clockwork_lab.oracle.weights import Online
from clockwork_serve.sim.constants import Network, Noise, read_constants
from clockwork_serve.units import NS_PER_S, NS_PER_US
from clockwork_serve.workload.zoo import ZooModel

if TYPE_CHECKING:
    from clockwork_serve.sim.constants import Cluster


class OracleBound(Struct, frozen=True, kw_only=True):
    """At most ``goodput`` requests (or weight) can be served in time; ``count`` is it rounded down.

    ``prices``: requests per second of an exec lane (on average), of a load lane, and of a page. ``limits``:
    each resource's share of the bound: scarce ones have a large share; ``requests`` is the rest: requests so
    cheap that only their number limits them. ``foresight``: the bound holds even for schedulers that know all
    arrivals in advance.
    """

    offered: int
    goodput: float
    prices: Mapping[str, float]
    limits: Mapping[str, float]
    foresight: bool = True

    @property
    def count(self) -> int:
        """The bound as a number of requests, where each weighs 1, with a tolerance for rounding errors."""
        return math.floor(self.goodput * (1 + 1e-9) + 1e-6)


def model_costs(row: ZooModel, page_bytes: int) -> ModelCosts:
    """A row of a zoo as the oracle's input."""
    sizes = row.batch_sizes()
    return ModelCosts(
        infer_ns={size: row.infer_ns[size] for size in sizes},
        load_ns=row.load_ns,
        pages=-(-row.weights_bytes // page_bytes),
    )


def upper_bound(
    requests: OracleRequests, models: Sequence[ModelCosts], cluster: Cluster, *,
    network: Network | None = None, noise: Noise | None = None, warm_start: bool = False,
    weights: Sequence[float] | None = None, rates_rps: Sequence[float] | None = None,
) -> OracleBound:  # fmt: skip
    """The most of ``requests`` that can be served in time on ``cluster`` from an empty start at time 0.

    ``noise``: durations may be as short as it allows (else they are the profile's); policies that do not know
    arrivals do not know the noise either, so their LOADs take lane time by their mean. ``warm_start``: any
    weights that fit may be resident at no cost when the first request is sent; use it for an interval of a
    longer run. ``weights``: what each request counts (by default 1). To bound one class while another is
    served in full, give the other a weight with which it always has priority (10, say), and subtract its
    weight from the result. ``rates_rps``: by model; see the module.
    """
    network = network or read_constants().network
    offered = len(requests.times_ns)
    first_ns = float(min(requests.times_ns, default=0)) if warm_start else 0.0
    longer_ns = 0.0 if noise is None else noise.load_over_least_us * NS_PER_US
    if noise is not None:
        models = [model.at_least(noise) for model in models]
    costs = Costs(
        requests, models, network, weights=weights, most_pages=cluster.pages,
        loads_from_ns=None if warm_start else network.worker_ns,
    )  # fmt: skip
    if not len(costs.source):
        return OracleBound(offered=offered, goodput=0.0, prices={}, limits={})
    market = Market(costs, LanePrices(costs), cluster.devices, cluster.pages, first_ns)
    found = with_foresight(market, warm=warm_start)
    if rates_rps is not None:
        lasts_ns = (float(max(requests.times_ns)) - first_ns) * (1 + 1 / offered)
        for frequent_rps in _frequent(costs, rates_rps):
            online = Online(
                costs, models, rates_rps, frequent_rps, first_ns, lasts_ns, warm=warm_start,
                longer_ns=longer_ns,
            )  # fmt: skip
            found = min((found, without_foresight(market, online)), key=lambda one: one.bound)
    limits = {name: rent / found.bound for name, rent in found.rents.items()}
    limits["requests"] = 1.0 - sum(limits.values())
    prices = dict(zip(("exec", "load", "page"), (price * NS_PER_S for price in found.prices), strict=True))
    return OracleBound(
        offered=offered, goodput=found.bound, prices=prices, limits=limits, foresight=found.foresight
    )


def _frequent(costs: Costs, rates_rps: Sequence[float]) -> list[float]:
    """Rates from which models count as frequent, by requests per usual window."""
    window_s = float(np.median(costs.end - costs.release)) / NS_PER_S
    rates = np.asarray(rates_rps)[np.unique(costs.model)]
    limits = {
        int(np.count_nonzero(rates >= share / window_s)): share / window_s for share in (0.05, 0.3, 1.0)
    }
    return [limit for models, limit in limits.items() if models < len(rates)]


def closed_loop_limit_rps(
    infer_ns: Mapping[int, int], slo_ns: int, max_batch: int, devices: int = 1, network: Network | None = None
) -> float:
    """The most responses in time per second that any number of closed-loop clients can get.

    D / min of infer(b) / b over the batch sizes whose run fits into the SLO with the least delays; 0 if
    none does.
    """
    network = network or read_constants().network
    room_ns = slo_ns - 2 * (network.gateway_ns + network.worker_ns)
    rates = [size / lasts for size, lasts in infer_ns.items() if size <= max_batch and lasts <= room_ns]
    return devices * NS_PER_S * max(rates, default=0.0)
