"""Each fault does to the world what it says, and the controller hears of it as it would in reality."""

from __future__ import annotations

import itertools

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import (
    Answer,
    Cancel,
    CodeAdded,
    CodeReady,
    CodeRemoved,
    Drain,
    GatewayLost,
    Infer,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Quarantined,
    Reason,
    Request,
    Result,
    Status,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.sim import read_constants
from clockwork_serve.units import NS_PER_S, ms
from clockwork_serve.workload.scenario import ModelSet
from clockwork_serve.workload.tables import FaultTable as Fault
from tests.sim.worlds import KIND, Steps, played, scenario

TIMES = read_constants().faults
NETWORK = read_constants().network
WORKER_MOST_NS = NETWORK.worker_ns + NETWORK.jitter_ns
CUT = Fault(kind="loss", at_s=1.0, factor=1.0, for_s=0.01)


def _answers(steps: Steps, model: str) -> list[tuple[int, Outcome]]:
    """When the requests to a model were answered, and how."""
    asked = {request.request_id for _, request in steps.seen(Request) if request.model == model}
    return [(now_ns, one.outcome) for now_ns, one in steps.done(Answer) if one.request_id in asked]


def test_a_crash_loses_what_was_in_flight_and_the_controller_hears_of_it_after_all_that_was_said():
    simulation, steps = played(scenario(Fault(kind="crash", at_s=1.0), rate_rps=500))

    ((lost_ns, _),) = steps.seen(WorkerLost)
    results = [now_ns for now_ns, _ in steps.seen(Result) if now_ns >= NS_PER_S]
    assert NS_PER_S < lost_ns <= NS_PER_S + 2 * WORKER_MOST_NS
    assert not any(lost_ns < now_ns < NS_PER_S + TIMES.restart_ns for now_ns in results)
    sent = {action.action_id for now_ns, action in steps.done(Infer) if now_ns < lost_ns}
    assert sent - {result.action_id for _, result in steps.seen(Result)}, "nothing was in flight"
    assert simulation.faults is not None and simulation.faults.executed == {"crash": 1}


def test_after_a_crash_a_new_worker_joins_and_prepares_one_code_after_another():
    models = (ModelSet(name="a", kind=KIND), ModelSet(name="b", kind="resnet18_v2"))
    _, steps = played(scenario(Fault(kind="crash", at_s=1.0, for_s=0.2), models=models))

    _, (joined_ns, joined) = steps.seen(WorkerJoined)
    (first_ns, _), (second_ns, _) = [ready for ready in steps.seen(CodeReady) if ready[0] > joined_ns]
    prepare_ns = read_constants().worker.prepare_ns
    assert (joined_ns, joined.worker) == (round(1.2 * NS_PER_S), "w0")
    assert first_ns >= joined_ns + prepare_ns
    assert second_ns - first_ns >= prepare_ns - NETWORK.jitter_ns
    assert any(result.status is Status.OK and now_ns > second_ns for now_ns, result in steps.seen(Result))


def test_a_worker_that_hangs_says_nothing_and_then_all_at_once():
    _, steps = played(scenario(Fault(kind="hang", at_s=1.0, for_s=0.05), rate_rps=500))

    went_on_ns = round(1.05 * NS_PER_S)
    times = [now_ns for now_ns, _ in steps.seen(Result)]
    assert not any(NS_PER_S + WORKER_MOST_NS < now_ns < went_on_ns for now_ns in times)
    assert any(went_on_ns < now_ns <= went_on_ns + WORKER_MOST_NS for now_ns in times)
    assert not steps.seen(WorkerLost)


def test_a_worker_that_hangs_for_good_is_killed():
    _, steps = played(scenario(Fault(kind="hang", at_s=0.5)), hang_ns=0)

    ((lost_ns, _),) = steps.seen(WorkerLost)
    assert lost_ns >= NS_PER_S // 2 + TIMES.kill_ns
    assert len(steps.seen(WorkerJoined)) == 2


def test_a_slow_device_takes_so_many_times_as_long_for_a_while():
    _, steps = played(scenario(Fault(kind="slow", at_s=0.5, for_s=0.5, factor=3.0), rate_rps=50))

    usual = {
        result.run_ns for now_ns, result in steps.seen(Result) if now_ns < NS_PER_S // 2 and result.outputs
    }
    slow = {
        result.run_ns
        for _, result in steps.seen(Result)
        if NS_PER_S // 2 < result.started_ns < NS_PER_S and result.outputs
    }
    later = {result.run_ns for _, result in steps.seen(Result) if result.started_ns > NS_PER_S}
    assert len(usual) == 1 and slow == {3 * one for one in usual} and later == usual


def test_a_lost_message_cuts_the_link_both_sides_notice_and_the_worker_joins_with_its_codes_prepared():
    _, steps = played(scenario(Fault(kind="loss", at_s=1.0, for_s=0.3, factor=1.0), rate_rps=500))

    ((lost_ns, _),) = steps.seen(WorkerLost)
    _, (joined_ns, _) = steps.seen(WorkerJoined)
    ready_ns = [now_ns for now_ns, _ in steps.seen(CodeReady) if now_ns > joined_ns]
    assert NS_PER_S + TIMES.notice_ns // 2 <= lost_ns <= joined_ns <= NS_PER_S + 2 * TIMES.notice_ns
    assert not any(NS_PER_S + WORKER_MOST_NS < now_ns < joined_ns for now_ns, _ in steps.seen(Result))
    assert ready_ns and ready_ns[0] <= joined_ns + 2 * WORKER_MOST_NS
    assert any(result.status is Status.OK and now_ns > joined_ns for now_ns, result in steps.seen(Result))


def test_late_messages_keep_their_order():
    _, steps = played(scenario(Fault(kind="delay", at_s=0.5, for_s=0.5, ms=20.0), rate_rps=300))

    took = [(now_ns, now_ns - result.ended_ns) for now_ns, result in steps.seen(Result)]
    late = [took_ns for now_ns, took_ns in took if NS_PER_S * 0.6 < now_ns < NS_PER_S]
    assert late and min(late) >= ms(20)
    ended = [result.ended_ns for _, result in steps.seen(Result)]
    assert ended == sorted(ended)
    assert max(took_ns for now_ns, took_ns in took if now_ns > NS_PER_S * 1.1) <= WORKER_MOST_NS


@pytest.mark.parametrize("skew_ms", [-30.0, 30.0])
def test_a_clock_that_jumps_shows_in_results_and_never_goes_back(skew_ms):
    _, steps = played(scenario(Fault(kind="skew", at_s=0.5, for_s=0.5, ms=skew_ms), slo_ms=500))

    seen = [(now_ns - result.ended_ns, now_ns) for now_ns, result in steps.seen(Result)]
    during = [late_ns for late_ns, now_ns in seen if NS_PER_S * 0.55 < now_ns < NS_PER_S]
    after = [late_ns for late_ns, now_ns in seen if now_ns > NS_PER_S * 1.1]
    assert during and all(abs(late_ns + ms(skew_ms)) <= WORKER_MOST_NS for late_ns in during)
    assert after and all(0 < late_ns <= WORKER_MOST_NS for late_ns in after)


def test_a_removed_model_is_unknown_until_it_comes_back():
    _, steps = played(scenario(Fault(kind="remove_model", at_s=0.5, for_s=0.5, model="m-0000")))

    assert [(now_ns, event.model) for now_ns, event in steps.seen(ModelRemoved)] == [
        (NS_PER_S // 2, "m-0000/1")
    ]
    assert [now_ns for now_ns, _ in steps.seen(ModelAdded)][-1] == NS_PER_S
    assert not steps.seen(CodeRemoved), "the other model has that code"
    asked = {request.request_id: request.model for _, request in steps.seen(Request)}
    unknown = [(now_ns, one) for now_ns, one in steps.done(Answer) if one.reason is Reason.UNKNOWN_MODEL]
    assert unknown and all(NS_PER_S // 2 <= now_ns <= NS_PER_S for now_ns, _ in unknown)
    assert {asked[one.request_id] for _, one in unknown} == {"m-0000/1"}


def test_a_code_that_no_model_has_any_more_is_removed_and_prepared_again():
    models = (ModelSet(name="a", kind=KIND), ModelSet(name="b", kind="resnet18_v2"))
    _, steps = played(scenario(Fault(kind="remove_model", at_s=0.5, for_s=0.5, model="b"), models=models))

    assert [event.code_id for _, event in steps.seen(CodeRemoved)] == ["resnet18_v2"]
    assert [event.code.code_id for now_ns, event in steps.seen(CodeAdded) if now_ns] == ["resnet18_v2"]
    again = [event.code_id for now_ns, event in steps.seen(CodeReady) if now_ns > NS_PER_S]
    assert again == ["resnet18_v2"]
    asked = {request.request_id: request.model for _, request in steps.seen(Request)}
    good = [
        now_ns
        for now_ns, one in steps.done(Answer)
        if one.outcome is Outcome.OK and asked[one.request_id] == "b/1"
    ]
    assert max(good) > 1.1 * NS_PER_S


def test_an_added_model_is_unknown_before():
    _, steps = played(scenario(Fault(kind="add_model", at_s=1.0, model="m-0001")))

    asked = {request.request_id: request.model for _, request in steps.seen(Request)}
    answers = [
        (now_ns, one.outcome) for now_ns, one in steps.done(Answer) if asked[one.request_id] == "m-0001/1"
    ]
    assert {outcome for now_ns, outcome in answers if now_ns < NS_PER_S} == {Outcome.INVALID}
    assert {outcome for now_ns, outcome in answers if now_ns > NS_PER_S} == {Outcome.OK}


def test_a_gateway_that_dies_takes_its_requests_along_and_another_takes_its_place():
    _, steps = played(scenario(Fault(kind="gateway", at_s=1.0), rate_rps=800, slo_ms=500))

    ((lost_ns, lost),) = steps.seen(GatewayLost)
    assert (lost_ns, lost.gateway) == (NS_PER_S + NETWORK.gateway_ns, "g0")
    names = {(now_ns >= lost_ns, request.gateway) for now_ns, request in steps.seen(Request)}
    assert names == {(False, "g0"), (False, "g1"), (True, "g2"), (True, "g1")}
    cancelled = [(now_ns, one) for now_ns, one in steps.done(Answer) if one.outcome is Outcome.CANCELLED]
    assert cancelled and {(now_ns, one.gateway) for now_ns, one in cancelled} == {(lost_ns, "g0")}


def test_clients_that_go_away_are_cancelled():
    simulation, steps = played(scenario(Fault(kind="cancel", at_s=0.5, for_s=1.0, factor=0.5), rate_rps=600))

    count = len(steps.seen(Cancel))
    cancelled = sum(one.outcome is Outcome.CANCELLED for _, one in steps.done(Answer))
    assert 240 < count < 360
    assert simulation.faults is not None
    assert 0 < cancelled <= simulation.faults.executed["cancel"] < count, "some were answered before"


def test_a_server_that_drains_takes_no_new_requests():
    _, steps = played(scenario(Fault(kind="drain", at_s=1.0)))

    assert [now_ns for now_ns, _ in steps.seen(Drain)] == [NS_PER_S]
    late = {request.request_id for now_ns, request in steps.seen(Request) if now_ns > NS_PER_S}
    assert {one.reason for _, one in steps.done(Answer) if one.request_id in late} == {Reason.DRAINING}


def test_a_fault_hits_only_the_worker_that_it_names():
    _, steps = played(scenario(Fault(kind="crash", at_s=1.0, worker=1), devices=3))

    assert [event.worker for _, event in steps.seen(WorkerLost)] == ["w1"]


def test_what_is_down_cannot_go_wrong_again():
    faults = (Fault(kind="crash", at_s=1.0), Fault(kind="hang", at_s=1.1, for_s=0.1))
    simulation, _ = played(scenario(*faults))

    assert simulation.faults is not None and simulation.faults.executed == {"crash": 1}


def test_a_worker_that_crashes_while_its_link_is_cut_is_lost_once():
    faults = (
        Fault(kind="loss", at_s=1.0, factor=1.0, for_s=0.01),
        Fault(kind="crash", at_s=1.02, for_s=0.02),
    )
    _, steps = played(scenario(*faults, rate_rps=500))

    kinds = [type(event) for _, event in steps.events if isinstance(event, WorkerLost | WorkerJoined)]
    assert kinds == [WorkerJoined, WorkerLost, WorkerJoined]


def test_a_worker_that_hangs_while_its_link_is_cut_joins_when_it_goes_on():
    faults = (
        Fault(kind="loss", at_s=1.0, factor=1.0, for_s=0.01),
        Fault(kind="hang", at_s=1.02, for_s=0.5),
    )
    _, steps = played(scenario(*faults, rate_rps=500, seconds=3.0))

    _, (joined_ns, _) = steps.seen(WorkerJoined)
    assert joined_ns > round(1.52 * NS_PER_S)
    assert any(result.status is Status.OK and now_ns > joined_ns for now_ns, result in steps.seen(Result))


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"faults\[0\]\.model: expected a model, found 'nobody'"):
        played(scenario(Fault(kind="remove_model", at_s=1.0, model="nobody")))


def test_the_same_seed_has_the_same_faults():
    faults = (
        Fault(kind="loss", at_s=0.5, factor=0.05, for_s=1.0),
        Fault(kind="cancel", at_s=0.2, factor=0.3),
    )
    (_, one), (_, two) = (played(scenario(*faults)) for _ in range(2))

    assert all(a == b for a, b in itertools.zip_longest(one.events, two.events))


KILLER = (ModelSet(name="killer", kind=KIND), ModelSet(name="good", kind=KIND, copies=4))


def test_a_model_that_kills_takes_a_worker_down_before_its_result_is_heard_and_the_autopsy_names_it():
    simulation, steps = played(
        scenario(Fault(kind="kills", at_s=0.5, model="killer"), models=KILLER, devices=2), quarantine_after=0
    )

    assert simulation.faults is not None
    assert simulation.faults.executed["kills"] == len(steps.seen(WorkerLost)) > 3
    running = {one.action_id: one.model for _, one in steps.done(Infer)}
    for _, lost in steps.seen(WorkerLost):
        assert "killer/1" in {running.get(action_id) for action_id in lost.running or ()}


def test_a_model_that_kills_is_in_quarantine_after_three_workers_and_others_are_not():
    _, steps = played(scenario(Fault(kind="kills", at_s=0.5, model="killer"), models=KILLER, devices=2))

    assert [one.model for _, one in steps.done(Quarantined)] == ["killer/1"]
    assert 3 <= len(steps.seen(WorkerLost)) <= 4, "one may be at it still"
    (at_ns, _) = steps.done(Quarantined)[0]
    answers = {one.reason for now_ns, one in steps.done(Answer) if now_ns > at_ns + NS_PER_S}
    assert answers == {Reason.NONE, Reason.QUARANTINED}


def test_others_are_served_as_if_the_model_that_kills_had_never_been_once_it_is_in_quarantine():
    def good(*faults: Fault) -> list[Outcome]:
        _, steps = played(scenario(*faults, models=KILLER, devices=2, seconds=4.0))
        return [
            outcome
            for name in range(4)
            for now_ns, outcome in _answers(steps, f"good-000{name}/1")
            if now_ns > 2.5 * NS_PER_S
        ]

    kept = good(Fault(kind="kills", at_s=0.5, model="killer"))
    assert kept.count(Outcome.OK) == len(kept) >= len(good()) - 2
