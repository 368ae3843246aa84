"""A worker that does not answer in time gets nothing more to do; it comes back, or is to be ended."""

from __future__ import annotations

import pytest

from clockwork_serve.controller.hangs import FIRST, FIRST_GRACE, NO_HEARTBEAT, PREPARE, SLOW_LOAD_BYTES
from clockwork_serve.messages import (
    Answer,
    CodeReady,
    Infer,
    ModelRemoved,
    Outcome,
    Quarantined,
    Readiness,
    Reason,
    ReleaseFromQuarantine,
    Result,
    Status,
    Unload,
    WorkerCrashed,
    WorkerHeard,
    WorkerJoined,
    WorkerLost,
    WorkerSilent,
)
from clockwork_serve.units import MIB, NS_PER_MS, ms
from tests.controller.honest import CODE, device, model
from tests.controller.stubborn import FLOOR_MS, GRACE_MS, Stubborn, world_of

SURE_MS = FLOOR_MS / 8 + 1


def test_an_action_that_is_late_makes_its_worker_hung_and_its_request_runs_elsewhere() -> None:
    world = world_of("d0")
    world.join(device("d1"), worker="w1")
    world.stuck = {"d0"}
    began_ms = world.now_ns / NS_PER_MS
    asked = world.ask("a", slo_ms=2000, until_ms=FLOOR_MS - 1)
    assert world.hung() == [], "it may be late"
    world.run(until_ms=50)
    assert world.hung() == [("w0", True, False)]
    late_ms = world.hung_ms() - began_ms
    assert FLOOR_MS < late_ms < FLOOR_MS + 10 + 2 * SURE_MS, "its estimate, the floor, and a second look"
    world.run(until_ms=100)
    assert world.answers[asked].outcome is Outcome.OK
    assert not world.answers[asked].release, "the worker that hung may still write there"
    assert [action.device for action in world.actions[-2:]] == ["d1", "d1"]


def test_a_worker_that_answers_after_all_comes_back_as_it_was_and_nothing_is_answered_twice() -> None:
    world = world_of("d0")
    world.join(device("d1"), worker="w1")
    world.stuck = {"d0"}
    asked = world.ask("a", slo_ms=2000, until_ms=250)
    assert world.answers[asked].outcome is Outcome.OK
    world.release("d0")
    world.run(until_ms=50)
    assert world.hung() == [("w0", True, False), ("w0", False, False)]
    assert world.releases == [asked]
    world.actions.clear()
    world.ask("b", slo_ms=100, until_ms=100)
    assert [(type(one), one.device) for one in world.actions] == [(Infer, "d0")], (
        "its weights are there still"
    )
    world.run(until_ms=10 * GRACE_MS)
    assert len(world.hung()) == 2, "it is not ended later"


def test_one_that_does_not_answer_in_its_grace_is_to_be_ended_and_does_not_come_back() -> None:
    world = world_of("d0")
    world.stuck = {"d0"}
    world.ask("a", slo_ms=50, until_ms=FLOOR_MS + GRACE_MS + 100)
    assert world.hung() == [("w0", True, False), ("w0", True, True)]
    assert world.hung_ms(end=True) == pytest.approx(world.hung_ms() + GRACE_MS)
    world.release("d0")
    world.run(until_ms=20)
    assert world.hung()[2:] == [], "too late: it is being ended"
    world.tell(WorkerLost(worker="w0", running=()))
    world.join(device("d0"), worker="w0")
    asked = world.ask("a", slo_ms=100, until_ms=100)
    assert world.answers[asked].outcome is Outcome.OK


def test_where_the_only_worker_hangs_requests_hear_at_once_and_it_is_not_ready() -> None:
    world = world_of("d0")
    world.stuck = {"d0"}
    first = world.ask("a", slo_ms=5000, until_ms=150)
    assert world.answers[first].outcome is Outcome.REJECTED
    assert (world.answers[first].reason, world.answers[first].release) == (Reason.NOT_SERVING, False)
    second = world.request("b", slo_ms=5000)
    assert world.answers[second].reason is Reason.NOT_SERVING
    assert world.answers[second].message == "no worker answers: w0 hung"
    told = [one for _, one in world.said if isinstance(one, Readiness)]
    assert [one.ready for one in told] == [False]
    assert "w0 hung: d0 has not answered an INFER of a/1" in told[0].why
    world.tell(WorkerLost(worker="w0", running=()))
    assert world.releases == [first], "a dead worker writes no more"


def test_what_was_never_measured_there_has_more_patience_and_more_grace() -> None:
    world = world_of("d0", measured=False)
    world.stuck_infers = {"d0"}
    asked = world.ask("a", slo_ms=100, until_ms=FIRST * FLOOR_MS)
    assert world.hung() == []
    assert asked in world.answers
    world.run(until_ms=100)
    assert world.hung() == [("w0", True, False)]
    world.run(until_ms=FIRST_GRACE * GRACE_MS)
    assert world.hung_ms(end=True) == pytest.approx(world.hung_ms() + FIRST_GRACE * GRACE_MS)


def test_a_big_load_may_take_as_long_as_from_a_slow_disk() -> None:
    world = world_of("d0")
    big = 8 * SLOW_LOAD_BYTES
    world.serve(model("big", mib=big // MIB))
    world.join(device("d9", pages=1024), worker="w9")
    world.stuck = {"d9"}
    world.ask("big", slo_ms=100, until_ms=FIRST * FLOOR_MS + 7 * FLOOR_MS)
    assert world.hung() == []
    world.run(until_ms=3 * FLOOR_MS)
    assert world.hung() == [("w9", True, False)]


def test_an_idle_worker_hangs_if_it_is_silent_and_comes_back_when_it_is_heard() -> None:
    world = world_of("d0")
    world.tell(WorkerSilent(worker="w0", for_ns=ms(1)), WorkerSilent(worker="w0", for_ns=ms(1)))
    assert world.hung() == [("w0", True, False)]
    asked = world.request("a", slo_ms=100)
    assert world.answers[asked].reason is Reason.NOT_SERVING
    world.tell(WorkerHeard(worker="w0"))
    assert world.hung()[1:] == [("w0", False, False)]
    again = world.ask("a", slo_ms=100, until_ms=100)
    assert world.answers[again].outcome is Outcome.OK
    assert not world.answers[again].cold


def test_silence_of_a_worker_that_is_at_work_is_left_to_the_patience_with_that_work() -> None:
    world = world_of("d0")
    world.stuck = {"d0"}
    world.request("a", slo_ms=100)
    world.tell(WorkerSilent(worker="w0", for_ns=ms(FLOOR_MS)))
    assert world.hung() == []
    world.tell(WorkerSilent(worker="w0", for_ns=ms(NO_HEARTBEAT * FLOOR_MS)))
    assert world.hung() == [("w0", True, False)]


def test_a_code_that_is_never_prepared_makes_its_worker_hung_at_last() -> None:
    world = Stubborn()
    world.serve(model("a"))
    world.tell(WorkerJoined(worker="w0", devices=(device(),)))
    world.run(until_ms=PREPARE * FLOOR_MS - 1)
    assert world.hung() == []
    world.run(until_ms=2 * FLOOR_MS)
    assert world.hung() == [("w0", True, False)]
    world.tell(CodeReady(device="d0", code_id=CODE.code_id))
    assert world.hung()[1:] == [("w0", False, False)]


def test_weights_of_a_model_removed_while_their_worker_hung_go_when_that_is_back() -> None:
    world = world_of("d0")
    world.stuck = {"d0"}
    world.ask("a", slo_ms=100, until_ms=250)
    world.tell(ModelRemoved(model="b/1"))
    world.release("d0")
    world.actions.clear()
    world.run(until_ms=50)
    assert [(type(one), one.model) for one in world.actions] == [(Unload, "b/1")]


def hang_and_end(world: Stubborn, name: str, *, idle: bool = False) -> None:
    """A request of a model hangs its worker, which is ended and comes again."""
    world.stuck = {"d0"}
    world.ask(name, slo_ms=50, until_ms=FIRST * FLOOR_MS + FIRST_GRACE * GRACE_MS + 200)
    (infer,) = (one for one in world.kept if isinstance(one, Infer))
    world.kept.clear()
    world.stuck.clear()
    world.tell(WorkerLost(worker="w0", running=(infer.action_id,), idle=idle))
    if not idle:
        world.tell(WorkerCrashed(worker="w0"))
    world.join(device("d0"), worker="w0")


def test_a_model_that_hangs_is_quarantined_as_one_that_crashes_and_the_reason_says_so() -> None:
    world = world_of("d0")
    for _ in range(3):
        world.request("a", slo_ms=500)
        world.run(until_ms=100)  # it answers well in between; and its weights are loaded
        hang_and_end(world, "a")
    (told,) = [one for _, one in world.said if isinstance(one, Quarantined)]
    assert told.model == "a/1"
    assert "it took a device down 3 times" in told.why
    assert "the last time running a request, where it hung" in told.why
    fine = world.ask("b", slo_ms=500, until_ms=100)
    assert world.answers[fine].outcome is Outcome.OK
    world.tell(ReleaseFromQuarantine(model="a"))
    again = world.ask("a", slo_ms=500, until_ms=100)
    assert world.answers[again].outcome is Outcome.OK


def test_a_worker_that_hung_at_nothing_blames_no_model() -> None:
    world = world_of("d0")
    for _ in range(5):
        world.ask("a", slo_ms=500, until_ms=100)
        hang_and_end(world, "a", idle=True)
    assert not [one for _, one in world.said if isinstance(one, Quarantined)]


def test_a_request_that_hangs_every_worker_costs_as_many_as_it_may() -> None:
    world = world_of("d0", "d1", "d2", settings={"retries": 1}, measured=False)
    world.stuck_infers = {"d0", "d1", "d2"}
    asked = world.ask("a", slo_ms=60_000, until_ms=5000)
    answer: Answer = world.answers[asked]
    assert (answer.outcome, answer.reason) == (Outcome.FAILED, Reason.WORKER_LOST)
    assert answer.message == "the worker hung while it ran this request"
    assert len({worker for worker, hangs, end in world.hung() if hangs and not end}) == 2


def test_without_a_floor_nobody_ever_hangs() -> None:
    world = world_of("d0", settings={"hang_ns": 0})
    world.stuck = {"d0"}
    world.ask("a", slo_ms=50, until_ms=100_000)
    world.tell(WorkerSilent(worker="w0", for_ns=ms(100_000)))
    assert world.hung() == []


def test_a_controller_that_slept_itself_blames_nobody_for_what_is_waiting_to_be_read() -> None:
    world = world_of("d0")
    world.stuck = {"d0"}
    world.request("a", slo_ms=50)
    world.now_ns += ms(60_000)  # nothing ran here; the result lies in the socket
    world.tell()
    assert world.hung() == []
    world.release("d0")
    world.run(until_ms=1000)
    assert world.hung() == []


def test_a_late_result_of_another_device_is_not_taken_for_one_that_is_owed() -> None:
    world = world_of("d0")
    world.stuck = {"d0"}
    world.ask("a", slo_ms=50, until_ms=250)
    world.tell(Result(action_id=999, device="d0", status=Status.OK, started_ns=0, ended_ns=1))
    world.tell(Result(action_id=999, device="nobody", status=Status.OK, started_ns=0, ended_ns=1))
    assert world.hung() == [("w0", True, False)]
