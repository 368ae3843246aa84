"""Timers by example."""

from __future__ import annotations

from clockwork_serve.controller.timers import Timers


def test_the_earliest_instant_of_a_name_counts() -> None:
    timers = Timers()
    timers.set("a", 50)
    timers.set("a", 20)
    timers.set("a", 30)
    assert timers.next_ns() == 20
    assert timers.due(20) == ["a"]
    assert timers.next_ns() is None
    assert timers.due(100) == []


def test_names_fire_in_order_of_their_instants() -> None:
    timers = Timers()
    timers.set("b", 20)
    timers.set("a", 10)
    assert timers.due(15) == ["a"]
    assert timers.due(25) == ["b"]
