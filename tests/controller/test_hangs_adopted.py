"""What runs for a controller that died may hang: its successor finds that, and what is late is believed."""

from __future__ import annotations

import pytest

from clockwork_serve.controller.hangs import FIRST, FIRST_GRACE, SLOW_LOAD_BYTES
from clockwork_serve.messages import (
    Answer,
    ControllerEffect,
    Extent,
    Infer,
    Lane,
    Load,
    ModelRemoved,
    Outcome,
    Resident,
    Running,
    Status,
    Unload,
    Weights,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.units import NS_PER_MS, ms
from tests.controller.successors import GPU, Successor, ask, only, resident, result, state

FLOOR_MS, GRACE_MS = 100, 200
INFER = Running(action_id=8, lane=Lane.EXEC, version=3, left_ns=0, expected_ns=ms(1))
LOAD = Running(action_id=7, lane=Lane.LOAD, version=7, left_ns=0, expected_ns=ms(4))


def successor() -> Successor:
    return Successor(hang_ns=ms(FLOOR_MS), hang_grace_ns=ms(GRACE_MS))


def pass_time(tell: Successor, until_ms: float) -> list[tuple[float, ControllerEffect]]:
    """Wake the controller as it asks until then; what it decides, and when in ms."""
    done: list[tuple[float, ControllerEffect]] = []
    while (wake_ns := tell.controller.next_wakeup_ns()) is not None and wake_ns <= ms(until_ms):
        done += [(wake_ns / NS_PER_MS, effect) for effect in tell(wake_ns / NS_PER_MS)]
    return done


def words(done: list[tuple[float, ControllerEffect]]) -> list[tuple[float, WorkerHung]]:
    return [(at_ms, effect) for at_ms, effect in done if isinstance(effect, WorkerHung)]


@pytest.mark.parametrize(
    ("running", "what"), [(INFER, "an INFER of before it joined"), (LOAD, "a LOAD of before it joined")]
)
def test_an_inherited_action_that_never_ends_makes_its_worker_hung_and_then_ended(
    running: Running, what: str
) -> None:
    tell = successor()
    tell.joined(
        state(resident("a", 0, 3), resident("b", 8, 7, ready=running is not LOAD), running=(running,))
    )
    (late_ms, late), (end_ms, end), *_ = words(pass_time(tell, 3000))
    assert FIRST * FLOOR_MS < late_ms < (FIRST + 1) * FLOOR_MS + 100
    assert (late.worker, late.end, end.end) == ("w0", False, True)
    assert f"gpu0 has not answered {what}" in late.why
    assert end_ms == pytest.approx(late_ms + FIRST_GRACE * GRACE_MS)
    tell(3001, WorkerLost(worker="w0", running=(running.action_id,)))
    assert tell(3002, result(running.action_id, 3002)) == []


def test_one_that_ends_after_all_brings_its_worker_back_with_its_weights() -> None:
    tell = successor()
    tell.joined(state(resident("a", 0, 3), running=(INFER,)))
    assert len(words(pass_time(tell, 700))) == 1
    assert only(tell(700, result(8, 700)), WorkerHung) == [WorkerHung(worker="w0")]
    (action,) = tell(701, ask("a", 701))
    assert isinstance(action, Infer)
    assert (action.extent, action.version) == (Extent(0, 4), 3)


@pytest.mark.parametrize(("status", "first"), [(Status.OK, Infer), (Status.DEVICE_FAULT, Load)])
def test_a_load_that_ends_while_its_worker_hangs_is_believed(
    status: Status, first: type[ControllerEffect]
) -> None:
    tell = successor()
    tell.joined(state(resident("a", 0, 7, ready=False), running=(LOAD,)))
    assert len(words(pass_time(tell, 700))) == 1
    assert only(tell(700, result(7, 700, status)), WorkerHung) == [WorkerHung(worker="w0")]
    assert isinstance(tell(701, ask("a", 701))[0], first)


def test_it_comes_back_only_when_it_owes_neither_controller_anything() -> None:
    tell = successor()
    tell.joined(state(resident("a", 0, 3), running=(INFER,)))
    (sent,) = tell(2, ask("a", slo_ms=5000))
    assert isinstance(sent, Infer)
    assert len(words(pass_time(tell, 700))) == 1
    assert only(tell(700, result(8, 700)), WorkerHung) == [], "it owes what was sent to it since"
    assert only(tell(701, result(sent.action_id, 701)), WorkerHung) == [WorkerHung(worker="w0")]


def test_a_model_that_left_while_its_inherited_weights_hung_is_unloaded_when_they_are_back() -> None:
    tell = successor()
    tell.joined(state(resident("a", 0, 3), running=(INFER,)))
    pass_time(tell, 700)
    tell(700, ModelRemoved(model="a/1"))
    assert [one.version for one in only(tell(701, result(8, 701)), Unload)] == [3]  # type: ignore[union-attr]


def test_what_takes_long_and_was_expected_to_has_patience() -> None:
    tell = successor()
    slow = Running(action_id=8, lane=Lane.EXEC, version=3, left_ns=0, expected_ns=ms(1000))
    tell.joined(state(resident("a", 0, 3), running=(slow,)))
    ((late_ms, _),) = words(pass_time(tell, 4500))
    assert late_ms > 4000


def test_a_big_load_of_weights_that_nobody_wants_has_patience_too() -> None:
    tell = successor()
    weights = Weights(weights_id="gone", path="", size=10 * SLOW_LOAD_BYTES)
    gone = Resident(model="gone/1", code_id="c", weights=weights, extent=Extent(0, 4), version=7, ready=False)
    tell.joined(state(gone, running=(LOAD,)))
    late_ms, _ = words(pass_time(tell, 3000))[0]
    assert late_ms > (FIRST + 10) * FLOOR_MS


def test_who_waited_behind_what_an_earlier_controller_sent_has_not_cost_a_worker() -> None:
    tell = Successor(retries=0)
    tell.joined(state(resident("a", 0, 3), running=(INFER,)))
    assert only(tell(2, ask("a", slo_ms=5000)), Infer)
    back = WorkerJoined(worker="w0", devices=(GPU,), states=(state(resident("a", 0, 3)),))
    effects = tell(3, WorkerLost(worker="w0", running=(8,)), back)
    assert only(effects, Answer) == [], "its turn did not come"
    (again,) = only(effects, Infer)
    (answer,) = tell(6, result(again.action_id, 6))  # type: ignore[union-attr]
    assert isinstance(answer, Answer)
    assert answer.outcome is Outcome.OK


def test_a_load_lane_that_is_stalled_by_an_inherited_load_is_sent_none_until_that_ends() -> None:
    tell = successor()
    tell.joined(state(resident("a", 0, 7, ready=False), running=(LOAD,)))
    pass_time(tell, 100)
    assert only(tell(100, ask("b", 100, slo_ms=500)), Load) == []
    assert [one.model for one in only(tell(101, result(7, 101)), Load)] == ["b/1"]  # type: ignore[union-attr]
