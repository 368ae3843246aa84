"""What a person sees of a load test while it runs: one panel on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from clockwork_serve.bench import words
from clockwork_serve.bench.live import Moment

if TYPE_CHECKING:
    from rich.live import Live

_PLAIN_EVERY_S = 2.0
_BARS = " ▁▂▃▄▅▆▇█"
_WIDE = 40


class BenchScreen:
    """Shows a moment after the other on standard error, and leaves the terminal as it was."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._told = 0.0
        self._live: Live | None = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, moment: Moment) -> None:
        """Show it."""
        if self._live is not None:
            self._live.update(panel(self._title, moment), refresh=True)
        elif not self._quiet and time.monotonic() - self._told >= _PLAIN_EVERY_S:
            self._told = time.monotonic()
            click.echo(words.moment_line(moment), err=True)


def panel(title: str, moment: Moment) -> Any:
    """The screen as something that rich can print."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right")
    table.add_column(no_wrap=True)
    done = min(1.0, moment.at_s / moment.seconds) if moment.seconds else 1.0
    state = "stopping: waiting for what is out" if moment.stopping else ""
    state = state or ("warm-up, not counted" if moment.warming else "")
    filled = round(done * _WIDE)
    table.add_row(
        "time", f"{'━' * filled}{'╌' * (_WIDE - filled)} {moment.at_s:.1f} of {moment.seconds:g} s  {state}"
    )
    table.add_row(
        "offered", f"{moment.asked_rps:>9,.0f} r/s   {moment.asked:>11,} in all, {moment.out:,} out"
    )
    ended = moment.good + moment.late + sum(moment.others.values())
    part = f"{words.share(moment.good / ended)} of those that ended" if ended else ""
    table.add_row(
        "good", Text(f"{moment.good_rps:>9,.0f} r/s   {moment.good:>11,} in all, {part}", style="green")
    )
    table.add_row("", Text("".join(_BARS[round(bar * 8)] for bar in moment.bars), style="green"))
    table.add_row("late", Text(f"{moment.late:,}", style="red" if moment.late else "dim"))
    for reason, count in moment.reasons.items():
        table.add_row("", Text(f"{count:>9,} {reason}", style="yellow"))
    table.add_row("answers", f"p50 {_ms(moment.p50_ms)}   p99 {_ms(moment.p99_ms)}")
    late = moment.lateness_p99_ms
    table.add_row("sent late", Text(f"p99 {_ms(late)}", style="red" if late is not None and late > 1 else ""))
    return Panel(table, title=title, title_align="left", expand=False)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f} ms"
