"""A journal played with a change: as it was without one, as in the true world with one, in flat memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Answer, Infer, Load, Outcome, Request, WorkerJoined
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.sim.counterfactual import KNOWN_NS, Change, LongScene, Traffic, play, play_on
from clockwork_serve.sim.what_if import IDS, AskedWorld, WhatIf, what_if
from clockwork_serve.telemetry import Journal, Step, head_of, read_journal
from clockwork_serve.units import MIB, NS_PER_MS
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo
from tests.pure import NEEDS_PURE
from tests.sim.journals import written
from tests.sim.overload import journal_of
from tests.sim.scenes import run_of, scene_of, walked

pytestmark = NEEDS_PURE

ZOO = Zoo.read("v100")


@pytest.fixture(scope="module")
def overload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return journal_of(tmp_path_factory.mktemp("what_if") / "journal")


def good_in(path: Path) -> set[str]:
    return {
        one.request_id
        for step in read_journal(path)
        for one in step.effects
        if isinstance(one, Answer) and one.outcome is Outcome.OK
    }


def steady(path: Path, devices: int = 2, slo_ms: float = 40.0) -> Path:
    """Too much for the devices, and nothing left to chance but the arrivals."""
    scenario = Scenario(
        name="steady", seconds=1.5, models=(ModelSet(name="m", kind="resnet50_v2", copies=3),),
        loads=(
            LoadTable(name="web", models=("m",), arrivals="poisson", rate_rps=1900.0, slo_ms=slo_ms),
        ),
    )  # fmt: skip
    config = ControllerConfig(expected_devices=2)
    journal = Journal(path, head_of(config))
    Simulation(
        workload=build(scenario, 1), zoo=ZOO, seed=1, config=config, keyed=True, noise=False,
        cluster=Cluster(devices=devices, pages=60, page_bytes=16 * MIB), watchers=[journal],
    ).run()  # fmt: skip
    journal.close()
    return path


def test_without_a_change_all_decisions_are_the_same(overload: Path) -> None:
    found = what_if(overload, AskedWorld())

    assert found.replayed.agrees
    assert found.replayed.decisions > 1000
    assert found.all is None


@pytest.mark.parametrize("seed", range(20))
def test_a_long_scene_without_a_change_is_as_recorded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clockwork_serve.sim.counterfactual.KNOWN_NS", 300 * NS_PER_MS)
    config, steps = run_of(seed)
    at = max(1, len(steps) // 3)
    found: list[Step] = []

    def watch(now_ns: int, events: list, effects: list) -> None:
        if events or effects:
            found.append(Step(now_ns, tuple(events), tuple(effects)))

    played = play_on(LongScene(walked(config, steps[:at]), iter(steps[at:])), Change(), watch)

    expected = [one for one in steps[at:] if one.events or one.effects]
    assert found[: len(expected)] == expected
    assert (played.from_ns, played.first) == (None, None)
    assert not played.ran
    assert not played.answers


def test_with_a_change_a_long_scene_is_as_a_whole_one(overload: Path) -> None:
    config, steps = run_of(3)
    change = Change(traffic=(Traffic(times=1.5),))
    answers: dict[str, Answer] = {}

    def watch(now_ns: int, events: list, effects: list) -> None:
        answers.update({one.request_id: one for one in effects if isinstance(one, Answer)})

    whole = play(scene_of(config, steps, 20), change)
    play_on(LongScene(walked(config, steps[:20]), iter(steps[20:])), change, watch)

    assert len(whole.answers) > 100
    assert {one: answers[one] for one in whole.answers} == {
        one: found for one, (_, found) in whole.answers.items()
    }


def test_one_device_more_is_as_in_a_world_that_had_it(tmp_path: Path) -> None:
    two, three = steady(tmp_path / "two"), steady(tmp_path / "three", devices=3)

    found = what_if(two, AskedWorld(devices=1))

    assert found.all is not None
    was, then = found.all.recorded, found.all.changed
    assert was.in_time == len(good_in(two))
    assert was.requests == then.requests
    assert then.in_time == pytest.approx(len(good_in(three)), rel=0.03)
    assert found.gained.count - found.lost.count == then.in_time - was.in_time
    assert len(found.gained.first) == IDS
    assert set(found.gained.first).isdisjoint(good_in(two))
    assert found.first is not None
    assert any(one.device == "added0" for one in found.first.found if isinstance(one, Infer | Load))
    assert sum(found.rests.values()) >= then.in_time


def test_one_device_less_is_as_in_a_world_without_it(tmp_path: Path) -> None:
    two, one = steady(tmp_path / "two"), steady(tmp_path / "one", devices=1)

    found = what_if(two, AskedWorld(devices=-1))

    assert found.all is not None
    assert found.all.changed.in_time == pytest.approx(len(good_in(one)), rel=0.03)
    assert found.all.changed.in_time < found.all.recorded.in_time


def test_a_device_less_of_a_worker_that_has_several() -> None:
    config, steps = run_of(5)
    controller = walked(config, steps[:3])
    spec = controller.workers()[0].devices[0]
    both = tuple(
        type(spec)(**{**{f: getattr(spec, f) for f in spec.__struct_fields__}, "device": name})
        for name in "xy"
    )
    controller.observe(WorkerJoined(worker="pair", devices=both), steps[3].now_ns)
    controller.decide(steps[3].now_ns)

    events = Change(devices=-1).begin(controller)

    assert [type(one).__name__ for one in events[:2]] == ["WorkerLost", "WorkerJoined"]
    assert [one.device for one in events[1].devices] == ["x"]


def test_a_longer_slo_is_as_in_a_world_that_gave_it(tmp_path: Path) -> None:
    tight, loose = steady(tmp_path / "tight"), steady(tmp_path / "loose", slo_ms=80.0)

    slos = {f"m-000{at}": 80 * NS_PER_MS for at in range(3)}
    found = what_if(tight, AskedWorld(slos=slos))

    assert found.all is not None
    assert found.all.changed.in_time == pytest.approx(len(good_in(loose)), rel=0.03)


def test_without_a_tenant_there_are_none_of_its_requests(overload: Path) -> None:
    found = what_if(overload, AskedWorld(without_tenants=("b",)))

    tenants = {one.name: one for one in found.tenants}
    asked = [one for step in read_journal(overload) for one in step.events if isinstance(one, Request)]
    assert tenants["b"].changed.requests == 0
    assert found.left_out == sum(one.tenant == "b" for one in asked)
    assert tenants["a"].changed.in_time > tenants["a"].recorded.in_time
    assert found.added == 0


def test_more_requests_come_besides(overload: Path) -> None:
    found = what_if(overload, AskedWorld(rate=2.0))

    assert found.all is not None
    assert found.all.changed.requests == pytest.approx(2 * found.all.recorded.requests, rel=0.02)
    assert found.added == pytest.approx(found.all.recorded.requests, rel=0.02)


def test_another_policy_decides_otherwise(overload: Path) -> None:
    found = what_if(overload, AskedWorld(policy="paper"))

    assert found.first is not None
    with pytest.raises(ConfigError, match="policy: expected one of"):
        what_if(overload, AskedWorld(policy="nobody"))


def test_a_new_versions_profile_takes_longer(tmp_path: Path) -> None:
    path = steady(tmp_path / "journal")
    header = "model,weights_mb,load_ms,infer_b1_ms,infer_b2_ms,infer_b4_ms,infer_b8_ms,infer_b16_ms\n"
    row = ZOO["resnet50_v2"]
    slower = ",".join(f"{3 * row.infer_ns[size] / 1e6}" for size in (1, 2, 4, 8, 16))
    (tmp_path / "new.csv").write_text(f"{header}m-0000,100,{row.load_ns / 1e6},{slower}\n")

    found = what_if(path, AskedWorld(profiles=Zoo.read(tmp_path / "new.csv")))

    assert found.all is not None
    assert found.all.changed.in_time < 0.7 * found.all.recorded.in_time
    (tmp_path / "other.csv").write_text(f"{header}other,100,8,{slower}\n")
    with pytest.raises(
        ConfigError, match=r"profile: expected a row for a model that the journal has \(m-0000/1"
    ):
        what_if(path, AskedWorld(profiles=Zoo.read(tmp_path / "other.csv")))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            AskedWorld(devices=-2),
            "devices: expected to leave at least one of the 2 that the first request met; found -2",
        ),
        (AskedWorld(slos={"q": 1}), "slo_ms: expected a model that the journal has, found 'q'"),
    ],
)
def test_what_cannot_be_is_named(overload: Path, asked: AskedWorld, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        what_if(overload, asked)

    assert said in str(caught.value)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_went_wrong_the_books_agree(tmp_path: Path, seed: int) -> None:
    path = written(tmp_path / "journal", seed)

    for asked in (AskedWorld(devices=1), AskedWorld(rate=0.5), AskedWorld(policy="paper")):
        found = what_if(path, asked)
        assert_agrees(found)


def assert_agrees(found: WhatIf) -> None:
    assert found.all is not None
    for groups in (found.models, found.tenants):
        for side in ("recorded", "changed"):
            whole = getattr(found.all, side)
            assert sum(getattr(one, side).requests for one in groups) == whole.requests
            assert sum(getattr(one, side).in_time for one in groups) == whole.in_time
    assert found.all.changed.requests == found.all.recorded.requests - found.left_out + found.added


def test_what_is_long_ago_is_forgotten() -> None:
    config, steps = run_of(7)
    shift_ns = 3 * KNOWN_NS
    scene = LongScene(walked(config, steps[:20]), iter(steps[20:]))
    sent = [one for step in steps[20:] for one in step.effects if isinstance(one, Infer)]

    for _ in scene.steps:
        pass
    known = len(scene.recording.actions)
    scene.recording.forget(steps[-1].now_ns + shift_ns)

    assert known >= len(sent) > 20
    assert not scene.recording.actions
    assert not scene.recording._infers
