"""A mutant ends: by what notices it, by its limit of CPU, or by the clock where it uses none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("judge", "fate"),
    [
        ("lambda *_: ('tests', 'test_a', '')", "('tests', 'test_a', '')"),
        ("lambda *_: os._exit(3)", "('tests', 'the process died', '')"),
        ("lambda *_: [None for _ in iter(int, 1)]", "('timed out', 'after 1 s of CPU', '')"),
        ("lambda *_: time.sleep(600)", "('timed out', 'after 1 s of CPU', '')"),
    ],
)
def test_a_mutant_ends(judge: str, fate: str) -> None:
    code = (
        "import os, time\nimport qa.mutants.__main__ as mutants\n"
        f"mutants._judge = {judge}\nprint(mutants.attempt(None, 1.0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=250
    )
    assert done.stdout.strip() == fate
