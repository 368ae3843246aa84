"""A stretch of a journal that is played on: unchanged as it was, with a change as in the true world."""

from __future__ import annotations

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Answer, Infer, Load, Outcome, Request
from clockwork_serve.sim import Cluster
from clockwork_serve.sim.counterfactual import Change, Scene, play
from clockwork_serve.sim.recording import Nearby
from clockwork_serve.sim.simulation import Simulation
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo
from tests.sim.scenes import KeptSteps, answers, run_of, scene_of, walked

ZOO = Zoo.read("v100")


@pytest.mark.parametrize("seed", range(40))
def test_with_nothing_changed_all_is_as_recorded(seed: int) -> None:
    config, steps = run_of(seed)
    for part in (3, 2):
        at = max(1, len(steps) // part)
        if at >= len(steps):
            continue

        played = play(scene_of(config, steps, at), keep_steps=True)

        assert played.from_ns is None
        assert [one for one in played.steps if one.events or one.effects] == [
            one for one in steps[at:] if one.events or one.effects
        ]


def test_a_later_scene_is_the_same_run() -> None:
    config, steps = run_of(7)
    scene = scene_of(config, steps, 20)

    later = scene.later(30)

    assert later.began_ns == steps[50].now_ns
    assert play(later).from_ns is None
    assert play(scene).from_ns is None


def simulation(
    *watchers: KeptSteps, rate_rps: float = 1600.0, devices: int = 1, pages: int = 12
) -> Simulation:
    """Six models that want more memory and time than there are; without noise."""
    scenario = Scenario(
        name="scene", seconds=3.0, models=(ModelSet(name="m", kind="resnet18_v2", copies=6),),
        loads=(
            LoadTable(name="web", models=("m",), arrivals="poisson", rate_rps=rate_rps, slo_ms=30.0),
        ),
    )  # fmt: skip
    return Simulation(
        workload=build(scenario, 1), zoo=ZOO, seed=1, keyed=True, noise=False,
        cluster=Cluster(devices=devices, pages=pages, page_bytes=16 * MIB),
        config=ControllerConfig(expected_devices=devices), watchers=watchers,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded() -> tuple[ControllerConfig, list]:
    kept = KeptSteps()
    made = simulation(kept)
    made.run()
    return made.controller.config, kept.steps


def scene_at(recorded, at_ns: int) -> Scene:
    config, steps = recorded
    at = next(at for at, step in enumerate(steps) if step.now_ns >= at_ns)
    return scene_of(config, steps, at)


def truth(scene: Scene, change: Change) -> dict[str, tuple[int, Answer]]:
    """What the simulated world answers with the change, which it is told of like the scene."""
    kept = KeptSteps()
    true = simulation(kept)
    true.run(until_ns=scene.began_ns - 1)
    true.edits = change.edits
    before = len(kept.steps)
    for host in true.hosts.values() if change.pages else ():
        host.machine.add_pages(change.pages)
    events = change.begin(true.controller)
    if events:
        assert not change.devices
        true._step_controller(events, true.now_ns)
    true.run(until_ns=scene.steps[-1].now_ns)
    return {
        one.request_id: (step.now_ns, one)
        for step in kept.steps[before:]
        for one in step.effects
        if isinstance(one, Answer)
    }


CHANGES = {
    "a longer SLO": lambda request: Change(
        edits={request.request_id: {"deadline_ns": request.deadline_ns + 100 * NS_PER_MS}}
    ),
    "a priority": lambda request: Change(edits={request.request_id: {"priority": 1}}),
    "memory": lambda request: Change(pages=6),
    "no model": lambda request: Change(without="m-0000/1"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_where_nothing_is_noisy_it_is_as_in_the_true_world(recorded, what: str) -> None:
    scene = scene_at(recorded, NS_PER_S)
    refused = {one for one, answer in answers(scene.steps).items() if answer.outcome is not Outcome.OK}
    request = next(
        one
        for step in scene.steps
        for one in step.events
        if isinstance(one, Request) and one.request_id in refused
    )
    change = CHANGES[what](request)

    played = play(scene, change)

    found = truth(scene, change)
    assert played.from_ns is not None
    assert len(found) > 500
    same = sum(played.answers.get(one) == answer for one, answer in found.items())
    assert same >= 0.99 * len(found)


def test_one_device_more_is_loaded_and_used(recorded) -> None:
    scene = scene_at(recorded, NS_PER_S)

    played = play(scene, Change(devices=1), keep_steps=True)

    sent = [one for step in played.steps for one in step.effects if isinstance(one, Load | Infer)]
    assert {type(one) for one in sent if one.device == "added0"} == {Load, Infer}
    good = sum(one.outcome is Outcome.OK for _, one in played.answers.values())
    assert good > sum(one.outcome is Outcome.OK for one in answers(scene.steps).values())


def test_it_ends_with_the_answer_that_is_waited_for(recorded) -> None:
    scene = scene_at(recorded, NS_PER_S)
    first = next(one for step in scene.steps for one in step.events if isinstance(one, Request))

    played = play(scene, until=first.request_id)

    assert first.request_id in played.answers
    assert len(played.answers) < len(answers(scene.steps))


def test_more_pages_are_believed_and_there(recorded) -> None:
    config, steps = recorded
    controller = walked(config, steps[:500])

    controller.add_pages(5)

    assert [spec.pages for one in controller.workers() for spec in one.devices] == [17]
    controller.check()


def test_values_that_are_near_count_and_a_level_changes_at_once() -> None:
    nearby = Nearby()
    for at, value in enumerate((10, 10, 11, 30, 30, 31)):
        nearby.add(at, value)

    assert nearby.at(1, 3) == 10
    assert nearby.nearest(4) == (4, 30)
    assert [nearby.level(at, 3, 1.25) for at in (1, 4)] == [10, 30]
