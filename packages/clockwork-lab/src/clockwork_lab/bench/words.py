"""A report as lines and table rows of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from clockwork_lab.bench.live import Moment
from clockwork_lab.bench.report import Group, Quantiles, Report

Row = list[str]
COLUMNS: Final = (
    "load", ">offered", ">r/s", ">good r/s", ">in time", ">late", ">refused", ">failed", ">lost", ">p50 ms",
    ">p99", ">p99.9", ">max",
)  # fmt: skip
REASON_COLUMNS: Final = (
    "not answered",
    "in the server's words",
    ">count",
    ">after p50 ms",
    ">p99 ms",
    ">max ms",
)
MODELS_MAX: Final = 20
"""The most models shown; the worst ones if there are more."""


def setup_lines(report: Report) -> list[str]:
    """The run's scenario, server and options."""
    setup = report.setup
    sent_as = {
        "header": "x-slo-ms",
        "timeout": "parameter timeout",
        "grpc": "gRPC's deadline",
        "none": "nothing",
    }
    scale = setup["rate_scale"]
    long = f"{seconds(report.seconds)} s, of which {seconds(report.warmup_s)} s of warm-up are not counted"
    return [
        f"{report.scenario}: {long}",
        f"  server     {report.url} over {report.protocol}; deadlines sent as {sent_as[setup['deadline']]}",
        f"  requests   of {counted(setup['models_asked'], 'model')}; seed {setup['seed']}"
        + ("" if scale == 1 else f"; rates times {scale:g}"),
        *(f"  {'workload' if not at else '':<10} {note}" for at, note in enumerate(setup["notes"])),
    ]


def group_rows(groups: Sequence[Group]) -> list[Row]:
    """A row for each group, under ``COLUMNS``: latencies are of all responses, late ones too."""
    return [
        [
            group.name, f"{group.offered:,}", rate(group.offered_rps), rate(group.goodput_rps),
            in_time(group), f"{group.late:,}", f"{group.rejected + group.expired:,}",
            f"{group.failed:,}", f"{lost(group):,}", *_latency(group.answers),
        ]
        for group in groups
    ]  # fmt: skip


def reason_rows(report: Report) -> list[Row]:
    """A row for each reason, under ``REASON_COLUMNS``."""
    return [
        [
            reason.kind, reason.reason, f"{reason.count:,}", _ms(reason.age.p50_ms), _ms(reason.age.p99_ms),
            _ms(reason.age.max_ms),
        ]
        for reason in report.reasons
    ]  # fmt: skip


def worst_models(report: Report) -> tuple[Group, ...]:
    """The models to show: all, or if they are many those with the least satisfaction."""
    if len(report.models) <= MODELS_MAX:
        return report.models
    return tuple(sorted(report.models, key=lambda model: model.satisfaction)[:MODELS_MAX])


def closing_lines(report: Report) -> list[str]:
    """Totals, the generator's own figures, and warnings."""
    total, sending, late = report.total, report.sending, report.lateness
    rates = f"{rate(total.goodput_rps)} r/s of {rate(total.offered_rps)} offered"
    who = f"{counted(sending.connections, 'connection')}, {counted(sending.processes, 'process')}"
    lines = [
        f"goodput    {rates}: {in_time(total)} in time",
        f"generator  sent p50 {_ms(late.p50_ms)}, p99 {_ms(late.p99_ms)}, max {_ms(late.max_ms)} ms late",
        f"           {who} with {sending.cpu_share:.0%} of a core",
    ]
    if sending.waited_for_connection:
        lines.append(f"           {sending.waited_for_connection:,} requests waited for a connection")
    if total.unanswered:
        lines.append(f"           {total.unanswered:,} requests had no response when the run ended")
    if sending.unexpected:
        lines.append(
            f"           {sending.unexpected:,} unexpected responses: {sending.unexpected_bytes:,} bytes"
        )
    if report.cut:
        lines.append(f"CUT after {report.warmup_s + report.measured_s:.1f} s of {report.seconds:g} s")
    if not report.valid:
        lines.append(f"INVALID: {report.invalid}")
    return lines


def moment_line(moment: Moment) -> str:
    """A sample in one line."""
    others = ", ".join(f"{count:,} {reason}" for reason, count in moment.reasons.items())
    state = " stopping" if moment.stopping else " warm-up" if moment.warming else ""
    return (
        f"{moment.at_s:.1f}/{moment.seconds:g} s{state}: {moment.asked_rps:,.0f} r/s offered, "
        f"{moment.good_rps:,.0f} good, p50 {_ms(moment.p50_ms)} p99 {_ms(moment.p99_ms)} ms, sent p99 "
        f"{_ms(moment.lateness_p99_ms)} ms late; in all {moment.good:,} good, {moment.late:,} late, "
        f"{moment.out:,} out{', ' if others else ''}{others}"
    )


def lost(group: Group) -> int:
    """Requests without any response from the server."""
    return group.reset + group.broken + group.abandoned + group.unanswered + group.unsent


def rate(per_second: float) -> str:
    """Requests per second."""
    return f"{per_second:,.1f}" if per_second < 1000 else f"{per_second:,.0f}"


def seconds(value: float) -> str:
    """Seconds, down to the millisecond."""
    return f"{round(value, 3):g}"


def in_time(group: Group) -> str:
    """The satisfaction as text; "-" if there were no requests."""
    return share(group.satisfaction) if group.offered else "-"


def share(part: float) -> str:
    """A share in percent, truncated rather than rounded: 100 % means all."""
    return "100 %" if part >= 1 else f"{math.floor(part * 100_000) / 1000:.3f}\N{NO-BREAK SPACE}%"


def counted(number: int, what: str) -> str:
    """``1 model``, ``2 models``."""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def _latency(found: Quantiles) -> Row:
    return [_ms(value) for value in (found.p50_ms, found.p99_ms, found.p999_ms, found.max_ms)]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
