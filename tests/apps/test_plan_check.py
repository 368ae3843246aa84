"""A prediction held against what was measured: counts, quantiles, single requests; what it needs for that."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.apps.plan import check
from clockwork_serve.apps.plan.check import (
    Ends,
    ServerDevices,
    check_report,
    on_server,
    predicted_ends,
    server_devices,
)
from clockwork_serve.apps.plan.demand import kinds_of
from clockwork_serve.apps.plan.report import PlanQuestion
from clockwork_serve.apps.simulate import ask, play, read_with_zoo
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.telemetry import Counters, render
from clockwork_serve.telemetry.counters import DeviceCounters
from clockwork_serve.telemetry.top import read_metrics
from clockwork_serve.units import MIB, ms
from clockwork_serve.workload.tables import ClusterTable, DeviceGroup, FaultTable
from tests.apps.scenarios import STEADY, written


def asked(file: str) -> PlanQuestion:
    scenario, zoo = read_with_zoo(file)
    return PlanQuestion(
        scenario=scenario, zoo=zoo, kinds=kinds_of(scenario), target=0.99, seeds=(1,),
        config=ControllerConfig(),
    )  # fmt: skip


def test_every_request_is_predicted(tmp_path: Path) -> None:
    file = written(tmp_path, STEADY.replace("rate_rps = 100", "rate_rps = 500"))

    ends = predicted_ends(asked(file).simulated())

    total = play(ask(file, config=ControllerConfig()).simulation()).tally.total()
    counted = [good for (due_ns, _), (good, _) in ends.items() if due_ns >= ms(1000)]
    assert len(counted) == total.offered
    assert sum(counted) == total.ok < total.offered
    assert {model for _, model in ends} == {"s-0000", "s-0001"}


def test_both_sides_are_compared_by_model_and_by_request(tmp_path: Path) -> None:
    predicted: Ends = {(ms(2000 + at), "a"): (True, ms(5)) for at in range(100)}
    predicted |= {(ms(2000 + at), "b"): (at % 2 == 0, ms(7)) for at in range(100)}
    measured: Ends = {key: (good, took + ms(1)) for key, (good, took) in predicted.items()}
    for at in range(10):
        measured[ms(2000 + at), "b"] = (True, ms(9))
    predicted[ms(10), "a"] = measured[ms(10), "a"] = (False, ms(1))  # of the warm-up
    measured[ms(3500), "a"] = (True, ms(1))  # that nobody predicted, as of a closed load

    made = check_report(asked(written(tmp_path)), predicted, measured, url="http://127.0.0.1:1", invalid="")

    assert (made.both, made.neither, made.only_predicted, made.only_measured) == (150, 45, 0, 5)
    assert made.unmatched == 1
    a, b = made.models
    assert (a.requests, a.near, round(a.off, 3)) == (101, True, -0.01)
    assert (a.predicted_ms, a.measured_ms) == ((5, 5), (6, 6))
    assert (b.near, round(b.off, 3), b.predicted_rps) == (False, -0.091, pytest.approx(50 / 3))
    assert not made.good
    assert b'"only_measured": 5' in made.to_json()


def test_without_the_laboratory_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(check, "import_module", missing)

    with pytest.raises(ConfigError, match=r"pip install '\./packages/clockwork-lab'"):
        check.measured_ends("x.toml", "http://127.0.0.1:1", seed=1, traces=None)


def test_closed_loads_are_counted_on_each_side_by_themselves(tmp_path: Path) -> None:
    text = STEADY.replace('arrivals = "poisson"', 'arrivals = "closed"\nconcurrency = 3')
    file = written(tmp_path, text.replace("rate_rps = 100\n", ""))

    ends = predicted_ends(asked(file).simulated())

    total = play(ask(file, config=ControllerConfig()).simulation()).tally.total()
    assert sum(due_ns >= ms(1000) for due_ns, _ in ends) == total.offered > 100
    later: Ends = {(due_ns + 7, model): end for (due_ns, model), end in ends.items()}
    made = check_report(asked(file), ends, later, url="http://127.0.0.1:1", invalid="")
    assert made.total.requests > 100 and made.total.off == 0
    assert made.good


# ------------------------------------------------------------
# Devices of a server.


def counters(*devices: tuple[str, int, bool]) -> Counters:
    """Of a server whose devices are of these kinds, have so much memory in MiB, and are up or not."""
    return Counters(
        devices={
            f"d{at}": DeviceCounters(worker="w", kind=kind, pages=mib // 16, page_bytes=16 * MIB, up=up)
            for at, (kind, mib, up) in enumerate(devices)
        }
    )


def told(*devices: tuple[str, int, bool]) -> tuple[ServerDevices, ...]:
    return server_devices(read_metrics(render(counters(*devices)).decode()))


def test_a_server_tells_of_its_devices() -> None:
    fast = ("cuda:sm_90", 4096, True)
    found = told(fast, ("cpu", 512, True), fast, ("cuda:sm_90", 4096, False), ("cpu", 1024, True))

    assert found == (
        ServerDevices(kind="cpu", count=1, memory_mib=512, page_mib=16),
        ServerDevices(kind="cpu", count=1, memory_mib=1024, page_mib=16),
        ServerDevices(kind="cuda:sm_90", count=2, memory_mib=4096, page_mib=16),
    )
    assert str(found[2]) == "2 devices of kind cuda:sm_90 with 4,096 MiB for weights"
    with pytest.raises(ConfigError, match="say with --devices how many to predict for"):
        told(("cpu", 512, False))


def test_the_prediction_is_for_the_devices_that_are_there(tmp_path: Path) -> None:
    scenario = asked(written(tmp_path)).scenario
    there = told(("emulated:v100", 256, True), ("emulated:v100", 256, True))

    found, differs = on_server(scenario, there)

    assert differs == ["the server has 2 devices, the scenario 1"]
    question = structs.replace(asked(written(tmp_path)), scenario=found).simulated()
    assert question.cluster.devices == question.config.expected_devices == 2
    assert {question.cluster.pages_of(group) for group in question.cluster.each()} == {16}
    assert on_server(found, there)[1] == []


def test_memory_and_kinds_that_differ_are_told(tmp_path: Path) -> None:
    scenario = asked(written(tmp_path)).scenario
    groups = (DeviceGroup(name="cpu", slower=4, memory_mib=256), DeviceGroup(name="gone", devices=2))
    scenario = structs.replace(scenario, cluster=ClusterTable(groups=groups))

    found, differs = on_server(scenario, told(("cpu", 512, True), ("other", 512, True)))

    assert [group.slower for group in found.cluster.groups] == [4, 1]
    assert differs == [
        "the server has 2 devices, the scenario 3",
        "a device of kind cpu has 512 MiB, not 256",
        "the scenario has no [[cluster.groups]] named 'other', which is taken to be as fast as v100 says",
        "the server has no 'gone'",
    ]
    faults = (FaultTable(kind="slow", at_s=1, device=2, factor=2),)
    with pytest.raises(ConfigError, match=r"faults\[0\].device: expected less than .*; the server has 1 dev"):
        on_server(structs.replace(scenario, faults=faults), told(("cpu", 512, True)))
