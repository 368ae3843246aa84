"""``clockwork workload from`` from its command line to a scenario that is simulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clockwork_serve.workload.scenario import read_scenario
from tests.cli.commands import Cli
from tests.sim.overload import journal_of

CALLS = "time,model,slo_ms\n" + "".join(f"{at / 10},resnet50_v2,50\n" for at in range(200))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calls.csv").write_text(CALLS)
    return tmp_path


def test_a_table_becomes_a_scenario_that_is_simulated(cli: Cli) -> None:
    told = cli("workload", "from", "calls.csv").out.splitlines()
    report = cli("simulate", "calls.toml", "--json", "-").json

    assert told[0] == "calls.toml: 200 requests for 1 model in 19.9 s (10.0/s)"
    assert told[1] == "  loads: requests 200"
    assert told[3].startswith("  note: sizes of inputs are not told")
    assert report["loads"][0]["in_time"] == 200


def test_a_journal_becomes_one_too(folder: Path, cli: Cli) -> None:
    journal_of(folder / "run.journal")

    made = cli("workload", "from", "run.journal", "--json").json
    report = cli("simulate", "run.toml", "--json", "-").json
    again = cli("simulate", "run.toml", "--zoo", "run.journal", "--json", "-").json

    assert made["loads"].keys() == {"a", "b"}
    assert sum(load["offered"] for load in report["loads"]) == made["requests"]
    assert json.loads(Path("run.zoo.json").read_bytes())["delays"]["network"]["gateway_ns"] > 0
    assert [load["in_time"] for load in again["loads"]] == [load["in_time"] for load in report["loads"]]


def test_what_is_to_be_otherwise(folder: Path, cli: Cli) -> None:
    words = (
        "--out mine.toml --from 5s --to 0.25m --scale 2 --burst 3@2s+1s --add-model densenet121=5 --slo-ms 80"
    )

    Path("times.csv").write_text("time,model\n1,densenet121\n2,densenet121\n")
    shown = cli("workload", "from", "calls.csv", *words.split()).out
    shown += cli("workload", "from", "times.csv", "--slo-ms", "80", "--out", "other.toml").out

    scenario = read_scenario(folder / "mine.toml")
    assert scenario.seconds == 10
    assert [(load.name, load.slo_ms) for load in scenario.loads] == [
        ("requests", 80.0),
        ("added densenet121", 80.0),
    ]
    assert "mine.toml: 2" in shown
    assert "SLOs are not told" not in shown
    assert "SLOs are not told: --slo-ms" in cli("workload", "from", "times.csv").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.csv"], "source: expected a file, found none at none.csv"),
        (["calls.csv", "--from", "soon"], "from: expected a time such as 90s, 30m, 1h or 2d, found 'soon'"),
        (["calls.csv", "--from", "2026-11-30"], "found a date; calls.csv does not tell the time of day"),
        (["calls.csv", "--from", "2026-11-3x"], "from: expected a date and time such as"),
        (["calls.csv", "--from", "2s", "--to", "1s"], "to: expected a time after --from, found '1s'"),
        (["calls.csv", "--from", "2s", "--to", "2026-11-30"], "to: expected a time as --from has it"),
        (["calls.csv", "--scale", "0"], "scale: expected a number above 0, up to 1000, found '0'"),
        (["calls.csv", "--burst", "3"], "burst: expected X@AT+FOR such as 3@10m+30s, found '3'"),
        (["calls.csv", "--add-model", "x"], "add_model: expected NAME=VALUE, found 'x'"),
        (["calls.csv", "--zoo", "v10"], "zoo: expected a .csv or .json file, or one of"),
        (["calls.csv", "--out", "mine.txt"], "out: expected a new file NAME.toml"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], said: str, cli: Cli) -> None:
    assert said in cli("workload", "from", *words, code=2).err


def test_models_without_a_profile_are_told_and_refused_where_a_zoo_is_named(folder: Path, cli: Cli) -> None:
    (folder / "calls.csv").write_text(CALLS.replace("resnet50_v2", "mine"))

    assert "note: 1 model without a profile in v100 (mine)" in cli("workload", "from", "calls.csv").out
    wrote = cli("workload", "from", "calls.csv", "--out", "b.toml", "--zoo", "v100", code=2)
    assert "calls.csv:2: model: expected one that has a profile in v100" in wrote.err
    cli("workload", "from", "calls.csv", "--out", "c.toml", "--kind", "resnet50_v2")
