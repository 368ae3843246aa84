"""The sketches that cases are compared with, and what counts as met."""

from __future__ import annotations

import pytest

from benchmarks.causes import starved
from benchmarks.causes.__main__ import CASES, row
from benchmarks.causes.cases import ZOO, Case, Found, Given, calls, copies, share_in_time, simulated
from benchmarks.causes.sketches import Sketch
from clockwork_serve.sim import Cluster
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build

KIND = "resnet50_v1"
"""2.6 ms alone, 15.7 ms in a batch of 16."""


@pytest.mark.parametrize("name", ["edf", "yield-greedy"])
def test_a_sketch_serves_all_that_is_easy_and_a_share_of_what_is_too_much(name: str) -> None:
    sketch = Sketch(name)  # type: ignore[arg-type]
    easy = build(copies(KIND, 4, 2, calls(100, 50)), 1)
    much = build(copies(KIND, 4, 2, calls(4000, 50)), 1)

    served, overloaded = sketch.serve(easy, ZOO, 1), sketch.serve(much, ZOO, 1)

    assert served.in_time == 1
    assert 150 < served.offered < 250
    assert 300 < overloaded.good_rps < 1021 * 2.05 / 2, "no more than full batches, up to the last deadline"
    assert overloaded.good_rps == overloaded.in_time * overloaded.offered / 2


def test_a_sketch_runs_a_model_only_where_its_weights_are_and_as_slowly_as_the_device() -> None:
    load = build(copies(KIND, 2, 2, calls(100, 3)), 1)

    assert Sketch("edf").serve(load, ZOO, 2).in_time > 0.9
    assert Sketch("edf", homes=lambda *_: (0,)).serve(load, ZOO, 2).in_time < 0.9
    assert Sketch("edf", speeds=(2.0, 2.0)).serve(load, ZOO, 2).in_time == 0


def test_a_sketch_answers_clients_that_wait_for_their_answers() -> None:
    load = LoadTable(name="calls", models=("model",), arrivals="closed", concurrency=4, slo_ms=50.0)
    models = (ModelSet(name="model", kind=KIND),)
    workload = build(Scenario(name="closed", seconds=1, models=models, loads=(load,)), 1)

    served = Sketch("edf").serve(workload, ZOO, 1)

    assert served.in_time == 1
    assert 1 / 2.61e-3 < served.good_rps < 4 / 5.61e-3, "some in batches; never all four"


def test_a_case_has_the_share_in_time_beside_that_of_the_best_sketch() -> None:
    play = share_in_time(
        lambda seconds: copies(KIND, 1, seconds, calls(50, 50)), Cluster(), (Sketch("edf"),), short_s=1
    )
    case = Case("easy", "few requests", asked=1, before=0, play=play)

    found = case.play(Given(1, short=True))

    assert (found.value, found.sketch, case.met(found)) == (1, 1, True)
    assert row(case, found)[:4] == ("easy", "0.000", "1.000", "1.000")


def test_the_use_of_devices_counts_after_the_warm_up() -> None:
    played = simulated(copies(KIND, 1, 2, calls(100, 50)), Cluster(devices=2), Given(1, short=True))

    assert played.busy[0] == pytest.approx(100 * 2.61e-3, rel=0.2)


def test_cases_have_names_of_their_own_and_may_ask_for_at_most() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    case = Case("most", "", asked=2, before=3, play=lambda _: Found(2), at_most=True)
    assert case.met(Found(2)) and not case.met(Found(2.1))


def test_a_device_starves_no_model_and_one_tight_client_takes_little_from_relaxed_ones() -> None:
    found = {case.name: case.play(Given(4, short=True)) for case in starved.CASES}

    assert {case.name for case in starved.CASES if not case.met(found[case.name])} == set()
