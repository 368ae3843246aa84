"""How many cores this process may use at once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: microseconds of CPU time that all its processes may use, in so many of real time."""
QUOTA_BEFORE: Final = tuple(Path("/sys/fs/cgroup/cpu") / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
"""The same of control groups, version 1; a quota of -1 is none."""


def cores() -> float:
    """Those it may run on, or what its container's quota comes to, if that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = _quota()
    return allowed if quota is None else min(allowed, quota)


def _quota() -> float | None:
    """None where there is none, or none can be read."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = QUOTA.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota_us, period_us = (int(path.read_text()) for path in QUOTA_BEFORE)
        return None if quota_us <= 0 else quota_us / period_us
    return None
