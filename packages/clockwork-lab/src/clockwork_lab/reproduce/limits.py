"""Limits that no policy can exceed, by the oracle, for intervals of a figure's workload."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from msgspec import Struct

from clockwork_lab.oracle.bound import OracleBound, model_costs, upper_bound
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.sim import Cluster
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.stream import Arrivals, build

OTHERS_WEIGH = 10.0
"""The weight of a class of requests that is to be served in full, so that it always has priority."""


class LimitStretch(Struct, frozen=True):
    """An interval of a workload: from ``start_s``, of this length."""

    start_s: float
    seconds: float


def stretches(run: FigureRun, scenario: Scenario, wanted: Sequence[LimitStretch]) -> list[Arrivals]:
    """The requests of open loads in each stretch, read in one pass; stretches ascend and do not overlap."""
    found = [Arrivals([], [], [], []) for _ in wanted]
    bounds = [
        (round(each.start_s * NS_PER_S), round((each.start_s + each.seconds) * NS_PER_S)) for each in wanted
    ]
    for block in build(scenario, run.seed).open():
        for (from_ns, to_ns), into in zip(bounds, found, strict=True):
            part = slice(bisect_left(block.times_ns, from_ns), bisect_left(block.times_ns, to_ns))
            into.times_ns += block.times_ns[part]
            into.models += block.models[part]
            into.slos_ns += block.slos_ns[part]
            into.loads += block.loads[part]
        if bounds and block.times_ns[0] >= bounds[-1][1]:
            break
    return found


def bound(
    run: FigureRun, kinds: str | Sequence[str], requests: Arrivals, *, devices: int,
    rates_rps: Sequence[float] | None = None, first_class: int | None = None,
) -> OracleBound:  # fmt: skip
    """The oracle's bound for a stretch of a longer run, on models of one kind, or of a kind each.

    Noise may shorten every duration, and any weights may be there at the start. ``first_class`` is a load
    whose requests must all be served. ``rates_rps`` by model: those without foresight are bounded, too.
    """
    cluster = Cluster(devices=devices)
    if isinstance(kinds, str):
        kinds = [kinds] * (max(requests.models) + 1)
    costs = {kind: model_costs(run.zoo[kind], cluster.page_bytes) for kind in set(kinds)}
    weights = None
    if first_class is not None:
        weights = [OTHERS_WEIGH if load == first_class else 1.0 for load in requests.loads]
    return upper_bound(
        requests, [costs[kind] for kind in kinds], cluster, network=run.constants.network,
        noise=run.constants.noise, warm_start=True, weights=weights, rates_rps=rates_rps,
    )  # fmt: skip


def satisfactions(run: FigureRun, kind: str, found: Iterable[Arrivals], *, devices: int) -> list[float]:
    """The largest share of each stretch's requests that can be answered in time."""
    limits = [bound(run, kind, requests, devices=devices) for requests in found]
    return [min(1.0, limit.goodput / limit.offered) for limit in limits]
