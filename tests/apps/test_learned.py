"""Profiles as a journal has them: medians of what was measured, and what follows for other batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.apps import learned as learned_module
from clockwork_serve.apps.learned import (
    ENOUGH,
    LearnedDelays,
    LearnedServer,
    TableDelays,
    delays_beside,
    read_delays,
    read_zoo,
)
from clockwork_serve.apps.simulate import ask, play, question_of
from clockwork_serve.apps.traffic import transcribe
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import (
    CodeAdded,
    DeviceSpec,
    Extent,
    Infer,
    ModelAdded,
    Request,
    Result,
    Status,
    Window,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.sim import Simulation, read_constants
from clockwork_serve.sim.constants import Quantiles
from clockwork_serve.telemetry import Journal, Step, head_of, read_records
from clockwork_serve.telemetry.journal import machine_name
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_US
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.transcript import TrafficChanges
from clockwork_serve.workload.zoo import Zoo
from tests.sim import worlds

ZOO = Zoo.read("v100")
KIND = "cpu"
SPEC = DeviceSpec(device="d", kind=KIND, pages=8, page_bytes=16 * MIB, workspace_bytes=0, io_bytes=0)


def steps(times: float = 2.0, count: int = 9) -> list[Step]:
    """A model whose batches of one take so many times what its profile says."""
    code, profile = ZOO.code("resnet50_v2"), ZOO.profile("resnet50_v2", KIND)
    found = [
        Step(0, (WorkerJoined(worker="w", devices=(SPEC,)), CodeAdded(code=code, profiles=(profile,))), ()),
        Step(1, (ModelAdded(model=ZOO.model("net", "resnet50_v2")),), ()),
    ]
    for at in range(count):
        infer = Infer(
            action_id=at, device="d", model="net/1", code_id="resnet50_v2", extent=Extent(0, 1), version=1,
            batch=1, calls=(), window=Window(0, 1), expected_ns=1,
        )  # fmt: skip
        lasted_ns = round(profile.infer_ns[1] * times) + (100 * NS_PER_MS if at == 0 else 0)
        result = Result(action_id=at, device="d", status=Status.OK, started_ns=5, ended_ns=5 + lasted_ns)
        found += [Step(10 + at, (), (infer,)), Step(11 + at, (result,), ())]
    return found


def learned(*records: Step) -> LearnedServer:
    found = LearnedServer()
    for record in records:
        found.take(record)
    return found


def journal(path: Path, machine: str = "") -> str:
    book = Journal(path, structs.replace(head_of(ControllerConfig()), machine=machine))
    for step in steps():
        book.on_step(step.now_ns, step.events, step.effects)
    book.close()
    return str(path)


def test_the_median_counts_and_batches_that_never_ran_follow() -> None:
    (row,) = learned(*steps()).rows()

    profile = ZOO.profile("resnet50_v2", KIND)
    for batch in (1, 2, 16):
        assert row[f"infer_b{batch}_ms"] == pytest.approx(2 * profile.infer_ns[batch] / NS_PER_MS, rel=1e-3)
    assert row["load_ms"] == pytest.approx(ZOO["resnet50_v2"].load_ns / NS_PER_MS, rel=1e-3)
    assert row["model"] == "net"


def test_without_results_it_is_what_was_profiled() -> None:
    (row,) = learned(*steps(count=0)).rows()

    assert row["infer_b1_ms"] == ZOO["resnet50_v2"].infer_ns[1] / NS_PER_MS


def test_batches_of_other_shapes_than_declared_are_not_measured() -> None:
    shaped = [
        Step(each.now_ns, each.events, tuple(structs.replace(one, signature="s") for one in each.effects))
        for each in steps()
    ]
    assert learned(*shaped).rows() == learned(*steps(count=0)).rows()


def test_devices_are_the_clusters() -> None:
    assert learned(*steps()).cluster() == {
        "devices": 1, "page_mib": 16, "memory_mib": 128, "lanes_share": None,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="journal: expected devices that joined, found none"):
        _ = learned().kind


def test_versions_have_names_of_their_own() -> None:
    found = learned()

    assert [found.name_of(key) for key in ("a/1", "a/2", "b/1", "a/1")] == ["a", "a.2", "b", "a"]


def test_a_journal_is_a_zoo_and_one_of_another_machine_is_refused(tmp_path: Path) -> None:
    mine, other = journal(tmp_path / "mine", machine_name()), journal(tmp_path / "other", "64 x Another CPU")

    assert list(read_zoo(mine).models) == ["net"]
    assert list(read_zoo(journal(tmp_path / "unknown")).models) == ["net"]
    with pytest.raises(
        ConfigError, match="found one of 64 x Another CPU; profile there, or say --foreign-profile"
    ):
        read_zoo(other)
    assert list(read_zoo(other, foreign=True).models) == ["net"]


def served(count: int = 100) -> LearnedDelays:
    """Requests that are known after 200 to 299 us; every tenth INFER is 3 ms longer, and known 1 ms later."""
    found = LearnedServer()
    for at in range(count):
        begun_ns, slow = at * 100 * NS_PER_MS, at % 10 == 0
        request = Request(
            request_id=str(at), gateway="g", model="net/1", arrival_ns=begun_ns,
            deadline_ns=begun_ns + 50 * NS_PER_MS, way_ns=4 * NS_PER_MS,
        )  # fmt: skip
        infer = Infer(
            action_id=at, device="d", model="net/1", code_id="c", extent=Extent(0, 1), version=1, batch=1,
            calls=(), window=Window(0, 1), expected_ns=1,
        )  # fmt: skip
        ended_ns = begun_ns + (13 if slow else 10) * NS_PER_MS
        result = Result(
            action_id=at, device="d", status=Status.OK, started_ns=begun_ns + NS_PER_MS, ended_ns=ended_ns
        )
        found.take(Step(begun_ns + (200 + at) * NS_PER_US, (request,), (infer,)))
        found.take(Step(ended_ns + (1100 if slow else 100) * NS_PER_US, (result,), ()))
    return found.delays


def test_delays_and_noise_are_as_the_journal_has_them() -> None:
    found = served().constants()

    assert found.network.gateway_ns == 210 * NS_PER_US
    assert found.network.worker_ns == 100 * NS_PER_US
    assert found.network.jitter_us[0] == (0.0, 0.0)
    assert found.network.jitter_us[-1] == (1.0, 1000.0)
    assert found.network.reserve_ns == 4 * NS_PER_MS + (250 - 210) * NS_PER_US
    assert dict(found.noise.infer_us)[0.5] == 0
    assert dict(found.noise.infer_us)[0.95] == 3000
    assert found.noise.load_us == read_constants().noise.load_us, "no LOAD was seen"


def test_simulations_with_delays_of_a_journal_give_requests_less_time() -> None:
    """Devices that are busy all the time answer fewer, for who would be answered late is refused."""
    load = LoadTable(name="all", models=("net",), arrivals="poisson", rate_rps=600, slo_ms=60)
    scenario = Scenario(
        name="s", seconds=3.0, warmup_s=0, models=(ModelSet(name="net", kind="resnet152_v2"),), loads=(load,)
    )
    measured, usual = served().constants(), read_constants()
    reserved = structs.replace(usual.network, reserve_ns=measured.network.reserve_ns)
    good = [
        play(question_of(scenario, ZOO, config=ControllerConfig(), seed=1, constants=constants).simulation())
        .tally.loads[0].ok
        for constants in (usual, measured, structs.replace(usual, network=reserved))
    ]  # fmt: skip
    assert 0 < good[1] < good[0]
    assert 0 < good[2] < good[0], "what gateways keep was not taken from requests"


def test_the_noise_is_of_what_ran_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_module, "KINDS_MAX", 1)
    found, infer = LearnedServer(), Infer(
        action_id=0, device="d", model="net/1", code_id="c", extent=Extent(0, 1), version=1, batch=1,
        calls=(), window=Window(0, 1), expected_ns=1,
    )  # fmt: skip
    request = Request(request_id="0", gateway="g", model="net/1", arrival_ns=0, deadline_ns=1)
    found.take(Step(1, (request,), ()))
    for at in range(2 * ENOUGH):
        second = at >= ENOUGH
        code = "of a model that was removed" if second else "c"
        action = structs.replace(infer, action_id=at, code_id=code)
        lasted_ns = (2 if second and at % 2 else 1) * NS_PER_MS
        result = Result(action_id=at, device="d", status=Status.OK, started_ns=0, ended_ns=lasted_ns)
        found.take(Step(lasted_ns, (), (action,)))
        found.take(Step(lasted_ns, (result,), ()))
    noise = found.delays.constants().noise
    assert noise.infer_us[0] == (0.0, -1000.0)
    assert noise.infer_us[-1] == (1.0, 0.0)


def test_a_journal_is_read_once_for_both_and_again_when_it_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Path] = []
    monkeypatch.setattr(
        learned_module, "read_records", lambda path: passes.append(path) or read_records(path)
    )
    file = journal(tmp_path / "serve.journal")
    read_zoo(file)
    assert delays_beside(file) is None
    assert len(passes) == 1

    book = Journal(tmp_path / "more", head_of(ControllerConfig()))
    book.close()
    (tmp_path / "more").replace(file)
    with pytest.raises(ConfigError, match="expected devices that joined"):
        read_zoo(file)
    assert len(passes) == 2


def test_actions_of_lost_workers_are_not_waited_for() -> None:
    found = learned(*steps()[:3])
    assert found._sent
    found.take(Step(20, (WorkerLost(worker="w"),), ()))
    assert not found._sent


def test_a_journal_as_a_table_has_its_delays_with_it(tmp_path: Path) -> None:
    scenario = worlds.scenario(models=(ModelSet(name=worlds.KIND, kind=worlds.KIND),))
    file = tmp_path / "serve.journal"
    book = Journal(file, structs.replace(head_of(ControllerConfig()), machine=machine_name()))
    Simulation(
        workload=build(scenario, seed=1), zoo=Zoo.read("v100"), seed=1, watchers=[book],
        cluster=worlds.Cluster(devices=1), config=ControllerConfig(expected_devices=1),
    ).run()  # fmt: skip
    book.close()
    asked = tmp_path / "s.toml"
    asked.write_text(
        f'name = "s"\nseconds = 2\n[[models]]\nname = "m"\nkind = "{worlds.KIND}"\n'
        '[[loads]]\nname = "all"\nmodels = ["m"]\narrivals = "poisson"\nrate_rps = 50\nslo_ms = 100\n'
    )
    of_server, said = read_delays(str(file)), served().constants()

    assert of_server != read_constants()
    for constants, zoo, expected in (
        (None, str(file), of_server), (said, str(file), said), (said, "v100", said),
    ):  # fmt: skip
        question = ask(asked, config=ControllerConfig(), zoo=zoo, constants=constants)
        assert question.constants == expected
    assert delays_beside("v100") is delays_beside(journal(tmp_path / "nobody asked")) is None

    transcribe(file, tmp_path / "made.toml", TrafficChanges())
    made = tmp_path / "made.zoo.json"
    assert ask(tmp_path / "made.toml", config=ControllerConfig()).constants == of_server
    for found, said in (
        (
            b'{"delays": {"network": 1}}',
            "zoo .*made.zoo.json: delays: expected those of a server, found Expected",
        ),
        (
            made.read_bytes().replace(b'"gateway_ns": ', b'"gateway_ns": -'),
            "expected times from 0 to a minute",
        ),
    ):
        made.write_bytes(found)
        with pytest.raises(ConfigError, match=said):
            delays_beside(str(made))


@pytest.mark.parametrize(
    "curve", [(), ((0.0, 1.0),), ((0.0, 0.0), (1.0, 1e9)), ((0.0, 0.0), (0.5, 1.0), (0.5, 2.0), (1.0, 3.0))]
)
def test_delays_of_a_table_are_checked(curve: Quantiles) -> None:
    usual = read_constants()
    delays = TableDelays(network=usual.network, noise=usual.noise)
    assert delays.possible
    assert delays.constants() == usual
    assert not structs.replace(delays, noise=structs.replace(usual.noise, infer_us=curve)).possible


def test_a_journal_without_requests_tells_no_delays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected requests that were served, found none"):
        read_delays(journal(tmp_path / "j"))
    (tmp_path / "text").write_text("name = 's'")
    with pytest.raises(ConfigError, match=r"delays: expected a server's journal, found .*text"):
        read_delays(str(tmp_path / "text"))
