"""The judge of known graphs: what is built to mix is seen to, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from benchmarks.rows.judge import Rows, gap_of, judge, poisoned, same, session_of
from qa.cases.kinds import kinds

NEVER_SHOWN = {"mixing_faint", "mixing_secret", "mixing_hidden_in_integers"}


def finding(model: onnx.ModelProto, seed: int = 0):
    return judge(session_of(model.SerializeToString()), seed=seed)


@pytest.mark.parametrize(
    "case", [case for case in kinds() if case.name.startswith("apart_")], ids=lambda case: case.name
)
def test_what_keeps_rows_apart_is_not_seen_to_mix_them(case):
    assert not finding(case.model).mixes


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
