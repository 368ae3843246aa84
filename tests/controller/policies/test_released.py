"""Policy ``paper`` as released, habit by habit: what ``paper`` mended does otherwise."""

from __future__ import annotations

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.policies import PaperScheduler, ReleasedScheduler
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Infer, Outcome, Profile
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, serve
from tests.controller.honest import World, device, model, profile

RELEASED = ControllerConfig.as_released()
B4, B8 = ms(22), ms(38)
"""What batches take; one request takes 10 ms, two 14."""


def world(*names: str, times: Profile | None = None, devices: int = 1) -> World:
    """Models that are warm on every device, as released."""
    made = World(RELEASED)
    made.serve(*[model(name) for name in names], times=times or profile())
    for at in range(devices):
        made.join(device(f"d{at}"), worker=f"w{at}")
    for name in names:
        made.ask(name, slo_ms=1000, until_ms=100)
    made.actions.clear()
    return made


def infers(made: World) -> list[tuple[str, int]]:
    """(model, requests) of each INFER."""
    return [(one.model[0], len(one.calls)) for one in made.actions if isinstance(one, Infer)]


def outcomes(made: World, *ids: str) -> list[Outcome]:
    return [made.answers[request_id].outcome for request_id in ids]


# Strategies


def test_a_queue_is_as_urgent_as_the_largest_batch_that_anybody_waits_for() -> None:
    made = belief("d0", config=RELEASED)
    model_a = serve(made, "a")
    place(made, model_a, "d0")
    queue = ask(made, model_a, slo_ms=100)
    ReleasedScheduler(made).queued(queue)
    (strategy,) = queue.strategies
    assert (strategy.key_ns, strategy.count) == (ms(10 + 100 - 5) - B8, 8), "though one request is no eight"


def test_a_request_that_joins_does_not_make_its_queue_more_urgent() -> None:
    made = world("a", "b", "c")
    made.request("c", slo_ms=900)
    made.request("a", slo_ms=300)
    made.request("b", slo_ms=200)
    made.request("a", slo_ms=100)
    made.run(until_ms=100)
    assert infers(made) == [("c", 1), ("b", 1), ("a", 2)], "mended, a is due first"


def test_a_failed_try_gives_up_larger_batches_even_if_they_can_be_filled_later() -> None:
    made = belief("d0", config=RELEASED)
    scheduler = ReleasedScheduler(made)
    few, many = serve(made, "few"), serve(made, "many")
    place(made, few, "d0")
    place(made, many, "d0", first=4)
    scheduler.queued(ask(made, many, slo_ms=102, count=8))
    scheduler.queued(ask(made, few, slo_ms=100))
    scheduler.schedule(ms(10))
    assert [len(one.calls) for one in made.effects if isinstance(one, Infer)] == [8]
    queue = ask(made, few, slo_ms=100, count=7)
    scheduler.queued(queue)
    (strategy,) = queue.strategies
    assert (strategy.key_ns, strategy.count) == (ms(105) - B4, 4), "eight wait, and four are what is tried"


def test_an_action_sent_gives_its_queue_strategies_of_all_batches_anew() -> None:
    made = belief("d0", config=RELEASED)
    scheduler = ReleasedScheduler(made)
    served = serve(made, "a")
    place(made, served, "d0")
    queue = ask(made, served, slo_ms=100, count=3)
    scheduler.queued(queue)
    scheduler.schedule(ms(10))
    (strategy,) = queue.strategies
    assert len(queue) == 1, "two were sent"
    assert (strategy.key_ns, strategy.count) == (ms(105) - B8, 8)


def test_a_queue_that_nobody_can_serve_in_time_has_no_strategies_until_somebody_joins() -> None:
    made = belief("d0", config=RELEASED)
    scheduler = ReleasedScheduler(made)
    served = serve(made, "a")
    place(made, served, "d0")
    queue = ask(made, served, slo_ms=15)
    (strategy,) = queue.strategies
    scheduler.queued(queue)
    scheduler.schedule(ms(10))
    assert (len(queue), strategy.key_ns) == (1, NEVER_NS), "10 ms of room are not 1 ms and 10 ms"
    scheduler.queued(ask(made, served, slo_ms=100))
    scheduler.schedule(ms(10))
    assert len(queue) == 1, "the second was sent"


# Queues of each batch size


def test_those_before_a_batch_that_is_sent_are_given_up_though_another_device_is_idle() -> None:
    made = belief("d0", "d1", config=RELEASED)
    scheduler = ReleasedScheduler(made)
    served = serve(made, "a")
    for name in ("d0", "d1"):
        place(made, served, name)
    ask(made, served, slo_ms=25)
    queue = ask(made, served, slo_ms=100, count=4)
    scheduler.queued(queue)
    scheduler.schedule(ms(10))
    assert [len(one.calls) for one in made.effects if isinstance(one, Infer)] == [4]
    assert len(queue) == 1, "it has 20 ms for 11 ms on the other device"


def test_a_device_that_is_late_empties_the_queue_of_a_size_for_all() -> None:
    made = belief("d0", "d1", config=RELEASED)
    scheduler = ReleasedScheduler(made)
    served = serve(made, "a")
    for name in ("d0", "d1"):
        place(made, served, name)
    made.devices["d1"].exec.free_ns = ms(10 + 4)
    queue = ask(made, served, slo_ms=30, count=4)
    scheduler.queued(queue)
    scheduler.schedule(ms(10))
    sent = [(one.device, len(one.calls)) for one in made.effects if isinstance(one, Infer)]
    assert sent == [("d1", 2), ("d0", 2)], "four would end on d1 after 36 ms, on d0 after 33 of 35"


def test_devices_take_turns() -> None:
    made = world("a", "b", times=profile(b1_ms=2), devices=2)
    made.request("a", slo_ms=900)
    made.request("b", slo_ms=900)
    assert len({one.device for one in made.actions}) == 2


# Deadlines


def test_a_request_hears_at_its_internal_deadline_if_it_was_not_sent() -> None:
    made = World(RELEASED)
    made.serve(model("a"))
    asked_ns = made.now_ns
    usual, tight = made.request("a", slo_ms=100), made.request("a", slo_ms=3)
    made.run(until_ms=200)
    assert outcomes(made, usual, tight) == [Outcome.EXPIRED, Outcome.EXPIRED]
    assert made.answered_ns[usual] - asked_ns == ms(95), "5 ms before its deadline"
    assert made.answered_ns[tight] - asked_ns == ms(10), "the floor, after its deadline"


def test_a_request_that_was_sent_hears_no_sooner_than_its_deadline() -> None:
    made = world("a")
    made.slower = 10
    asked_ns = made.now_ns
    request_id = made.ask("a", slo_ms=50, until_ms=300)
    assert outcomes(made, request_id) == [Outcome.EXPIRED]
    assert made.answered_ns[request_id] - asked_ns == ms(50)


# The setting


def test_it_is_a_setting_of_policy_paper() -> None:
    assert RELEASED.policy == "paper"
    with pytest.raises(ConfigError, match="released: expected policy paper"):
        ControllerConfig(policy="default", released=True)
    mended = World(ControllerConfig(policy="paper")).controller
    assert type(mended._scheduler) is PaperScheduler
