"""What is left of a deadline for the way: one and a half times the longest of the last answers."""

from __future__ import annotations

from clockwork_serve.serve.gateway.timing import GatewayDelay
from clockwork_serve.units import NS_PER_S, ms


def answered(way: GatewayDelay, *ways_ms: float, now_ns: int = NS_PER_S) -> None:
    for each in ways_ms:
        way.ended(now_ns - ms(each))
    way.left(now_ns)


def test_nothing_is_left_before_anything_was_measured() -> None:
    assert GatewayDelay().of(ms(100), NS_PER_S) == 0


def test_the_longest_way_counts_of_those_that_left_together_and_of_those_before() -> None:
    way = GatewayDelay()
    answered(way, 1, 4, 2)
    answered(way, 1)
    assert way.of(ms(100), NS_PER_S) == ms(6)


def test_what_was_long_ago_does_not_count() -> None:
    way = GatewayDelay()
    answered(way, 4)
    later_ns = 2 * NS_PER_S + 1
    assert way.of(ms(100), later_ns) == 0
    answered(way, 1, now_ns=later_ns)
    assert way.of(ms(100), later_ns) == ms(1.5)


def test_at_least_half_of_the_time_is_left_to_run_in() -> None:
    way = GatewayDelay()
    answered(way, 40)
    assert way.of(ms(100), NS_PER_S) == ms(50)


def test_an_answer_that_no_lane_gave_says_nothing() -> None:
    way = GatewayDelay()
    way.left(NS_PER_S)
    assert way.of(ms(100), NS_PER_S) == 0
