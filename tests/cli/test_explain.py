"""``clockwork explain`` from its command line to its exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.cli.entry import run
from tests.sim.overload import journal_of


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(journal_of(tmp_path_factory.mktemp("explain") / "journal"))


def refused(journal: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert run(["explain", journal, "--refused", "--sample", "2", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_many_and_one(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    many = refused(journal, capsys)
    assert many["chosen"] == sum(many["causes"].values()) > 20
    name = many["sample"][1]

    assert run(["explain", journal, name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert run(["explain", journal, name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert lines == told["lines"]  # the same words
    assert lines[0].startswith("Refused ")
    assert any(line.startswith(("Answered, if: ", "Nothing that was tried")) for line in lines)


def test_people_read_lines(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", journal, "--late", "--since", "1s", "--sample", "1"]) == 0

    assert "requests were late." in capsys.readouterr().out


def test_a_tenant_sees_its_own(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = refused(journal, capsys)["sample"][0]
    assert run(["explain", journal, name, "--json"]) == 0
    whose = json.loads(capsys.readouterr().out)["tenant"]

    assert run(["explain", journal, name, "--tenant", whose]) == 0
    assert capsys.readouterr().out.startswith("Refused ")
    other = {"a": "b", "b": "a"}[whose]
    assert run(["explain", journal, name, "--tenant", other]) == 1
    shown = capsys.readouterr()
    assert f"expected a request of tenant {other}" in shown.err
    assert not shown.out


def test_an_unknown_id_says_which_are_like_it(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", journal, "r11111"]) == 1

    shown = capsys.readouterr().err
    assert "r11111: expected a request that reached the controller" in shown
    assert "nearest: r" in shown
    assert "What a gateway refuses by itself" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found neither; give one of them"),
        (["r1", "--late"], "found both; give one of them"),
        (["--late", "--since", "soon"], "since: expected a time such as 90s"),
        (["--late", "--since", "0s"], "since: expected a time such as 90s"),
    ],
)
def test_what_is_wrong_is_named(
    journal: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["explain", journal, *words]) == 2

    assert message in capsys.readouterr().err


def test_no_journal_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(tmp_path / "none"), "r1"]) == 2

    assert "found nothing at" in capsys.readouterr().err


def test_ctrl_c_ends_it_in_a_line(journal: str) -> None:
    command = [sys.executable, "-m", "clockwork_serve", "explain", journal, "--refused", "--sample", "10000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        child.stderr.readline()  # it is reading
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)

    assert child.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted: nothing was found so far"


def test_a_change_is_asked_for_and_one_that_cannot_be_is_named(
    journal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = refused(journal, capsys)["sample"][0]

    assert run(["explain", journal, name, "--if", "traffic=0", "--if", "priority=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert run(["explain", journal, name, "--if", "traffic=0", "--if", "priority=1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert lines == told["lines"]
    assert lines[-1].startswith("With no other requests and priority 1: met at +")
    assert told["changed"]["outcome"] == "ok"
    assert run(["explain", journal, name, "--if", "memory:gpu9=1GiB"]) == 2
    assert "expected a device that was there (gpu0, gpu1); found 'gpu9'" in capsys.readouterr().err
    assert run(["explain", journal, "--late", "--if", "priority=1"]) == 2
    assert "if: expected the ID of a request with it" in capsys.readouterr().err
