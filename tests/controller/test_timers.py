"""Timers by example, and against a plain dict."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.timers import NEVER_NS, Timer, Timers


def test_what_was_set_last_counts() -> None:
    timers, timer = Timers(), Timer(1)
    timers.set(timer, 50)
    timers.set(timer, 20)
    timers.set(timer, 30)
    assert timers.next_ns() == 30
    assert timers.due(29) is None
    assert timers.due(30) is timer
    assert timers.next_ns() == NEVER_NS
    assert timers.due(100) is None


def test_timers_fire_in_order_of_their_instants() -> None:
    timers, first, second = Timers(), Timer(2), Timer(1)
    timers.set(second, 20)
    timers.set(first, 10)
    assert timers.due(15) is first
    assert timers.due(25) is second


def test_a_timer_that_was_taken_back_never_fires() -> None:
    timers, timer = Timers(), Timer(1)
    timers.set(timer, 10)
    timers.set(timer, NEVER_NS)
    assert timers.next_ns() == NEVER_NS
    assert timers.due(100) is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50), st.booleans()), max_size=60))
def test_any_history_agrees_with_a_plain_dict(steps: list[tuple[int, int, bool]]) -> None:
    timers, subjects = Timers(), [Timer(at) for at in range(5)]
    truth: dict[int, int] = {}
    for at, instant, look in steps:
        if look:
            fired = sorted((at_ns, order) for order, at_ns in truth.items() if at_ns <= instant)
            for _, order in fired:
                assert timers.due(instant) is subjects[order]
                del truth[order]
            assert timers.due(instant) is None
        else:
            timers.set(subjects[at], instant)
            truth[at] = instant
        assert timers.next_ns() == min(truth.values(), default=NEVER_NS)
