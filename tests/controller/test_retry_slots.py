"""Those who are refused come again one after another, as fast as they could be served."""

from __future__ import annotations

import itertools

from clockwork_serve.controller.timers import RETRY_MAX_NS, RetrySlots
from clockwork_serve.units import ms
from tests.controller.honest import profile, serving


def test_turns_follow_one_another_by_what_each_costs() -> None:
    returns = RetrySlots()
    assert [returns.slot_ns(ms(5), ms(2), 0) for _ in range(3)] == [ms(5), ms(7), ms(9)]


def test_no_turn_is_before_there_could_be_room_again() -> None:
    returns = RetrySlots()
    returns.slot_ns(ms(5), ms(2), 0)
    assert returns.slot_ns(ms(50), ms(2), ms(6)) == ms(50)


def test_no_turn_is_later_than_the_limit_unless_there_is_no_room_before() -> None:
    returns = RetrySlots()
    for _ in range(2000):
        assert returns.slot_ns(ms(5), ms(2), 0) <= RETRY_MAX_NS
    assert returns.slot_ns(ms(5), ms(2), 0) == RETRY_MAX_NS
    assert returns.slot_ns(2 * RETRY_MAX_NS, ms(2), 0) == 2 * RETRY_MAX_NS


def test_who_is_refused_in_one_instant_is_not_told_to_come_back_in_one_instant() -> None:
    world = serving("a", times=profile(b1_ms=10, step_ms=2), max_batch=4)
    world.ask("a", slo_ms=500)
    world.request("a", slo_ms=500)
    refused = [world.request("a", slo_ms=15) for _ in range(8)]
    waits = [world.answers[one].retry_after_ns for one in refused]
    gaps = [later - sooner for sooner, later in itertools.pairwise(waits)]
    assert gaps == [ms(4)] * 7, "what one of four in a batch takes"
