"""The driver of a brain in real time, its timer, and what processes ask of the kernel to be in time."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from clockwork_serve.machine import Machine
from clockwork_serve.units import NS_PER_S, ms

# ------------------------------------------------------------
# A timer of nanosecond resolution on the loop: a timerfd, because loops round their timers to milliseconds.
#
# Measured under uvloop: 30 us late in the median, never early; ``call_at`` is 370 us early or 630 us late.


_ABSOLUTE: Final = 1  # TFD_TIMER_ABSTIME
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class LoopTimer:
    """Calls ``on_time`` on the running loop, once, when CLOCK_MONOTONIC reaches the armed time."""

    def __init__(self, on_time: Callable[[], None]) -> None:
        self._on_time = on_time
        self._loop = asyncio.get_running_loop()
        self._armed_ns: int | None = None
        self._setting = _Itimerspec()
        self._fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop.add_reader(self._fd, self._fired)

    def arm(self, at_ns: int | None) -> None:
        """Fire at that time, at once if it is past; None disarms. Replaces the time armed before."""
        if at_ns == self._armed_ns:
            return
        self._armed_ns = at_ns
        value = self._setting.value
        # A value of zero would disarm; any time in the past fires at once.
        value.seconds, value.nanoseconds = (0, 0) if at_ns is None else divmod(max(1, at_ns), NS_PER_S)
        if _libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(self._setting), None) != 0:
            raise OSError(ctypes.get_errno(), f"timerfd_settime to {at_ns} ns")

    def count(self, messages: int) -> None:
        """Note how many messages were received since the last call; ignored here, for subclasses."""

    def close(self) -> None:
        """Never fire again."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _fired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # re-armed after the loop found it readable
        self._armed_ns = None
        self._expired()

    def _expired(self) -> None:
        self._on_time()


# ------------------------------------------------------------
# The driver: all events posted in one turn of the loop share one ``now``; they are observed, and the machine
# decides once. The journal records that grouping, which is all that a replay needs.


Event = TypeVar("Event")
Effect = TypeVar("Effect")


class Driver(Generic[Event, Effect]):
    """Runs ``machine`` on the running loop. Methods are for the loop's own thread.

    ``perform`` is called with each effect in order; it may post events. ``journal``, called soon after each
    turn and in order, gets (now_ns, events, effects). ``woke`` gets the lateness of each wake-up in ns: how
    long after the instant that it had asked for the machine decided, whether the timer or an event caused it.
    ``timer`` creates the timer. Exceptions of any of them are left to the loop's exception handler: a broken
    invariant should end the process.
    """

    def __init__(
        self, machine: Machine[Event, Effect], perform: Callable[[Effect], None],
        clock: Callable[[], int] = time.monotonic_ns,
        journal: Callable[[int, list[Event], list[Effect]], None] | None = None,
        woke: Callable[[int], None] = lambda late_ns: None,
        timer: Callable[[Callable[[], None]], LoopTimer] = LoopTimer,
    ) -> None:  # fmt: skip
        self.machine = machine
        self._perform = perform
        self._clock = clock
        self._journal = journal
        self._woke = woke
        self._loop = asyncio.get_running_loop()
        self._timer = timer(self.wake)
        self._wakeup_ns: int | None = None  # when the machine last asked to decide
        self._events: list[Event] = []  # all and only those not observed yet
        self._turn_due = False
        self._closed = False

    def post(self, *events: Event) -> None:
        """Have the machine observe these, and decide, at the end of this turn of the loop."""
        self._events.extend(events)
        self.wake()

    def wake(self) -> None:
        """Have the machine decide at the end of this turn of the loop."""
        if not self._turn_due and not self._closed:
            self._turn_due = True
            self._loop.call_soon(self._turn)

    def settle(self) -> None:
        """Have the machine observe what was posted, and decide, now: somebody asks for its state."""
        if self._events:
            self._turn()

    def close(self) -> None:
        """Stop: the machine is not called any more."""
        self._closed = True
        self._timer.close()

    def _turn(self) -> None:
        self._turn_due = False
        if self._closed:
            return
        events, self._events = self._events, []
        effects: list[Effect] = []
        now_ns = self._clock()
        try:
            self._step(now_ns, events, effects)
        finally:
            # After the writes that the effects queued, which are urgent and the journal is not; and even if
            # the machine raised an error, for then the journal matters most.
            if self._journal is not None:
                self._loop.call_soon(self._journal, now_ns, events, effects)

    def _step(self, now_ns: int, events: list[Event], effects: list[Effect]) -> None:
        machine = self.machine
        for event in events:
            machine.observe(event, now_ns)
        effects += machine.decide(now_ns)
        for effect in effects:
            self._perform(effect)
        requested_wakeup_ns, wakeup_ns = self._wakeup_ns, machine.next_wakeup_ns()
        assert wakeup_ns is None or wakeup_ns > now_ns, f"asked to wake at {wakeup_ns}, not after {now_ns}"
        self._timer.count(len(events))
        self._timer.arm(wakeup_ns)
        self._wakeup_ns = wakeup_ns
        if requested_wakeup_ns is not None and requested_wakeup_ns <= now_ns:
            self._woke(now_ns - requested_wakeup_ns)


# ------------------------------------------------------------
# Scheduling policies and time slices that processes ask of the kernel, so that decisions are made in time.
#
# Measured together: servers with all of it and servers without one part were loaded in turns of 400 to 500
# requests, 40 turns each, from 16 HTTP connections in a closed loop to an emulated device (0.5 ms, 0.8 ms
# for a batch of 16); all processes of a server on one core, the client on another. Linux 6.18, two cores of
# an AMD EPYC that other programs used as well (load average 9 to 15). Ratios compare turns that follow one
# another, without the part over with it:
#
# =====================  ===================  ================  ================  ===================
# without                late, median         late, p99         CPU a request     requests/s
# =====================  ===================  ================  ================  ===================
# short slices           4.65 (37 of 40 > 1)  1.77 (31 of 40)   0.99 (17 of 40)   0.98 (13 of 40)
# batch policy (bursts)  1.54 (28 of 40)      1.27 (23 of 40)   1.06 (28 of 40)   0.99 (19 of 40)
# batch policy (I/O)     1.47 (25 of 40)      1.00 (19 of 40)   1.04 (23 of 40)   1.00 (20 of 40)
# =====================  ===================  ================  ================  ===================
#
# Short slices are worth it: decisions were 0.09 ms late instead of 0.51 in the median, 2.1 ms instead of
# 3.7 in the p99. About the other two such a busy machine shows little. Beside a busy loop on the same core
# a server without the batch policy in bursts answered 1.28 times the requests (0.93 to 1.71 in nine turns
# of 600); what both gain where nothing else uses the core is given below, as it was measured there.


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
BATCH_MESSAGES: Final = 2.0  # SCHED_BATCH is used from this many messages per turn on
TURNS: Final = 4  # messages per turn are averaged over about this many turns

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


SHORT_NS: Final = 100_000  # the shortest slice that the kernel allows
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


def use_short_slices() -> bool:
    """Give this thread a time slice of ``SHORT_NS``; returns whether the kernel accepted it.

    A policy other than SCHED_OTHER, set by the operator, is kept.
    """
    machine = platform.machine()
    if machine not in _SETATTR or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = _Attributes(size=ctypes.sizeof(_Attributes), runtime=SHORT_NS)
    wanted.nice = os.getpriority(os.PRIO_PROCESS, 0)
    return libc.syscall(_SETATTR[machine], 0, ctypes.byref(wanted), 0) == 0 and own_slice_ns() == SHORT_NS


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
