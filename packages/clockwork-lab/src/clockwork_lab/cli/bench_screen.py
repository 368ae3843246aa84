"""The live view of a load test: a panel on a terminal, periodic lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from clockwork_lab.bench import words
from clockwork_lab.bench.live import Moment
from clockwork_serve.cli.screen import drawing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

_PLAIN_EVERY_S = 2.0
_BARS = " ▁▂▃▄▅▆▇█"
_WIDE = 40
_LABEL_WIDE = 9
_PANEL_WIDE = 80
_TITLE_LEAVES = 6
_ECHO_WIDE = 4
"""Room beside the panel for what a terminal shows of Ctrl-C: on a line of its own it would move the panel."""


class BenchScreen:
    """Shows samples on standard error, and restores the terminal at the end."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._told = 0.0
        self._live: Live | None = None
        self._console: Console | None = None if quiet else drawing()
        if self._console is not None:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, moment: Moment) -> None:
        """Show a sample."""
        if self._live is not None and self._console is not None:
            width = min(_PANEL_WIDE, self._console.width - _ECHO_WIDE)
            self._live.update(panel(self._title, moment, width), refresh=True)
        elif not self._quiet and moment.asked and time.monotonic() - self._told >= _PLAIN_EVERY_S:
            self._told = time.monotonic()
            click.echo(words.moment_line(moment), err=True)


def panel(title: str, moment: Moment, width: int = _PANEL_WIDE) -> Any:
    """The screen as a rich renderable, cut to the terminal's width."""
    from rich.panel import Panel
    from rich.text import Text

    state = "stopping: waiting for what is out; Ctrl-C again ends at once" if moment.stopping else ""
    state = state or ("warm-up, not counted" if moment.warming else "")
    lines = [
        Text.assemble((f"{label:>{_LABEL_WIDE}}  ", "dim"), (text, style))
        for label, text, style in _rows(moment)
    ]
    named = Text(title)
    named.truncate(width - _TITLE_LEAVES, overflow="ellipsis")  # a longer one would make the panel wider
    return Panel(
        Text("\n", no_wrap=True, overflow="ellipsis").join(lines),
        title=named, title_align="left",
        subtitle=state or None, subtitle_align="left", width=width,
    )  # fmt: skip


def _rows(moment: Moment) -> list[tuple[str, str, str]]:
    """Labels, texts and styles."""
    filled = round((min(1.0, moment.at_s / moment.seconds) if moment.seconds else 1.0) * _WIDE)
    ended = moment.good + moment.late + sum(moment.others.values())
    part = f", {words.share(moment.good / ended)} of those that ended" if ended else ""
    late = moment.lateness_p99_ms
    bar = f"{'━' * filled}{'╌' * (_WIDE - filled)}"
    return [
        ("time", f"{bar} {moment.at_s:,.1f} of {moment.seconds:,g} s", ""),
        ("offered", f"{moment.asked_rps:>9,.0f} r/s   {moment.asked:>11,} in all, {moment.out:,} out", ""),
        ("good", f"{moment.good_rps:>9,.0f} r/s   {moment.good:>11,} in all{part}", "green"),
        ("", "".join(_BARS[round(bar * 8)] for bar in moment.bars), "green"),
        ("late", f"{moment.late:>9,}", "red" if moment.late else "dim"),
        *(("", f"{count:>9,} {reason}", "yellow") for reason, count in moment.reasons.items()),
        ("answers", f"p50 {_ms(moment.p50_ms)}   p99 {_ms(moment.p99_ms)}", ""),
        ("sent late", f"p99 {_ms(late)}", "red" if late is not None and late > 1 else ""),
    ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f} ms"
