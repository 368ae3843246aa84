"""The live view of a load test: a panel on a terminal, periodic lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from clockwork_lab.bench.report import in_ms, share
from clockwork_lab.bench.run import LoadSample
from clockwork_serve.cli.screen import drawing

_PLAIN_EVERY_S = 2.0
_BARS = " ▁▂▃▄▅▆▇█"
_WIDE = 40
_LABEL_WIDE = 9
_PANEL_WIDE = 80
_TITLE_LEAVES = 6
_ECHO_WIDE = 4
"""Room beside the panel for what a terminal shows of Ctrl-C: on a line of its own it would move the panel."""


@contextmanager
def bench_screen(title: str, *, quiet: bool) -> Iterator[Callable[[LoadSample], None]]:
    """A function that shows a sample on standard error; the terminal is restored at the end."""
    console = None if quiet else drawing()
    if quiet:
        yield lambda moment: None
    elif console is None:
        yield _lines()
    else:
        from rich.live import Live

        with Live(console=console, auto_refresh=False, transient=True) as live:

            def show(moment: LoadSample) -> None:
                width = min(_PANEL_WIDE, console.width - _ECHO_WIDE)
                live.update(panel(title, moment, width), refresh=True)

            yield show


def _lines() -> Callable[[LoadSample], None]:
    shown_s = 0.0

    def show(moment: LoadSample) -> None:
        nonlocal shown_s
        if moment.asked and time.monotonic() - shown_s >= _PLAIN_EVERY_S:
            shown_s = time.monotonic()
            click.echo(_line(moment), err=True)

    return show


def _line(moment: LoadSample) -> str:
    """A sample in one line."""
    others = ", ".join(f"{count:,} {reason}" for reason, count in moment.reasons.items())
    state = " stopping" if moment.stopping else " warm-up" if moment.warming else ""
    return (
        f"{moment.at_s:.1f}/{moment.seconds:g} s{state}: {moment.asked_rps:,.0f} r/s offered, "
        f"{moment.good_rps:,.0f} good, p50 {in_ms(moment.p50_ms)} p99 {in_ms(moment.p99_ms)} ms, sent p99 "
        f"{in_ms(moment.lateness_p99_ms)} ms late; in all {moment.good:,} good, {moment.late:,} late, "
        f"{moment.out:,} out{', ' if others else ''}{others}"
    )


def panel(title: str, moment: LoadSample, width: int = _PANEL_WIDE) -> Any:
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


def _rows(moment: LoadSample) -> list[tuple[str, str, str]]:
    """Labels, texts and styles."""
    filled = round((min(1.0, moment.at_s / moment.seconds) if moment.seconds else 1.0) * _WIDE)
    ended = moment.good + moment.late + sum(moment.others.values())
    part = f", {share(moment.good / ended)} of those that ended" if ended else ""
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
