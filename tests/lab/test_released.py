"""Policy ``released``, habit by habit: what ``paper`` mended does otherwise."""

from __future__ import annotations

import pytest

from clockwork_lab.released import InternalDeadlines, ReleasedScheduler, settings
from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.controller.cluster import ServedModel, Waiter
from clockwork_serve.controller.life import ANSWER, SEND, SPENT
from clockwork_serve.controller.policies.base import Scheduler
from clockwork_serve.controller.timers import NEVER_NS, Timers
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Infer, Load, Outcome, Profile, Reason, Request
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, serve
from tests.controller.honest import CODE, World, device, model, profile
from tests.pure import NEEDS_PURE

RELEASED = settings()
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
    scheduler = ReleasedScheduler(made)
    scheduler.queued(queue)
    (strategy,) = queue.strategies
    assert (strategy.key_ns, scheduler._counts[queue]["d0"]) == (ms(10 + 100 - 5) - B8, 8), (
        "though one request is no eight"
    )


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
    assert (strategy.key_ns, scheduler._counts[queue]["d0"]) == (ms(105) - B4, 4), (
        "eight wait, and four are what is tried"
    )


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
    assert (strategy.key_ns, scheduler._counts[queue]["d0"]) == (ms(105) - B8, 8)


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


# LOADs and windows


def test_a_model_is_loaded_everywhere_whether_or_not_its_demand_is_served() -> None:
    made = World(RELEASED)
    made.serve(model("a"))
    for name in ("d0", "d1"):
        made.join(device(name), worker=name)
    made.ask("a", slo_ms=1000, until_ms=500)
    made.ask("a", slo_ms=1000, until_ms=500)
    assert {one.device for one in made.actions if isinstance(one, Load)} == {"d0", "d1"}


def test_every_action_may_start_until_the_look_ahead_after_its_planned_start() -> None:
    made = World(RELEASED)
    made.serve(model("a"))
    made.join(device("d0"))
    made.ask("a", slo_ms=1000, until_ms=500)
    sent = [one for one in made.actions if isinstance(one, Infer | Load)]
    assert [type(one) for one in sent] == [Load, Infer]
    assert {one.window.latest_ns - one.window.earliest_ns for one in sent} == {ms(5 + 1)}, "and the network"


def test_a_request_with_less_time_than_the_floor_counts_as_one_that_has_it() -> None:
    made = World(RELEASED)
    made.serve(model("a"))
    made.request("a", slo_ms=3)
    made.request("a", slo_ms=15)
    made.run(until_ms=1)
    tight, usual = made.controller._belief.waiters.values()
    assert (tight.due_ns - tight.request.arrival_ns, tight.demand_ns) == (ms(10), usual.demand_ns)


# What is kept


def test_what_is_kept_for_queues_that_are_gone_is_dropped() -> None:
    made = belief("d0", config=RELEASED)
    scheduler = ReleasedScheduler(made)
    gone, there = serve(made, "gone"), serve(made, "there")
    queues = []
    for at, served in enumerate((gone, there)):
        place(made, served, "d0", first=4 * at)
        queues.append(ask(made, served, slo_ms=100))
        scheduler.queued(queues[-1])
        scheduler._floors[queues[-1]] = {1: 1}
    made.drop(gone.residencies["d0"])
    gone.removed = True
    made.answer(queues[0].waiters[0], Outcome.REJECTED, Reason.NOT_SERVING)
    scheduler._forget_gone()
    assert list(scheduler._floors) == [queues[1]]
    assert list(scheduler._counts) == [queues[1]]


def test_a_request_that_is_over_is_not_planned_again_when_an_older_one_returns() -> None:
    made = belief("d0", config=RELEASED)
    scheduler = ReleasedScheduler(made)
    served = serve(made, "a")
    place(made, served, "d0")
    queue = ask(made, served, slo_ms=100)
    (newest,) = queue.waiters
    scheduler.queued(queue)
    scheduler.schedule(ms(10))
    scheduler.schedule(ms(200))
    assert newest.state == SPENT, "it was answered, and its worker still has it"
    scheduler.queued(queue)
    assert newest not in scheduler._deadlines


def waiter(request_id: str, deadline_ns: int, due_ns: int) -> Waiter:
    queue = ServedModel(model("a"), CODE, 1).open("", 1, 2, alone=False)
    request = Request(request_id=request_id, gateway="g", model="a/1", arrival_ns=0, deadline_ns=deadline_ns)
    return Waiter(request, due_ns, deadline_ns, 1, queue)


def test_a_request_that_waits_expires_at_its_due_time_though_that_is_after_its_deadline() -> None:
    deadlines = InternalDeadlines(Timers())
    early, floored = waiter("r1", 100, due_ns=95), waiter("r2", 80, due_ns=97)
    deadlines.add(floored)
    deadlines.add(early)
    deadlines.correct()
    assert deadlines.timer.at_ns == 95
    assert deadlines.passed(94) == []
    assert deadlines.passed(95) == [early]
    assert deadlines.passed(97) == [floored]


def test_a_request_that_was_sent_expires_at_its_deadline_and_one_that_is_over_does_not() -> None:
    deadlines = InternalDeadlines(Timers())
    sent, over = waiter("r1", 100, due_ns=95), waiter("r2", 100, due_ns=95)
    for one in (sent, over):
        deadlines.add(one)
        one.step(SEND)
    over.step(ANSWER)
    assert deadlines.passed(95) == []
    assert over not in deadlines
    deadlines.correct()
    assert deadlines.timer.at_ns == 100
    assert deadlines.passed(100) == [sent]


# The policy, by its name


def test_its_settings_are_the_published_numbers() -> None:
    assert settings(max_batch=4, expected_devices=3) == ControllerConfig(
        policy="released", reject_infeasible=False, slack_ns=ms(5), network_ns=ms(1), look_ahead_ns=ms(5),
        max_batch=4, min_batch_gain=0.0, hang_ns=0, expected_devices=3, estimate_window=10,
        estimate_quantile=0.99, capacity_ns=ms(100),
    )  # fmt: skip


def test_its_name_finds_it_and_it_is_a_policy() -> None:
    assert type(World(RELEASED).controller._scheduler) is ReleasedScheduler
    assert {name for name in vars(Scheduler) if not name.startswith("_")} <= {*dir(ReleasedScheduler)}


def test_no_other_policy_can_go_on_with_its_run() -> None:
    with pytest.raises(ConfigError, match="found one of released, which answers requests at deadlines"):
        Controller(RELEASED).use_policy("default")


@NEEDS_PURE
def test_a_copy_that_was_saved_answers_at_the_same_internal_deadlines() -> None:
    made = World(RELEASED)
    made.serve(model("a"))
    made.request("a", slo_ms=100)
    made.request("a", slo_ms=3)
    made.run(until_ms=1)
    for copy in (made.controller.fork(), Controller.restore(made.controller.save())):
        assert copy.next_wakeup_ns() == made.controller.next_wakeup_ns() is not None
        assert copy.decide(made.now_ns + ms(50)) == made.controller.fork().decide(made.now_ns + ms(50)) != []
