"""A controller that follows another takes over what workers have; what the other sent answers nobody."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clockwork_serve.messages import (
    Answer,
    Extent,
    Infer,
    Lane,
    Load,
    MeasuredDurations,
    ModelRemoved,
    Outcome,
    Readiness,
    RetainWeights,
    Running,
    Status,
    Unload,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.units import ms
from tests.controller.honest import model
from tests.controller.successors import GPU, LIFE, Successor, ask, only, resident, result, state


def test_it_is_ready_at_once_and_loads_nothing_that_is_there() -> None:
    tell = Successor()
    effects = tell.joined(state(resident("a", 0, 3), resident("b", 8, 5)))
    assert effects[0] == RetainWeights(device="gpu0", versions=(3, 5))
    assert Readiness(ready=True) in effects
    (action,) = tell(2, ask("a"))
    assert isinstance(action, Infer)
    assert (action.extent, action.version) == (Extent(0, 4), 3)
    assert action.action_id > LIFE


def test_one_device_of_two_is_enough_for_a_successor() -> None:
    tell = Successor(expected_devices=2)
    assert Readiness(ready=True) in tell.joined(state())


def test_what_it_does_not_serve_is_not_kept() -> None:
    tell = Successor()
    other = replace(resident("b", 4, 4), weights=replace(model("b").weights, weights_id="older"))
    effects = tell.joined(state(resident("a", 0, 3), other, resident("c", 8, 5)))
    assert only(effects, RetainWeights) == [RetainWeights(device="gpu0", versions=(3,))]
    (load,) = tell(2, ask("b"))
    assert isinstance(load, Load)


def test_weights_of_a_code_that_is_not_prepared_are_not_kept() -> None:
    tell = Successor()
    effects = tell.joined(state(resident("a", 0, 3), codes=()))
    assert only(effects, RetainWeights) == [RetainWeights(device="gpu0")]
    assert not only(effects, Readiness) or not effects[-1].ready  # type: ignore[union-attr]


def test_of_two_weights_of_one_model_one_is_kept() -> None:
    tell = Successor()
    effects = tell.joined(state(resident("a", 0, 3), resident("a", 8, 5)))
    assert only(effects, RetainWeights) == [RetainWeights(device="gpu0", versions=(3,))]


def test_a_load_that_runs_is_waited_for_and_its_weights_used() -> None:
    tell = Successor()
    load = Running(action_id=7, lane=Lane.LOAD, version=7, left_ns=ms(4))
    assert only(tell.joined(state(resident("a", 0, 7, ready=False), running=(load,))), RetainWeights) == [
        RetainWeights(device="gpu0", versions=(7,))
    ]
    assert tell(2, ask("a")) == [], "no second LOAD"
    (action,) = tell(5, result(7, 5))
    assert isinstance(action, Infer)
    assert action.version == 7


@pytest.mark.parametrize("status", [Status.DEVICE_FAULT, Status.MODEL_RAISED])
def test_a_load_that_fails_is_made_again(status: Status) -> None:
    tell = Successor()
    load = Running(action_id=7, lane=Lane.LOAD, version=7, left_ns=ms(4))
    tell.joined(state(resident("a", 0, 7, ready=False), running=(load,)))
    tell(2, ask("a"))
    (action,) = tell(5, result(7, 5, status))
    assert isinstance(action, Load)


def test_an_infer_that_runs_takes_its_lane_and_answers_nobody() -> None:
    tell = Successor()
    infer = Running(action_id=8, lane=Lane.EXEC, version=3, left_ns=ms(40))
    tell.joined(state(resident("a", 0, 3), running=(infer,)))
    # 40 ms are left of it: what must end before cannot.
    (answer,) = tell(2, ask("a", slo_ms=30))
    assert isinstance(answer, Answer)
    assert answer.outcome is Outcome.REJECTED
    tell(2, ask("a", slo_ms=100, number=2))
    effects = tell(41, result(8, 41))
    assert only(effects, Answer) == []
    (action,) = only(effects, Infer) or only(tell(42), Infer)
    assert [call.request_id for call in action.calls] == ["r2"]  # type: ignore[union-attr]
    (answer,) = tell(60, result(action.action_id, 60))  # type: ignore[union-attr]
    assert isinstance(answer, Answer)
    assert answer.outcome is Outcome.OK


def test_weights_that_an_old_infer_reads_are_not_unloaded_before_it_ends() -> None:
    tell = Successor()
    infer = Running(action_id=8, lane=Lane.EXEC, version=3, left_ns=ms(4))
    tell.joined(state(resident("a", 0, 3), running=(infer,)))
    assert tell(2, ModelRemoved(model="a/1")) == []
    (unload,) = tell(5, result(8, 5))
    assert isinstance(unload, Unload)
    assert unload.version == 3


def test_what_ran_is_forgotten_with_its_worker() -> None:
    tell = Successor()
    infer = Running(action_id=8, lane=Lane.EXEC, version=3, left_ns=ms(4))
    tell.joined(state(resident("a", 0, 3), running=(infer,)))
    tell(2, WorkerLost(worker="w0"))
    assert tell(3, result(8, 3)) == []


def test_a_result_of_what_nobody_told_of_is_nothing() -> None:
    tell = Successor()
    tell.joined(state(resident("a", 0, 3)))
    assert tell(2, result(99, 2)) == []


def test_durations_measured_before_are_believed() -> None:
    tell = Successor()
    measured = MeasuredDurations(code_id="c", batch=1, lasted_ns=(ms(30),) * 10)
    loads = MeasuredDurations(code_id="c", batch=0, lasted_ns=(ms(2),) * 10)
    tell.joined(state(resident("a", 0, 3), measured=(measured, loads)))
    (action,) = tell(2, ask("a"))
    assert isinstance(action, Infer)
    assert action.expected_ns == ms(30)
    (load,) = tell(3, ask("b", 3, number=2))
    assert isinstance(load, Load)
    assert load.expected_ns == ms(2)


def test_a_worker_with_empty_memory_is_told_to_keep_nothing() -> None:
    tell = Successor()
    assert only(tell(1, WorkerJoined(worker="w0", devices=(GPU,))), RetainWeights) == []
