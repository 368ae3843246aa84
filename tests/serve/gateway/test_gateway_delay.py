"""The time reserved for the gateway's delay: one and a half times the longest of the last answers."""

from __future__ import annotations

from clockwork_serve.serve.gateway.timing import GatewayDelay
from clockwork_serve.units import NS_PER_S, ms


def answered(delay: GatewayDelay, *ways_ms: float, now_ns: int = NS_PER_S) -> None:
    for each in ways_ms:
        delay.lane_ended(now_ns - ms(each))
    delay.answers_written(now_ns)


def test_nothing_is_reserved_before_the_first_measurement() -> None:
    assert GatewayDelay().reserve_ns(ms(100), NS_PER_S) == 0


def test_the_longest_delay_of_recent_answers_counts() -> None:
    delay = GatewayDelay()
    answered(delay, 1, 4, 2)
    answered(delay, 1)
    assert delay.reserve_ns(ms(100), NS_PER_S) == ms(6)


def test_old_measurements_do_not_count() -> None:
    delay = GatewayDelay()
    answered(delay, 4)
    later_ns = 2 * NS_PER_S + 1
    assert delay.reserve_ns(ms(100), later_ns) == 0
    answered(delay, 1, now_ns=later_ns)
    assert delay.reserve_ns(ms(100), later_ns) == ms(1.5)


def test_at_least_half_of_the_time_is_left_to_run() -> None:
    delay = GatewayDelay()
    answered(delay, 40)
    assert delay.reserve_ns(ms(100), NS_PER_S) == ms(50)


def test_an_answer_without_a_lane_is_no_measurement() -> None:
    delay = GatewayDelay()
    delay.answers_written(NS_PER_S)
    assert delay.reserve_ns(ms(100), NS_PER_S) == 0
