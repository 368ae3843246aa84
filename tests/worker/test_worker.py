"""The worker as a whole: windows, order, routing, one result per action, and how it ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec import structs

from clockwork_serve.messages import (
    CodeAdded,
    CodeReady,
    CodeRemoved,
    DeviceState,
    Extent,
    Held,
    Infer,
    Lane,
    Load,
    Resident,
    Result,
    RetainWeights,
    Running,
    Status,
    Unload,
    WorkerJoined,
)
from clockwork_serve.units import NS_PER_MS, ms
from clockwork_serve.worker import ControllerFound, ControllerLost, Start, Stop, Worker
from tests.worker.actions import (
    CODE,
    GPU,
    OTHER,
    SPEC,
    Told,
    done,
    fresh,
    infer,
    load,
    resident,
    start,
    statuses,
    unload,
)

Make = Callable[..., Load | Unload | Infer]

# Windows


def test_an_action_starts_when_its_window_opens_and_not_before() -> None:
    tell = fresh()
    action = load(1, "a", 0, window=(5, 10))
    assert tell(1, action) == []
    assert tell.wake_ms() == 5
    assert tell(5) == [start(action)]


def test_not_one_nanosecond_early() -> None:
    tell = fresh()
    action = load(1, "a", 0, window=(5, 10))
    tell(0, action)
    assert tell.worker.decide(ms(5) - 1) == []
    assert tell.worker.decide(ms(5)) == [start(action)]


def test_the_last_instant_of_a_window_is_inside() -> None:
    tell = fresh()
    action = load(1, "a", 0, window=(0, 5))
    assert tell(5, action) == [start(action)]


def test_a_window_that_closed_is_too_late() -> None:
    tell = fresh()
    status, message = tell.refusal(5, load(1, "a", 0, window=(0, 4)))
    assert status is Status.TOO_LATE
    assert message == "LOAD of a: its window closed 1000000 ns before its lane was free"


def test_what_waits_behind_a_running_action_is_judged_when_the_lane_is_free() -> None:
    tell = resident(fresh(), "a", 0)
    first, second, third = infer(1, "a", 0), infer(2, "a", 0, window=(0, 3)), infer(3, "a", 0)
    assert tell(0, first, second, third) == [start(first)]
    assert tell(4) == []
    effects = tell(5, done(first, 5))
    assert statuses(effects) == {1: Status.OK, 2: Status.TOO_LATE}
    assert effects[-1] == start(third)


def test_a_window_too_far_ahead_is_not_waited_for() -> None:
    tell = fresh()
    status, message = tell.refusal(0, load(1, "a", 0, window=(10_001, 10_002)))
    assert status is Status.TOO_EARLY
    assert message == (
        "LOAD of a: window: opens in 10.0 s, expected at most 10 s ahead; "
        "compare the clocks of controller and worker"
    )
    assert tell(0, load(2, "a", 0, window=(10_000, 10_002))) == []


def test_a_window_that_closes_before_it_opens_is_a_contradiction() -> None:
    status, message = fresh().refusal(0, load(1, "a", 0, window=(2, 1)))
    assert status is Status.BAD_ACTION
    assert message == "LOAD of a: window: expected earliest_ns <= latest_ns, found 2000000 > 1000000"


# Order


def test_a_lane_takes_the_earliest_first_and_equals_as_they_came() -> None:
    tell = resident(fresh(), "a", 0)
    busy, late, soon, sooner = (
        infer(at, "a", 0, window=(at_ms, 50)) for at, at_ms in enumerate((0, 3, 1, 1))
    )
    tell(0, busy, late, soon, sooner)
    assert tell(5, done(busy, 5))[-1] == start(soon)
    assert tell(6, done(soon, 6))[-1] == start(sooner)
    assert tell(7, done(sooner, 7))[-1] == start(late)


def test_an_action_that_opens_earlier_overtakes_one_that_waits() -> None:
    tell = resident(fresh(), "a", 0)
    late, soon = infer(1, "a", 0, window=(5, 50)), infer(2, "a", 0, window=(3, 50))
    tell(0, late)
    tell(1, soon)
    assert tell.wake_ms() == 3
    assert tell(3) == [start(soon)]


def test_the_two_lanes_work_at_the_same_time() -> None:
    tell = resident(fresh(), "a", 0)
    run, copy = infer(1, "a", 0), load(2, "b", 2)
    assert sorted(effect.lane for effect in tell(0, run, copy) if isinstance(effect, Start)) == [
        Lane.EXEC,
        Lane.LOAD,
    ]


def test_a_free_lane_needs_no_wakeup_and_neither_does_a_busy_one() -> None:
    tell = fresh()
    assert tell.wake_ms() is None
    resident(tell, "a", 0)
    action = infer(1, "a", 0)
    tell(0, action, infer(2, "a", 0, window=(7, 9)))
    assert tell.wake_ms() is None
    tell(1, done(action, 1))
    assert tell.wake_ms() == 7
    assert tell.worker.lane_wakeup_ns(GPU, Lane.EXEC) == ms(7)
    assert tell.worker.lane_wakeup_ns(GPU, Lane.LOAD) is None


# Results


def test_a_result_carries_what_the_lane_measured() -> None:
    tell = resident(fresh(), "a", 0)
    action = infer(1, "a", 0, batch=2, rows=(1, 1))
    tell(1, action)
    measured = structs.replace(done(action, 4, started_ms=1), input_ns=5, run_ns=6, output_ns=7)
    (result,) = tell(4, measured)
    assert result == Result(
        action_id=1, device=GPU, status=Status.OK, started_ns=ms(1), ended_ns=ms(4), input_ns=5, run_ns=6,
        output_ns=7, outputs=(b"answer", b"answer"),
    )  # fmt: skip


def test_a_fault_of_the_lane_is_passed_on_with_its_message() -> None:
    tell = resident(fresh(), "a", 0)
    action = infer(1, "a", 0)
    tell(1, action)
    (result,) = tell(4, done(action, 4, Status.MODEL_RAISED))
    assert isinstance(result, Result)
    assert (result.status, result.message) == (Status.MODEL_RAISED, "the lane says no")


def test_an_id_that_is_queued_or_running_is_not_taken_twice() -> None:
    tell = fresh()
    action = load(1, "a", 0)
    tell(0, action)
    status, message = tell.refusal(0, unload(1, "b", 4))
    assert status is Status.BAD_ACTION
    assert "action_id: 1 is queued or running already" in message
    assert statuses(tell(1, done(action, 1))) == {1: Status.OK}
    assert tell(2, load(1, "b", 2)) == [start(load(1, "b", 2))], "it ended: the id is free"


@pytest.mark.parametrize("make", [load, unload, infer])
def test_a_window_that_closed_a_nanosecond_ago_is_missed(make: Make) -> None:
    tell = resident(fresh(), "a", 4)
    first = 0 if make is load else 4
    status, message = tell.refusal(5.000001, make(1, "a", first, window=(0, 5)))
    assert status is Status.TOO_LATE
    assert message.endswith("its window closed 1 ns before its lane was free")


@pytest.mark.parametrize("make", [load, unload, infer])
def test_an_action_that_waits_already_may_not_come_again(make: Make) -> None:
    tell = resident(fresh(), "a", 4)
    action = make(1, "a", 0 if make is load else 4, window=(9, 10))
    assert tell(1, action) == []
    status, message = tell.refusal(2, action)
    assert status is Status.BAD_ACTION
    assert message.endswith("action_id: 1 is queued or running already")


# Devices


def test_an_unknown_device_is_named_and_so_are_the_known() -> None:
    tell = fresh(SPEC, OTHER)
    for kind, make in (("LOAD", load), ("UNLOAD", unload), ("INFER", infer)):
        status, message = tell.refusal(0, make(1, "a", 0, device="gpu:7"))
        assert status is Status.UNKNOWN_DEVICE
        assert message == f"{kind} of a: device: expected one of gpu:0, gpu:1; found 'gpu:7'"


def test_devices_share_no_lane_and_no_page() -> None:
    tell = fresh(SPEC, OTHER)
    here, there = load(1, "a", 0), load(2, "b", 0, device="gpu:1")
    assert tell(0, here, there) == [start(here), start(there)]


def test_the_next_wakeup_is_the_earliest_of_all_devices() -> None:
    tell = fresh(SPEC, OTHER)
    tell(0, load(1, "a", 0, window=(7, 9)), load(2, "b", 0, window=(4, 9), device="gpu:1"))
    assert tell.wake_ms() == 4
    tell(4)
    assert tell.wake_ms() == 7


def test_devices_that_wake_together_all_start() -> None:
    tell = fresh(SPEC, OTHER)
    here, there = load(1, "a", 0, window=(4, 9)), load(2, "b", 0, window=(4, 9), device="gpu:1")
    tell(0, here, there)
    assert tell(4) == [start(here), start(there)]


def test_a_wakeup_that_was_overtaken_is_not_asked_for() -> None:
    tell = resident(fresh(), "a", 0)
    tell(0, infer(1, "a", 0, window=(5, 50)))
    tell(1, infer(2, "a", 0, window=(3, 50)))
    tell(3)
    assert tell.wake_ms() is None


def test_devices_need_names_of_their_own() -> None:
    with pytest.raises(AssertionError, match="each with its name"):
        Worker((SPEC, SPEC))


# Time


def test_time_does_not_go_back() -> None:
    tell = fresh()
    tell(5)
    with pytest.raises(AssertionError, match="time went back"):
        tell.worker.decide(ms(5) - 1)
    with pytest.raises(AssertionError, match="time went back"):
        tell.worker.observe(Stop(), ms(4))


# Stop


def test_stop_refuses_what_waits_and_what_comes_but_not_what_runs() -> None:
    tell = resident(fresh(), "a", 0)
    runs, waits, comes = (infer(at, "a", 0) for at in range(3))
    tell(0, runs, waits)
    assert statuses(tell(1, Stop(), comes)) == {1: Status.SHUTTING_DOWN, 2: Status.SHUTTING_DOWN}
    assert not tell.worker.idle
    assert statuses(tell(2, done(runs, 2))) == {0: Status.OK}
    assert tell.worker.idle


def test_stop_drops_codes_that_wait_to_be_prepared() -> None:
    tell = fresh()
    action = load(1, "a", 0)
    tell(0, action)
    tell(0, CodeAdded(code=structs.replace(CODE, code_id="more")))
    assert tell(1, Stop()) == []
    assert statuses(tell(2, done(action, 2))) == {1: Status.OK}
    assert tell.worker.idle


# The controller went away


FOUND = ControllerFound(worker="w")


def state_after(tell: Told, at_ms: float) -> DeviceState:
    """What the next controller is told of the only device, the first one having been there."""
    (joined,) = tell(at_ms, FOUND)
    assert isinstance(joined, WorkerJoined)
    (state,) = joined.states
    return state


def second() -> Told:
    """A worker whose first controller was there."""
    tell = fresh()
    assert tell(0, FOUND) == [WorkerJoined(worker="w", devices=(SPEC,))]
    return tell


def test_what_waits_is_refused_and_what_runs_goes_on_and_is_answered() -> None:
    tell = resident(second(), "a", 0)
    runs, waits = infer(1, "a", 0), infer(2, "a", 0)
    tell(0, runs, waits)
    assert statuses(tell(1, ControllerLost())) == {2: Status.SHUTTING_DOWN}
    assert statuses(tell(2, done(runs, 2))) == {1: Status.OK}


def test_the_next_controller_hears_of_codes_weights_and_what_runs() -> None:
    tell = resident(second(), "a", 0, version=3)
    runs, copies = infer(1, "a", 0, version=3), load(2, "b", 2, version=4)
    tell(1, runs, copies)
    tell(1.5, ControllerLost())
    state = state_after(tell, 2)
    assert state.codes == ("net",)
    assert [(one.model, one.version, one.extent, one.ready) for one in state.weights] == [
        ("a", 3, Extent(0, 2), True),
        ("b", 4, Extent(2, 2), False),
    ]
    assert set(state.running) == {
        Running(action_id=1, lane=Lane.EXEC, version=3, left_ns=ms(1), expected_ns=ms(2)),
        Running(action_id=2, lane=Lane.LOAD, version=4, left_ns=0, expected_ns=ms(1)),
    }


def test_the_next_controller_hears_of_the_last_durations_by_batch_and_signature() -> None:
    tell = resident(second(), "a", 0)
    for at in range(12):
        action = structs.replace(infer(at, "a", 0, window=(0, 1000)), signature="s" if at == 3 else "")
        tell(10 * at, action)
        tell(10 * at + 1 + at / 10, done(action, 10 * at + 1 + at / 10, started_ms=10 * at))
    tell(200, ControllerLost())
    measured = {(one.batch, one.signature): one.lasted_ns for one in state_after(tell, 200).measured}
    assert measured[1, "s"] == (ms(1.3),)
    assert measured[1, ""] == tuple(ms(1 + at / 10) for at in (1, 2, 4, 5, 6, 7, 8, 9, 10, 11))
    assert len(measured[0, ""]) == 1


def test_weights_that_are_kept_serve_the_next_controller() -> None:
    tell = resident(second(), "a", 0)
    tell(1, ControllerLost())
    tell(1, FOUND, RetainWeights(device=GPU, versions=(1,)))
    action = infer(1, "a", 0)
    assert tell(2, action) == [start(action)]


def test_weights_that_nobody_keeps_are_unloaded_by_the_worker_itself() -> None:
    tell = resident(second(), "a", 0)
    resident(tell, "b", 2)
    assert tell(1, ControllerLost()) == []
    _, first = tell(1, FOUND, RetainWeights(device=GPU))
    assert isinstance(first, Start)
    assert (first.action.model, first.action.action_id) == ("a", -1)
    assert statuses(tell(1, load(1, "c", 0))) == {}
    (second_,) = tell(2, done(first.action, 2))
    assert isinstance(second_, Start)
    assert second_.action.model == "b"
    assert tell(3, done(second_.action, 3)) == [start(load(1, "c", 0))]


def test_weights_that_nobody_keeps_and_wait_to_be_forgotten_are_still_forgotten_after_another_loss() -> None:
    tell = resident(second(), "a", 0)
    resident(tell, "b", 2)
    tell(1, ControllerLost())
    _, first = tell(1, FOUND, RetainWeights(device=GPU))
    assert isinstance(first, Start)
    tell(1, ControllerLost())
    assert state_after(tell, 1).weights == ()
    (second_,) = tell(2, done(first.action, 2))
    assert isinstance(second_, Start)
    assert second_.action.model == "b"


def test_weights_that_are_read_or_copied_are_forgotten_afterwards() -> None:
    tell = resident(second(), "a", 0)
    runs, copies = infer(1, "a", 0), load(2, "b", 2)
    tell(0, runs, copies)
    tell(1, ControllerLost())
    tell(1, FOUND, RetainWeights(device=GPU))
    result, forget_b = tell(2, done(copies, 2))
    assert isinstance(result, Result)
    assert isinstance(forget_b, Start)
    assert forget_b.action.model == "b"
    tell(3, done(forget_b.action, 3))
    result, forget_a = tell(4, done(runs, 4))
    assert isinstance(result, Result)
    assert isinstance(forget_a, Start)
    assert forget_a.action.model == "a"
    assert tell(5, done(forget_a.action, 5)) == []
    assert tell.worker.idle


def test_weights_that_nobody_keeps_answer_no_infer() -> None:
    tell = resident(second(), "a", 0)
    tell(0, load(1, "b", 4))
    tell(1, ControllerLost())
    tell(1, FOUND, RetainWeights(device=GPU))
    assert tell.refusal(2, infer(2, "a", 0))[0] is Status.WEIGHTS_MISSING


def test_weights_that_nobody_keeps_are_missing_for_an_unload_though_an_old_infer_reads_them() -> None:
    tell = resident(second(), "a", 0)
    runs = infer(1, "a", 0)
    tell(0, runs)
    tell(1, ControllerLost())
    tell(1, FOUND, RetainWeights(device=GPU))
    assert tell.refusal(2, unload(2, "a", 0))[0] is Status.WEIGHTS_MISSING
    _, forget = tell(3, done(runs, 3))
    assert isinstance(forget, Start)
    assert tell(4, done(forget.action, 4)) == []
    assert tell.worker.idle


def test_a_load_into_pages_that_an_old_infer_reads_waits_in_its_window() -> None:
    for patience_ms in (2, 100):
        tell = resident(second(), "a", 0)
        runs, wanted = infer(1, "a", 0), load(2, "b", 1, window=(0, patience_ms))
        tell(0, runs)
        tell(1, ControllerLost())
        tell(1, FOUND, RetainWeights(device=GPU))
        assert tell(2, wanted) == []
        if patience_ms == 2:
            assert tell.refusal(3, *())[0] is Status.TOO_LATE
            continue
        _, forget = tell(5, done(runs, 5))
        assert isinstance(forget, Start)
        assert tell(6, done(forget.action, 6)) == [start(wanted)]


def test_codes_of_a_lost_controller_stay_and_are_told_to_the_next() -> None:
    tell = fresh()
    tell(1, ControllerLost())
    assert tell(2, CodeAdded(code=CODE)) == [CodeReady(device=GPU, code_id="net")]


def test_a_wakeup_in_the_far_future_costs_one_entry() -> None:
    tell = fresh()
    tell(0, infer(1, "a", 4, window=(9000, 9001)))
    for at in range(50):
        action = load(100 + at, "b", 0, window=(0, 9000))
        tell(at, action)
        tell(at, done(action, at))
        forget = unload(200 + at, "b", 0, window=(0, 9000))
        tell(at, forget)
        tell(at, done(forget, at))
    assert len(tell.worker._wakes) == 1
    assert tell.worker.next_wakeup_ns() == 9000 * NS_PER_MS


# Begun in the middle of a run


def test_a_worker_can_begin_with_the_codes_and_weights_that_one_held() -> None:
    tell = Told(Worker((SPEC,)))
    action = load(1, "a", 0)
    held = Resident(
        model="a", code_id="net", weights=action.weights, extent=action.extent, version=action.version
    )
    tell.worker.resume(GPU, [CODE], [held])

    assert tell.worker.prepared(GPU, "net")
    assert not tell.worker.prepared(GPU, "more")
    read = infer(5, "a", 0)
    assert tell(0, read) == [start(read)]
    tell.worker.check()


def test_pages_that_are_added_can_be_loaded() -> None:
    tell = fresh()
    late = load(1, "a", SPEC.pages)
    assert statuses(tell(0, late)) == {1: Status.BAD_ACTION}

    tell.worker.add_pages(2)

    again = load(2, "a", SPEC.pages)
    assert tell(1, again) == [start(again)]
    tell.worker.check()


# What a device holds


def test_the_last_refusal_of_an_instant_says_what_the_device_holds_then() -> None:
    tell = fresh()
    action = load(1, "a", 0, version=7)
    tell(0, action)
    tell(1, done(action, 1))
    found = tell(2, infer(2, "b", 4), infer(3, "c", 4), infer(4, "a", 0, version=7))
    assert [one.held for one in found if isinstance(one, Result)] == [None, Held(versions=(7,))]


def test_weights_that_are_about_to_go_are_not_held() -> None:
    tell = fresh()
    action = load(1, "a", 0, version=7)
    tell(0, action)
    tell(1, done(action, 1), RetainWeights(device=GPU))
    (refused,) = [one for one in tell(1, infer(2, "b", 4)) if isinstance(one, Result)]
    assert refused.held == Held()


def test_a_code_that_is_being_prepared_anew_cannot_run() -> None:
    tell = fresh()
    tell(0, CodeRemoved(code_id="net"), CodeAdded(code=CODE))
    tell(0, CodeRemoved(code_id="net"))
    tell(0, CodeAdded(code=CODE))
    (refused,) = [one for one in tell(1, load(1, "a", 0)) if isinstance(one, Result)]
    assert refused.held == Held(unprepared=("net",))
