"""The graphs whose truth is known: plain ONNX Runtime shows it, and each promise can be broken."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from benchmarks.unseen_graphs import cases, copies
from benchmarks.unseen_graphs.__main__ import Rule, judge_answers, judge_rule, rule
from benchmarks.unseen_graphs.mixing import MIXING
from benchmarks.unseen_graphs.serving import Answers, decoded, encoded
from harness.report import MISSED, PASSED, Outcome


def accepts_all(model: bytes) -> bool:
    """In place of the product."""
    return bool(model)


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_a_graph_mixes_if_its_witness_shows_it_and_none_is_found_for_a_safe_one(first: int) -> None:
    for number in range(first, first + 50):
        case = cases.made(7, number)
        plain, dice = cases.session(case.model.SerializeToString()), random.Random(number)
        assert case.mixes is (case.witness is not None) is (number % 2 == 1)
        if case.witness is not None:
            feeds, row = case.witness
            assert cases.shown(plain, feeds, 10 * case.rtol) == row
        else:
            assert cases.checked(case, plain, dice, 20)


def test_the_same_seed_and_number_make_the_same_graph_and_witness() -> None:
    one, two = cases.made(3, 11), cases.made(3, 11)
    assert one.model == two.model
    assert one.witness is not None
    assert two.witness is not None
    assert all(np.array_equal(one.witness[0][name], two.witness[0][name]) for name in one.inputs)


def test_what_hides_a_mixing_step_is_met_by_the_witness_alone() -> None:
    hidden = [case for number in range(1, 120, 2) if (case := cases.drawn(5, number)).hint.values]
    assert hidden
    assert len({case.hint.kind for case in hidden}) > 5
    assert len(MIXING) > 80


@pytest.mark.parametrize("number", range(0, 20, 4))
def test_copies_of_an_architecture_differ_in_nothing_but_weights(number: int) -> None:
    models, _ = copies.architecture(1, number)
    weights = [{each.name: each for each in model.graph.initializer} for model in models]
    for model in models:
        cases.session(model.SerializeToString())
        del model.graph.initializer[:]
    assert len({model.SerializeToString() for model in models}) == 1
    assert len({each["w0"].raw_data for each in weights}) == copies.COPIES


def test_a_request_is_read_as_it_was_written() -> None:
    row: cases.Feeds = {"x": np.array([[1, 2]], np.float16), "n": np.array([[3]], np.int64)}
    body, head = encoded(row)
    said = decoded(200, body.replace(b'"inputs"', b'"outputs"'), str(head + 1)).outputs
    assert all(np.array_equal(said[name], array) for name, array in row.items())


def test_equal_nan_and_infinities_are_equal_and_others_are_not() -> None:
    odd = np.array([np.nan, np.inf, 1.0], np.float32)
    assert not cases.far(odd, odd.copy(), 1e-4)
    assert cases.far(odd, np.array([np.nan, -np.inf, 1.0], np.float32), 1e-4)
    assert cases.far(odd, np.array([0.0, np.inf, 1.0], np.float32), 1e-4)


def test_small_answers_differ_where_nothing_but_rounding_may() -> None:
    small = np.array([1e-30, 2e-30], np.float32)
    assert not cases.far(small, 2 * small, 1e-4)
    assert cases.far(small, 2 * small, 1e-4, floor=1e-38)


def test_a_rule_that_accepts_all_misses_and_names_what_it_accepted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome, found = Outcome("benchmarks.unseen_graphs"), rule(1, 8, accepts_all, processes=1)
    judge_rule(outcome, 1, found)
    assert (outcome.verdict, len(found.mixing)) == (MISSED, 4)
    assert "--seed 1 --only 1 (" in capsys.readouterr().out


@pytest.mark.parametrize(("accepted", "verdict"), [(35, PASSED), (34, MISSED)])
def test_a_rule_accepts_a_share_of_the_safe(accepted: int, verdict: str) -> None:
    outcome = Outcome("benchmarks.unseen_graphs")
    counts = {"safe, accepted": accepted, "safe, not accepted": 100 - accepted, "mixing, not accepted": 100}
    judge_rule(outcome, 1, Rule(Counter(counts)))
    assert outcome.verdict == verdict


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [({}, PASSED), ({"wrong": Counter(m1=1)}, MISSED), ({"answered": 98}, MISSED), ({"served": 9}, MISSED)],
)
def test_each_promise_of_a_server_can_be_broken(changed: dict[str, object], verdict: str) -> None:
    outcome = Outcome("benchmarks.unseen_graphs")
    answers = Answers(models=10, served=10, asked=100, answered=100)
    for name, value in changed.items():
        setattr(answers, name, value)
    judge_answers(outcome, "server", answers)
    assert outcome.verdict == verdict
