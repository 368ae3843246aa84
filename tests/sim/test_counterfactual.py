"""A stretch of a journal that is played on: unchanged as it was, with a change as in the true world."""

from __future__ import annotations

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Answer, Cancel, Infer, Load, Outcome, Request, Result, Status
from clockwork_serve.sim import Cluster
from clockwork_serve.sim.counterfactual import FOLLOWS_NS, Change, PlayedScene, Scene, Traffic, play
from clockwork_serve.sim.recording import Nearby
from clockwork_serve.sim.simulation import Simulation
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo
from tests.pure import NEEDS_PURE
from tests.sim.scenes import KeptSteps, answers, run_of, scene_of, walked

pytestmark = NEEDS_PURE

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
    for host in true.hosts.values():
        change.add_pages(host.machine)
    events = change.begin(true.controller)
    if events or change.policy:
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
    "memory of one device": lambda request: Change(pages_on={"gpu0": 6}),
    "another policy": lambda request: Change(policy="paper"),
    "no model": lambda request: Change(without=("m-0000/1",)),
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


def come(played: PlayedScene) -> list[str]:
    """The requests that came, in their order."""
    return [one.request_id for step in played.steps for one in step.events if isinstance(one, Request)]


def recorded_ids(scene: Scene, model: str | None = None) -> list[str]:
    return [
        one.request_id
        for step in scene.steps
        for one in step.events
        if isinstance(one, Request) and model in {None, one.model}
    ]


def test_traffic_is_thinned_by_ids_and_the_one_that_is_asked_about_stays(recorded) -> None:
    scene = scene_at(recorded, NS_PER_S)
    ids = recorded_ids(scene)
    half, quarter = (Change(traffic=(Traffic(times=times),)) for times in (0.5, 0.25))

    played = play(scene, half, keep_steps=True)

    assert come(play(scene, half, keep_steps=True)) == come(played)
    assert 0.45 * len(ids) < len(come(played)) < 0.55 * len(ids)
    assert set(come(play(scene, quarter, keep_steps=True))) < set(come(played)) < set(ids)
    assert set(come(played)) == played.answers.keys() - answers_before(scene)
    alone = play(scene, Change(traffic=(Traffic(times=0.0),)), until=ids[5], keep_steps=True)
    assert come(alone) == [ids[5]]


def answers_before(scene: Scene) -> set[str]:
    """Those that had come before the scene."""
    return set(answers(scene.steps)) - set(recorded_ids(scene))


def test_more_traffic_has_ids_of_its_own_and_follows_what_was_recorded(recorded) -> None:
    scene = scene_at(recorded, NS_PER_S)
    ids = recorded_ids(scene)

    played = play(scene, Change(traffic=(Traffic(times=1.5),)), keep_steps=True)

    found = come(played)
    assert len(set(found)) == len(found)
    assert 1.45 * len(ids) < len(found) < 1.55 * len(ids)
    assert [one for one in found if "+" not in one] == ids
    copies = [
        (step.now_ns, one)
        for step in played.steps
        for one in step.events
        if isinstance(one, Request) and "+" in one.request_id
    ]
    of = {one.request_id: one for step in scene.steps for one in step.events if isinstance(one, Request)}
    for now_ns, copy in copies:
        origin = of[copy.request_id.partition("+")[0]]
        assert 0 < copy.arrival_ns - origin.arrival_ns <= FOLLOWS_NS
        assert copy.slo_ns == origin.slo_ns
        assert copy.arrival_ns <= now_ns


def test_the_traffic_of_a_model_or_tenant_alone_is_changed(recorded) -> None:
    scene = scene_at(recorded, NS_PER_S)
    ids, of_model = recorded_ids(scene), recorded_ids(scene, "m-0001/1")

    without = come(play(scene, Change(traffic=(Traffic(times=0.0, model="m-0001/1"),)), keep_steps=True))
    twice = come(play(scene, Change(traffic=(Traffic(times=2.0, model="m-0001/1"),)), keep_steps=True))
    none = play(scene, Change(traffic=(Traffic(times=2.0, tenant="nobody"), Traffic(times=1.0))))

    assert without == [one for one in ids if one not in set(of_model)]
    assert len(ids) + 0.95 * len(of_model) < len(twice) <= len(ids) + len(of_model)  # the last come too late
    assert none.from_ns is None


def test_who_cancels_cancels_what_is_there_once_more_too() -> None:
    config, steps = run_of(11)
    cancelled = next(one for step in steps for one in step.events if isinstance(one, Cancel))
    at = next(at for at, step in enumerate(steps) if cancelled.request_id in str(step.events))

    played = play(scene_of(config, steps, at), Change(traffic=(Traffic(times=2.0),)), keep_steps=True)

    found = [one.request_id for step in played.steps for one in step.events if isinstance(one, Cancel)]
    assert f"{cancelled.request_id}+1" in found


@pytest.mark.parametrize("seed", range(20))
def test_another_policy_goes_on_in_any_world(seed: int) -> None:
    config, steps = run_of(seed, policy=("default", "paper")[seed % 2])
    scene = scene_of(config, steps, max(1, len(steps) // 3))
    (other,) = {"default", "paper"} - {config.policy}

    played = play(scene, Change(policy=other))

    due = {
        one.request_id
        for step in scene.steps
        for one in step.events
        if isinstance(one, Request) and one.deadline_ns < steps[-1].now_ns
    }
    assert due & set(answers(steps)) <= set(played.answers)
    assert play(scene, Change(policy=config.policy)).from_ns is None


def test_more_memory_of_one_device_is_believed_and_there() -> None:
    kept = KeptSteps()
    made = simulation(kept, devices=2)
    made.run(until_ns=NS_PER_S)
    scene = Scene(walked(made.controller.config, kept.steps[:200]), kept.steps[200:])

    played = play(scene, Change(pages_on={"gpu1": 12}), keep_steps=True)

    loads = [one for step in played.steps for one in step.effects if isinstance(one, Load)]
    refused = [
        one for step in played.steps for one in step.events
        if isinstance(one, Result) and one.status is Status.NO_ROOM
    ]  # fmt: skip
    ends = {
        name: max(one.extent.first + one.extent.count for one in loads if one.device == name)
        for name in ("gpu0", "gpu1")
    }
    assert ends["gpu0"] <= 12 < ends["gpu1"]
    assert not refused
