"""Lanes as they are believed: when an action sent now could start."""

from __future__ import annotations

import pytest

from clockwork_serve.controller.lanes import LaneBelief
from clockwork_serve.messages import Request
from clockwork_serve.units import ms
from tests.controller.clusters import belief, place, serve


def test_an_idle_lane_is_free_one_network_delay_from_now() -> None:
    assert LaneBelief(network_ns=5).available_ns(100) == 105


def test_work_adds_up_from_when_the_first_began() -> None:
    lane = LaneBelief(network_ns=5)
    lane.send(1, 50, 100)
    lane.send(2, 30, 110)
    assert lane.available_ns(120) == 105 + 80


def test_an_early_end_moves_the_rest_forward() -> None:
    lane = LaneBelief(network_ns=5)
    lane.send(1, 50, 100)
    lane.send(2, 30, 110)
    lane.end(1, 140)
    assert lane.available_ns(141) == 170
    lane.check()


def test_a_late_end_moves_the_rest_back() -> None:
    lane = LaneBelief(network_ns=5)
    lane.send(1, 50, 100)
    lane.send(2, 30, 110)
    lane.end(1, 190)
    assert lane.available_ns(191) == 220


def test_while_the_head_is_overdue_what_follows_is_counted_from_now() -> None:
    lane = LaneBelief(network_ns=5)
    lane.send(1, 50, 100)
    lane.send(2, 30, 110)
    assert lane.overdue_ns(200) == 45
    assert lane.available_ns(200) == 230


def test_a_refusal_out_of_order_only_takes_its_own_time_away() -> None:
    lane = LaneBelief(network_ns=5)
    lane.send(1, 50, 100)
    lane.send(2, 30, 110)
    lane.end(2, 120)
    assert lane.available_ns(121) == 155
    assert len(lane.outstanding) == 1


def test_an_action_ends_once() -> None:
    lane = LaneBelief(network_ns=5)
    with pytest.raises(AssertionError, match="action 7"):
        lane.end(7, 100)


def test_what_was_refused_before_its_turn_leaves_the_lane_busy_until_then() -> None:
    lane = LaneBelief(network_ns=5)
    lane.send(1, 50, 100)
    lane.end(1, 155)
    lane.send(2, 30, 110)
    lane.end(2, 115)
    assert lane.available_ns(116) == 155


def test_hope_rests_on_what_plans_are_made_with() -> None:
    made = belief("d0")
    served = serve(made, "a")
    place(made, served, "d0")
    request = Request(
        request_id="r", gateway="g", model=served.key, arrival_ns=0, deadline_ns=10**9, signature="x:1,4"
    )
    (strategy,) = made.admit(request, served).queue.strategies
    assert strategy.least is strategy.batches[0].samples


def test_a_lane_that_gets_work_again_at_once_made_no_pause() -> None:
    lane = LaneBelief(network_ns=0)
    lane.send(1, ms(5), ms(100))
    lane.end(1, ms(105))
    lane.send(2, ms(5), ms(105.5))
    assert lane.busy_since_ns == ms(100)
    lane.end(2, ms(110.5))
    lane.send(3, ms(5), ms(111.5))
    assert lane.busy_since_ns == ms(111.5)
