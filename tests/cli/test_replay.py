"""``clockwork simulate --replay`` from its command line to its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clockwork_serve.cli.entry import run
from clockwork_serve.telemetry import Journal, JournalHead, Step, read_records
from tests.apps.scenarios import STEADY, written


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


def test_the_same_for_machines(journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        (["--replay", "README.md"], "expected a journal; found a record of"),
        ([], "SCENARIO: expected a file, found none"),
    ],
)
def test_misuse_is_one_line(
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
