"""Scenario files: what they say is read, what is wrong in them is named by file, line and field."""

# ruff: noqa: E501 - a table of mistakes, one a line

from __future__ import annotations

import re

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import ms
from clockwork_serve.workload.processes import steps_at
from clockwork_serve.workload.scenario import (
    ClusterTable,
    FaultTable,
    LoadTable,
    ModelSet,
    Ramp,
    Scenario,
    check_kinds,
    read_scenario,
)
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo
from tests.workload.scenarios import ROOT, WHOLE


def written(tmp_path, text):
    file = tmp_path / "s.toml"
    file.write_text(text)
    return file


def test_a_scenario_is_read_as_written(tmp_path) -> None:
    found = read_scenario(written(tmp_path, WHOLE))

    assert (found.name, found.seconds, found.warmup_s) == ("whole", 60, 5.5)
    assert found.cluster == ClusterTable(zoo="v100", devices=4, devices_per_worker=2, memory_mib=1000)
    assert found.models == (
        ModelSet(name="m", kind="resnet50_v2", copies=3), ModelSet(name="n", kind="densenet121"),
    )  # fmt: skip
    assert found.loads == (
        LoadTable(name="first", models=("n", "m"), arrivals="gamma", cv=2.0, rate_rps=10.5, slo_ms=20.0,
             slo_ramp=Ramp(every_s=5, factor=1.5, until=100)),
        LoadTable(name="second", models=("m",), arrivals="azure", trace=("day1.csv", "day2.csv.gz"), mapping="stripe",
             rate_ramp=Ramp(every_s=10, add=2)),
    )  # fmt: skip
    assert found.faults == (FaultTable(kind="slow", at_s=10, for_s=2, device=3, factor=2.5),)


WRONG = [
    # what is replaced, by what, the line and the message
    ("seconds = 60", "second = 60", 3, "second: expected a known key, found 'second'; did you mean seconds?"),
    ("seconds = 60", 'seconds = "60"', 3, "seconds: expected float, found '60'"),
    ("seconds = 60", "seconds = nan", 3, "seconds: expected a number in 0.000001..100000000, found nan"),
    ("seconds = 60", "seconds = -1", 3, "seconds: expected a number"),
    ("seconds = 60", "seconds = ", 3, "expected valid TOML, found: Invalid value (at line 3"),
    ("seconds = 60", "seconds = 60\nseconds = 61", 4, "expected valid TOML, found: Cannot overwrite a value"),
    ("warmup_s = 5.5", "warmup_s = 60", 4, "warmup_s: expected less than seconds = 60, found 60.0"),
    ("devices = 4", "device = 4", 8, "cluster.device: expected a known field, found 'device'; did you mean devices?"),
    ("devices = 4", "devices = 4.5", 8, "cluster.devices: expected int, found 4.5"),
    ("devices_per_worker = 2", "devices_per_worker = 3", 9, "cluster.devices_per_worker: expected a divisor of"),
    ("devices = 4", "groups = [{devices = 3}]\ndevices = 4", 9, "cluster.devices: expected none, or the 3 of groups, found 4"),
    ("devices = 4", "groups = [{slower = 0}]", 8, "cluster.groups[0].slower: expected a number in 0.01..100, found 0.0"),
    ("devices = 4", "groups = [{speed = 1}]", 8, "cluster.groups[0].speed: expected a known field, found 'speed'"),
    ("copies = 3", "copies = 0", 15, "models[0].copies: expected a whole number in 1..1000000, found 0"),
    ("copies = 3", "copies = true", 15, "models[0].copies: expected int, found True"),
    ('name = "n"', 'name = "m"', 18, "models[1].name: expected each name once, found 'm'"),
    ('name = "n"', 'name = ""', 18, "models[1].name: expected a name without blanks around it, found ''"),
    ('name = "n"\n', "", 17, "models[1].name: expected a value, found none; add it"),
    ('models = ["n", "m"]', 'models = ["n", "o"]', 23, "loads[0].models: expected the name of a [[models]] table, found"),
    ('models = ["n", "m"]', "models = []", 23, "loads[0].models: expected names of model sets"),
    ('models = ["n", "m"]', 'models = ["n", 3]', 23, "loads[0].models[1]: expected str, found ['n', 3]"),
    ('arrivals = "gamma"', 'arrivals = "gama"', 24, "found 'gama'; did you mean gamma?"),
    ('arrivals = "gamma"', 'arrivals = "poisson"', 25, 'loads[0].cv: expected no value with arrivals = "poisson"'),
    ("cv = 2\n", "", 21, 'loads[0].cv: expected a value with arrivals = "gamma", found None'),
    ("cv = 2", "cv = 0", 25, "loads[0].cv: expected a number in 0.001..50, found 0.0"),
    ("rate_rps = 10.5", "rate_rps = inf", 26, "loads[0].rate_rps: expected a number"),
    ("rate_rps = 10.5", "rate_rps = 1\nconcurrency = 3", 27, 'concurrency: expected no value with arrivals = "gamma"'),
    ("rate_rps = 10.5", "rate_rps = 1\nzipf_s = 1", 27, 'loads[0].zipf_s: expected popularity = "zipf" beside it'),
    ("rate_rps = 10.5", "rate_rps = 1\non_s = 1", 21, "loads[0].off_s: expected a value beside on_s"),
    ("rate_rps = 10.5", "rate_rps = 1\nactive_models = 1", 21, "loads[0].model_ramp: expected a value beside active"),
    ("rate_rps = 10.5", "rate_rps = 1\nstart_s = 5\nstop_s = 5", 28, "loads[0].stop_s: expected more than start_s = 5"),
    ("rate_rps = 10.5", "rate_rps = 1\nstop_s = 61", 27, "loads[0].stop_s: expected at most seconds = 60, found 61.0"),
    ("rate_rps = 10.5", "rate_rps = 1\nretry = 'fast'", 27, "loads[0].retry: expected one of fixed, retry_after, found"),
    ("slo_ms = 20\n", "", 21, "slo_ms: expected a value beside slo_ramp"),
    ("slo_ms = 20", "slo_ms = -1", 27, "loads[0].slo_ms: expected a number in 0.001..86400000, found -1.0"),
    ("factor = 1.5,", "facto = 1.5,", 28, "loads[0].slo_ramp.facto: expected a known field, found 'facto'; did you mean factor"),
    ("factor = 1.5,", "factor = 1.5, add = 1,", 28, "loads[0].slo_ramp.factor: expected either factor or add"),
    ("every_s = 5,", "every_s = 0,", 28, "loads[0].slo_ramp.every_s: expected a number"),
    ('"day2.csv.gz"]', '"day2.csv.gz"]\nrate_scale = 2\nrate_rps = 5', 35, "rate_scale: expected either rate_rps or"),
    ('mapping = "stripe"', 'mapping = "strip"', 35, "one of block, stripe, shuffled, named, found 'strip'; did you mean stripe"),
    ('mapping = "stripe"', "cap_share = 1.5", 35, "loads[1].cap_share: expected a share in (0, 1], found 1.5"),
    ('mapping = "stripe"', 'counts = "exact"', 36, 'loads[1].rate_ramp: expected no value with counts = "exact"'),
    ("add = 2", "ad = 2", 38, "loads[1].rate_ramp.ad: expected a known field, found 'ad'; did you mean add?"),
    ('kind = "slow"', 'kind = "slower"', 41, "faults[0].kind: expected one of crash, hang, slow"),
    ('kind = "slow"', 'kind = "crash"', 45, 'faults[0].factor: expected no value with kind = "crash", found 2.5'),
    ("factor = 2.5\n", "", 40, 'faults[0].factor: expected a value with kind = "slow", found None'),
    ("device = 3", "device = 4", 44, "faults[0].device: expected less than the cluster's 4, found 4"),
    ("device = 3", "device = 3\nworker = 1", 44, "faults[0].device: expected either device or worker"),
    ("at_s = 10", "at_s = 70", 42, "faults[0].at_s: expected at most seconds = 60, found 70.0"),
    ("[[faults]]", "[faults]", 40, "faults: expected [[faults]] tables, found {'kind'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line", "message"), WRONG, ids=[f"{new!r}"[:40] for _, new, *_ in WRONG]
)
def test_what_is_wrong_is_named_by_file_line_and_field(tmp_path, old, new, line, message) -> None:
    assert WHOLE.count(old) >= 1
    file = written(tmp_path, WHOLE.replace(old, new, 1))

    with pytest.raises(ConfigError) as caught:
        read_scenario(file)

    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert message in str(caught.value)


def test_a_scenario_without_loads_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"s.toml: loads: expected at least one \[\[loads\]\], found \(\)"):
        read_scenario(written(tmp_path, WHOLE[: WHOLE.index("[[loads]]")]))


def test_a_file_that_is_missing_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: expected a readable scenario, found: No such file"):
        read_scenario(tmp_path / "none.toml")


def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path) -> None:
    file = tmp_path / "s.toml"
    file.write_bytes(b'name = "x"\n# \xff\n')

    with pytest.raises(ConfigError, match=r"s.toml:2: expected UTF-8"):
        read_scenario(file)


def test_a_file_that_is_no_scenario_is_not_read_whole(tmp_path) -> None:
    file = written(tmp_path, "#" * (1 << 21))

    with pytest.raises(ConfigError, match="expected a scenario of at most"):
        read_scenario(file)


def test_an_unknown_kind_is_named_by_file_line_and_field(tmp_path) -> None:
    file = written(tmp_path, WHOLE.replace("densenet121", "densnet121"))

    with pytest.raises(
        ConfigError, match=rf"{re.escape(str(file))}:19: models\[1\].kind: .*did you mean densenet121"
    ):
        check_kinds(read_scenario(file), Zoo.read("v100").models)


def test_a_missing_trace_is_named_by_file_line_and_field(tmp_path) -> None:
    file = written(tmp_path, WHOLE)

    with pytest.raises(
        ConfigError, match=rf"{re.escape(str(file))}:34: loads\[1\].trace: .*found none at .*day1.csv"
    ):
        build(read_scenario(file), 1)


def test_a_scenario_made_in_code_is_named_by_its_name() -> None:
    made = Scenario(
        name="made", seconds=1, models=(ModelSet(name="m", kind="x"),),
        loads=(LoadTable(name="l", models=("m",), arrivals="timestamps", trace="none.csv"),),
    )  # fmt: skip

    with pytest.raises(ConfigError, match=r"scenario made: loads\[0\].trace: expected a trace file"):
        build(made, 1)


@pytest.mark.parametrize(
    ("ramp", "values"),
    [
        (Ramp(every_s=0.1, factor=1.5), [10, 15, 22.5, 33.75]),
        (Ramp(every_s=0.1, factor=1.5, until=20), [10, 15, 20, 20]),
        (Ramp(every_s=0.1, factor=0.5, until=3), [10, 5, 3, 3]),
        (Ramp(every_s=0.1, add=2, until=13), [10, 12, 13, 13]),
        (Ramp(every_s=0.1, add=-4, until=3), [10, 6, 3, 3]),
        (Ramp(every_s=0.1, add=-4), [10, 6, 2, -2]),
        (Ramp(every_s=0.1, factor=2, until=5), [10, 10, 10, 10]),
    ],
)
def test_a_ramp_steps_at_its_instants_and_stops_at_its_end(ramp, values) -> None:
    assert [ramp.value(10, steps_at(ramp, ms(100 * step))) for step in range(4)] == values
    assert steps_at(ramp, ms(100) - 1) == 0


def test_a_ramp_of_many_steps_is_no_error() -> None:
    assert Ramp(every_s=1, factor=10).value(1.0, 1000) == float("inf")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "examples" / "scenarios").glob("*.toml")), ids=lambda file: file.name
)
def test_the_examples_are_read_and_ask_for_known_models(file) -> None:
    check_kinds(read_scenario(file), Zoo.read("v100").models)
