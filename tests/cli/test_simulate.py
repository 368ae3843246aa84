"""``clockwork simulate`` from its command line to its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clockwork_serve.telemetry import Journal, JournalHead, Step, read_journal, read_records
from tests.apps.scenarios import STEADY, written
from tests.cli.commands import Cli, interrupted

# ``clockwork simulate`` from its command line to its exit code.


@pytest.fixture
def scenario(tmp_path: Path, repository: Path) -> str:
    """A scenario, and nothing of the caller's environment."""
    return written(tmp_path)


def test_one_screen_tells_all(scenario: str, cli: Cli) -> None:
    shown = cli("simulate", scenario, "--seed", "3", "--devices", "2", "--max-batch", "4").out
    assert "2 devices of" in shown
    assert "policy     default, batches of at most 4; seed 3" in shown
    assert "100 %" in shown
    assert "all requests answered in time" in shown


def test_the_same_for_machines(scenario: str, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "out.json"

    one = cli("simulate", scenario, "--json", "-").json
    cli("simulate", scenario, "--json", file)

    two = json.loads(file.read_bytes())
    one["took_s"] = two["took_s"]
    assert one == two


def test_a_seed_decides(scenario: str, tmp_path: Path, cli: Cli) -> None:
    offered = []
    for seed in ("1", "1", "2"):
        file = tmp_path / "out.json"
        cli("simulate", scenario, "--seed", seed, "--json", file)
        found = json.loads(file.read_bytes())
        offered.append((found["loads"][0]["offered"], found["loads"][0]["answers"]))
    assert offered[0] == offered[1] != offered[2]


def test_a_journal_holds_every_step(scenario: str, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "journal"

    cli("simulate", scenario, "--journal", file, "--checks")

    times = [step.now_ns for step in read_journal(file)]
    assert times == sorted(times)
    assert len(times) > 500
    cli("simulate", scenario, "--journal", file, code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "pap"], "policy (from --policy): expected one of default, paper"),
        (["--max-batch", "0"], "max_batch (from --max-batch): expected"),
        (["--devices", "0"], "0 is not in the range"),
        (["--zoo", "v1000"], "zoo: expected a .csv or .json file, or one of v100"),
        (["--json", "nowhere/out.json"], "json: expected a file in a folder that exists"),
        (["--trace-dir", "nowhere"], "trace_dir: expected a folder of trace files"),
        (["--seed", "x"], "'x' is not a valid integer range"),
    ],
)
def test_misuse_is_one_line(scenario: str, arguments: list[str], said: str, cli: Cli) -> None:
    assert said in cli.refused("simulate", scenario, *arguments)


def test_a_bad_scenario_is_named_with_its_line(tmp_path: Path, repository: Path, cli: Cli) -> None:
    file = written(tmp_path, STEADY.replace("rate_rps = 100", 'rate_rps = "many"'))

    assert f"error: {file}:19: loads[0].rate_rps: expected " in cli("simulate", file, code=2).err


def test_interrupted_it_shows_what_was_reached(scenario: str, tmp_path: Path) -> None:
    Path(scenario).write_text(STEADY.replace("seconds = 4", "seconds = 100000"))
    line, wrote = interrupted("simulate", scenario, "--json", tmp_path / "out.json")

    assert line.startswith("simulating 0/100000")
    assert "CUT at" in wrote.out
    found = json.loads((tmp_path / "out.json").read_bytes())
    assert found["cut"]
    assert 0 < found["reached_s"] < 100000


# ``clockwork simulate --replay`` from its command line to its exit code.


@pytest.fixture
def journal(tmp_path: Path, repository: Path, cli: Cli) -> Path:
    """What a simulation wrote."""
    path = tmp_path / "journal"
    scenario = written(tmp_path, STEADY)
    cli("simulate", scenario, "--devices", "2", "--policy", "paper", "--journal", path)
    return path


def spoil(path: Path, at: int) -> None:
    """Take the effects out of the first step from the ``at``-th record on that has some."""
    records = [record for _, record in read_records(path)]
    path.unlink()
    assert isinstance(records[0], JournalHead)
    book = Journal(path, records[0])
    spoilt = False
    for number, step in enumerate(records[1:], start=2):
        assert isinstance(step, Step)
        take = number >= at and bool(step.effects) and not spoilt
        spoilt |= take
        book.on_step(step.now_ns, step.events, () if take else step.effects)
    book.close()


def test_a_journal_that_agrees_is_told_in_a_few_lines(journal: Path, cli: Cli) -> None:

    shown = cli("simulate", "--replay", journal).out
    assert "policy paper, batches of at most 64, 2 devices" in shown
    assert "decisions agree, and none differs" in shown


def test_the_first_difference_is_shown_and_the_exit_code_is_1(journal: Path, cli: Cli) -> None:
    spoil(journal, 100)

    shown = cli("simulate", "--replay", journal, code=1).out
    assert "DIFFERENT at record 1" in shown
    assert "decisions before it agree" in shown
    assert "    expected nothing\n    found    " in shown


def test_a_replay_for_machines(journal: Path, tmp_path: Path, cli: Cli) -> None:
    found = cli("simulate", "--replay", journal, "--json", "-", "--checks").json
    assert (found["agrees"], found["difference"], len(found["runs"])) == (True, None, 1)
    assert found["decisions"] == found["runs"][0]["decisions"] > 500
    assert found["runs"][0]["head"]["config"]["policy"] == "paper"

    spoil(journal, 50)
    file = tmp_path / "out.json"
    cli("simulate", "--replay", journal, "--json", file, code=1)
    found = json.loads(file.read_bytes())
    assert not found["agrees"]
    assert found["difference"]["record"] >= 50
    assert found["difference"]["expected"] is None
    assert {"type", "gateway"} <= found["difference"]["found"].keys(), "fields have their names"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--replay", "nowhere"],
            "journal: expected a file that `--journal` wrote; found nothing at nowhere",
        ),
        (["--replay", "J", "--policy", "paper"], "expected a journal alone"),
        (["--replay", "J", "--seed", "3"], "found --seed too; leave it out"),
        (["x.toml", "--replay", "J"], "found SCENARIO too"),
        (["--replay", "README.md"], "expected a journal; found other bytes"),
        ([], "SCENARIO: expected a file, found none"),
    ],
)
def test_misuse_of_a_replay_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("This is some text, and no journal at all.")

    assert said in cli.refused("simulate", *arguments)
