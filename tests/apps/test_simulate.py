"""What a scenario and the caller's changes make of a simulation, how it runs, and what is reported of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clockwork_serve.apps.simulate import CheckFailed, Report, ask, cluster_of, play, report
from clockwork_serve.cli import simulate as words
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.sim import Simulation
from clockwork_serve.units import MIB, NS_PER_S
from clockwork_serve.workload.tables import ClusterTable
from tests.apps.scenarios import STEADY, SURGE, written


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


GROUPS = """devices_per_worker = 2
groups = [{devices = 2}, {slower = 2, memory_mib = 512}, {slower = 3, profiled = false}]"""


def test_devices_that_are_not_alike(tmp_path: Path) -> None:
    question = ask(
        written(tmp_path, STEADY.replace("[cluster]", f"[cluster]\n{GROUPS}")), config=ControllerConfig()
    )

    cluster = question.cluster
    assert (cluster.devices, question.config.expected_devices) == (4, 4)
    assert [[(one.kind, one.pages) for one in worker] for worker in cluster.specs("k")] == [
        [("k", 16), ("k", 16)], [("k/2", 32), ("k", 16)],
    ]  # fmt: skip
    assert cluster.slower() == {"gpu2": 2, "gpu3": 3}
    assert cluster.kinds("k") == {"k": 1, "k/2": 2}
    told = "\n".join(words.setup_lines(report(question, play(question.simulation(checks=True)))))
    assert "1 of them 2 times as slow, 512 MiB each" in told
    assert "1 of them 3 times as slow, which no profile tells" in told
    with pytest.raises(ConfigError, match=r"--devices: .*the 4 of groups"):
        ask(question.scenario.source.file, config=ControllerConfig(), devices=3)


def test_a_load_of_which_nothing_was_counted_is_not_called_good(tmp_path: Path) -> None:
    text = STEADY.replace("warmup_s = 1", "warmup_s = 3").replace("slo_ms = 100", "slo_ms = 100\nstop_s = 2")
    others = text[text.index("[[loads]]") :].replace("web", "others").replace("stop_s = 2", "")
    question = ask(written(tmp_path, text + others), config=ControllerConfig())

    made = report(question, play(question.simulation()))

    assert [row[4] for row in words.load_rows(made)] == ["-", "100 %"]
    assert [load.satisfaction for load in made.loads] == [None, 1]
    told = "\n".join(words.closing_lines(made))
    assert "nothing is known of web: none of its requests was sent after the warm-up of 3 s" in told

    with pytest.raises(
        ConfigError, match=r"toml:4: warmup_s: expected less than 2, when the last load stops"
    ):
        ask(written(tmp_path, text), config=ControllerConfig())


def test_long_scenarios_are_looked_at_by_the_minute(tmp_path: Path) -> None:
    text = STEADY.replace("seconds = 4", "seconds = 121")

    assert ask(written(tmp_path, text), config=ControllerConfig()).stretch_s == 60


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('kind = "small"', 'kind = "smal"', "scenario.toml:12: models[0].kind: expected a kind of model"),
        (
            'zoo = "two.csv"',
            'zoo = "v1000"',
            "scenario.toml:7: cluster.zoo: expected a .csv or .json file, or one of",
        ),
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


# Running


LONG = STEADY.replace("seconds = 4", "seconds = 600")


def made(folder: Path, text: str = STEADY) -> Simulation:
    return ask(written(folder, text), config=ControllerConfig()).simulation()


def test_it_runs_to_the_end(tmp_path: Path) -> None:
    played = play(made(tmp_path))

    assert not played.cut
    assert played.reached_ns >= 3.9 * NS_PER_S
    assert played.tally.total().ended == played.tally.total().offered > 250


def test_it_can_be_stopped(tmp_path: Path) -> None:
    told: list[float] = []

    played = play(
        made(tmp_path, LONG), tell=lambda simulated_s, took_s: told.append(simulated_s), stopped=lambda: True
    )

    assert played.cut
    assert told == [played.reached_ns / NS_PER_S]
    assert 0 < played.reached_ns < 600 * NS_PER_S
    assert played.tally.total().ended > 0


def test_checks_see_every_step_and_change_nothing(tmp_path: Path) -> None:
    checked = ask(written(tmp_path), config=ControllerConfig()).simulation(checks=True)
    assert checked.checks is not None

    with_checks, without = play(checked), play(made(tmp_path))

    assert with_checks.reached_ns == without.reached_ns
    assert with_checks.tally.total().ok == without.tally.total().ok


def test_faults_are_counted_as_they_hit(tmp_path: Path) -> None:
    text = STEADY + '\n[[faults]]\nkind = "crash"\nat_s = 2\nworker = 0\n'

    played = play(ask(written(tmp_path, text), config=ControllerConfig()).simulation(checks=True))

    assert played.faults == {"crash": 1}
    assert played.tally.total().ok < played.tally.total().ended


def test_what_checks_find_is_told_with_the_time(tmp_path: Path) -> None:
    simulation = made(tmp_path)

    class Doubt:
        def on_step(self, now_ns, events, effects):
            assert now_ns < NS_PER_S, "a page is lost"

    simulation.watchers.append(Doubt())

    with pytest.raises(CheckFailed, match=r"contradicts itself at 1\.\d+ s: .*a page is lost"):
        play(simulation)


# Reporting


FIELDS = {
    "version", "scenario", "setup", "seconds", "warmup_s", "measured_s", "reached_s", "cut", "took_s",
    "loads", "devices", "faults", "first_break", "stretch_s", "stretches",
}  # fmt: skip
LOAD_FIELDS = {
    "name", "arrivals", "slo_ms", "offered", "offered_rps", "in_time", "goodput_rps", "satisfaction", "late",
    "refused", "open", "cold", "mean_batch", "answers", "refusals",
}  # fmt: skip


def reported(folder: Path, text: str) -> Report:
    question = ask(written(folder, text), config=ControllerConfig())
    return report(question, play(question.simulation()))


@pytest.fixture(scope="module")
def surge(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return reported(tmp_path_factory.mktemp("surge"), SURGE)


def test_every_request_is_counted_once(surge: Report) -> None:
    for load in surge.loads:
        assert load.offered == load.in_time + load.late + sum(load.refused.values()) + load.open
        assert load.open == 0
        assert load.answers.count == load.in_time
        assert load.refusals.count == load.offered - load.in_time
    assert sum(row.offered for row in surge.stretches[1:]) == sum(load.offered for load in surge.loads)
    assert sum(row.in_time for row in surge.stretches[1:]) == sum(load.in_time for load in surge.loads)


def test_rates_are_over_the_time_that_a_load_was_on(surge: Report) -> None:
    web, other = surge.loads

    assert surge.measured_s == 3
    assert web.offered_rps == pytest.approx(web.offered / 3)
    assert other.offered_rps == pytest.approx(200)
    assert other.goodput_rps == pytest.approx(other.in_time / 1.5)
    assert 60 < other.goodput_rps < 100  # batch 1 in 10 ms, beside the other load


def test_it_breaks_when_the_surge_comes(surge: Report) -> None:
    first = surge.first_break

    assert first is not None
    assert (first.from_s, first.to_s) == (2, 3)
    assert first.load == "surge"
    assert first.load_satisfaction < first.satisfaction < 1


def test_devices_are_as_busy_as_their_actions(surge: Report) -> None:
    devices = surge.devices

    assert 0.5 < devices.exec_busy <= 1
    assert devices.load_busy == pytest.approx(0.008 / 3, rel=0.1)  # one LOAD of the large model
    assert devices.infers > 250
    assert (devices.loads, devices.refused) == (1, 0)


def test_a_load_that_is_carried_does_not_break(tmp_path: Path) -> None:
    made = reported(tmp_path, STEADY)

    (web,) = made.loads
    assert (web.satisfaction, made.first_break) == (1, None)
    assert web.answers.p50_ms is not None
    assert web.answers.max_ms is not None
    assert 4 <= web.answers.p50_ms <= web.answers.max_ms < 100
    assert web.refusals.max_ms is None
    assert words.closing_lines(made)[1] == "every second after the warm-up: all requests answered in time"


def test_json_has_the_documented_fields(surge: Report) -> None:
    found = json.loads(surge.to_json())

    assert set(found) == FIELDS
    assert set(found["loads"][0]) == LOAD_FIELDS
    assert found["loads"][1]["refused"]["rejected/would_miss_deadline"] > 0
    assert found["setup"]["seed"] == 1
    assert found["setup"]["memory_mib"] == 256
    guide = (Path(__file__).parents[2] / "docs" / "use" / "simulate.md").read_text(encoding="utf-8")
    assert [field for field in FIELDS | LOAD_FIELDS if f"`{field}`" not in guide] == []


def test_words_say_what_the_numbers_say(surge: Report) -> None:
    lines = "\n".join(words.setup_lines(surge) + words.closing_lines(surge))

    assert "1 device of" in lines
    assert "3 of 2 kinds, 92 MiB of weights" in lines
    assert "surge (fixed, SLO 50 ms)" in lines
    assert "network, each way: gateway 25 us" in lines
    assert "breaks first in second 3 (2 to 3 s)" in lines
    assert [len(row) for row in words.load_rows(surge)] == [len(words.LOAD_COLUMNS)] * 2
    assert {len(row) for row in words.latency_rows(surge)} == {len(words.LATENCY_COLUMNS)}


@pytest.mark.parametrize(("part", "text"), [(1.0, "100 %"), (0.9999999, "99.999 %"), (0.5, "50.000 %")])
def test_only_all_is_all(part: float, text: str) -> None:
    assert words.share(part) == text
