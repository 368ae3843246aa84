"""The oracle's bound against what policies do, and its options."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from clockwork_lab.oracle.bound import OracleBound, model_costs, upper_bound
from clockwork_lab.oracle.costs import ModelCosts
from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.sim.constants import Cluster, read_constants
from clockwork_serve.sim.simulation import Simulation
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.stream import Arrivals, Workload, build
from clockwork_serve.workload.tables import LoadTable, ModelSet
from clockwork_serve.workload.zoo import Zoo

pytestmark = pytest.mark.slow  # all together

NOISE = read_constants().noise
ZOO = Zoo.read("v100")
R50 = "resnet50_v2"
NAMES = ("times_ns", "models", "slos_ns", "loads")


def load(models: str, rate_rps: float, slo_ms: float, **more: object) -> LoadTable:
    """A load, by default of Poisson arrivals."""
    fields = {"arrivals": "poisson", **more}
    return LoadTable(name=models, models=(models,), rate_rps=rate_rps, slo_ms=slo_ms, **fields)  # type: ignore[arg-type]


def scenario(seconds: float, sets: Sequence[ModelSet], loads: Sequence[LoadTable]) -> Workload:
    """That workload."""
    return build(Scenario(name="s", seconds=seconds, models=tuple(sets), loads=tuple(loads)), seed=1)


def everything(workload: Workload) -> Arrivals:
    """All its requests at once."""
    requests = Arrivals([], [], [], [])
    for part in workload.open():
        for name in NAMES:
            getattr(requests, name).extend(getattr(part, name))
    return requests


def judged(
    workload: Workload, cluster: Cluster, rates_rps: Sequence[float] | None = None, *, noise: bool = False
) -> tuple[OracleBound, list[int]]:
    """The bound, and how many requests each policy answered in time."""
    models = [model_costs(ZOO[kind], cluster.page_bytes) for _, kind in workload.models]
    bound = upper_bound(
        everything(workload), models, cluster, rates_rps=rates_rps, noise=NOISE if noise else None
    )
    runs = [
        Simulation(
            workload=workload, zoo=ZOO, cluster=cluster, config=ControllerConfig(policy=policy), seed=1,
            noise=noise,
        )
        for policy in POLICIES
    ]  # fmt: skip
    return bound, [run.run().total().ok for run in runs]


ONE = (10, [ModelSet(name="m", kind=R50)], [load("m", 2200, 100)], Cluster())
BURSTS = (
    10,
    [ModelSet(name="a", kind=R50, copies=4), ModelSet(name="b", kind="resnet50_v1", copies=4)],
    [load("a", 3000, 100, on_s=1.0, off_s=2.0), load("b", 300, 250)],
    Cluster(),
)
COLD = (20, [ModelSet(name="m", kind=R50, copies=600)], [load("m", 400, 100)], Cluster(pages=224))


@pytest.mark.parametrize("case", [ONE, BURSTS], ids=["one model at 2.4 times capacity", "bursts, two SLOs"])
def test_no_policy_exceeds_the_bound_of_exec_lanes_and_the_best_comes_near(
    case: tuple[float, list[ModelSet], list[LoadTable], Cluster],
) -> None:
    seconds, sets, loads, cluster = case

    bound, goodput = judged(scenario(seconds, sets, loads), cluster)

    assert 0.9 * bound.goodput <= max(goodput) <= bound.count
    assert max(bound.limits, key=lambda one: bound.limits[one]) == "exec"


def test_no_policy_exceeds_the_bound_of_cold_models_and_the_best_comes_near() -> None:
    seconds, sets, loads, cluster = COLD

    bound, goodput = judged(scenario(seconds, sets, loads), cluster, [400 / 600] * 600)

    spread = 3 * math.sqrt(bound.goodput)  # it is an expectation
    assert 0.9 * bound.goodput <= max(goodput) <= bound.goodput + spread
    assert not bound.foresight
    assert max(bound.limits, key=lambda one: bound.limits[one]) == "load"
    assert bound.prices["load"] == pytest.approx(120, rel=0.1)  # 120 LOADs a second


def test_noise_that_nobody_foresees_gives_no_more_loads() -> None:
    seconds, sets, loads, cluster = COLD
    workload, rates = scenario(seconds, sets, loads), [400 / 600] * 600
    costs = model_costs(ZOO[R50], cluster.page_bytes)
    shortest = costs.at_least(NOISE)
    assert shortest.load_ns < 0.975 * costs.load_ns

    bound, goodput = judged(workload, cluster, rates, noise=True)
    usual, _ = judged(workload, cluster, rates)
    ever_shorter = upper_bound(everything(workload), [shortest] * 600, cluster, rates_rps=rates)

    assert 0.9 * bound.goodput <= max(goodput) <= bound.goodput + 3 * math.sqrt(bound.goodput)
    assert usual.goodput <= bound.goodput < 1.005 * usual.goodput
    assert bound.goodput < 0.99 * ever_shorter.goodput


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_exceeds_the_bound_on_mixtures(seed: int) -> None:
    dice = np.random.default_rng(seed)
    kinds = [R50, "resnet18_v1", "densenet169", "inceptionv3"]
    sets = [ModelSet(name=kind, kind=kind, copies=int(dice.integers(1, 12))) for kind in kinds]
    loads = [
        load(kind, float(dice.integers(300, 1200)), float(dice.integers(8, 120)), arrivals="gamma", cv=2.0)
        for kind in kinds
    ]
    cluster = Cluster(devices=int(dice.integers(1, 3)), pages=int(dice.integers(25, 200)))

    bound, goodput = judged(scenario(1.5, sets, loads), cluster, noise=bool(seed % 2))

    assert 0 < max(goodput) <= bound.count < bound.offered


# Options


def crowd(quiet: int) -> tuple[Arrivals, list[ModelCosts], list[float]]:
    """One busy model among many quiet ones, as in the paper's Fig 6: arrivals, models, rates."""
    sets = [ModelSet(name="minor", kind=R50), ModelSet(name="major", kind=R50, copies=quiet)]
    workload = scenario(4, sets, [load("minor", 100, 100), load("major", 500, 100)])
    models = [model_costs(ZOO[R50], Cluster().page_bytes)] * (quiet + 1)
    return everything(workload), models, [100.0, *[500.0 / quiet] * quiet]


def test_a_class_is_bounded_beside_one_that_is_served_in_full() -> None:
    requests, models, rates = crowd(1000)
    minor = requests.models.count(0)
    weights = [10.0 if model == 0 else 1.0 for model in requests.models]

    both = upper_bound(requests, models, Cluster(pages=350), rates_rps=rates)
    weighed = upper_bound(requests, models, Cluster(pages=350), rates_rps=rates, weights=weights)

    # 120 requests a second after a LOAD, 500 x 50 / 1000 warm, and some that share a LOAD
    assert (120 + 25) * 4 < weighed.goodput - 10 * minor < (120 + 25 + 30) * 4
    assert weighed.goodput - 10 * minor == pytest.approx(both.goodput - minor, rel=0.02)


def test_a_warm_start_allows_more_and_stretches_add_up_to_more_than_the_whole() -> None:
    requests, models, _ = crowd(100)
    whole = upper_bound(requests, models, Cluster(pages=350)).goodput
    parts = 0.0
    for begin in range(0, 4, 2):
        at = [one for one, sent in enumerate(requests.times_ns) if begin <= sent / NS_PER_S < begin + 2]
        part = Arrivals(*[[getattr(requests, name)[one] for one in at] for name in NAMES])
        parts += upper_bound(part, models, Cluster(pages=350), warm_start=True).goodput

    assert whole <= upper_bound(requests, models, Cluster(pages=350), warm_start=True).goodput
    assert whole <= parts * 1.001 <= 1.1 * whole


def test_noise_that_can_shorten_runs_allows_more() -> None:
    requests, models, _ = crowd(400)

    exact = upper_bound(requests, models, Cluster()).goodput
    noisy = upper_bound(requests, models, Cluster(), noise=NOISE).goodput

    assert exact < noisy < 1.04 * exact
