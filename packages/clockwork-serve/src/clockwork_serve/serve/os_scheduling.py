"""What is asked of the kernel's scheduler: a timer thread that wakes in time, time slices per thread.

Measured together: servers with all of it and servers without one part each took turns of 400 to 500 requests,
40 each, from 16 HTTP connections in a closed loop to an emulated device (0.5 ms, 0.8 ms a batch of 16); all
processes of a server on one core, the client on another. Linux 6.18, two cores of an AMD EPYC that other
programs wanted too (load average 9 to 15). Ratios are of neighbours in time, without over with:

=====================  ===================  ================  ================  ===================
without                late, median         late, p99         CPU a request     requests/s
=====================  ===================  ================  ================  ===================
short slices           4.65 (37 of 40 > 1)  1.77 (31 of 40)   0.99 (17 of 40)   0.98 (13 of 40)
waiting in a crowd     1.54 (28 of 40)      1.27 (23 of 40)   1.06 (28 of 40)   0.99 (19 of 40)
patient data movers    1.47 (25 of 40)      1.00 (19 of 40)   1.04 (23 of 40)   1.00 (20 of 40)
=====================  ===================  ================  ================  ===================

Short slices are worth it: in the median decisions came 0.09 ms late and not 0.51, in the p99 2.1 ms and not
3.7. Of the other two such a machine tells little. Beside a busy loop on the same core a server that does not
wait in a crowd answered 1.28 times the requests (0.93 to 1.71 in nine turns of 600); what is gained where
nothing else wants the core is said below, and stands as it was measured there.
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
# A timer whose thread takes the core from others to be in time, but waits for them in a crowd of messages.
#
# Where processes share a core, each message wakes one of them, which takes the core from the sender and finds
# one message. Under SCHED_BATCH a thread takes the core from nobody when it wakes, and finds many. But where
# other programs want the core too it may wait for a tick of theirs; so it does not while a decision is near,
# nor while messages come one by one, for then nothing is gained.
#
# Measured on one core: a controller that waited until 1.5 ms before each decision used 82 % (16
# connections) and 91 % (32) of the CPU a request over HTTP, 98 to 102 % over gRPC, of one that never waits.
# As it is here, beside programs that took 1.75 of two cores, decisions came as late as without it (p99 5.7
# and 6.6 ms, 6.4 and 5.9 ms); but who waits for others gets less of a core that they want: 17 % fewer
# requests over HTTP, as many over gRPC.


MARGIN_NS: Final = ms(4)
"""From so long before its time on, the thread waits for nobody. Who has the core may keep it for a tick: on
most kernels, so long."""
BATCH_MESSAGES: Final = 2.0
"""From so many messages a turn on, they may wait."""
TURNS: Final = 4
"""The mean is over about so many."""

_PARAMETERS: Final = os.sched_param(0)


class UrgentTimer(LoopTimer):
    """As :class:`LoopTimer`; it sets the scheduling class of the thread that makes it and arms it.

    Whom the operator gave another policy than the ordinary one keeps that.
    """

    def __init__(self, on_time: Callable[[], None]) -> None:
        super().__init__(on_time)
        self._due_ns: int | None = None
        self._may_change = os.sched_getscheduler(0) == os.SCHED_OTHER
        self._batched = False  # under SCHED_BATCH
        self._messages_per_turn = 0.0  # messages a turn, of late

    def count(self, messages: int) -> None:
        """A turn took in so many messages."""
        if messages:
            self._messages_per_turn += (messages - self._messages_per_turn) / TURNS

    def arm(self, at_ns: int | None) -> None:
        """Ring at that time, at once if it is past; None disarms. Replaces the time armed before."""
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
# Asks the kernel to run a thread at another time than others; no priority, and no privilege needed.
#
# Linux 6.12 and later look at a thread's slice when it wakes: who wants little gets it before who wants much.
# Measured on two cores while other programs took more than one of them: a controller with a slice of 0.1 ms
# decided more than 0.5 ms late in 4 to 8 % of its wake-ups, without in 12 to 15 %.
#
# Where processes share a core, each message wakes another one, which takes the core from the sender. Who
# moves data need not: with gateways and the threads of workers' links in no hurry, one core did 8 to 11 %
# more requests, and the controller, which they no longer hold up, decided earlier (p99 of 0.33 to 0.35 ms
# instead of 0.43 to 0.51 at 1,000 requests/s of 600 kB beside a program that took one of two cores).


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


def use_short_slices(slice_ns: int = SHORT_NS) -> bool:
    """Whether the kernel took it. Whom the operator gave another policy than the ordinary one keeps that."""
    machine = platform.machine()
    if machine not in _SETATTR or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = _Attributes(size=ctypes.sizeof(_Attributes), runtime=slice_ns)
    wanted.nice = os.getpriority(os.PRIO_PROCESS, 0)
    return libc.syscall(_SETATTR[machine], 0, ctypes.byref(wanted), 0) == 0 and own_slice_ns() == slice_ns


def use_batch_policy() -> bool:
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
