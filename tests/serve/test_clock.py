"""Clock alignment finds the offset from delays alone, and windows are narrowed by its error."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.messages import (
    AdmissionQuery,
    Cancel,
    Extent,
    Quarantined,
    Request,
    Result,
    Status,
    Unload,
    Window,
)
from clockwork_serve.serve.transport import ClockAlignment, SlidingMinimum, to_controller, to_local


def unload(window: Window) -> Unload:
    return Unload(action_id=1, device="d", model="m/1", extent=Extent(0, 1), version=1, window=window)


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=60), st.integers(1, 8))
def test_the_sliding_minimum_is_the_least_of_the_last_numbers(numbers: list[int], size: int) -> None:
    sliding = SlidingMinimum(size)
    for index, number in enumerate(numbers):
        sliding.add(number)
        assert sliding.least == min(numbers[max(0, index + 1 - size) : index + 1])


@given(
    st.integers(-(10**15), 10**15),
    st.lists(st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)), min_size=1, max_size=30),
)
def test_the_true_offset_lies_within_the_error(offset_ns: int, delays: list[tuple[int, int]]) -> None:
    ours, theirs = ClockAlignment(same_clock=False), ClockAlignment(same_clock=False)
    now_ns = 10**9
    for there_ns, back_ns in delays:
        theirs.observe(now_ns + offset_ns, now_ns + there_ns, ours.least_delta_ns)
        now_ns += there_ns
        ours.observe(now_ns, now_ns + back_ns + offset_ns, theirs.least_delta_ns)
        now_ns += back_ns
    assert ours.aligned
    assert abs(ours.offset_ns - offset_ns) <= ours.error_ns + 1
    assert ours.error_ns <= (min(d for d, _ in delays) + min(d for _, d in delays) + 1) // 2


def test_it_is_not_aligned_before_both_directions_were_seen() -> None:
    alignment = ClockAlignment(same_clock=False)
    assert not alignment.aligned
    alignment.observe(0, 5_000, None)
    assert (alignment.aligned, alignment.offset_ns, alignment.error_ns) == (False, 0, 0)
    alignment.observe(100, 5_090, -4_950)
    assert (alignment.aligned, alignment.offset_ns, alignment.error_ns) == (True, 4_970, 20)


def test_one_clock_needs_no_samples() -> None:
    alignment = ClockAlignment(same_clock=True)
    assert (alignment.aligned, alignment.offset_ns, alignment.error_ns) == (True, 0, 0)


def test_a_drifting_clock_is_followed_once_old_samples_left() -> None:
    alignment = ClockAlignment(same_clock=False, samples=4)
    for sample in range(8):
        offset_ns = 1_000 if sample < 4 else 3_000
        alignment.observe(0, 50 + offset_ns, 50 - offset_ns)
    assert (alignment.offset_ns, alignment.error_ns) == (3_000, 50)


def test_windows_are_shifted_and_narrowed() -> None:
    assert to_local(unload(Window(1_000, 3_000)), 500, 100) == unload(Window(1_600, 3_400))


def test_a_window_shorter_than_the_error_shrinks_to_its_middle() -> None:
    assert to_local(unload(Window(1_000, 1_100)), 0, 5_000) == unload(Window(1_050, 1_050))


def test_times_for_the_controller_are_shifted_back() -> None:
    result = Result(action_id=1, device="d", status=Status.OK, started_ns=1_500, ended_ns=1_700)
    assert to_controller(result, 500) == Result(
        action_id=1, device="d", status=Status.OK, started_ns=1_000, ended_ns=1_200
    )
    request = Request(request_id="r", gateway="g", model="m/1", arrival_ns=1_500, deadline_ns=2_500)
    assert to_controller(request, 500) == Request(
        request_id="r", gateway="g", model="m/1", arrival_ns=1_000, deadline_ns=2_000
    )
    announced = AdmissionQuery(
        announced_id="a", gateway="g", model="m/1", arrival_ns=1_500, deadline_ns=2_500
    )
    assert to_controller(announced, 500) == AdmissionQuery(
        announced_id="a", gateway="g", model="m/1", arrival_ns=1_000, deadline_ns=2_000
    )


def test_since_when_a_model_is_quarantined_is_shifted_and_not_narrowed() -> None:
    quarantined = Quarantined(model="m/1", why="w", since_ns=1_000)
    assert to_local(quarantined, 500, 100) == Quarantined(model="m/1", why="w", since_ns=1_500)


def test_the_end_of_a_quarantine_has_no_time() -> None:
    ended = Quarantined(model="m/1")
    assert to_local(ended, 500, 100) is ended


def test_other_frames_pass_unchanged() -> None:
    frame = Cancel(request_id="r")
    assert to_local(frame, 5, 5) is frame
    assert to_controller(frame, 5) is frame
