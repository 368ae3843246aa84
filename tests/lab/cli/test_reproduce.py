"""``clockwork reproduce``: the files that it writes, and its usage errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Cli, interrupted


def test_one_command_writes_json_picture_and_table(tmp_path: Path, cli: Cli):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    out = tmp_path / "new" / "figures"

    shown = cli("reproduce", "fig5", "--short", "--out", out, "--seed", "3")

    assert sorted(path.name for path in out.iterdir()) == ["fig5.json", "fig5.md", "fig5.svg"]
    record = json.loads((out / "fig5.json").read_bytes())
    assert (record["figure"], record["setup"]["seed"]) == ("fig5", 3)
    assert "![" in (out / "fig5.md").read_text()
    assert "claims met" in shown.out
    assert "fig5.svg" in shown.err


def test_json_alone_goes_to_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli):
    monkeypatch.chdir(tmp_path)

    shown = cli("reproduce", "fig5", "--short", "--json", "-")
    assert json.loads(shown.out)["figure"] == "fig5"
    assert shown.err == ""
    assert list(tmp_path.iterdir()) == []


def test_json_goes_to_a_file(tmp_path: Path, cli: Cli):
    cli("reproduce", "fig5", "--short", "--json", tmp_path / "five.json")

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
        ([], "FIGURE"),
    ],
)
def test_misuse_is_said_before_the_work(arguments: list[str], said: str, cli: Cli):
    assert said in cli.refused("reproduce", *arguments)


def test_ctrl_c_ends_it_at_once_without_a_traceback(tmp_path: Path):
    first, (shown, said) = interrupted("reproduce", "fig6", "--json", tmp_path / "6.json")

    assert "fig6" in first  # it simulates by then
    assert shown == ""
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
