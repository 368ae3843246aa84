"""A lane's queue: whose turn it is, and when to look again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.units import ms
from clockwork_serve.worker.events import Retire
from clockwork_serve.worker.lanes import CHORE_PATIENCE_NS, LaneJob, LaneQueue
from tests.worker.actions import GPU, load


def action(number: int = 1) -> LaneJob:
    return LaneJob(load(number, "a", 0), None)


def chore() -> LaneJob:
    return LaneJob(Retire(device=GPU, code_id="net"), None)


def worked(lane: LaneQueue, from_ms: float, to_ms: float) -> None:
    """The lane did something in that time."""
    job = action()
    lane.push(job, ms(from_ms))
    lane.start(job, ms(from_ms))
    lane.finish(ms(to_ms))


def test_the_earliest_start_comes_first_then_the_first_to_come() -> None:
    lane, jobs = LaneQueue(), [action(number) for number in range(3)]
    for job, earliest_ms in zip(jobs, (2, 1, 1), strict=True):
        lane.push(job, ms(earliest_ms))
    for expected in (jobs[1], jobs[2], jobs[0]):
        assert lane.turn(ms(2)) is expected
        lane.drop(expected)


@given(st.lists(st.integers(0, 5), max_size=12))
def test_any_order_of_arrival_comes_out_sorted_and_ties_as_they_came(earliest: list[int]) -> None:
    lane, jobs = LaneQueue(), [action(number) for number in range(len(earliest))]
    for job, earliest_ns in zip(jobs, earliest, strict=True):
        lane.push(job, earliest_ns)
        lane.check()
    expected = [job for _, job in sorted(zip(earliest, jobs, strict=True), key=lambda pair: pair[0])]
    assert lane.drop_all() == expected


def test_nothing_has_its_turn_before_its_time() -> None:
    lane = LaneQueue()
    lane.push(action(), ms(5))
    assert lane.turn(ms(5) - 1) is None
    assert lane.wake_ns == ms(5)


def test_an_empty_lane_need_not_be_looked_at() -> None:
    lane = LaneQueue()
    assert lane.turn(0) is None
    assert lane.wake_ns is None


def test_a_chore_on_a_lane_that_never_worked_starts_at_once() -> None:
    lane, job = LaneQueue(), chore()
    lane.push_chore(job, 0)
    assert lane.turn(0) is job


@pytest.mark.parametrize(("worked_ms", "rest_ms"), [(0.8, 0.1), (8, 1), (16, 2), (500, 2)])
def test_a_lane_rests_before_a_chore_in_proportion_to_its_work(worked_ms: float, rest_ms: float) -> None:
    lane, job = LaneQueue(), chore()
    worked(lane, 100, 100 + worked_ms)
    lane.push_chore(job, ms(100 + worked_ms))
    assert lane.turn(ms(100 + worked_ms)) is None
    assert lane.wake_ns == ms(100 + worked_ms) + ms(rest_ms)
    assert lane.turn(lane.wake_ns) is job


def test_an_action_that_is_due_goes_before_a_chore_until_it_waited_too_long() -> None:
    lane, job, old = LaneQueue(), action(), chore()
    lane.push_chore(old, 0)
    lane.push(job, 0)
    assert lane.turn(CHORE_PATIENCE_NS - 1) is job
    assert lane.turn(CHORE_PATIENCE_NS) is old


def test_patience_ends_once_for_each_chore_that_is_done_not_for_all_that_wait() -> None:
    lane, first, second, job = LaneQueue(), chore(), chore(), action()
    lane.push_chore(first, 0)
    lane.push_chore(second, 0)
    lane.push(job, 0)
    lane.start(first, CHORE_PATIENCE_NS)
    lane.finish(CHORE_PATIENCE_NS + 1)
    assert lane.turn(CHORE_PATIENCE_NS + 1) is job
    assert lane.turn(2 * CHORE_PATIENCE_NS + 1) is second


def test_chores_are_done_as_they_came() -> None:
    lane, first, second = LaneQueue(), chore(), chore()
    lane.push_chore(first, 0)
    lane.push_chore(second, 0)
    assert lane.turn(0) is first
    lane.drop(first)
    assert lane.turn(0) is second


def test_what_is_dropped_at_once_comes_out_in_order() -> None:
    lane, late, soon, last = LaneQueue(), action(1), action(2), chore()
    lane.push_chore(last, 0)
    lane.push(late, 2)
    lane.push(soon, 1)
    assert lane.drop_all() == [soon, late, last]
    assert not len(lane)


def test_one_thing_at_a_time() -> None:
    lane, first, second = LaneQueue(), action(1), action(2)
    lane.push(first, 0)
    lane.push(second, 1)
    lane.start(first, 0)
    with pytest.raises(AssertionError, match="still runs"):
        lane.start(second, 1)


def test_what_ended_can_not_start_again() -> None:
    for job, push in ((action(), LaneQueue.push), (chore(), LaneQueue.push_chore)):
        lane = LaneQueue()
        push(lane, job, 0)
        lane.drop(job)
        with pytest.raises(AssertionError, match="is not next"):
            lane.start(job, 0)


def test_a_lane_that_is_free_has_nothing_to_finish() -> None:
    with pytest.raises(AssertionError, match="nothing runs"):
        LaneQueue().finish(0)


def test_a_job_that_is_queued_twice_is_found() -> None:
    lane, job = LaneQueue(), action()
    lane.push(job, 0)
    lane.push(job, 0)
    with pytest.raises(AssertionError, match="queued twice"):
        lane.check()
