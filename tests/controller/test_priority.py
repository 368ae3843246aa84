"""Classes of priority: they hold across models, for lanes, LOADs and room alike."""

from __future__ import annotations

import random

import pytest

from clockwork_serve.controller import POLICIES
from clockwork_serve.controller.cluster import BAND_NS, level
from clockwork_serve.messages import Infer, Load, Outcome, Unload
from tests.controller.honest import World, model, serving

both = pytest.mark.parametrize("policy", POLICIES)


def world(policy: str, names: str = "abc", pages: int = 16, **priorities: int) -> World:
    """Models of 10 ms (4 MiB each) on one device, warm as far as they fit."""
    made = serving(
        *[model(name, priority=priorities.get(name, 0)) for name in names], pages=pages, policy=policy
    )
    for name in names[: pages // 4]:
        made.ask(name, slo_ms=500)
    return made


def ran(made: World, kind: type[Infer | Load | Unload] = Infer, since: int = 0) -> list[str]:
    """Models in the order of actions."""
    return [action.model.removesuffix("/1") for action in made.actions[since:] if isinstance(action, kind)]


def test_a_priority_is_one_of_fifteen_classes_and_none_is_the_eighth() -> None:
    assert [level(priority) for priority in (0, 1, 8, 15, 16, 1 << 31)] == [8, 1, 8, 15, 15, 15]
    assert 8 * BAND_NS + BAND_NS < 1 << 62, "keys of all classes are below the time that never comes"


@pytest.mark.parametrize(
    ("policy", "slo_ms", "order"),
    [("paper", 90, "acb"), ("default", 90, "abc"), ("default", 31, "acb"), ("default", 25, "ac")],
)
def test_an_urgent_class_goes_first_by_default_where_it_cannot_wait(
    policy: str, slo_ms: float, order: str
) -> None:
    made = world(policy)
    since = len(made.actions)
    made.request("a", slo_ms=24)  # on the lane already when the others come, for 10 ms
    made.request("b", slo_ms=24 if order == "ac" else 35)
    made.request("c", slo_ms=slo_ms, priority=1)
    made.run()
    assert ran(made, since=since) == list(order)


@both
def test_where_not_all_can_be_met_the_less_urgent_class_gives_way(policy: str) -> None:
    made = world(policy)
    made.request("a", slo_ms=30)
    usual = [made.request("b", slo_ms=slo, priority=0) for slo in (31, 32)]
    urgent = made.request("c", slo_ms=34, priority=3)
    made.run()
    assert made.answers[urgent].outcome is Outcome.OK
    assert Outcome.REJECTED in {made.answers[one].outcome for one in usual}


@both
def test_a_steady_urgent_load_is_served_as_if_it_were_alone(policy: str) -> None:
    made = world(policy)
    urgent = []
    for _ in range(100):
        urgent.append(made.request("a", slo_ms=40, priority=1))
        for name in "bc":
            made.request(name, slo_ms=25)
        made.run(until_ms=13)
    made.run()
    assert [made.answers[one].outcome for one in urgent].count(Outcome.OK) >= 99


@both
def test_a_model_of_its_own_class_needs_no_word_from_its_requests(policy: str) -> None:
    made = world(policy, c=2)
    since = len(made.actions)
    made.request("a", slo_ms=24)
    made.request("b", slo_ms=35)
    made.request("c", slo_ms=36, priority=2)
    made.run()
    assert ran(made, since=since) == ["a", "c", "b"]


@pytest.mark.parametrize(("policy", "found"), [("paper", [(2, 2), (2, 2)]), ("default", [(4, 4)])])
def test_classes_of_a_model_share_batches_by_default(policy: str, found: list[tuple[int, int]]) -> None:
    made = world(policy)
    made.request("a", slo_ms=30)
    since = len(made.actions)
    for priority in (0, 1, 8, 1):
        made.request("b", slo_ms=300, priority=priority)
    made.run()
    infers = [one for one in made.actions[since:] if isinstance(one, Infer) and one.model != "a/1"]
    assert [(len(one.calls), one.batch) for one in infers] == found


def test_a_batch_takes_the_most_urgent_first_and_leaves_out_who_would_be_late() -> None:
    made = world("default")
    made.request("a", slo_ms=30)  # 10 ms
    made.run(until_ms=5)  # so the lane is free in 5 ms: a batch of 4 ends in 27 ms, one of 8 in 43
    late = made.request("b", slo_ms=20, priority=15)
    asked = [made.request("b", slo_ms=39, priority=priority) for priority in (15, 8, 1, 8, 15)]
    since = len(made.actions)
    made.run()
    first = next(one for one in made.actions[since:] if isinstance(one, Infer))
    assert sorted(call.request_id for call in first.calls) == sorted([asked[1], asked[2], asked[3], asked[0]])
    assert made.answers[late].outcome is Outcome.REJECTED


def shared_load(*, alone: bool) -> list[Outcome]:
    """How requests of the urgent class end, alone or beside three times what the device can."""
    made = world("default", names="abcd")
    rng = random.Random(2)
    urgent: list[str] = []
    for _ in range(250):
        name, others = rng.choice("abcd"), rng.choices("abcd", k=rng.choice([0, 4, 12]))
        urgent.append(made.request(name, slo_ms=60, priority=1))
        for other in others:
            slo_ms, priority = rng.choice([25, 60, 200]), rng.choice([8, 15])
            if not alone:
                made.request(other, slo_ms=slo_ms, priority=priority)
        made.run(until_ms=rng.choice([5, 15, 25]))
    made.run()
    return [made.answers[one].outcome for one in urgent]


def test_the_urgent_class_loses_nothing_to_those_that_share_its_batches() -> None:
    lost = sum(one is not Outcome.OK for one in shared_load(alone=False))
    assert lost <= sum(one is not Outcome.OK for one in shared_load(alone=True)) + 1


@both
def test_the_urgent_class_is_loaded_first(policy: str) -> None:
    made = world(policy, names="abcd", pages=4)
    since = len(made.actions)
    made.request("b", slo_ms=400)
    made.request("c", slo_ms=300)
    made.request("d", slo_ms=500, priority=1)
    made.run()
    assert ran(made, Load, since)[:2] == ["b", "d"]


@both
def test_a_model_is_loaded_for_the_most_urgent_who_waits_for_it(policy: str) -> None:
    made = world(policy, names="abcd", pages=4)
    since = len(made.actions)
    made.request("b", slo_ms=400)
    for _ in range(3):
        made.request("c", slo_ms=300)
    made.request("d", slo_ms=500)
    made.request("d", slo_ms=500, priority=1)
    made.run()
    assert ran(made, Load, since)[:2] == ["b", "d"]


@both
def test_weights_that_less_urgent_requests_wait_for_make_room(policy: str) -> None:
    made = world(policy, names="abc", pages=8)
    since = len(made.actions)
    for slo_ms in range(60, 160, 4):
        for name in "ab":
            made.request(name, slo_ms=slo_ms)
    urgent = made.request("c", slo_ms=100, priority=1)
    made.run()
    assert made.answers[urgent].outcome is Outcome.OK
    assert len(ran(made, Unload, since)) >= 1


def overload(priority: int) -> list[tuple[str, int, int]]:
    """What a device does of more than it can, all of one class: model, batch, start."""
    made = world("default", names="abcd")
    rng = random.Random(1)
    since = len(made.actions)
    for step in range(200):
        name = rng.choice("abcd")
        slos_ms = [25, 40, 120, 400] if step < 100 else [60, 70, 80, 90]
        for _ in range(1 if step < 100 else rng.choice([1, 2, 5, 9])):
            made.request(name, slo_ms=rng.choice(slos_ms), priority=priority)
        made.run(until_ms=rng.choice([0.5, 4, 8]))
    made.run()
    infers = [action for action in made.actions[since:] if isinstance(action, Infer)]
    return [(action.model, action.batch, action.window.earliest_ns) for action in infers]


def test_a_load_of_one_class_is_served_alike_whichever_that_is() -> None:
    usual = overload(8)
    assert overload(1) == usual == overload(15)


def test_fuller_batches_of_a_less_urgent_class_are_no_reason_to_wait() -> None:
    made = world("default")
    urgent = []
    for _ in range(60):
        for name in "bc":
            for _ in range(8):
                made.request(name, slo_ms=90)
        for slo_ms in (58, 80, 80, 80, 80):  # the first leaves no time for a larger batch
            urgent.append(made.request("a", slo_ms=slo_ms, priority=7))
            made.run(until_ms=0.1)
        made.run(until_ms=45)
    made.run()
    assert [made.answers[one].outcome for one in urgent].count(Outcome.OK) >= 0.95 * len(urgent)


def test_batches_of_an_urgent_class_are_not_cut_short_for_tight_ones_of_a_less_urgent() -> None:
    found = []
    for priority in (8, 1):
        made = world("default")
        made.request("a", slo_ms=20)
        for _ in range(8):
            made.request("b", slo_ms=900, priority=priority)
        since = len(made.actions)
        made.run()
        found.append([len(one.calls) for one in made.actions[since:] if isinstance(one, Infer)])
    assert found[0] != [8]
    assert found[1] == [8]
