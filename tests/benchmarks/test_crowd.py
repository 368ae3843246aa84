"""On virtual time: others are served beside a crowd, and what is hopeless costs the controller no time."""

from __future__ import annotations

import pytest

from benchmarks.crowd import run


@pytest.mark.parametrize(("devices", "rate_rps"), [(4, 1_500.0), (32, 6_000.0)])
def test_others_are_served_beside_a_crowd(devices: int, rate_rps: float) -> None:
    world = run(("one", devices, {False: rate_rps, True: 36_000.0}), 0.5, 1, refuses=True)
    others = world.counts[False]
    assert others.good > 0.9 * others.offered, "half of it where models do not share what waits for credit"


def test_hopeless_requests_cost_the_controller_nothing() -> None:
    asks, refuses = (run(("all", 4, {False: 12_000.0}), 0.5, 1, refuses=refuses) for refuses in (False, True))
    assert refuses.heard < asks.heard / 1.5
    assert refuses.counts[False].good > 0.95 * asks.counts[False].good


def test_a_slow_gateway_leaves_the_controller_no_idler_than_it_must() -> None:
    slow = run(("slow", 32, {False: 36_000.0}), 0.5, 1, refuses=True)
    assert slow.heard > 4000, "3300 where credit is what a turn of the controller takes"
