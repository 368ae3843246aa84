"""What commands and people say to each other: progress, tables, JSON, and Ctrl-C."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Self

import click
import msgspec

from clockwork_serve.errors import printable
from clockwork_serve.units import KIB

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

INTERRUPTED: Final = 130  # the exit status after Ctrl-C
_PLAIN_EVERY_S = 1.0
_PLAIN_WIDTH = 160
_TEXT_LEAST = 20  # longer text in a table is wrapped; numbers are not
_LINE_MAX = 64 * KIB
_OURS = re.compile("[^\n\u00a0]+")
"""Characters between line ends and no-break spaces, which keep numbers and units together."""
_GAP = 3
_EDGES = 2
_STAGES = {"prepare": "preparing", "start": "starting", "compile": "compiling", "profile": "profiling"}


class Progress:
    """A progress bar on a terminal; periodic lines elsewhere. Call :meth:`step` as work is done."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self._what = what
        self._quiet = quiet
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._told = 0.0

        console = None if quiet else drawing()
        if console is not None:
            self._bar = _rich_bar(console)
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` are done; ``text`` names the last one."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._what, total=total, text="")
            self._bar.update(self._task, completed=done, total=total, text=text)
            return
        now = time.monotonic()
        if not self._quiet and (done == total or now - self._told >= _PLAIN_EVERY_S):
            self._told = now
            click.echo(f"{self._what} {done}/{total}: {text}", err=True)


class Stages:
    """The stages of some work, each with its own progress bar; :meth:`step` takes a ``StartProgress``."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._stage = ""
        self._progress: Progress | None = None

    def step(self, progress: Any) -> None:
        """Show a report."""
        if progress.stage != self._stage:
            self.close()
            self._stage = progress.stage
            self._progress = Progress(_STAGES[progress.stage], quiet=self._quiet)
        if self._progress is not None:
            self._progress.step(progress.done, progress.total, progress.text)

    def close(self) -> None:
        """Restore the terminal."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None


def drawing() -> Console | None:
    """Standard error as a terminal on which a display can be redrawn, or None; dumb ones cannot."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return None if console.is_dumb_terminal or not console.encoding.startswith("utf") else console


def _rich_bar(console: Console) -> RichProgress:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", style="dim", markup=False), console=console, transient=True,
    )  # fmt: skip


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on standard output; columns whose names start with ``>`` are aligned to the right.

    On a narrow terminal it is split into parts below each other, each with the first column.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    for part in _parts(columns, rows, console.width):
        table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
        for at in part:
            name, number = columns[at].removeprefix(">"), columns[at][0] == ">"
            table.add_column(
                Text(name), justify="right" if number else "left", overflow="fold", no_wrap=number
            )
        for row in rows:
            table.add_row(*(Text(printable_lines(row[at])) for at in part))
        console.print(table)


def _parts(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of each part of a table that fits the width."""
    needs = [
        max(len(cell) for cell in (name.removeprefix(">"), *(row[at] for row in rows)))
        for at, name in enumerate(columns)
    ]
    needs = [
        need if name[0] == ">" else min(need, _TEXT_LEAST) for name, need in zip(columns, needs, strict=True)
    ]
    first = used = needs[0] + _EDGES
    parts = [[0]]
    for at in range(1, len(columns)):
        if used + _GAP + needs[at] > width and len(parts[-1]) > 1:
            parts.append([0])
            used = first
        parts[-1].append(at)
        used += _GAP + needs[at]
    return parts


def say(line: str) -> None:
    """One line on standard output."""
    click.echo(printable_lines(line))


def note(line: str) -> None:
    """One line on standard error, for people rather than machines."""
    click.echo(printable_lines(line), err=True)


def printable_lines(text: str) -> str:
    """Text made safe for a terminal: names and messages of servers and models may contain control codes."""
    return _OURS.sub(lambda line: printable(line[0], _LINE_MAX), text)


def show_json(value: object) -> None:
    """A value as indented JSON on standard output."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def show_json_line(value: object) -> None:
    """A value as one line of JSON on standard output."""
    click.echo(msgspec.json.encode(value).decode())


def size_text(nbytes: int) -> str:
    """Bytes for people, in binary units: ``46.7 MiB``."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether an end was requested by Ctrl-C; a second one ends at once."""
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
