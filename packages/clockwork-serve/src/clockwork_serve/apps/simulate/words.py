"""A report for people: lines and rows of text. It computes nothing that is not in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from clockwork_serve.apps.simulate.report import Latency, LoadReport, Report

Row = list[str]

LOAD_COLUMNS = (
    "load", ">offered", ">r/s", ">goodput r/s", ">in time", ">late", ">refused", ">cold starts",
    ">mean batch",
)  # fmt: skip
LATENCY_COLUMNS = ("load", "latency of", ">count", ">p50 ms", ">p99 ms", ">p99.9 ms", ">max ms")


def setup_lines(report: Report) -> list[str]:
    """What was simulated."""
    setup: dict[str, Any] = report.setup
    workers = counted(setup["devices"] // setup["devices_per_worker"], "worker")
    devices = f"{counted(setup['devices'], 'device')} of {setup['zoo']} on {workers}"
    memory = f"{setup['memory_mib']:g} MiB each in pages of {setup['page_mib']:g} MiB"
    share = "; no LOAD beside an INFER" if setup["lanes_share"] else ""
    models = f"{setup['models']:,} of {counted(setup['kinds'], 'kind')}"
    return [
        f"{report.scenario}: {report.seconds:g} s, of which {report.warmup_s:g} s of warm-up are not counted",
        f"  cluster    {devices}, {memory}{share}",
        f"  models     {models}, {setup['weights_mib']:,.0f} MiB of weights",
        f"  loads      {'; '.join(_asked(load) for load in report.loads)}",
        f"  policy     {setup['policy']}, batches of at most {setup['max_batch']}; seed {setup['seed']}",
        *_under("workload", setup["workload"]),
        *_under("constants", setup["constants"]),
    ]


def load_rows(report: Report) -> list[Row]:
    """A row for each load under ``LOAD_COLUMNS``."""
    return [
        [
            load.name, f"{load.offered:,}", rate(load.offered_rps), rate(load.goodput_rps),
            share(load.satisfaction), f"{load.late:,}", f"{sum(load.refused.values()):,}",
            f"{load.cold:,}", "-" if load.mean_batch is None else f"{load.mean_batch:.2f}",
        ]
        for load in report.loads
    ]  # fmt: skip


def latency_rows(report: Report) -> list[Row]:
    """Two rows for each load under ``LATENCY_COLUMNS``."""
    rows = []
    for load in report.loads:
        rows.append([load.name, "answers in time", *_latency(load.answers)])
        if load.refusals.count:
            rows.append(["", "all other answers", *_latency(load.refusals)])
    return rows


def closing_lines(report: Report) -> list[str]:
    """Why requests were refused, what the devices did, when it broke, how long it took."""
    lines = [
        f"  {load.name}: " + ", ".join(f"{count:,} {reason}" for reason, count in load.refused.items())
        for load in report.loads
        if load.refused
    ]
    if lines:
        lines.insert(0, "refused, by reason")
    busy = report.devices
    each = "its" if busy.devices == 1 else "their"
    lines.append(
        f"devices: executing {100 * busy.exec_busy:.1f} % and loading {100 * busy.load_busy:.1f} % of {each} "
        f"time; {busy.infers:,} INFER, {busy.loads:,} LOAD, {busy.unloads:,} UNLOAD, "
        f"{busy.refused:,} refused by workers"
    )
    if report.faults:
        hits = ", ".join(f"{count:,} {kind}" for kind, count in report.faults.items())
        lines.append(f"faults that hit something: {hits}")
    lines.append(_broke(report))
    ended = sum(load.offered - load.open for load in report.loads)
    speed = report.reached_s / report.took_s if report.took_s else 0.0
    lines.append(f"took {report.took_s:.1f} s, {speed:.3g} times real time; {ended:,} requests counted")
    if report.cut:
        still = sum(load.open for load in report.loads)
        lines.append(
            f"CUT at {report.reached_s:.1f} s of {report.seconds:g} s: all numbers are of the time until "
            f"then; {counted(still, 'request')} without an answer"
        )
    return lines


def _broke(report: Report) -> str:
    first = report.first_break
    unit = "second" if report.stretch_s == 1 else "minute"
    if first is None:
        return f"every {unit} after the warm-up: all requests answered in time"
    worst = f"; worst {first.load}: {share(first.load_satisfaction)}" if len(report.loads) > 1 else ""
    return (
        f"breaks first in {unit} {round(first.from_s / report.stretch_s) + 1} ({first.from_s:g} to "
        f"{first.to_s:g} s): {share(first.satisfaction)} in time{worst}"
    )


def _asked(load: LoadReport) -> str:
    slo = "no SLO" if load.slo_ms is None else f"SLO {load.slo_ms:g} ms"
    return f"{load.name} ({load.arrivals}, {slo})"


def _latency(latency: Latency) -> Row:
    values = (latency.p50_ms, latency.p99_ms, latency.p999_ms, latency.max_ms)
    return [f"{latency.count:,}", *("-" if value is None else f"{value:.2f}" for value in values)]


def _under(name: str, lines: Iterable[str]) -> list[str]:
    """Lines under a name that stands in front of the first."""
    return [f"  {'' if at else name:<10} {line}" for at, line in enumerate(lines)]


def rate(per_second: float) -> str:
    """Requests per second."""
    return f"{per_second:,.1f}" if per_second < 1000 else f"{per_second:,.0f}"


def share(part: float) -> str:
    """A share in percent, cut and not rounded: 100 % means all."""
    return "100 %" if part >= 1 else f"{math.floor(part * 100_000) / 1000:.3f} %"


def counted(number: int, what: str) -> str:
    """``1 device``, ``2 devices``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
