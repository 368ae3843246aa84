"""Sixty known graphs: those that mix rows are served one by one, the others in batches, answered rightly."""

from __future__ import annotations

import pytest

from benchmarks.rows import asking
from qa.cases.__main__ import judged
from qa.cases.case import Case, Played, play
from qa.cases.known import APART, MIXING, sixty


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


def test_a_case_that_no_row_of_runs_is_not_counted(cases, store, device):
    whole = cases["perceptron"]
    broken = Case("broken", type(whole.model).FromString(whole.model.SerializeToString()))
    broken.model.graph.node[0].op_type = "NoSuchOperator"
    assert play(broken, store, device).verdict == "refused"
    assert judged([Played("broken", refused="so")], set()).verdict == "invalid"


def test_what_lost_its_batch_is_told_from_what_never_had_one():
    played = [Played("a", why="CumSum"), Played("b", why="Shape"), Played("c", batched=True)]
    outcome = judged(played, {"b"})
    assert outcome.figures["lost"] == {"a": "CumSum"}
    assert outcome.verdict == "passed"
    assert judged([Played("d", mixes="so", batched=True)], set()).verdict == "missed"
