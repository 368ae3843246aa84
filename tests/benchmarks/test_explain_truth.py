"""The benchmark of explanations finds what is not true, and believes nothing that it did not try."""

from __future__ import annotations

from benchmarks.explain_truth import EXACT, PLANS, Claim, Sampled, Seen, examine, find_truth, judge
from clockwork_serve.messages import Answer, Outcome, Request
from clockwork_serve.sim.counterfactual import Change
from clockwork_serve.units import NS_PER_S
from harness.report import Outcome as Found

PLAN = next(one for one in PLANS if one.name == "gateway")
SEED = 108


def test_a_few_requests_of_a_run_are_explained_and_tried() -> None:
    seen = Seen()

    examine(PLAN, SEED, 3, seen)

    assert seen.cases == seen.again == 3
    assert seen.claims[EXACT]
    assert not any(one.wrong or one.perhaps for one in seen.claims[EXACT])
    outcome = Found("explain")
    judge(outcome, seen)
    assert {one.good for one in outcome.verdicts} == {True}


def test_a_claim_that_is_not_true_is_found() -> None:
    request = Request(
        request_id="r500", gateway="g0", model="m0-0000/1", arrival_ns=NS_PER_S, deadline_ns=NS_PER_S + 1
    )
    answer = Answer(request_id="r500", gateway="g0", outcome=Outcome.OK)
    sampled = Sampled(request, answer, "fast", 0)
    soon, late = (
        Change(edits={"r500": {"deadline_ns": deadline_ns}}) for deadline_ns in (1, 1000 * NS_PER_S)
    )
    claims = [
        Claim(sampled, "slo", 1000, change, chance) for change in (soon, late) for chance in (1.0, 0.5, 0.0)
    ]

    find_truth(PLAN, SEED, claims)

    assert [one.met for one in claims] == [False] * 3 + [True] * 3
    assert [one.wrong for one in claims] == [True, False, False, False, False, True]
