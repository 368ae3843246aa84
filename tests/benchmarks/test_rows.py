"""The judge of graphs made by chance: what is built to mix is seen to, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from benchmarks.rows.__main__ import Tally, judged
from benchmarks.rows.asking import Company
from benchmarks.rows.generator import graph_of
from benchmarks.rows.judge import Refused, Rows, gap_of, judge, poisoned, same, session_of
from benchmarks.rows.trials import Prober, Tried
from qa.cases.kinds import kinds

NEVER_SHOWN = {"mixing_faint", "mixing_secret", "mixing_hidden_in_integers"}


def finding(model: onnx.ModelProto, seed: int = 0):
    return judge(session_of(model.SerializeToString()), seed=seed)


def test_a_seed_is_one_graph():
    assert graph_of(7).model == graph_of(7).model
    assert graph_of(7).model != graph_of(8).model


def test_what_is_built_to_keep_rows_apart_is_never_seen_to_mix_them():
    built = [graph_of(seed) for seed in range(120)]
    assert 30 < sum(made.mixes for made in built) < 90
    seen = 0
    for made in built:
        try:
            found = finding(made.model, made.seed)
        except Refused:
            continue
        assert made.mixes or not found.mixes, (made.seed, found)
        seen += bool(found.mixes)
    assert seen > 30


@pytest.mark.parametrize("case", [case for case in kinds() if case.mixes], ids=lambda case: case.name)
def test_each_way_of_mixing_is_seen_but_for_those_that_hide(case):
    found = finding(case.model)
    assert not found.refused
    assert bool(found.mixes) or case.name in NEVER_SHOWN


def test_other_neighbours_are_like_none_of_the_rows_and_the_row_itself_stays():
    rows = Rows({
        "x": np.ones((3, 2), np.float32), "i": np.full((3, 1), 4), "t": np.full((3, 1), "a", object)
    })  # fmt: skip
    dice = np.random.default_rng(1)
    for poison in ("nan", "zeros", "large"):
        other = poisoned(rows, poison, dice)
        assert not same(other.arrays["x"], rows.arrays["x"])
        assert not same(other.arrays["i"], rows.arrays["i"])
        assert not same(other.arrays["t"], rows.arrays["t"])


def test_a_gap_is_that_of_numbers_and_what_is_no_number_must_stay():
    a = np.array([1.0, np.nan, np.inf], np.float32)
    assert gap_of(a, a) == 0
    assert gap_of(a, np.array([1.5, np.nan, np.inf], np.float32)) == pytest.approx(1 / 3)
    assert gap_of(a, np.array([1.0, 2.0, np.inf], np.float32)) == float("inf")
    assert gap_of(np.array(["a"], object), np.array(["b"], object)) == float("inf")


def test_a_prober_makes_judges_asks_and_serves_a_graph():
    prober = Prober(1, served_share=1.0)
    stages = []
    try:
        found = [prober.probe(number, stages.append) for number in range(6)]
    finally:
        prober.close()
    assert {"made", "judged", "put to the store"} <= set(stages)
    assert [one.number for one in found] == list(range(6))
    assert all(one.mixes or not one.company.wrong for one in found)


@pytest.mark.parametrize(
    ("seed", "number", "counted"),
    [
        (41, 12672, "unsettled"),  # it normalises what is equal but for rounding
        (2027, 27427, "optimised"),  # the runtime's optimiser moves a rounding of quantised values
    ],
)
def test_an_answer_that_differs_as_much_without_neighbours_is_no_sign_of_mixing(seed, number, counted):
    prober = Prober(seed, served_share=1.0)
    try:
        found = prober.probe(number, lambda _: None)
    finally:
        prober.close()
    assert not found.mixes
    assert found.batched
    assert found.company.wrong == 0
    assert getattr(found.company, counted) > 0


def test_one_graph_that_mixes_and_is_batched_is_one_too_many():
    tally = Tally()
    for number in range(20):
        tally.enter(Tried(number, batched=number > 0, why="by an operator 'Loop'"))
    tally.enter(Tried(20, built="_reduced"))
    tally.enter(Tried(21, refused="not implemented"))
    tally.enter(Tried(21, faint="a bit"))
    assert judged(tally, 22, 1.0).verdict == "passed"
    assert tally.reasons == {"by an operator '..'": 1}
    tally.enter(Tried(22, seen="other bits", batched=True))
    assert judged(tally, 23, 1.0).verdict == "missed"
    assert [one.number for one in tally.surprises] == [22]


def test_one_wrong_answer_is_one_too_many():
    tally = Tally()
    tally.enter(Tried(0, batched=True, served=True, company=Company(answers=9, wrong=1)))
    tally.enter(Tried(1, built="_reduced"))
    assert judged(tally, 2, 1.0).verdict == "missed"
