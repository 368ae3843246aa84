"""Codes are prepared when added, retired when nothing needs them, and never in the way of LOADs for long."""

from __future__ import annotations

from msgspec import structs

from clockwork_serve.messages import CodeAdded, CodeReady, CodeRemoved, Status
from clockwork_serve.worker import Prepare, Prepared, Retire, Retired, Worker
from tests.worker.actions import (
    CODE,
    GPU,
    MORE,
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


def test_a_code_is_prepared_on_every_device_and_told_when_ready() -> None:
    tell = Told(Worker((SPEC, OTHER)))
    assert tell(0, CodeAdded(code=CODE)) == [
        Prepare(device=GPU, code=CODE),
        Prepare(device="gpu:1", code=CODE),
    ]
    assert tell(1, Prepared(device="gpu:1", code_id="net")) == [CodeReady(device="gpu:1", code_id="net")]
    assert tell(2, Prepared(device=GPU, code_id="net")) == [CodeReady(device=GPU, code_id="net")]


def test_a_code_of_a_backend_that_a_device_does_not_run_is_refused_and_never_prepared() -> None:
    tell = Told(Worker((structs.replace(SPEC, backends=("onnx", "torch")), OTHER)))
    assert tell(0, CodeAdded(code=CODE)) == [
        CodeReady(
            device=GPU, code_id="net", ok=False,
            message="gpu:0 runs onnx and torch codes; found one of backend emulated",
        ),
        Prepare(device="gpu:1", code=CODE),
    ]  # fmt: skip
    assert statuses(tell(1, load(1, "a", 0))) == {1: Status.UNKNOWN_CODE}
    assert tell(2, CodeRemoved(code_id="net")) == []


def test_a_code_that_can_not_be_prepared_is_told_why_and_tried_again_when_added_again() -> None:
    tell = Told(Worker((SPEC,)))
    tell(0, CodeAdded(code=CODE))
    no = Prepared(device=GPU, code_id="net", ok=False, message="the file is gone")
    assert tell(1, no) == [CodeReady(device=GPU, code_id="net", ok=False, message="the file is gone")]
    status, message = tell.refusal(2, load(1, "a", 0))
    assert status is Status.UNKNOWN_CODE
    assert message == "LOAD of a: code_id: net is not prepared on gpu:0; it is failed"
    assert tell(3, CodeAdded(code=CODE)) == [Prepare(device=GPU, code=CODE)]


def test_loads_go_before_codes_that_wait_to_be_prepared() -> None:
    tell = fresh()
    first, second = load(1, "a", 0), load(2, "b", 2)
    tell(0, first)
    tell(2, CodeAdded(code=MORE), second)
    assert tell(8, done(first, 8))[-1] == start(second)
    assert statuses(tell(16, done(second, 16))) == {2: Status.OK}
    assert tell.wake_ms() == 17, "8 ms were worked: 1 ms is left for the controller to say more"
    assert tell(17) == [Prepare(device=GPU, code=MORE)]


def test_between_two_codes_there_is_time_for_a_load() -> None:
    tell = Told(Worker((SPEC,)))
    tell(0, CodeAdded(code=CODE), CodeAdded(code=MORE))
    assert tell(200, Prepared(device=GPU, code_id="net")) == [CodeReady(device=GPU, code_id="net")]
    assert tell.wake_ms() == 202, "but never more than 2 ms"
    copy = load(1, "a", 0, window=(0, 300))
    assert tell(201, copy) == [start(copy)]


def test_a_code_that_waited_long_is_prepared_before_loads() -> None:
    tell = fresh()
    tell(0, load(1, "a", 0), CodeAdded(code=MORE))
    copies = [load(at, "a", 2, window=(0, 1000)) for at in (2, 3)]
    tell(499, *copies)
    assert tell(499, done(load(1, "a", 0), 499))[-1] == start(copies[0])
    assert tell(500, done(copies[0], 500))[-1] == Prepare(device=GPU, code=MORE)


def test_a_chore_in_its_rest_does_not_hide_a_load_that_opens_sooner() -> None:
    tell = fresh()
    first = load(1, "a", 0)
    tell(0, first, CodeAdded(code=MORE))
    tell(16, done(first, 16), load(2, "b", 2, window=(17, 90)))
    assert tell.wake_ms() == 17
    assert tell(17) == [start(load(2, "b", 2, window=(17, 90)))]


def test_an_unknown_code_is_refused() -> None:
    tell = fresh()
    assert tell.refusal(0, load(1, "a", 0, code_id="odd"))[0] is Status.UNKNOWN_CODE
    assert tell.refusal(0, infer(2, "a", 0, code_id="odd")) == (
        Status.UNKNOWN_CODE,
        "INFER of a: code_id: odd is not prepared on gpu:0; it is absent",
    )


def test_a_removed_code_is_retired_and_can_come_back() -> None:
    tell = fresh()
    assert tell(1, CodeRemoved(code_id="net")) == [Retire(device=GPU, code_id="net")]
    assert tell(2, CodeAdded(code=CODE)) == []
    assert tell(3, Retired(device=GPU, code_id="net")) == []
    assert tell(5) == [Prepare(device=GPU, code=CODE)]


def test_a_removed_code_stays_while_weights_or_actions_use_it() -> None:
    tell = resident(fresh(), "a", 0)
    runs = infer(1, "a", 0)
    tell(1, runs)
    assert tell(2, CodeRemoved(code_id="net")) == []
    tell(3, done(runs, 3))
    forget = unload(2, "a", 0)
    assert tell(4, forget) == [start(forget)]
    tell(5, done(forget, 5))
    assert tell(5.5) == [Retire(device=GPU, code_id="net")]
    assert tell(6, Retired(device=GPU, code_id="net")) == []
    assert tell.refusal(7, load(3, "a", 0))[0] is Status.UNKNOWN_CODE


def test_the_refusal_of_the_last_user_retires_a_removed_code() -> None:
    tell = fresh()
    tell(0, infer(1, "a", 0, window=(5, 6)))
    assert tell(1, CodeRemoved(code_id="net")) == []
    refusal, retire = tell(5)
    assert statuses([refusal]) == {1: Status.WEIGHTS_MISSING}
    assert retire == Retire(device=GPU, code_id="net")


def test_a_code_removed_while_it_is_prepared_is_retired_unsaid() -> None:
    tell = Told(Worker((SPEC,)))
    tell(0, CodeAdded(code=CODE))
    assert tell(1, CodeRemoved(code_id="net")) == []
    assert tell(2, Prepared(device=GPU, code_id="net")) == []
    assert tell(2.5) == [Retire(device=GPU, code_id="net")]
    assert tell(3, Retired(device=GPU, code_id="net")) == []
    assert tell.worker.idle


def test_a_code_added_and_removed_before_its_turn_is_not_prepared() -> None:
    tell = fresh()
    more = structs.replace(CODE, code_id="more")
    copies = load(1, "a", 0)
    tell(0, copies, CodeAdded(code=more))
    tell(1, CodeRemoved(code_id="more"))
    assert statuses(tell(2, done(copies, 2))) == {1: Status.OK}
    assert tell(3) == []
    assert tell.worker.idle


def test_adding_a_code_twice_prepares_it_once_and_answers_both() -> None:
    tell = Told(Worker((SPEC,)))
    tell(0, CodeAdded(code=CODE))
    assert tell(1, CodeAdded(code=CODE)) == []
    ready = [CodeReady(device=GPU, code_id="net")]
    assert tell(2, Prepared(device=GPU, code_id="net")) == ready
    assert tell(3, CodeAdded(code=CODE)) == ready


def test_removing_an_unknown_code_does_nothing() -> None:
    assert fresh()(0, CodeRemoved(code_id="odd")) == []
