"""Devices that join and leave a server under load as its observer wants them; nothing is lost."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scaling_day import real
from harness.report import Outcome


def test_a_load_that_grows_is_given_devices_and_nothing_is_lost(tmp_path: Path) -> None:
    outcome = Outcome("scaling")
    real(outcome, tmp_path, 80)
    assert outcome.verdict == "passed", [one for one in outcome.verdicts if not one.good]
