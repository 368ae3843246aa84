"""The time reserved for the gateway's delay: one and a half times the longest of the last answers."""

from __future__ import annotations

from clockwork_serve.serve.gateway.timing import GatewayDelay
from clockwork_serve.units import NS_PER_S, ms


def answered(delay: GatewayDelay, *ways_ms: float, now_ns: int = NS_PER_S) -> None:
    for each in ways_ms:
        delay.lane_ended(now_ns - ms(each))
    delay.answers_written(now_ns)


def test_nothing_is_left_before_anything_was_measured() -> None:
    assert GatewayDelay().reserve_ns(ms(100), NS_PER_S) == 0


def test_the_longest_way_counts_of_those_that_left_together_and_of_those_before() -> None:
    delay = GatewayDelay()
    answered(delay, 1, 4, 2)
    answered(delay, 1)
    assert delay.reserve_ns(ms(100), NS_PER_S) == ms(6)


def test_what_was_long_ago_does_not_count() -> None:
    delay = GatewayDelay()
    answered(delay, 4)
    later_ns = 2 * NS_PER_S + 1
    assert delay.reserve_ns(ms(100), later_ns) == 0
    answered(delay, 1, now_ns=later_ns)
    assert delay.reserve_ns(ms(100), later_ns) == ms(1.5)


def test_at_least_half_of_the_time_is_left_to_run_in() -> None:
    delay = GatewayDelay()
    answered(delay, 40)
    assert delay.reserve_ns(ms(100), NS_PER_S) == ms(50)


def test_an_answer_that_no_lane_gave_says_nothing() -> None:
    delay = GatewayDelay()
    delay.answers_written(NS_PER_S)
    assert delay.reserve_ns(ms(100), NS_PER_S) == 0
