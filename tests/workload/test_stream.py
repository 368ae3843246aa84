"""Streams: in order, inside their times, the same for a seed, merged without a seam."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload import processes as schedule
from clockwork_serve.workload import stream
from clockwork_serve.workload.scenario import ClusterTable, FaultTable, ModelSet, Ramp, Scenario
from clockwork_serve.workload.stream import build
from tests.workload.scenarios import ROOT, load, open_loads, requests, run, scenario

DAY_NS = 24 * 3600 * NS_PER_S
PRINT_SUM = """
import zlib
from clockwork_serve.workload.scenario import read_scenario
from clockwork_serve.workload.stream import build
stream = build(read_scenario("examples/scenarios/burst.toml"), 7).open()
print(zlib.crc32(repr([(a.times_ns, a.models, a.slos_ns, a.loads) for a in stream]).encode()))
"""


@settings(max_examples=60)
@given(loads=st.lists(open_loads(), min_size=1, max_size=3), seed=st.integers(0, 1 << 40))
def test_requests_are_in_order_and_inside_their_loads_times(loads, seed) -> None:
    named = [type(one)(**{f: getattr(one, f) for f in one.__struct_fields__} | {"name": f"l{index}"})
             for index, one in enumerate(loads)]  # fmt: skip
    made = requests(*named, seed=seed)

    assert (np.diff(made["times_ns"]) >= 0).all()
    ties = np.diff(made["times_ns"]) == 0
    assert (np.diff(made["loads"])[ties] >= 0).all()
    for index, one in enumerate(loads):
        times = made["times_ns"][made["loads"] == index]
        assert times.size == 0 or times[0] >= round(one.start_s * NS_PER_S)
        assert times.size == 0 or times[-1] < round(one.stop_s * NS_PER_S)
    assert set(made["models"]) <= set(range(4))
    assert (made["slos_ns"] >= 1).all()


@settings(max_examples=20)
@given(loads=st.lists(open_loads(), min_size=1, max_size=2), most=st.integers(1, 500))
def test_how_the_stream_is_cut_does_not_change_it(loads, most) -> None:
    named = [type(one)(**{f: getattr(one, f) for f in one.__struct_fields__} | {"name": f"l{index}"})
             for index, one in enumerate(loads)]  # fmt: skip
    workload = build(scenario(*named), 3)
    whole = run(workload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_MOST", most)
        patch.setattr(stream, "LONGEST_NS", NS_PER_S // 7)
        cut = run(workload)
        assert all(len(part.times_ns) <= most for part in workload.open())

    assert all((whole[name] == cut[name]).all() for name in whole)


def test_a_window_is_a_minute_at_most_even_if_little_comes() -> None:
    for part in build(scenario(load(rate_rps=0.5), seconds=3600), 1).open():
        assert part.times_ns[-1] - part.times_ns[0] <= 60 * NS_PER_S


def test_a_workload_opens_anew_each_time() -> None:
    workload = build(scenario(load(), load("gamma", name="b", cv=3.0)), 5)
    first, second = run(workload), run(workload)

    assert all((first[name] == second[name]).all() for name in first)


def test_another_seed_gives_other_requests() -> None:
    assert (
        requests(load(), seed=1)["times_ns"][:50].tolist()
        != requests(load(), seed=2)["times_ns"][:50].tolist()
    )


def test_a_load_that_is_added_changes_no_other() -> None:
    alone = requests(load("gamma", cv=2.0))
    both = requests(load("gamma", cv=2.0), load(name="second", rate_rps=300.0))
    first = both["loads"] == 0

    assert (both["times_ns"][first] == alone["times_ns"]).all()
    assert (both["models"][first] == alone["models"]).all()


def test_the_same_seed_gives_the_same_stream_in_any_process() -> None:
    sums = {
        subprocess.run(
            [sys.executable, "-c", PRINT_SUM], cwd=ROOT, env={"PYTHONHASHSEED": hashing}, capture_output=True,
            check=True, text=True,
        ).stdout
        for hashing in ("1", "2")
    }  # fmt: skip

    assert len(sums) == 1


def test_memory_does_not_grow_with_time(monkeypatch) -> None:
    monkeypatch.setattr(schedule, "MOST_EXPECTED", 4096)

    def peak(seconds: float) -> int:
        workload = build(scenario(load("gamma", rate_rps=1000.0, cv=1.5), seconds=seconds), 1)
        tracemalloc.start()
        for _ in workload.open():
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(400.0) < 1.2 * peak(100.0)


def test_an_slo_steps_at_its_instants_and_stops_at_its_end() -> None:
    ramp = Ramp(every_s=4.0, factor=2.0, until=30.0)
    made = requests(load(rate_rps=500.0, start_s=3.0, slo_ms=10.0, slo_ramp=ramp))
    steps = (made["times_ns"] - 3 * NS_PER_S) // (4 * NS_PER_S)

    assert set(steps) == {0, 1, 2, 3, 4}
    for step, expected_ms in enumerate((10, 20, 30, 30, 30)):
        assert set(made["slos_ns"][steps == step]) == {expected_ms * NS_PER_MS}


def test_a_load_without_an_slo_has_a_day() -> None:
    assert set(requests(load())["slos_ns"]) == {DAY_NS}


def test_a_closed_load_is_data_for_its_driver() -> None:
    ramp = Ramp(every_s=10.0, factor=1.5)
    one = load(
        "closed", concurrency=16, start_s=2.0, stop_s=19.0, start_jitter_s=0.5, retry="retry_after",
        retry_ms=2.5, slo_ms=20.0, slo_ramp=ramp,
    )  # fmt: skip
    workload = build(scenario(load(), one.__class__(**{f: getattr(one, f) for f in one.__struct_fields__} |
                                                    {"name": "closed"})), 1)  # fmt: skip
    (closed,) = workload.closed

    assert (closed.load, closed.models, closed.concurrency) == (1, (0, 1, 2, 3), 16)
    assert (closed.start_ns, closed.stop_ns) == (2 * NS_PER_S, 19 * NS_PER_S)
    assert (closed.start_jitter_ns, closed.retry, closed.retry_ns) == (
        NS_PER_S // 2,
        "retry_after",
        2_500_000,
    )
    assert closed.slo.at(12 * NS_PER_S - 1) == 20 * NS_PER_MS
    assert closed.slo.at(12 * NS_PER_S) == 30 * NS_PER_MS
    assert workload.loads == ("load", "closed")


def test_models_are_named_by_their_sets_and_copies() -> None:
    sets = (ModelSet(name="one", kind="a"), ModelSet(name="two", kind="b", copies=2))
    made = build(Scenario(name="x", seconds=1, models=sets, loads=(load(models=("two",)),)), 1)

    assert made.models == (("one", "a"), ("two-0000", "b"), ("two-0001", "b"))
    assert {model for part in made.open() for model in part.models} == {1, 2}


def test_the_kind_star_is_every_model_of_the_paper() -> None:
    sets = (ModelSet(name="all", kind="*", copies=2),)
    names = build(Scenario(name="x", seconds=1, models=sets, loads=(load(models=("all",)),)), 1).models

    assert len(names) == 122
    assert all(name[:-5] == kind for name, kind in names)
    assert all(first[1] == second[1] for first, second in list(pairwise(names))[::2])


def test_two_sets_cannot_make_the_same_model() -> None:
    sets = (ModelSet(name="m", kind="a", copies=2), ModelSet(name="m-0001", kind="b"))

    with pytest.raises(
        ConfigError, match=r"models\[1\].name: expected each model once, found 'm-0001' again"
    ):
        build(Scenario(name="x", seconds=1, models=sets, loads=(load(),)), 1)


def test_a_fault_names_a_model_that_is_there() -> None:
    fault = FaultTable(kind="remove_model", at_s=1.0, model="m-0009")

    with pytest.raises(
        ConfigError, match=r"faults\[0\].model: expected a model, found 'm-0009'; did you mean m-000"
    ):
        build(scenario(load(), faults=(fault,), cluster=ClusterTable(devices=2)), 1)
