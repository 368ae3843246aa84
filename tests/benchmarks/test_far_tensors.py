"""What the benchmark of tensors between machines asks, on made-up figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.far_tensors import judge
from harness.report import INVALID, MISSED, PASSED, Outcome

HOME = {
    "goodput": 400.0,
    "good_when_slow": 1.0,
    "cores": 1.0,
    "small_p50_ms": 1.0,
    "late_sends": 0.0,
    "unwell": 0.0,
    "host_us": 500.0,
    "all_us": 500.0,
}
FAR = HOME | {"goodput": 399.0, "small_p50_ms": 1.3, "host_us": 50.0, "all_us": 1000.0}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, PASSED),
        ({"goodput": 380.0}, MISSED),
        ({"good_when_slow": 0.97}, MISSED),
        ({"small_p50_ms": 1.5}, MISSED),
        ({"host_us": 61.0}, MISSED),
        ({"all_us": 1300.0}, MISSED),
        ({"unwell": 1.0}, MISSED),
        ({"late_sends": 0.5}, INVALID),
    ],
)
def test_each_promise_can_be_broken(tmp_path: Path, changed: dict[str, float], verdict: str) -> None:
    outcome, before = Outcome("benchmarks.far_tensors"), tmp_path / "before.json"
    before.write_text(json.dumps({"figures": {"medians": {"apart": {"all_us": 2000.0}}}}))
    judge(outcome, {"one host": HOME, "apart": FAR | changed}, before)
    assert (outcome.verdict, len(outcome.verdicts)) == (verdict, 6)
