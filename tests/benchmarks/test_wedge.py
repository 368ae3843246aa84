"""A server made of real processes whose worker refuses what it is sent."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.system
def test_a_second_after_the_last_refusal_every_model_answers():
    command = [sys.executable, "-m", "benchmarks.wedge", "--seed", "5", "--refusals", "150"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "benchmarks.wedge: PASSED" in found.stdout
