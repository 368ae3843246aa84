"""``clockwork docs``: the pages, as a list and one by one. ``clockwork examples``: copies that are whole."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.cli.docs import pages_there
from tests.cli.commands import Cli

DOCS = Path(__file__).parents[2] / "docs"


def test_every_page_is_listed_by_its_first_heading(cli: Cli) -> None:
    shown = cli("docs").out
    listed = cli("docs", "--json").json

    paths = [
        page for folder in ("", "use", "operate", "develop") for page in sorted((DOCS / folder).glob("*.md"))
    ]
    assert [one["path"] for one in listed] == [str(path) for path in paths]
    assert {"page": "machines", "section": "operate", "title": "Several machines"}.items() <= {
        one["page"]: one for one in listed
    }["machines"].items()
    assert ["machines", "operate", "Several", "machines"] in [line.split() for line in shown.splitlines()]


@pytest.mark.parametrize(
    "name",
    ["machines", "operate/machines", "../operate/machines.md#certificates", "docs/operate/machines.md"],
)
def test_a_page_is_found_by_its_name_and_by_a_link_to_it(name: str, cli: Cli) -> None:
    assert cli("docs", name).out == (DOCS / "operate" / "machines.md").read_text()


def test_a_page_for_machines(cli: Cli) -> None:
    assert cli("docs", "faults", "--json").json["text"] == (DOCS / "develop" / "faults.md").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("machine", "found 'machine'; did you mean 'machines'? See clockwork docs --help"),
        ("zzz", "found 'zzz'; for the list: clockwork docs. See clockwork docs --help"),
        ("\x1b[31m", r"found '\x1b[31m'; for the list: clockwork docs."),
    ],
)
def test_a_page_that_is_none(name: str, said: str, cli: Cli) -> None:
    assert said in cli("docs", name, code=2).err


@pytest.mark.slow
def test_on_a_terminal_every_page_is_laid_out() -> None:
    script = (
        "from clockwork_serve.cli.entry import run;"
        "from clockwork_serve.cli.docs import pages_there;"
        "assert [run(['docs', name]) for name in pages_there()].count(0) == len(pages_there())"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    shown = b""
    with subprocess.Popen([sys.executable, "-c", script], stdout=theirs, env=environment) as child:
        os.close(theirs)
        while part := _read(ours):
            shown += part
        assert child.wait(timeout=120) == 0
    os.close(ours)

    text = shown.decode()
    assert "\x1b[" in text
    assert "# Several machines" not in text
    assert text.count("Several machines") >= 1
    assert len(pages_there()) > 30


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # as a terminal ends
        return b""


def test_examples_are_copied_whole_and_what_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "copied to examples; next: clockwork serve examples/models" in cli("examples").out

    source, copy = DOCS.parent / "examples", tmp_path / "examples"
    listed = subprocess.run(["git", "ls-files"], cwd=source, capture_output=True, text=True, check=True)
    names = listed.stdout.splitlines()
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*.*") if path.is_file()} == {*names}
    assert all((copy / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert os.access(copy / "09_curl.sh", os.X_OK)

    (copy / "05_client.py").unlink()
    assert cli("examples", "--json").json["copied"] == ["05_client.py"]


def test_examples_overwrite_nothing(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "keys.toml").write_text("mine")
    said = cli("examples", tmp_path, code=2).err
    assert f"found another {tmp_path / 'keys.toml'}; name another folder: clockwork examples FOLDER" in said
    assert [path.name for path in tmp_path.iterdir()] == ["keys.toml"]

    wrote = cli("examples", tmp_path / "keys.toml", code=2)
    assert "folder: expected one that can be written, found File exists at" in wrote.err
