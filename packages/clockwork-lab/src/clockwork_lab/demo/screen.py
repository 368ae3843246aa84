"""The demo's output: progress while it runs, and one screen of results."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from clockwork_lab.demo.report import DemoReport, ModelRow
from clockwork_lab.demo.zoo import EXACT
from clockwork_serve.units import MIB

WIDE = 140  # terminal width from which results are shown beside their numbers


BUSY = 0.3  # load per core by other programs from which it is mentioned


def progress_bar(console: Console) -> Progress:
    """Progress bars for the steps, removed when they are done."""
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.fields[note]}", style="dim"), console=console,
        transient=True,
    )  # fmt: skip


def show(report: DemoReport, console: Console) -> None:
    """Show the screen of results."""
    wide = console.width >= WIDE
    console.print(_table(report, wide=wide))
    if not wide:
        console.print()
        for row in report.models:
            console.print(Text.assemble((f"{row.name:<13}", "bold"), _answer(row)))
    for line in _lines(report):
        console.print(line, highlight=False)


def _table(report: DemoReport, *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    if wide:
        table.add_column("answer", overflow="fold", ratio=1)
    for name in ("copies", "asked", "in time", "refused", "late", "p50 ms", "p99 ms", "cold"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.models:
        table.add_row(Text(row.name, "bold"), *([_answer(row)] if wide else []), *_numbers(row))
    return table


def _answer(row: ModelRow) -> Text:
    right = row.answer_ok and row.worst_error <= row.tolerance
    answer = Text.assemble(("✓ " if right else "✗ ", "green" if right else "bold red"), (row.kind, "dim"))
    return answer.append(f": {row.answer}")


def _numbers(row: ModelRow) -> tuple[Text | str, ...]:
    return (
        str(row.instances),
        str(row.requests),
        Text(_share(row.ok, row.requests), "green" if row.ok == row.requests else ""),
        Text(str(row.rejected), "yellow" if row.rejected else "dim"),
        Text(str(row.late + row.failed), "red" if row.late + row.failed else "dim"),
        _ms(row.p50_ms),
        _ms(row.p99_ms),
        str(row.cold_starts),
    )


def _lines(report: DemoReport) -> list[str]:
    rows, error = report.models, report.prediction_error
    total, good = sum(row.requests for row in rows), sum(row.ok for row in rows)
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.reasons)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
    checked = sum(row.checked for row in rows)
    exact = max((row.worst_error for row in rows if row.tolerance == EXACT), default=0.0)
    recurrent = [row.worst_error for row in rows if row.tolerance != EXACT]
    errors = f"{exact:.1e}" + (f"; recurrent models {max(recurrent):.1e}" if recurrent else "")
    facts = (
        ("requests", f"{good} of {total} in time ([bold]{_share(good, total)}[/]); not in time: {counts}"),
        (
            "load",
            f"{report.rate:.0f} requests/s for {report.load_s:.0f} s, {report.utilisation:.0%} of the device",
        ),
        ("SLOs", f"5, 10 or 20 times batch 1, at least {report.slo_floor_ms:.0f} ms"),
        ("models", f"{report.instances} registered, {report.weights_bytes / MIB:.0f} MiB of weights"),
        ("memory", f"{report.device_bytes / MIB:.0f} MiB: {report.loads} loads, {report.unloads} unloads"),
        ("lane time", f"p50 {_ms(error.lane_p50)} ms, p99 {_ms(error.lane_p99)} ms"),
        ("prediction", f"off by p50 {_ms(error.p50)} ms, p99 {_ms(error.p99)} ms"),
        ("answers", f"{checked} compared with plain sessions, worst relative error {errors}"),
        ("client", f"sent its requests up to {report.client_lag_p99_ms:.1f} ms late (p99)"),
        ("took", f"{report.duration_s:.0f} s without downloads"),
        ("next", "clockwork serve REPO; clockwork docs demo; clockwork docs metrics"),
    )
    lines = ["", *(f"[dim]{name:<11}[/]{text}" for name, text in facts)]
    if report.busy > BUSY:
        lines.append(
            f"[yellow]{report.busy:.1f} other tasks per core kept this machine busy when the demo began: "
            "that is in these numbers.[/]"
        )
    if report.offline:
        lines.append("[yellow]These were three tiny models: nothing could be fetched.[/]")
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"
