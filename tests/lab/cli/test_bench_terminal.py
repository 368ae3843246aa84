"""``clockwork bench`` on terminals: wide, narrow, and such that cannot be drawn on; Ctrl-C in the middle."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from clockwork_lab.bench.run import LoadSample
from clockwork_lab.cli.bench_screen import panel
from tests.lab.bench.loads import STEADY, written
from tests.lab.bench.scripted import scripted

LONG = STEADY.replace(
    'name = "steady"\nseconds = 1', f'name = "{"-".join(["long"] * 12)}"\nseconds = 1000\nwarmup_s = 100'
)
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(
    arguments: list[str], *, columns: int, rows: int = 24, interrupt_at: str = "", **variables: str
) -> tuple[int, str]:
    """The exit code, and all that was written to a terminal; Ctrl-C is typed when the text was seen."""
    child, end = pty.fork()
    if not child:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "clockwork_serve", "bench", *arguments],
            {**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, **variables},
        )
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    found = b""
    while True:
        try:
            found += os.read(end, 1 << 16)
        except OSError:  # that is how a terminal says that its program has ended
            break
        if interrupt_at and interrupt_at in found.decode(errors="replace"):
            interrupt_at = ""
            os.write(end, b"\x03")
    os.close(end)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), found.decode()


def options(folder: Path, url: str, text: str) -> list[str]:
    return [written(folder, text), "--url", url, "--max-lateness-ms", "60000", "--drain", "10"]


@pytest.mark.parametrize("columns", [80, 120])
def test_ctrl_c_leaves_the_figures_and_a_clean_screen(tmp_path: Path, columns: int) -> None:
    with scripted() as played:
        code, said = on_terminal(
            options(tmp_path, played.url, LONG),
            columns=columns,
            interrupt_at="warm-up, not counted",
            TERM="xterm-256color",
        )
    assert code == 130, said
    drawn, _, rest = said.partition("^C")
    assert "warm-up, not counted" in drawn
    assert "sent late" in drawn
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1  # the cursor went, and came back
    figures = CODES.sub("", rest)
    assert "CUT after" in figures
    for name in ("offered", "good r/s", "in time", "refused", "p50 ms", "p99.9", "max"):
        assert f" {name}" in figures
    assert (
        max(len(line) for line in figures.splitlines() if "\N{BOX DRAWINGS LIGHT HORIZONTAL}" in line)
        <= columns
    )


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": "xterm", "PYTHONIOENCODING": "ascii"}])
def test_where_nothing_can_be_drawn_there_are_lines(tmp_path: Path, variables: dict[str, str]) -> None:
    with scripted() as played:
        code, said = on_terminal(options(tmp_path, played.url, STEADY), columns=200, **variables)
    assert code == 0
    assert re.search(r"\x1b\[[^m]*[A-Za-ln-z]", said) is None  # bold is no drawing
    assert "/1 s: " in said
    assert "goodput" in said
    assert "\\u" not in said


@pytest.mark.parametrize("width", [76, 50])
def test_the_panel_is_as_wide_as_it_is_told_and_keeps_its_labels(width: int) -> None:
    moment = LoadSample(
        at_s=12.5, seconds=1000, warming=False, stopping=True, asked=25_000, out=12, good=24_000, late=88,
        others={"rejected": 900}, reasons={"429 " + "x" * 100: 900}, asked_rps=2000.0, good_rps=1920.0,
        p50_ms=4.5, p99_ms=48.25, lateness_p99_ms=0.125, bars=(1.0,) * 60,
    )  # fmt: skip
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed below
    console.print(panel("a long name " * 20, moment, width))
    lines = console.export_text().splitlines()
    console.file.close()
    assert {len(line) for line in lines} == {width}
    for label in ("time", "offered", "good", "late", "answers", "sent late"):
        assert sum(f" {label}  " in line for line in lines) >= 1
    assert "stopping" in lines[-1]
