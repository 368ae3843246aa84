"""Records and reports of load tests that were made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clockwork_lab.bench.job import SenderMessage
from clockwork_lab.bench.plan import Options, Plan, make_schedule
from clockwork_lab.bench.records import FIRST_ENDS, ROW, End, Kind, Records
from clockwork_lab.bench.report import BenchReport, make_report
from clockwork_lab.bench.server import ServerAddress
from clockwork_serve.units import NS_PER_MS
from clockwork_serve.workload.scenario import read_scenario
from tests.lab.bench.loads import STEADY, written

ENDS = (*FIRST_ENDS, End(Kind.REJECTED, "429 <b>queue_full</b>"), End(Kind.RESET, "closed"))
OPEN, ANSWERED, ABANDONED, REJECTED, RESET = range(5)


def plan(tmp_path: Path, text: str = STEADY, **options) -> Plan:
    scenario = read_scenario(written(tmp_path, text))
    given = Options(url="h:1", drain_s=1.0, **options)
    schedule = make_schedule(scenario, seed=1)
    return Plan(scenario, schedule, given, ServerAddress.of("h:1", "http"), {0: "m"}, [], [])


def records(*rows: tuple[float, float, float, int]) -> Records:
    """Each (due, sent, over, end), in ms."""
    table = np.zeros(len(rows), ROW)
    for at, (due, sent, over, end) in enumerate(rows):
        table[at]["scheduled_ns"], table[at]["sent_ns"] = due * NS_PER_MS, sent * NS_PER_MS
        table[at]["last_ns"], table[at]["end"] = over * NS_PER_MS, end
    table["slo_ns"] = 100 * NS_PER_MS
    return Records(table, ENDS)


def report(tmp_path: Path, found: Records, cut_ms: float | None = None, **options) -> BenchReport:
    cut_ns = None if cut_ms is None else round(cut_ms * NS_PER_MS)
    return make_report(
        plan(tmp_path, **options), found, [SenderMessage(over=True, connections=3)], cut_ns=cut_ns
    )


ALL = records(
    (10, 10.1, 60, ANSWERED),
    (20, 20.2, 120, ANSWERED),  # exactly in time
    (30, 30.3, 130.001, ANSWERED),  # a thousandth too late
    (40, 90, 141, ANSWERED),  # the generator's fault counts too
    (50, 50.1, 52, REJECTED),
    (60, 60.1, 61, RESET),
    (70, 70.1, 170, ABANDONED),
    (80, 80.1, 0, OPEN),
    (90, 0, 0, OPEN),
)
