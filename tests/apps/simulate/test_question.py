"""What a scenario and the caller's changes make of a simulation, and what is refused before it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from clockwork_serve.apps.simulate.question import ask, cluster_of
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import MIB
from clockwork_serve.workload.tables import ClusterTable
from tests.apps.simulate.scenarios import STEADY, written


def test_the_scenario_decides(tmp_path: Path) -> None:
    question = ask(written(tmp_path), config=ControllerConfig(), seed=7)

    assert question.cluster.devices == 1
    assert (question.cluster.pages, question.cluster.page_bytes) == (16, 16 * MIB)
    assert list(question.zoo.models) == ["small", "large"]
    assert [name for name, _ in question.workload.models] == ["s-0000", "s-0001"]
    assert question.stretch_s == 1


def test_the_caller_overrules_it(tmp_path: Path) -> None:
    text = STEADY.replace('zoo = "two.csv"', "devices = 2").replace('kind = "small"', 'kind = "resnet50_v2"')

    question = ask(written(tmp_path, text), config=ControllerConfig(), zoo="v100_seed", devices=6)

    assert question.zoo.name == "v100_seed"
    assert question.scenario.cluster.zoo == "v100_seed"
    assert (question.cluster.devices, question.config.expected_devices) == (6, 6)


def test_without_a_size_devices_are_those_of_the_paper() -> None:
    assert cluster_of(ClusterTable()).pages == 1376
    assert cluster_of(ClusterTable(page_mib=32)).pages == 688
    assert [cluster_of(ClusterTable(lanes_share=one)).lanes_share for one in (True, False)] == [True, False]


def test_long_scenarios_are_looked_at_by_the_minute(tmp_path: Path) -> None:
    text = STEADY.replace("seconds = 4", "seconds = 121")

    assert ask(written(tmp_path, text), config=ControllerConfig()).stretch_s == 60


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('kind = "small"', 'kind = "smal"', "scenario.toml:12: models[0].kind: expected a kind of model"),
        ('zoo = "two.csv"', 'zoo = "v1000"', "scenario.toml:7: cluster.zoo: expected a .csv file or one of"),
        ('zoo = "two.csv"', 'zoo = "no.csv"', "it cannot be read"),
        ("memory_mib = 256", "memory_mib = 15", "scenario.toml:8: cluster.memory_mib: expected at least 16"),
        ("rate_rps = 100", "rate_rps = -1", "scenario.toml:19: loads[0].rate_rps: expected a number"),
        ('arrivals = "poisson"\nrate_rps = 100', 'arrivals = "azure"\ntrace = "no.csv"', "no.csv"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in STEADY

    with pytest.raises(ConfigError) as caught:
        ask(written(tmp_path, STEADY.replace(old, new)), config=ControllerConfig())

    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ('kind = "crash"\nworker = 3', "faults[0].worker: expected less than"),
        ('kind = "remove_model"\nmodel = "s-1"', "faults[0].model: expected a model, found 's-1'"),
    ],
)
def test_faults_hit_what_is_there(tmp_path: Path, fault: str, said: str) -> None:
    text = STEADY.replace("[cluster]", "[cluster]\ndevices = 3")

    with pytest.raises(ConfigError) as caught:
        ask(written(tmp_path, f"{text}\n[[faults]]\nat_s = 1\n{fault}\n"), config=ControllerConfig())

    assert f"scenario.toml:26: {said}" in str(caught.value)


def test_fewer_devices_may_be_too_few_for_the_faults(tmp_path: Path) -> None:
    text = STEADY.replace("[cluster]", "[cluster]\ndevices = 3")
    text += '\n[[faults]]\nkind = "crash"\nat_s = 1\nworker = 2\n'
    ask(written(tmp_path, text), config=ControllerConfig())

    with pytest.raises(ConfigError, match=r"scenario.toml:26: faults\[0\].worker: expected less than"):
        ask(written(tmp_path, text), config=ControllerConfig(), devices=2)


def test_devices_that_do_not_fill_workers_are_refused(tmp_path: Path) -> None:
    text = STEADY.replace("[cluster]", "[cluster]\ndevices = 4\ndevices_per_worker = 2")

    with pytest.raises(
        ConfigError, match=r"--devices: devices_per_worker: expected a divisor of devices = 3"
    ):
        ask(written(tmp_path, text), config=ControllerConfig(), devices=3)
