"""Arrival processes: their rates, how uneven they are, and that no border between pieces is seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.processes import Block, Popularity, Renewals, gathered, in_order
from clockwork_serve.workload.scenario import Ramp
from tests.workload.scenarios import load, requests


def gaps_s(times_ns: np.ndarray) -> np.ndarray:
    return np.diff(times_ns) / NS_PER_S


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["poisson", "fixed", 0.5, 1.5]),
    rate=st.floats(20, 2000),
    seed=st.integers(0, 1 << 30),
)
def test_the_rate_is_what_was_asked_for(kind, rate, seed) -> None:
    name, cv = (kind, 0.0 if kind == "fixed" else 1.0) if isinstance(kind, str) else ("gamma", kind)
    own = {"cv": kind} if name == "gamma" else {}
    made = requests(load(name, rate_rps=rate, **own), seed=seed)["times_ns"]

    expected = rate * 20
    assert abs(made.size - expected) <= 6 * cv * np.sqrt(expected) + 5


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.0, 5.0])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(cv) -> None:
    gaps = gaps_s(requests(load("gamma", rate_rps=500.0, cv=cv), copies=1, seconds=200)["times_ns"])

    assert gaps.mean() == pytest.approx(1 / 500, rel=0.03 * max(1, cv))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)


def test_a_poisson_load_is_poisson_for_each_model() -> None:
    made = requests(load(rate_rps=2000.0), seconds=100)
    for model in range(4):
        gaps = gaps_s(made["times_ns"][made["models"] == model])
        assert gaps.mean() == pytest.approx(1 / 500, rel=0.03)
        assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.03)


def test_a_fixed_load_is_even_and_models_take_turns() -> None:
    made = requests(load("fixed", rate_rps=40.0, start_s=1.0), seconds=11)

    assert made["times_ns"].tolist() == [NS_PER_S + index * 25_000_000 for index in range(400)]
    assert made["models"].tolist() == [0, 1, 2, 3] * 100


@given(rate=st.floats(0.01, 3000), seconds=st.floats(1, 300), models=st.integers(1, 7))
@settings(max_examples=30)
def test_a_fixed_load_has_as_many_requests_as_fit(rate, seconds, models) -> None:
    if rate * seconds > 50_000:
        rate = 50_000 / seconds
    made = requests(load("fixed", rate_rps=rate), seconds=seconds, copies=models)

    assert abs(made["times_ns"].size - rate * seconds) <= 1.001


def test_a_rate_steps_at_its_instants() -> None:
    ramp = Ramp(every_s=5.0, factor=2.0)
    times = requests(load("fixed", rate_rps=100.0, rate_ramp=ramp), copies=1)["times_ns"]

    for step, rate in enumerate((100, 200, 400, 800)):
        inside = times[(times >= step * 5 * NS_PER_S) & (times < (step + 1) * 5 * NS_PER_S)]
        assert abs(inside.size - 5 * rate) <= 1
        assert gaps_s(inside) == pytest.approx(1 / rate, rel=1e-3)


def test_models_join_at_their_instants_and_share_the_rate() -> None:
    made = requests(
        load(rate_rps=3000.0, active_models=1, model_ramp=Ramp(every_s=2.0, add=1)), copies=8, seconds=20
    )
    step = made["times_ns"] // (2 * NS_PER_S)

    for passed in range(10):
        counts = np.bincount(made["models"][step == passed], minlength=8)
        active = min(8, passed + 1)
        assert counts[active:].sum() == 0
        assert counts[:active] == pytest.approx(6000 / active, rel=0.25)


def test_popular_models_get_what_their_rank_says() -> None:
    made = requests(load(rate_rps=5000.0, popularity="zipf", zipf_s=1.2), copies=10)
    shares = np.bincount(made["models"], minlength=10) / made["models"].size
    weights = np.arange(1, 11) ** -1.2

    assert shares == pytest.approx(weights / weights.sum(), rel=0.1)


def test_gamma_loads_are_popular_by_rank_too() -> None:
    made = requests(load("gamma", rate_rps=5000.0, cv=0.5, popularity="zipf"), copies=10)
    weights = 1 / np.arange(1, 11)

    assert np.bincount(made["models"]) == pytest.approx(100_000 * weights / weights.sum(), rel=0.05)


def test_bursts_come_and_go_with_exponential_lengths() -> None:
    made = requests(load("fixed", rate_rps=1000.0, on_s=0.5, off_s=1.5), copies=1, seconds=2000)["times_ns"]
    gaps = gaps_s(made)
    pauses = gaps[gaps > 0.01]

    assert made[0] < NS_PER_S // 100
    assert made.size / 2000 == pytest.approx(250, rel=0.15)
    assert pauses.mean() == pytest.approx(1.5, rel=0.12)
    assert pauses.std() / pauses.mean() == pytest.approx(1.0, rel=0.12)
    assert pauses.size == pytest.approx(1000, rel=0.12)


@settings(max_examples=25)
@given(
    cuts=st.lists(st.floats(0.001, 30.0), min_size=1, max_size=40),
    cv=st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    seed=st.integers(0, 1 << 30),
)
def test_a_renewal_goes_on_over_the_borders_of_its_pieces(cuts, cv, seed) -> None:
    streams = Renewals(np.random.default_rng(seed), cv, 200)
    found = [streams.advance(np.full(200, cut)) for cut in cuts]

    for places, _ in found:
        assert ((places >= 0) & (places < 1)).all()
    starts = np.cumsum([0.0, *cuts[:-1]])
    at = np.concatenate(
        [start + places * cut for start, cut, (places, _) in zip(starts, cuts, found, strict=True)]
    )
    which = np.concatenate([who for _, who in found])
    expected = 200 * sum(cuts)
    assert abs(at.size - expected) <= 6 * max(cv, 0.2) * np.sqrt(expected + 200) + 6
    if cv == 0.0:
        for stream in range(200):
            assert np.diff(np.sort(at[which == stream])) == pytest.approx(1.0, abs=1e-5)


def test_streams_of_different_variation_keep_their_own() -> None:
    streams = Renewals(np.random.default_rng(1), np.array([0.3, 3.0]), 2)
    places, which = streams.advance(np.array([20_000.0, 20_000.0]))

    for stream, cv in enumerate((0.3, 3.0)):
        gaps = np.diff(np.sort(places[which == stream]))
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_a_stream_that_rests_expects_nothing() -> None:
    streams = Renewals(np.random.default_rng(1), 0.0, 2)
    places, which = streams.advance(np.array([0.0, 3.0]))

    assert which.tolist() == [1, 1, 1]
    assert places == pytest.approx([0.5 / 3, 1.5 / 3, 2.5 / 3])


def test_a_block_is_in_order_and_before_its_end() -> None:
    block = in_order(100, 200, np.array([0.9999, 0.0, 0.5]), np.array([7, 8, 9]))

    assert block.times_ns.tolist() == [100, 150, 199]
    assert block.models.tolist() == [8, 9, 7]


@given(st.lists(st.lists(st.integers(0, 10**10 - 1), max_size=30), max_size=30))
@settings(max_examples=30)
def test_gathering_loses_nothing(lists) -> None:
    blocks = []
    for index, inside in enumerate(lists):
        times = np.sort(np.array(inside, dtype=np.int64)) + index * 10**10
        blocks.append(Block((index + 1) * 10**10, times, np.arange(times.size, dtype=np.int32)))
    merged = list(gathered(blocks))

    for name in ("times_ns", "models"):
        before = [value for block in blocks for value in getattr(block, name).tolist()]
        assert [value for block in merged for value in getattr(block, name).tolist()] == before
    assert not blocks or merged[-1].end_ns == blocks[-1].end_ns
    assert all(block.times_ns.size == 0 or block.times_ns[-1] < block.end_ns for block in merged)


def test_ranks_beyond_the_active_ones_have_no_share() -> None:
    assert Popularity(4, None).shares(2).tolist() == [0.5, 0.5, 0, 0]
    assert set(Popularity(4, 1.0).draw(np.random.default_rng(1), 2, 100).tolist()) == {0, 1}
