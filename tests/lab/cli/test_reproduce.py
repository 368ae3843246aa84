"""``clockwork reproduce``: the files that it writes, and its usage errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.cli.entry import run


def test_one_command_writes_json_picture_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    out = tmp_path / "new" / "figures"

    assert run(["reproduce", "fig5", "--short", "--out", str(out), "--seed", "3"]) == 0

    assert sorted(path.name for path in out.iterdir()) == ["fig5.json", "fig5.md", "fig5.svg"]
    record = json.loads((out / "fig5.json").read_bytes())
    assert (record["figure"], record["setup"]["seed"]) == ("fig5", 3)
    assert "![" in (out / "fig5.md").read_text()
    shown = capsys.readouterr()
    assert "claims met" in shown.out
    assert "fig5.svg" in shown.err


def test_json_alone_goes_to_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)

    assert run(["reproduce", "fig5", "--short", "--json", "-"]) == 0

    shown = capsys.readouterr()
    assert json.loads(shown.out)["figure"] == "fig5"
    assert shown.err == ""
    assert list(tmp_path.iterdir()) == []


def test_json_goes_to_a_file(tmp_path: Path):
    assert run(["reproduce", "fig5", "--short", "--json", str(tmp_path / "five.json")]) == 0

    assert [path.name for path in tmp_path.iterdir()] == ["five.json"]
    assert json.loads((tmp_path / "five.json").read_bytes())["claims"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fig3"], "figure: expected one of fig"),
        (["fig5", "--json", "/nowhere/at/all.json"], "json: expected a file in a folder that exists"),
        (["fig5", "--out", "/proc/none"], "out: expected a folder"),
        (["fig5", "--seed", "-1"], "--seed"),
        (["fig5", "--policy", "none"], "policy: expected one of default, paper"),
        (["fig5", "--real"], "real: expected fig9 --real"),
        (["fig9", "--seconds", "5"], "real: expected fig9 --real"),
        ([], "FIGURE"),
    ],
)
def test_misuse_is_said_before_the_work(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert run(["reproduce", *arguments]) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_ctrl_c_ends_it_at_once_without_a_traceback(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "clockwork_serve",
        "reproduce",
        "fig6",
        "--json",
        str(tmp_path / "6.json"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert "fig6" in child.stderr.readline()  # it simulates by now
        child.send_signal(signal.SIGINT)
        shown, said = child.communicate(timeout=60)

    assert child.returncode == 130
    assert shown == ""
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
