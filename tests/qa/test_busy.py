"""Tests counted as pytest tells of them, beside programs that end."""

from __future__ import annotations

from pathlib import Path

from harness import machine
from harness.report import Outcome
from qa.busy import FAILED_ONCE, Counts, programs, verdict

ROOT = Path(__file__).parents[2]
SAID = """
R.F
=================================== run again ==================================
tests/a.py::test_slow[a - b]: could not be judged: other processes took 1.50 of a core
=========================== short test summary info ============================
PASSED tests/a.py::test_slow[a: b c]
FAILED tests/a.py::test_other - AssertionError: no - yes
SKIPPED [1] tests/a.py:3: not here
1 failed, 1 passed, 1 skipped, 1 run again in 4.05s
"""


def test_ends_are_counted_by_test() -> None:
    counts = Counts()
    counts.add(SAID)
    counts.add(SAID.replace("FAILED tests/a.py::test_other - AssertionError: no - yes", ""))
    assert counts.passed == {"tests/a.py::test_slow[a: b c]": 2}
    assert counts.failed == {"tests/a.py::test_other": 1}
    assert counts.again == {"tests/a.py::test_slow[a - b]": 2}
    outcome = Outcome("qa.busy")
    counts.judge(outcome, 2)
    assert [one.good for one in outcome.verdicts] == [False, True, False]
    assert outcome.verdicts[-1].found == "1 of 3 failed, 2 run again"


def test_nothing_that_ran_is_no_pass() -> None:
    outcome = Outcome("qa.busy")
    Counts().judge(outcome, 2)
    assert outcome.verdict == "missed"


def test_a_run_says_of_itself_what_pytest_says_last() -> None:
    said = [
        "FAILED tests/a.py::b",
        "",
        "== 1 failed, 8 passed in 12.34s (0:00:12) ==\n",
        "make: *** Error 1\n",
    ]
    last = ""
    for line in said:
        last = verdict(last, line)
    assert last == "1 failed, 8 passed in 12.34s (0:00:12)"
    assert verdict("installing", "make: *** no network\n") == "make: *** no network"


def test_programs_end_with_their_block() -> None:
    before = set(machine.children("self"))
    with programs(2, limit_s=60):
        started = set(machine.children("self")) - before
        assert len(started) >= 2
    assert not started & set(machine.children("self"))


def test_tests_that_failed_once_are_still_there() -> None:
    for name in FAILED_ONCE:
        path, _, function = name.partition("::")
        assert f"def {function.partition('[')[0] or 'test_'}" in (ROOT / path).read_text()
