"""A thread gets the slice that it asked for, and a policy set by the operator is kept."""

from __future__ import annotations

import subprocess
import sys

import pytest

from clockwork_serve.serve.driver import SHORT_NS, own_slice_ns

ASK = "from clockwork_serve.serve.driver import *; import os; {}; print(use_short_slices(), own_slice_ns())"


def told(before: str) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-c", ASK.format(before)], capture_output=True, text=True, check=True
    )
    return ran.stdout.split()


@pytest.mark.skipif(not own_slice_ns(), reason="this kernel knows no slices")
def test_a_short_slice_is_accepted_and_the_niceness_stays() -> None:
    taken, slice_ns = told("os.nice(3)")
    assert (taken, int(slice_ns)) == ("True", SHORT_NS)
    assert told("nice = os.nice(3); use_short_slices(); assert os.nice(0) == nice > 0")[0] == "True"


def test_a_policy_set_by_the_operator_is_kept() -> None:
    batch = "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))"
    assert told(batch)[0] == "False"
    assert (
        told(f"{batch}; use_short_slices(); assert os.sched_getscheduler(0) == os.SCHED_BATCH")[0] == "False"
    )


def test_the_batch_policy_is_used_unless_the_operator_set_another() -> None:
    code = (
        "import os; from clockwork_serve.serve.driver import use_batch_policy; {}; "
        "print(use_batch_policy(), os.sched_getscheduler(0) == os.{})"
    )
    idle = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    for before, after, taken in (("pass", "SCHED_BATCH", "True"), (idle, "SCHED_IDLE", "False")):
        ran = subprocess.run(
            [sys.executable, "-c", code.format(before, after)], capture_output=True, text=True, check=True
        )
        assert ran.stdout.split() == [taken, "True"]
