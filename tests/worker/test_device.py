"""One device: pages, weights and what an action must be in itself, each rule in three lines."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec import structs

from clockwork_serve.messages import CodeAdded, Extent, Result, Status
from clockwork_serve.worker import Prepared, Worker
from clockwork_serve.worker.pages import WeightsState
from tests.worker.actions import (
    CODE,
    GPU,
    NO_IO,
    NO_WORKSPACE,
    PROFILE,
    SPEC,
    Told,
    done,
    fresh,
    infer,
    load,
    resident,
    start,
    unload,
)


def ended(effects: Sequence[object]) -> Status:
    (result, *_) = effects
    assert isinstance(result, Result)
    return result.status


# LOAD


def test_weights_can_be_used_once_their_load_is_done() -> None:
    tell = fresh()
    copy, run = load(1, "a", 0), infer(2, "a", 0)
    assert tell(0, copy) == [start(copy)]
    assert ended(tell(1, done(copy, 1))) is Status.OK
    assert tell(2, run) == [start(run)]


def test_a_load_into_pages_that_are_held_needs_an_unload_first() -> None:
    tell = resident(fresh(), "a", 2)
    status, message = tell.refusal(1, load(1, "b", 3))
    assert status is Status.NO_ROOM
    assert message == "LOAD of b: pages 2..3 hold a; UNLOAD it first"
    assert tell.refusal(1, load(2, "a", 2))[0] is Status.NO_ROOM


def test_neighbouring_pages_are_free() -> None:
    tell = resident(fresh(), "a", 2)
    before, after = load(1, "b", 0), load(2, "c", 4)
    assert tell(1, before) == [start(before)]
    tell(1, done(before, 1))
    assert tell(1, after) == [start(after)]


def test_a_load_into_pages_that_an_infer_reads_is_refused() -> None:
    tell = resident(fresh(), "a", 0)
    tell(1, infer(1, "a", 0))
    status, message = tell.refusal(2, load(2, "b", 1))
    assert (status, message) == (Status.IN_USE, "LOAD of b: pages 0..1 are in use by a")


def test_a_load_into_pages_that_a_queued_infer_will_read_is_refused() -> None:
    tell = resident(fresh(), "a", 0)
    tell(1, infer(1, "a", 0, window=(9, 10)))
    assert tell.refusal(2, load(2, "b", 1))[0] is Status.IN_USE


def test_a_queued_infer_of_other_weights_holds_nothing() -> None:
    tell = resident(fresh(), "a", 0)
    tell(1, infer(1, "a", 0, version=2, window=(9, 10)))
    assert tell.refusal(2, load(2, "b", 1))[0] is Status.NO_ROOM


def test_a_load_that_fails_leaves_its_pages_empty() -> None:
    tell = fresh()
    copy = load(1, "a", 0)
    tell(0, copy)
    assert ended(tell(1, done(copy, 1, Status.DEVICE_FAULT))) is Status.DEVICE_FAULT
    assert tell.refusal(2, infer(2, "a", 0))[0] is Status.WEIGHTS_MISSING
    again = load(3, "b", 0)
    assert tell(3, again) == [start(again)]


def test_an_unload_before_a_load_makes_room_at_once() -> None:
    tell = resident(fresh(), "a", 0)
    forget, copy = unload(1, "a", 0), load(2, "b", 0)
    assert tell(1, forget, copy) == [start(forget)]
    assert tell(2, done(forget, 2))[-1] == start(copy)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (9, 2), (0, 0), (0, -1), (0, 11)])
def test_an_extent_outside_the_device_is_a_contradiction(first: int, count: int) -> None:
    status, message = fresh().refusal(0, load(1, "a", first, count, size=1))
    assert status is Status.BAD_ACTION
    assert message == f"LOAD of a: extent: expected pages within 0..9, found {count} from page {first}"


def test_weights_must_fit_their_extent() -> None:
    tell = fresh()
    status, message = tell.refusal(0, load(1, "a", 0, 2, size=201))
    assert status is Status.BAD_ACTION
    assert message == "LOAD of a: extent: expected room for 201 bytes of weights, found 200 bytes"
    assert tell(0, load(2, "a", 0, 2, size=200)) == [start(load(2, "a", 0, 2, size=200))]


# UNLOAD


def test_unloaded_weights_are_gone() -> None:
    tell = resident(fresh(), "a", 0)
    forget = unload(1, "a", 0)
    assert tell(1, forget) == [start(forget)]
    assert ended(tell(1, done(forget, 1))) is Status.OK
    assert tell.refusal(2, infer(2, "a", 0))[0] is Status.WEIGHTS_MISSING


def test_an_unload_that_fails_forgets_all_the_same() -> None:
    tell = resident(fresh(), "a", 0)
    forget = unload(1, "a", 0)
    tell(1, forget)
    assert ended(tell(2, done(forget, 2, Status.DEVICE_FAULT))) is Status.DEVICE_FAULT
    copy = load(2, "b", 0)
    assert tell(3, copy) == [start(copy)]


@pytest.mark.parametrize(
    "action",
    [unload(1, "a", 4), unload(1, "a", 0, version=2), unload(1, "a", 0, count=1), unload(1, "b", 0)],
    ids=["empty pages", "another version", "another extent", "another model"],
)
def test_an_unload_of_what_is_not_there_is_refused(action: object) -> None:
    tell = resident(fresh(), "a", 0)
    assert tell.refusal(1, action)[0] is Status.WEIGHTS_MISSING  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [(0, 10), (9, 10)], ids=["running", "queued"])
def test_weights_that_an_infer_reads_are_not_unloaded(window: tuple[float, float]) -> None:
    tell = resident(fresh(), "a", 0)
    tell(1, infer(1, "a", 0, window=window))
    status, message = tell.refusal(2, unload(2, "a", 0))
    assert (status, message) == (Status.IN_USE, "UNLOAD of a: an INFER reads its weights in pages 0..1")


# INFER


@pytest.mark.parametrize(
    "action",
    [infer(1, "a", 4), infer(1, "a", 0, version=2), infer(1, "a", 0, count=1), infer(1, "b", 0)],
    ids=["empty pages", "another version", "another extent", "another model"],
)
def test_an_infer_of_what_is_not_there_is_refused(action: object) -> None:
    tell = resident(fresh(), "a", 0)
    assert tell.refusal(1, action)[0] is Status.WEIGHTS_MISSING  # type: ignore[arg-type]


def test_an_infer_with_another_code_than_the_weights_are_laid_out_for_is_refused() -> None:
    tell = fresh()
    tell(0, CodeAdded(code=structs.replace(CODE, code_id="more")))
    tell(0, Prepared(device=GPU, code_id="more"))
    resident(tell, "a", 0)
    assert tell.refusal(1, infer(1, "a", 0, code_id="more"))[0] is Status.WEIGHTS_MISSING
    assert tell(1, unload(2, "a", 0)) == [start(unload(2, "a", 0))]


def test_the_refusal_says_what_is_there_instead() -> None:
    tell = resident(fresh(), "b", 0, version=3)
    assert tell.refusal(1, infer(1, "a", 1, version=2))[1] == (
        "INFER of a: expected its weights, version 2, in pages 1..2; found b version 3"
    )


def test_an_infer_waits_for_its_weights_inside_its_window() -> None:
    tell = fresh()
    copy, run = load(1, "a", 0), infer(2, "a", 0, window=(1, 5))
    tell(0, copy, run)
    assert tell(1) == []
    assert tell.worker.next_wakeup_ns() == run.window.latest_ns + 1
    assert tell(4, done(copy, 4))[-1] == start(run)


def test_an_infer_waits_for_a_load_that_has_not_started() -> None:
    tell = fresh()
    copy, run = load(1, "a", 0, window=(2, 5)), infer(2, "a", 0, window=(0, 9))
    assert tell(0, run, copy) == []
    assert tell(2) == [start(copy)]
    assert tell(4, done(copy, 4))[-1] == start(run)


def test_an_infer_does_not_wait_past_its_window() -> None:
    tell = fresh()
    tell(0, load(1, "a", 0), infer(2, "a", 0, window=(1, 5)))
    status, _ = tell.refusal(5.001)
    assert status is Status.TOO_LATE


def test_an_infer_whose_load_failed_is_refused_at_once() -> None:
    tell = fresh()
    copy, run = load(1, "a", 0), infer(2, "a", 0)
    tell(0, copy, run)
    failed, refused = tell(3, done(copy, 3, Status.DEVICE_FAULT))
    assert ended([failed]) is Status.DEVICE_FAULT
    assert ended([refused]) is Status.WEIGHTS_MISSING


def test_an_infer_whose_load_is_refused_is_refused_too() -> None:
    tell = fresh()
    tell(0, load(1, "a", 0, window=(2, 2)), infer(2, "a", 0), load(3, "b", 4))
    tell(1)
    effects = tell(3, done(load(3, "b", 4), 3))
    assert [ended([effect]) for effect in effects] == [Status.OK, Status.TOO_LATE, Status.WEIGHTS_MISSING]


def test_answers_computed_with_weights_that_changed_are_thrown_away() -> None:
    tell = resident(fresh(), "a", 0)
    run = infer(1, "a", 0)
    tell(1, run)
    # No order of events leads here; the check is the last line of defence, so the state is bent by hand.
    held = tell.worker._devices[GPU].pages.at(Extent(0, 2), 1)
    assert held is not None
    held.state = WeightsState.UNLOADING
    tell.worker.observe(done(run, 2), 2_000_000)
    (result,) = tell.worker.decide(2_000_000)
    assert isinstance(result, Result)
    assert (result.status, result.outputs) == (Status.WEIGHTS_CHANGED, ())
    assert "version 1, changed while it ran" in result.message


def test_a_batch_size_that_was_not_compiled_is_a_contradiction() -> None:
    status, message = fresh().refusal(0, infer(1, "a", 0, batch=3))
    assert (status, message) == (
        Status.BAD_ACTION,
        "INFER of a: batch: expected one of (1, 2, 4, 8), found 3",
    )


@pytest.mark.parametrize("rows", [(1, 1, 1), (3,), (0, 1), (-1, 2)])
def test_rows_that_do_not_fit_the_batch_are_a_contradiction(rows: tuple[int, ...]) -> None:
    status, message = fresh().refusal(0, infer(1, "a", 0, batch=2, rows=rows))
    assert status is Status.BAD_ACTION
    assert message == f"INFER of a: rows: expected at least 1 each and at most 2 in all, found {list(rows)}"


def test_an_infer_without_a_call_is_a_contradiction() -> None:
    assert (
        fresh().refusal(0, infer(1, "a", 0, rows=()))[1]
        == "INFER of a: calls: expected at least one, found none"
    )


def test_a_code_without_a_batch_axis_takes_one_call_of_any_rows() -> None:
    tell = resident(fresh(code=structs.replace(CODE, batched=False, batch_sizes=(1,))), "a", 0)
    status, message = tell.refusal(0, infer(1, "a", 0, rows=(1, 1)))
    assert status is Status.BAD_ACTION
    assert message == "INFER of a: calls: expected 1 where there is no batch axis, found 2"
    assert tell(0, infer(2, "a", 0)) == [start(infer(2, "a", 0))]


def test_a_batch_that_needs_more_workspace_than_the_device_has_finds_no_room() -> None:
    status, message = fresh().refusal(0, infer(1, "a", 0, batch=8))
    assert (status, message) == (
        Status.NO_ROOM,
        f"INFER of a: {NO_WORKSPACE}",
    )


def test_a_batch_that_needs_more_io_than_the_device_has_finds_no_room() -> None:
    status, message = fresh().refusal(0, infer(1, "a", 0, batch=4))
    assert (status, message) == (
        Status.NO_ROOM,
        f"INFER of a: {NO_IO}",
    )


def test_only_profiles_of_its_own_kind_count() -> None:
    tell = resident(fresh(profiles=(structs.replace(PROFILE, device_kind="other"),)), "a", 0)
    assert tell(0, infer(1, "a", 0, batch=8)) == [start(infer(1, "a", 0, batch=8))]


def test_profiles_may_come_later() -> None:
    tell = fresh(profiles=())
    tell(0, CodeAdded(code=CODE, profiles=(PROFILE,)))
    assert tell.refusal(0, infer(1, "a", 0, batch=8))[0] is Status.NO_ROOM


def test_a_lane_that_ends_what_it_did_not_start_is_a_bug() -> None:
    tell = Told(Worker((SPEC,)))
    with pytest.raises(AssertionError, match="nothing runs on this lane"):
        tell(0, done(load(1, "a", 0), 0))
