"""``clockwork plan`` from its command line to its exit code."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.apps.learned import read_zoo
from clockwork_serve.apps.plan.report import PlanQuestion
from clockwork_serve.cli.entry import run
from clockwork_serve.errors import ConfigError
from clockwork_serve.sim import read_constants
from tests.apps.scenarios import STEADY, written

BUSY = STEADY.replace("rate_rps = 100", "rate_rps = 900")


@pytest.fixture
def scenario(tmp_path: Path, repository: Path) -> str:
    """A scenario, and nothing of the caller's environment."""
    return written(tmp_path, BUSY)


def test_one_screen_tells_all(scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "out.json")]

    assert run(["plan", scenario, "--slo-ms", "50", "--target", "99", "--jobs", "2", *files]) == 0

    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_bytes())
    count = found["answer"]["devices"]["device"]
    assert f"\n{count} devices\n" in shown
    assert "web 50 ms" in shown
    assert "it breaks first from 1 to 4 s" in shown
    assert re.search(rf"with {count + 1} devices: .*p99 \d+\.\d instead of \d+\.\d ms", shown)
    for more in re.findall(r"(\S+) instead of (\S+)", shown):
        assert more[0] != more[1]

    assert run(["plan", scenario, "--slo-ms", "50", "--target", "99", "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["reused"], again["answer"]) == (found["simulations"], found["answer"])


def test_kinds_have_prices(scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = tmp_path / "kinds.toml"
    kinds.write_text(
        "[[kind]]\nname = 'small'\nspeed = 0.5\nprice = 1.5\nmemory = '1GiB'\nat_most = 9\n"
        "[[kind]]\nname = 'large'\nspeed = 4\nprice = 3.5\n"
    )
    assert run(["plan", scenario, "--target", "99", "--max-devices", "9", "--kinds", str(kinds)]) == 0

    shown = capsys.readouterr().out
    assert "small: 0.5 times as fast as the profile, 1GiB for weights, price 1.5, at most 9" in shown
    assert "\n1 x large, for 3.5\n" in shown


def test_what_a_journal_learned_is_a_table_that_is_read_once(
    scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal, read = tmp_path / "run.journal", []
    assert run(["simulate", scenario, "--journal", str(journal)]) == 0
    monkeypatch.setattr(
        "clockwork_serve.apps.simulate.read_zoo", lambda *a, **k: read.append(a) or read_zoo(*a, **k)
    )

    Path(scenario).write_text(BUSY.replace('"small"', '"s-0000"'))  # a journal knows models by their names
    assert run(["plan", scenario, "--zoo", str(journal), "--target", "99"]) == 0

    assert "models of " + str(journal) in capsys.readouterr().out
    assert len(read) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "0"], "0.0 is not in the range"),
        (["--slo-ms", "3"], "loads[0].slo_ms: no number of these devices does"),
        (["--kinds", "nowhere.toml"], "kinds: expected a TOML file of [[kind]], found nowhere.toml"),
        (["--json", "nowhere/out.json"], "json: expected a file in a folder that exists"),
        (["--trace-dir", "nowhere"], "trace_dir: expected a folder of trace files"),
    ],
)
def test_misuse_is_one_line(
    scenario: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", scenario, *arguments]) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert said in shown.err


def test_where_nothing_does_it_says_so(scenario: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", scenario, "--max-devices", "1"]) == 1

    shown = capsys.readouterr().out
    assert "NO: not even 1 device" in shown
    assert "the work alone, in the largest batches, takes 2." in shown


@pytest.mark.slow
def test_interrupted_it_shows_what_was_found_and_goes_on_later(scenario: str, tmp_path: Path) -> None:
    Path(scenario).write_text(BUSY.replace("seconds = 4", "seconds = 3000"))
    child = subprocess.Popen(
        [sys.executable, "-m", "clockwork_serve", "plan", scenario, "--jobs", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    line = child.stderr.readline()
    child.send_signal(signal.SIGINT)
    shown, _ = child.communicate(timeout=120)

    assert line.startswith("planning ")
    assert child.returncode == 130
    assert "NO ANSWER YET" in shown
    assert "INTERRUPTED" in shown


def test_a_table_of_a_server_brings_its_delays_unless_others_are_asked_for(
    scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = read_constants()
    of_table, given = (
        structs.replace(usual, network=structs.replace(usual.network, reserve_ns=ns)) for ns in (1, 2)
    )
    asked: list[PlanQuestion] = []

    def make_plan(question: PlanQuestion, runs: object) -> None:
        asked.append(question)
        raise ConfigError("no more is needed")

    monkeypatch.setattr("clockwork_serve.apps.plan.report.make_plan", make_plan)
    monkeypatch.setattr("clockwork_serve.apps.learned.delays_beside", lambda zoo: of_table)
    monkeypatch.setattr("clockwork_serve.apps.learned.read_delays", lambda journal: given)
    assert run(["plan", scenario]) == run(["plan", scenario, "--delays", "serve.journal"]) == 2

    assert [question.constants for question in asked] == [of_table, given]


def test_kinds_of_the_scenario_have_names_and_prices(
    scenario: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(scenario).read_text().replace("memory_mib = 256\n", "")
    Path(scenario).write_text(
        text + "[[cluster.groups]]\nname = 'small'\nslower = 2\nprice = 1.5\nmemory_mib = 1024\nat_most = 9\n"
        "[[cluster.groups]]\nname = 'large'\nslower = 0.25\nprice = 3.5\n"
    )
    assert run(["plan", scenario, "--target", "99", "--max-devices", "9"]) == 0

    shown = capsys.readouterr().out
    assert "small: 0.5 times as fast as the profile, 1024MiB for weights, price 1.5, at most 9" in shown
    assert "\n1 x large, for 3.5\n" in shown

    Path(scenario).write_text(Path(scenario).read_text().replace("'large'", "'small'"))
    assert run(["plan", scenario]) == 2
    assert "cluster.groups[1].name: expected each name once, found 'small'" in capsys.readouterr().err
