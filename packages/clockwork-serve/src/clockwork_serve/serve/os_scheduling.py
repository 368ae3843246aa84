"""Scheduling policies and time slices that processes ask of the kernel, so that decisions are made in time.

Measured together: servers with all of it and servers without one part were loaded in turns of 400 to 500
requests, 40 turns each, from 16 HTTP connections in a closed loop to an emulated device (0.5 ms, 0.8 ms for a
batch of 16); all processes of a server on one core, the client on another. Linux 6.18, two cores of an AMD
EPYC that other programs used as well (load average 9 to 15). Ratios compare turns that follow one another,
without the part over with it:

=====================  ===================  ================  ================  ===================
without                late, median         late, p99         CPU a request     requests/s
=====================  ===================  ================  ================  ===================
short slices           4.65 (37 of 40 > 1)  1.77 (31 of 40)   0.99 (17 of 40)   0.98 (13 of 40)
batch policy (bursts)  1.54 (28 of 40)      1.27 (23 of 40)   1.06 (28 of 40)   0.99 (19 of 40)
batch policy (I/O)     1.47 (25 of 40)      1.00 (19 of 40)   1.04 (23 of 40)   1.00 (20 of 40)
=====================  ===================  ================  ================  ===================

Short slices are worth it: decisions were 0.09 ms late instead of 0.51 in the median, 2.1 ms instead of 3.7 in
the p99. About the other two such a busy machine shows little. Beside a busy loop on the same core a server
without the batch policy in bursts answered 1.28 times the requests (0.93 to 1.71 in nine turns of 600); what
both gain where nothing else uses the core is given below, as it was measured there.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from typing import Final

from clockwork_serve.serve.driver import LoopTimer
from clockwork_serve.units import ms

# ------------------------------------------------------------
# A timer whose thread runs under SCHED_BATCH while messages arrive in bursts, and under SCHED_OTHER, so that
# it preempts other threads, when a decision is due.
#
# Where processes share a core, each message wakes the receiver, which preempts the sender and finds one
# message. A thread under SCHED_BATCH preempts no other when it wakes, and then finds many messages. But where
# other programs use the core too, it may wait for a tick of the scheduler; so the policy is left while a
# decision is near, and while messages arrive one by one, when nothing is gained.
#
# Measured on one core: a controller under SCHED_BATCH until 1.5 ms before each decision used 82 % (16
# connections) and 91 % (32) of the CPU per request over HTTP, 98 to 102 % over gRPC, of one that never uses
# it. As implemented here, beside programs that used 1.75 of two cores, decisions were as late as without it
# (p99 5.7 and 6.6 ms, 6.4 and 5.9 ms); but a thread under SCHED_BATCH gets less of a contended core: 17 %
# fewer requests over HTTP, as many over gRPC.


MARGIN_NS: Final = ms(4)
"""How long before the armed time SCHED_BATCH is left. A running thread may keep the core for a tick of the
scheduler, which is this long on most kernels."""
BATCH_MESSAGES: Final = 2.0
"""SCHED_BATCH is used from this many messages per turn on."""
TURNS: Final = 4
"""Messages per turn are averaged over about this many turns."""

_PARAMETERS: Final = os.sched_param(0)


class UrgentTimer(LoopTimer):
    """A :class:`LoopTimer` that sets the scheduling policy of the thread that creates and arms it.

    A policy other than SCHED_OTHER, set by the operator, is kept.
    """

    def __init__(self, on_time: Callable[[], None]) -> None:
        super().__init__(on_time)
        self._due_ns: int | None = None
        self._may_change = os.sched_getscheduler(0) == os.SCHED_OTHER
        self._batched = False  # now under SCHED_BATCH
        self._messages_per_turn = 0.0  # a moving average

    def count(self, messages: int) -> None:
        """Note how many messages a turn of the loop received."""
        if messages:
            self._messages_per_turn += (messages - self._messages_per_turn) / TURNS

    def arm(self, at_ns: int | None) -> None:
        """Fire at that time, at once if it is past; None disarms. Replaces the time armed before."""
        self._due_ns = at_ns
        waits = self._may_change and self._messages_per_turn >= BATCH_MESSAGES
        if waits and at_ns is not None:
            early_ns = at_ns - MARGIN_NS
            waits = early_ns > time.monotonic_ns()
            at_ns = early_ns if waits else at_ns
        if waits is not self._batched:
            self._batched = waits
            os.sched_setscheduler(0, os.SCHED_BATCH if waits else os.SCHED_OTHER, _PARAMETERS)
        super().arm(at_ns)

    def _expired(self) -> None:
        if self._batched:
            self.arm(self._due_ns)
        else:
            super()._expired()


# ------------------------------------------------------------
# Time slices and the batch policy of threads; neither is a priority, and no privilege is needed.
#
# Linux 6.12 and later consider a thread's slice when it wakes: a thread with a short slice runs before one
# with a long slice. Measured on two cores while other programs used more than one of them: a controller with
# a slice of 0.1 ms decided more than 0.5 ms late in 4 to 8 % of its wake-ups, without it in 12 to 15 %.
#
# Where processes share a core, each message wakes the receiver, which preempts the sender. Threads that only
# move data need not: with gateways and the threads of workers' links under SCHED_BATCH, one core served 8 to
# 11 % more requests, and the controller, which they no longer delay, decided earlier (p99 of 0.33 to 0.35 ms
# instead of 0.43 to 0.51 at 1,000 requests/s of 600 kB beside a program that used one of two cores).


SHORT_NS: Final = 100_000
"""The shortest slice that the kernel allows."""
_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""System call numbers of sched_setattr(2), for which not every C library has a function."""
_GETATTR: Final = {"x86_64": 315, "aarch64": 275}


class _Attributes(ctypes.Structure):
    """struct sched_attr in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32), ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64), ("period", ctypes.c_uint64),
    )  # fmt: skip


def use_short_slices(slice_ns: int = SHORT_NS) -> bool:
    """Give this thread a time slice of ``slice_ns``; returns whether the kernel accepted it.

    A policy other than SCHED_OTHER, set by the operator, is kept.
    """
    machine = platform.machine()
    if machine not in _SETATTR or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = _Attributes(size=ctypes.sizeof(_Attributes), runtime=slice_ns)
    wanted.nice = os.getpriority(os.PRIO_PROCESS, 0)
    return libc.syscall(_SETATTR[machine], 0, ctypes.byref(wanted), 0) == 0 and own_slice_ns() == slice_ns


def use_batch_policy() -> bool:
    """Put this thread, and those it starts, under SCHED_BATCH: they preempt no thread when they wake.

    Returns whether it is so now. A policy other than SCHED_OTHER, set by the operator, is kept.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    return True


def own_slice_ns() -> int | None:
    """This thread's time slice in ns; 0 where the kernel has none, None where it cannot be read."""
    machine = platform.machine()
    if machine not in _GETATTR:
        return None
    found = _Attributes()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_GETATTR[machine], 0, ctypes.byref(found), ctypes.sizeof(found), 0) != 0:
        return None
    return int(found.runtime)
