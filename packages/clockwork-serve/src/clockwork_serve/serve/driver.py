"""The driver of a brain in real time: it feeds it events, performs its effects, and wakes it in time."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from clockwork_serve.machine import Machine
from clockwork_serve.units import NS_PER_S

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
        self,
        machine: Machine[Event, Effect],
        perform: Callable[[Effect], None],
        clock: Callable[[], int] = time.monotonic_ns,
        journal: Callable[[int, list[Event], list[Effect]], None] | None = None,
        woke: Callable[[int], None] = lambda late_ns: None,
        timer: Callable[[Callable[[], None]], LoopTimer] = LoopTimer,
    ) -> None:
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
