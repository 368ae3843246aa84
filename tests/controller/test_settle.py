"""What an answer says when something went wrong, and what is tried again."""

from __future__ import annotations

import pytest

from clockwork_serve.controller.life import GONE
from clockwork_serve.messages import CodeReady, Held, Infer, Load, ModelRemoved, Outcome, Reason, Status
from clockwork_serve.units import ms
from tests.controller.honest import World, device, serving


def failing(kind: type, status: Status, times: int = 1000, *, lost: bool = False) -> World:
    """A cold device on which the first ``times`` actions of a kind end badly; ``lost``: it holds nothing."""
    world = serving("a")
    honest, left = world.reply, [times]

    def reply(action, said, start_ns, end_ns):  # type: ignore[no-untyped-def]
        bad = isinstance(action, kind) and left[0] > 0
        left[0] -= bad
        honest(action, status if bad else said, start_ns, end_ns, held=Held() if bad and lost else None)

    world.reply = reply  # type: ignore[method-assign]
    return world


@pytest.mark.parametrize(
    ("status", "reason"),
    [(Status.MODEL_RAISED, Reason.MODEL_RAISED), (Status.DEVICE_FAULT, Reason.DEVICE_FAULT)],
)
def test_a_failed_infer_says_why_and_that_it_was_cold(status: Status, reason: Reason) -> None:
    world = failing(Infer, status)
    request_id = world.ask("a", slo_ms=500)
    answer = world.answers[request_id]
    assert (answer.outcome, answer.reason, answer.cold) == (Outcome.FAILED, reason, True)
    assert answer.message == f"the worker refused: {status.value}"
    again = world.ask("a", slo_ms=500)
    assert not world.answers[again].cold, "the weights are there now"


@pytest.mark.parametrize(
    "status", [Status.WEIGHTS_MISSING, Status.WEIGHTS_CHANGED, Status.IN_USE, Status.UNKNOWN_CODE]
)
def test_weights_that_the_worker_does_not_hold_are_loaded_again(status: Status) -> None:
    world = failing(Infer, status, times=1, lost=True)
    request_id = world.ask("a", slo_ms=500)
    assert world.answers[request_id].outcome is Outcome.OK
    assert [type(one) for one in world.actions] == [Load, Infer, Load, Infer]


def test_belief_may_be_wrong_three_times_and_not_four() -> None:
    for times, outcome in ((3, Outcome.OK), (4, Outcome.FAILED)):
        world = failing(Infer, Status.WEIGHTS_MISSING, times)
        request_id = world.ask("a", slo_ms=5000)
        assert world.answers[request_id].outcome is outcome


def test_a_refusal_that_leaves_the_action_as_good_as_it_was_is_tried_for_as_long_as_there_is_time() -> None:
    world = failing(Infer, Status.TOO_LATE, times=10)
    request_id = world.ask("a", slo_ms=5000)
    assert world.answers[request_id].outcome is Outcome.OK
    assert [type(one) for one in world.actions] == [Load, *[Infer] * 11]


@pytest.mark.parametrize("status", [one for one in Status if one is not Status.OK])
def test_a_refusal_alone_says_nothing_about_weights(status: Status) -> None:
    world = failing(Infer, status, times=1)
    world.ask("a", slo_ms=500)
    world.ask("a", slo_ms=500)
    assert [type(one) for one in world.actions].count(Load) == 1


def test_an_infer_without_room_fails_and_is_not_tried_again() -> None:
    world = failing(Infer, Status.NO_ROOM)
    request_id = world.ask("a", slo_ms=500)
    assert world.answers[request_id].outcome is Outcome.FAILED
    assert [type(one) for one in world.actions] == [Load, Infer]


def test_a_load_that_found_no_room_is_tried_again_three_times() -> None:
    for times, outcome in ((3, Outcome.OK), (4, Outcome.FAILED)):
        world = failing(Load, Status.NO_ROOM, times)
        assert world.answers[world.ask("a", slo_ms=5000)].outcome is outcome


def test_weights_that_were_forgotten_are_gone() -> None:
    world = failing(Infer, Status.WEIGHTS_MISSING, times=1, lost=True)
    world.request("a", slo_ms=500)
    residency = world.controller._belief.models["a/1"].residencies["d0"]
    world.run()
    assert residency.state == GONE


@pytest.mark.parametrize("status", [Status.MODEL_RAISED, Status.INPUT_GONE, Status.NO_ROOM])
def test_two_that_failed_together_are_tried_alone(status: Status) -> None:
    world = failing(Infer, status, times=1)
    ids = [world.request("a", slo_ms=500) for _ in range(2)]
    world.run()
    assert [world.answers[one].outcome for one in ids] == [Outcome.OK] * 2
    assert [len(one.calls) for one in world.actions if isinstance(one, Infer)] == [2, 1, 1]


def test_what_raised_alone_is_not_tried_again() -> None:
    world = failing(Infer, Status.MODEL_RAISED)
    ids = [world.request("a", slo_ms=500) for _ in range(2)]
    world.run()
    assert [world.answers[one].reason for one in ids] == [Reason.MODEL_RAISED] * 2
    assert [len(one.calls) for one in world.actions if isinstance(one, Infer)] == [2, 1, 1]


def test_a_good_answer_says_how_long_it_waited_and_ran() -> None:
    world = failing(Infer, Status.OK, times=0)
    world.slower = 1.5
    request_id = world.ask("a", slo_ms=500)
    answer = world.answers[request_id]
    assert (answer.batch, answer.exec_ns, answer.expected_ns) == (1, ms(15), ms(10))
    assert answer.queue_ns == ms(0.1) + ms(8) + ms(0.1) + ms(0.1), "there, LOAD, back, there"


def test_what_a_failed_load_ends_has_failed() -> None:
    world = failing(Load, Status.MODEL_RAISED)
    request_id = world.ask("a", slo_ms=500)
    answer = world.answers[request_id]
    assert (answer.outcome, answer.reason) == (Outcome.FAILED, Reason.MODEL_RAISED)
    assert answer.message == "its weights could not be loaded: model_raised"


def test_requests_that_were_lost_together_are_tried_alone() -> None:
    world = failing(Infer, Status.OK, times=0)
    for _ in range(2):
        world.request("a", slo_ms=5000)
    world.run(until_ms=10)
    world.join(device("d1"), worker="w1")
    world.kill("w0", "d0")
    world.run()
    assert [len(one.calls) for one in world.actions if isinstance(one, Infer)] == [2, 1, 1]


def test_a_worker_that_comes_back_is_not_believed_as_slow_as_its_old_self() -> None:
    world = serving("a")
    world.slower = 3.0
    ids = []
    for _ in range(2):
        ids.append(world.request("a", slo_ms=500))
        world.run()
    world.kill("w0", "d0")
    world.join(device())
    ids.append(world.request("a", slo_ms=500))
    world.run()
    first, slow, again = (world.answers[one].expected_ns for one in ids)
    assert slow > 2 * first
    assert again == first


def test_weights_that_one_missed_stay_believed_while_another_reads_them() -> None:
    world = serving("a", policy="paper", look_ahead_ns=ms(50), max_batch=1)
    honest, infers = world.reply, []

    def reply(action, said, start_ns, end_ns):  # type: ignore[no-untyped-def]
        missed = isinstance(action, Infer) and not infers
        if isinstance(action, Infer):
            infers.append(action)
        held = Held() if missed else None
        honest(action, Status.WEIGHTS_MISSING if missed else said, start_ns, end_ns, held=held)

    world.reply = reply  # type: ignore[method-assign]
    ids = [world.request("a", slo_ms=500) for _ in range(2)]
    world.run()
    assert [world.answers[one].outcome for one in ids] == [Outcome.OK, Outcome.OK]
    assert [type(one) for one in world.actions] == [Load, Infer, Infer, Infer]


def test_what_ran_on_a_lost_worker_is_not_tried_again_once_its_model_was_removed() -> None:
    world = serving("a")
    request_id = world.request("a", slo_ms=5000)
    while not any(isinstance(one, Infer) for one in world.actions):
        world.run(until_ms=0.5)
    world.tell(ModelRemoved(model="a/1"))
    world.kill("w0", "d0")
    answer = world.answers[request_id]
    assert (answer.outcome, answer.reason) == (Outcome.FAILED, Reason.WORKER_LOST)


def test_a_code_that_cannot_run_there_is_waited_for() -> None:
    world = serving("a")
    honest = world.reply

    def reply(action, said, start_ns, end_ns):  # type: ignore[no-untyped-def]
        honest(action, Status.UNKNOWN_CODE, start_ns, end_ns, held=Held(unprepared=("c",)))

    world.reply = reply  # type: ignore[method-assign]
    world.ask("a", slo_ms=500, until_ms=100)
    world.reply = honest  # type: ignore[method-assign]
    assert world.controller._belief.devices["d0"].pending_codes == {"c"}
    world.tell(CodeReady(device="d0", code_id="c"))
    assert world.answers[world.ask("a", slo_ms=500)].outcome is Outcome.OK
