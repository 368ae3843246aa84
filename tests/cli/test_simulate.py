"""``clockwork simulate`` from its command line to its exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.cli.entry import run
from clockwork_serve.telemetry import Journal, JournalHead, Step, read_journal, read_records
from tests.apps.scenarios import STEADY, written

# ``clockwork simulate`` from its command line to its exit code.


@pytest.fixture
def scenario(tmp_path: Path, repository: Path) -> str:
    """A scenario, and nothing of the caller's environment."""
    return written(tmp_path)


def test_one_screen_tells_all(scenario: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", scenario, "--seed", "3", "--devices", "2", "--max-batch", "4"]) == 0

    shown = capsys.readouterr().out
    assert "2 devices of" in shown
    assert "policy     default, batches of at most 4; seed 3" in shown
    assert "100 %" in shown
    assert "all requests answered in time" in shown


def test_the_same_for_machines(scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"

    assert run(["simulate", scenario, "--json", "-"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert run(["simulate", scenario, "--json", str(file)]) == 0

    two = json.loads(file.read_bytes())
    one["took_s"] = two["took_s"]
    assert one == two


def test_a_seed_decides(scenario: str, tmp_path: Path) -> None:
    offered = []
    for seed in ("1", "1", "2"):
        file = tmp_path / "out.json"
        assert run(["simulate", scenario, "--seed", seed, "--json", str(file)]) == 0
        found = json.loads(file.read_bytes())
        offered.append((found["loads"][0]["offered"], found["loads"][0]["answers"]))
    assert offered[0] == offered[1] != offered[2]


def test_a_journal_holds_every_step(scenario: str, tmp_path: Path) -> None:
    file = tmp_path / "journal"

    assert run(["simulate", scenario, "--journal", str(file), "--checks"]) == 0

    times = [step.now_ns for step in read_journal(file)]
    assert times == sorted(times)
    assert len(times) > 500
    assert run(["simulate", scenario, "--journal", str(file)]) == 2


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
def test_misuse_is_one_line(
    scenario: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", scenario, *arguments]) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err


def test_a_bad_scenario_is_named_with_its_line(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, STEADY.replace("rate_rps = 100", 'rate_rps = "many"'))

    assert run(["simulate", file]) == 2

    assert f"error: {file}:19: loads[0].rate_rps: expected " in capsys.readouterr().err


def test_interrupted_it_shows_what_was_reached(scenario: str, tmp_path: Path) -> None:
    Path(scenario).write_text(STEADY.replace("seconds = 4", "seconds = 100000"))
    child = subprocess.Popen(
        [sys.executable, "-m", "clockwork_serve", "simulate", scenario, "--json", str(tmp_path / "out.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    line = child.stderr.readline()
    child.send_signal(signal.SIGINT)
    shown, _ = child.communicate(timeout=60)

    assert line.startswith("simulating 0/100000")
    assert child.returncode == 130
    assert "CUT at" in shown
    found = json.loads((tmp_path / "out.json").read_bytes())
    assert found["cut"]
    assert 0 < found["reached_s"] < 100000


# ``clockwork simulate --replay`` from its command line to its exit code.


@pytest.fixture
def journal(tmp_path: Path, repository: Path) -> Path:
    """What a simulation wrote."""
    path = tmp_path / "journal"
    scenario = written(tmp_path, STEADY)
    assert run(["simulate", scenario, "--devices", "2", "--policy", "paper", "--journal", str(path)]) == 0
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


def test_a_journal_that_agrees_is_told_in_a_few_lines(
    journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()

    assert run(["simulate", "--replay", str(journal)]) == 0

    shown = capsys.readouterr().out
    assert "policy paper, batches of at most 16, 2 devices" in shown
    assert "decisions agree, and none differs" in shown


def test_the_first_difference_is_shown_and_the_exit_code_is_1(
    journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(journal, 100)
    capsys.readouterr()

    assert run(["simulate", "--replay", str(journal)]) == 1

    shown = capsys.readouterr().out
    assert "DIFFERENT at record 1" in shown
    assert "decisions before it agree" in shown
    assert "    expected nothing\n    found    " in shown


def test_a_replay_for_machines(journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["simulate", "--replay", str(journal), "--json", "-", "--checks"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["agrees"], found["difference"], len(found["runs"])) == (True, None, 1)
    assert found["decisions"] == found["runs"][0]["decisions"] > 500
    assert found["runs"][0]["head"]["config"]["policy"] == "paper"

    spoil(journal, 50)
    file = tmp_path / "out.json"
    assert run(["simulate", "--replay", str(journal), "--json", str(file)]) == 1
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
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("This is some text, and no journal at all.")

    assert run(["simulate", *arguments]) == 2

    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err
