"""The load that is likely to come: what stays as it is, what makes a step, what rises."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_serve.apps.scaling.demand import BUCKET_NS, FIRST_BUCKETS, MOST, LikelyLoad, RecentDemand
from clockwork_serve.messages import Request
from clockwork_serve.units import NS_PER_MS, NS_PER_S

FIRST_S = FIRST_BUCKETS * BUCKET_NS // NS_PER_S


def asked(demand: RecentDemand, rates_rps: dict[str, list[float]], seed: int = 1) -> int:
    """Poisson requests at these rates, a second each; returns when they end."""
    dice = np.random.default_rng(seed)
    seconds = max(len(rates) for rates in rates_rps.values())
    for second in range(seconds):
        times = [
            (second * NS_PER_S + int(at), model)
            for model, rates in rates_rps.items()
            for at in dice.integers(0, NS_PER_S, dice.poisson(rates[second]))
        ]
        for at_ns, model in sorted(times):
            demand.observe(
                Request(
                    request_id="r", gateway="g", model=model, arrival_ns=at_ns, tenant=f"of {model}",
                    deadline_ns=at_ns + 100 * NS_PER_MS,
                )
            )  # fmt: skip
    return seconds * NS_PER_S


def likely(rates_rps: dict[str, list[float]], ahead_s: float = 60.0) -> LikelyLoad:
    demand = RecentDemand()
    load = demand.likely(asked(demand, rates_rps), round(ahead_s * NS_PER_S))
    assert load is not None
    return load


def of(load: LikelyLoad, model: str) -> float:
    """Its rate."""
    return float((load.models == load.names.index(model)).sum()) * NS_PER_S / load.window_ns


def test_at_the_beginning_nothing_is_said() -> None:
    demand = RecentDemand()
    assert demand.likely(10**12, 0) is None
    assert demand.likely(asked(demand, {"a": [20.0] * (FIRST_S - 1)}), 0) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_steady_load_comes_again_as_it_came(seed: int) -> None:
    demand = RecentDemand()
    load = demand.likely(asked(demand, {"a": [50.0] * 300, "b": [2.0] * 300}, seed), 60 * NS_PER_S)
    assert load is not None
    assert of(load, "a") == pytest.approx(50, rel=0.1)
    assert (np.diff(load.times_ns) >= 0).all()
    assert 0 <= load.times_ns[0] <= load.times_ns[-1] < load.window_ns
    assert set(load.slos_ns.tolist()) == {100 * NS_PER_MS}
    assert {load.classes[one][1] for one in load.whose} == {"of a", "of b"}


@pytest.mark.parametrize("after_s", [5, 10, 60, 120, 250])
def test_a_step_is_seen_whenever_it_was(after_s: int) -> None:
    load = likely({"a": [20.0] * (300 - after_s) + [80.0] * after_s, "b": [20.0] * 300})
    assert of(load, "a") == pytest.approx(80, rel=0.25)
    assert of(load, "b") == pytest.approx(20, rel=0.2), "and nobody else is thought to have made it"
    since = load.times_ns[load.models == load.names.index("a")] // BUCKET_NS
    assert max(np.bincount(since)) < 1.6 * 80 * 5, "the old rate is not in it, and so no peak above the new"


def test_a_step_down_is_seen_too() -> None:
    load = likely({"a": [80.0] * 240 + [20.0] * 60})
    assert of(load, "a") == pytest.approx(20, rel=0.2)


def test_a_rise_goes_on_until_a_device_has_joined() -> None:
    rising = {"a": [50 + 0.2 * second for second in range(300)]}
    assert of(likely(rising, 0), "a") == pytest.approx(110, rel=0.12)
    assert of(likely(rising, 120), "a") == pytest.approx(134, rel=0.12)


def test_many_models_that_rise_a_little_are_seen_together() -> None:
    load = likely({f"m{at}": [0.5] * 240 + [1.0] * 60 for at in range(100)})
    assert load.rate_rps == pytest.approx(100, rel=0.1)


def test_what_is_played_is_bounded_and_memory_too() -> None:
    demand = RecentDemand()
    load = demand.likely(asked(demand, {"a": [500.0] * 60 + [2000.0] * 20}), 0)
    assert load is not None
    assert load.times_ns.size <= MOST
    assert load.rate_rps == pytest.approx(2000, rel=0.05)


def test_the_same_requests_are_the_same_load() -> None:
    rates = {"a": [50 + 0.2 * second for second in range(300)]}
    one, other = likely(rates), likely(rates)
    assert one.times_ns.tolist() == other.times_ns.tolist()


def test_a_load_that_ended_is_empty() -> None:
    demand = RecentDemand()
    end_ns = asked(demand, {"a": [20.0] * 300})
    load = demand.likely(end_ns + 400 * NS_PER_S, 0)
    assert load is not None
    assert load.times_ns.size == 0


def test_so_many_that_the_last_ones_alone_are_kept_are_played_at_their_rate() -> None:
    demand, now_ns = RecentDemand(), 0
    for at in range(300_000):
        now_ns = at * 100_000 + 7
        demand.observe(
            Request(request_id="r", gateway="g", model="a", arrival_ns=now_ns, deadline_ns=now_ns + 9)
        )
    for late_s in (0, 3):
        load = demand.likely(now_ns + late_s * NS_PER_S, 60 * NS_PER_S)
        assert load is not None
        assert load.rate_rps == pytest.approx(10_000, rel=0.01)
        assert load.times_ns.size == pytest.approx(MOST, abs=2)
