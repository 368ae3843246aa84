"""Workers that stop, models that never end and devices that become slow, simulated, with all checks."""

from __future__ import annotations

import pytest

from clockwork_serve.messages import Infer, Outcome, Quarantined, Result, WorkerHung, WorkerJoined, WorkerLost
from clockwork_serve.units import NS_PER_MS, NS_PER_S, ms
from clockwork_serve.workload.scenario import ModelSet
from clockwork_serve.workload.tables import FaultTable as Fault
from tests.sim.worlds import KIND, played, scenario

SOON = {"hang_ns": ms(50), "hang_grace_ns": ms(100)}
TWO = (ModelSet(name="bad", kind=KIND), ModelSet(name="good", kind=KIND))


def test_a_worker_that_stops_for_good_is_found_ended_and_replaced():
    simulation, steps = played(scenario(Fault(kind="stop", at_s=0.5), seconds=3.0), **SOON)
    (hung_ns, _), (end_ns, end) = steps.done(WorkerHung)
    (lost_ns, _) = steps.seen(WorkerLost)[0]
    assert end.end
    assert NS_PER_S // 2 + ms(50) <= hung_ns <= NS_PER_S // 2 + ms(100)
    assert end_ns == hung_ns + ms(100)
    assert end_ns < lost_ns < end_ns + ms(10)
    assert len(steps.seen(WorkerJoined)) == 2
    assert not steps.done(Quarantined)
    assert simulation.tally.total().late == 0


def test_one_that_goes_on_in_time_comes_back_with_its_weights():
    simulation, steps = played(scenario(Fault(kind="stop", at_s=0.5, for_s=0.12), seconds=2.0), **SOON)
    assert [bool(one.why) for _, one in steps.done(WorkerHung)] == [True, False]
    assert not steps.seen(WorkerLost)
    assert simulation.tally.busy.loads == 2, "no weights were loaded again"
    assert simulation.tally.total().late == 0


def test_a_stop_that_is_short_is_nobodys_business():
    _, steps = played(scenario(Fault(kind="stop", at_s=0.5, for_s=0.04), seconds=2.0), **SOON)
    assert not steps.done(WorkerHung)


def test_a_worker_that_stops_idle_is_missed():
    made = scenario(Fault(kind="stop", at_s=0.5, for_s=1.0), seconds=2.0, rate_rps=1.0)
    _, steps = played(made, **SOON)
    first = steps.done(WorkerHung)[0]
    assert "no beat" in first[1].why


def test_a_model_that_never_ends_is_quarantined_and_the_other_is_served():
    made = scenario(Fault(kind="hangs", at_s=0.5, model="bad"), models=TWO, devices=2, seconds=8.0)
    simulation, steps = played(made, **SOON)
    (told,) = [one for _, one in steps.done(Quarantined)]
    assert told.model == "bad/1"
    assert "where it hung" in told.why
    assert simulation.faults is not None
    assert 3 <= simulation.faults.executed["hangs"] <= 4, "two workers may be at it at once"
    assert all("INFER of bad/1" in one.why for _, one in steps.done(WorkerHung) if one.why)
    since_ns = max(now_ns for now_ns, _ in steps.done(Quarantined))
    good = [one for now_ns, one in steps.done(Infer) if now_ns > since_ns]
    assert {one.model for one in good} == {"good/1"}


def _goodput(steps, since_s: float, until_s: float) -> float:
    answers = [
        one
        for now_ns, one in steps.effects
        if getattr(one, "outcome", None) is Outcome.OK and since_s * NS_PER_S <= now_ns < until_s * NS_PER_S
    ]
    return len(answers) / (until_s - since_s)


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_a_step_in_durations_is_adopted_within_a_window_and_nothing_late_is_good(factor: float):
    """A device that becomes slower serves what it still can, and the one beside it does not notice."""
    made = scenario(
        Fault(kind="slow", at_s=2.0, device=0, factor=factor),
        seconds=6.0,
        rate_rps=700.0,
        slo_ms=50.0,
        devices=2,
    )
    simulation, steps = played(made, max_batch=1)
    sent = {one.action_id: one for _, one in steps.done(Infer)}
    results = [one for _, one in steps.seen(Result) if one.action_id in sent]
    slowed = [one for one in results if one.device == "gpu0" and one.started_ns > 2 * NS_PER_S]
    wrong = [one for one in slowed if one.lane_ns > sent[one.action_id].expected_ns + ms(0.5)]
    assert 0 < len(wrong) <= 10, "the window of ten learns it"
    assert slowed.index(wrong[-1]) < 10, "and no later than that"
    others = [one for one in results if one.device == "gpu1"]
    assert not [one for one in others if abs(one.lane_ns - sent[one.action_id].expected_ns) > ms(0.5)]
    assert simulation.tally.total().late <= 10
    base_ns = min(one.lane_ns for one in results)
    can = NS_PER_S / base_ns * (1 + 1 / factor)
    asked = 700.0
    assert _goodput(steps, 3.0, 6.0) >= 0.9 * min(can, asked), (can, base_ns / NS_PER_MS)
    assert not steps.done(WorkerHung)
