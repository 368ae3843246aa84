"""Sixty known graphs: those that mix rows are served one by one, others in batches, answered rightly."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.rows import asking
from harness.report import Outcome
from qa.cases.__main__ import judge, judge_answers
from qa.cases.case import Case, Played, play
from qa.cases.known import APART, DECLARED, MIXING, sixty, standard_cases
from qa.cases.standard import SHORT, SHORT_MODULES, Answered, answer


@pytest.fixture(scope="module")
def cases():
    return {case.name: case for case in sixty()}


@pytest.fixture(scope="module")
def store():
    made = asking.Store()
    yield made
    made.close()


@pytest.fixture(scope="module")
def device():
    with asking.device() as made:
        yield made


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_mix_are_served_one_by_one(name, cases, store, device):
    played = play(cases[name], store, device)
    assert played.mixes
    assert not played.batched
    assert played.why  # a warning says what mixes them


@pytest.mark.parametrize("name", APART)
def test_rows_that_are_apart_are_batched_and_company_changes_no_answer(name, cases, store, device):
    played = play(cases[name], store, device)
    assert not played.mixes
    assert played.batched, played.why
    assert played.company.answers > played.company.refused
    assert not played.company.wrong, played.company.first


@pytest.mark.parametrize("name", DECLARED)
def test_rows_that_are_not_plainly_apart_are_batched_where_that_is_declared(name, cases, store, device):
    undeclared = play(cases[name], store, device)
    assert not undeclared.batched
    assert "max_batch_size = 16 in clockwork.toml" in undeclared.why
    declared = play(dataclasses.replace(cases[name], declared=16), store, device)
    assert declared.batched, declared.why
    assert declared.company.answers > declared.company.refused
    assert not declared.company.wrong, declared.company.first


def test_a_case_that_no_row_of_runs_is_not_counted(cases, store, device):
    whole = cases["perceptron"]
    broken = Case("broken", type(whole.model).FromString(whole.model.SerializeToString()))
    broken.model.graph.node[0].op_type = "NoSuchOperator"
    assert play(broken, store, device).verdict == "refused"
    outcome = Outcome("cases")
    judge(outcome, [Played("broken", refused="so")], set())
    assert outcome.verdict == "invalid"


def test_what_lost_its_batch_is_told_from_what_never_had_one():
    played = [Played("a", why="CumSum"), Played("b", why="Shape"), Played("c", batched=True)]
    outcome, mixed = Outcome("cases"), Outcome("cases")
    judge(outcome, played, {"b"})
    assert outcome.figures["lost"] == {"a": "CumSum"}
    assert outcome.verdict == "passed"
    judge(mixed, [Played("d", mixes="so", batched=True)], set())
    assert mixed.verdict == "missed"


# ------------------------------------------------------------
# Standard cases as they are.


@pytest.fixture(scope="module")
def standard():
    return {made.name: made for made in standard_cases(SHORT_MODULES)}


@pytest.mark.parametrize("name", SHORT)
def test_a_standard_case_is_served_and_answered_for_other_values_too(name, standard, store, device):
    found = answer(standard[name], store, device)
    assert found.served, found.refused
    assert not found.wrong
    assert not found.batched
    assert found.answers > 1  # other values than its own, for which ONNX Runtime has an answer


def test_a_case_that_is_refused_or_answered_wrongly_breaks_the_promise():
    good = Answered("a", answers=2)
    for bad, verdict in (
        (Answered("b", refused="so"), "missed"),
        (Answered("c", answers=1, wrong="so"), "missed"),
        (Answered("d", refused="so", outside="a sequence"), "passed"),
        (Answered("e", unusable="so"), "passed"),
    ):
        outcome = Outcome("cases")
        judge_answers(outcome, [good, bad], whole=False)
        assert outcome.verdict == verdict
    assert outcome.figures["standard_served"] == 1
    few = Outcome("cases")
    judge_answers(few, [good], whole=True)
    assert few.verdict == "missed"
