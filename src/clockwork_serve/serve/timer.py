"""One alarm on the loop, at nanoseconds: a timerfd, because loops round their own timers to milliseconds.

Measured under uvloop: 30 us late at the median, never early, where ``call_at`` is 370 us early or 630 late.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from typing import Final

from clockwork_serve.units import NS_PER_S

_ABSOLUTE: Final = 1  # TFD_TIMER_ABSTIME
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Timer:
    """Calls ``on_time`` on the running loop when CLOCK_MONOTONIC reaches the armed time; one shot."""

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
        """Ring at that time, at once if it is past; None disarms. Replaces the time armed before."""
        if at_ns == self._armed_ns:
            return
        self._armed_ns = at_ns
        value = self._setting.value
        # A value of zero would disarm; every time before now rings at once.
        value.seconds, value.nanoseconds = (0, 0) if at_ns is None else divmod(max(1, at_ns), NS_PER_S)
        if _libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(self._setting), None) != 0:
            raise OSError(ctypes.get_errno(), f"timerfd_settime to {at_ns} ns")

    def count(self, messages: int) -> None:
        """So many messages were taken in since the last count; here that is of no account."""

    def close(self) -> None:
        """Never ring again."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _fired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # re-armed since the loop saw it ring
        self._armed_ns = None
        self._rang()

    def _rang(self) -> None:
        self._on_time()
