"""Asks the kernel to run a thread at another time than others; no priority, and no privilege needed.

Linux 6.12 and later look at a thread's slice when it wakes: who wants little gets it before who wants much.
Measured on two cores while other programs took more than one of them: a controller with a slice of 0.1 ms
decided more than 0.5 ms late in 4 to 8 % of its wake-ups, without in 12 to 15 %.

Where processes share a core, each message wakes another one, which takes the core from the sender. Who moves
data need not: with gateways and the threads of workers' links in no hurry, one core did 8 to 11 % more
requests, and the controller, which they no longer hold up, decided earlier (p99 of 0.33 to 0.35 ms instead of
0.43 to 0.51 at 1,000 requests/s of 600 kB beside a program that took one of two cores).
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

SHORT_NS: Final = 100_000
"""The shortest that the kernel knows."""
_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""The number of sched_setattr(2), for which not every C library has a function."""
_GETATTR: Final = {"x86_64": 315, "aarch64": 275}


class _Attributes(ctypes.Structure):
    """struct sched_attr, as it was at first."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32), ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64), ("period", ctypes.c_uint64),
    )  # fmt: skip


def run_briefly(slice_ns: int = SHORT_NS) -> bool:
    """Whether the kernel took it. Whom the operator gave another policy than the ordinary one keeps that."""
    machine = platform.machine()
    if machine not in _SETATTR or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = _Attributes(size=ctypes.sizeof(_Attributes), runtime=slice_ns)
    wanted.nice = os.getpriority(os.PRIO_PROCESS, 0)
    return libc.syscall(_SETATTR[machine], 0, ctypes.byref(wanted), 0) == 0 and own_slice_ns() == slice_ns


def run_patiently() -> bool:
    """Have this thread, and those it starts, take the core from nobody when they wake. Whether it is so now.

    Whom the operator gave another policy than the ordinary one keeps that.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    return True


def own_slice_ns() -> int | None:
    """This thread's slice; 0 where the kernel knows none, None where it cannot be asked."""
    machine = platform.machine()
    if machine not in _GETATTR:
        return None
    found = _Attributes()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_GETATTR[machine], 0, ctypes.byref(found), ctypes.sizeof(found), 0) != 0:
        return None
    return int(found.runtime)
