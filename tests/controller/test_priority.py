"""Classes of priority: they hold across models, for lanes, LOADs and room alike."""

from __future__ import annotations

import random

import pytest

from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.controller.cluster import BAND_NS, level
from clockwork_serve.messages import Infer, Load, Outcome, Unload
from tests.controller.honest import World, device, model

both = pytest.mark.parametrize("policy", POLICIES)


def world(policy: str, names: str = "abc", pages: int = 16, **priorities: int) -> World:
    """Models of 10 ms (4 MiB each) on one device, warm as far as they fit."""
    made = World(ControllerConfig(policy=policy))
    made.serve(*[model(name, priority=priorities.get(name, 0)) for name in names])
    made.join(device(pages=pages))
    for name in names[: pages // 4]:
        made.request(name, slo_ms=500)
        made.run()
    return made


def ran(made: World, kind: type[Infer | Load | Unload] = Infer, since: int = 0) -> list[str]:
    """Models in the order of actions."""
    return [action.model.removesuffix("/1") for action in made.actions[since:] if isinstance(action, kind)]


def test_a_priority_is_one_of_fifteen_classes_and_none_is_the_eighth() -> None:
    assert [level(priority) for priority in (0, 1, 8, 15, 16, 1 << 31)] == [8, 1, 8, 15, 15, 15]
    assert 8 * BAND_NS + BAND_NS < 1 << 62, "keys of all classes are below the time that never comes"


@both
def test_an_urgent_class_of_one_model_runs_before_earlier_deadlines_of_another(policy: str) -> None:
    made = world(policy)
    since = len(made.actions)
    made.request("a", slo_ms=30)  # on the lane already when the others come
    for name, slo_ms, priority in (("b", 50, 0), ("b", 60, 9), ("c", 90, 1)):
        made.request(name, slo_ms=slo_ms, priority=priority)
    made.run()
    assert ran(made, since=since) == ["a", "c", "b", "b"]


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
    made.request("a", slo_ms=30)
    made.request("b", slo_ms=50)
    made.request("c", slo_ms=90, priority=2)
    made.run()
    assert ran(made, since=since) == ["a", "c", "b"]


@both
def test_one_class_of_a_model_shares_batches_and_two_do_not(policy: str) -> None:
    made = world(policy)
    since = len(made.actions)
    made.request("a", slo_ms=30)
    for priority in (0, 1, 8, 1):
        made.request("b", slo_ms=300, priority=priority)
    made.run()
    batches = [(len(one.calls), one.batch) for one in made.actions[since:] if isinstance(one, Infer)]
    assert batches == [(1, 1), (2, 2), (2, 2)]


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
