"""How ten times the load is judged, and a short run of it on a real server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.overload_10x import (
    CLIENTS,
    MODEL,
    SERVICE_MS,
    WIDTH,
    Findings,
    Seen,
    conclude,
    judged,
    measure,
)
from clockwork_lab.bench.records import ANSWERED, FIRST_ENDS, ROW, Records
from clockwork_serve.units import MIB, ms
from harness import repositories
from harness.report import Outcome
from harness.serving import serve
from tests.timing import Timing


def records(*requests: tuple[int, float, float, int]) -> Records:
    """Of (load, due ms, answered ms, end), with an SLO of 100 ms."""
    table = np.zeros(len(requests), ROW)
    for row, (load, due_ms, last_ms, end) in zip(table, requests, strict=True):
        row["load"], row["end"], row["slo_ns"] = load, end, ms(100)
        row["scheduled_ns"], row["last_ns"] = ms(due_ms), ms(last_ms)
    return Records(table, FIRST_ENDS)


def test_only_what_is_answered_in_time_counts_and_in_its_window() -> None:
    asked = [(0, 2000 + 10 * at, 2050 + 10 * at, ANSWERED) for at in range(1000)]
    asked += [(0, 3000, 3101, ANSWERED), (1, 15_000, 15_010, ANSWERED), (1, 15_000, 15_200, ANSWERED)]
    found = judged("told", records(*asked), [], 12.0, 10.0)
    assert found.windows == [99.6]
    assert (found.late, found.after, found.asked) == (2, (2, 1), 1001)


def findings(worst: float, after: tuple[int, int], grew: int) -> Findings:
    samples = [(float(at), 0.5 * at, 50 * MIB + grew * at // 40) for at in range(40)]
    return Findings("told", 100.0, [100.0, worst], 1, Counter(), 0, [1.0], after, [Seen("g", samples)], 40.0)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (findings(95, (1000, 999), 0), "passed"),
        (findings(94, (1000, 999), 0), "missed"),
        (findings(95, (1000, 998), 0), "missed"),
        (findings(95, (1000, 999), 10 * MIB), "missed"),
    ],
)
def test_each_promise_can_be_missed(found: Findings, verdict: str) -> None:
    outcome = Outcome("x")
    conclude(outcome, found)
    assert outcome.verdict == verdict


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["told", "at once"])
def test_a_crowd_costs_no_goodput_and_leaves_nothing_behind(
    tmp_path: Path, kind: str, timing: Timing
) -> None:
    repositories.emulated(tmp_path / "models", MODEL, {1: SERVICE_MS}, width=WIDTH)
    with serve(tmp_path / "models", device="emulated") as serving:
        found = measure(serving, kind, seconds=6.0, after_s=3.0, window_s=4.0)
    if kind == "at once":
        assert found.ends["answered"] < found.asked / 5, f"{CLIENTS} clients are ten times too many"
    with timing.judged():
        assert found.worst > 0.5, "far less than is promised, for machines are shared"
        assert found.after[1] >= 0.9 * found.after[0] > 0
