"""Results as they are shown, and when a run proves nothing."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.feasible_load import why_invalid
from harness import machine
from harness.machine import Disturbance
from harness.report import Outcome, between_marks, finish, quantile


def outcome(*, good: bool, invalid: str = "") -> Outcome:
    made = Outcome("benchmarks.test", invalid=invalid)
    made.judge("speed", asked="fast", found="slow", good=good)
    return made


@pytest.mark.parametrize(
    ("good", "invalid", "status", "verdict"),
    [
        (True, "", 0, "passed"),
        (False, "", 1, "missed"),
        (True, "noise", 2, "invalid"),
        (False, "noise", 2, "invalid"),
    ],
)
def test_the_verdict_is_printed_written_and_returned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], good: bool, invalid: str, status: int, verdict: str
) -> None:
    assert finish(outcome(good=good, invalid=invalid), tmp_path / "out.json") == status
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["verdict"] == verdict
    assert written["machine"] in capsys.readouterr().out


def test_a_page_without_marks_is_left_alone() -> None:
    with pytest.raises(SystemExit, match="expected lines"):
        between_marks("no marks", "text")


def test_a_quantile_is_a_value_that_was_seen() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([3, 1, 2], 1.0) == 3
    assert quantile(range(1, 101), 0.99) == 99
    assert math.isnan(quantile([], 0.5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"involuntary": 500}, "involuntary"),
        ({"waited_s": 9}, "waited"),
        ({"stolen_s": 1}, "stolen"),
        ({"others_s": 9}, "others"),
    ],
)
def test_a_disturbed_run_proves_nothing(changes: dict[str, float], words: str) -> None:
    quiet = Disturbance(100, stolen_s=0, others_s=0, involuntary=50, waited_s=1)
    reasons = why_invalid(replace(quiet, **changes), requests=100)
    assert words in reasons
    assert bool(words) == bool(reasons)


def test_this_process_is_seen_in_proc() -> None:
    pid = os.getpid()
    assert machine.cpu_s(pid) > 0
    assert machine.rss_bytes(pid) > 1 << 20
    assert any(thread.tid == pid for thread in machine.threads(pid))
    watch = machine.Watch([pid], lane=(pid, pid))
    sum(range(1_000_000))
    found = watch.read()
    assert found.seconds > 0
    assert found.involuntary >= 0
    assert found.waited_s >= 0
    assert "Python" in machine.machine_line()
