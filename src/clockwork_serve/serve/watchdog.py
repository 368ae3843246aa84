"""Whether a child process still answers: judged by beats that its loop returns. It ends nobody.

Silence is counted in the watcher's own ticks, never by a clock alone: who was paused with all others has
missed nobody. A tick counts only as far as the child could have answered in it: one that wants a core and
gets none, or waits for a disk, is not stuck.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec import Struct

TICK_S: Final = 0.25
GAP_S: Final = 1.0
"""A tick that comes so much later than it should: the watcher was paused itself, others perhaps longer."""
STOPPED_SHARE: Final = 0.4
"""Of the limit, for a child that is stopped by a signal: it is at nothing that might end by itself."""
START_TIMES: Final = 40
"""So many limits for the first beat: a start imports, and collects garbage."""

_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")


class ThreadState(Struct, frozen=True):
    """The main thread of a process: its state as in /proc, and the seconds that it has run."""

    state: str
    ran_s: float

    @property
    def stopped(self) -> bool:
        """By a signal or a debugger."""
        return self.state in {"T", "t"}


def look_at(pid: int) -> ThreadState | None:
    """None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/task/{pid}/stat").read_bytes()
    except OSError:
        return None
    # After the name, which is in parentheses and may be anything.
    fields = stat.rpartition(b")")[2].split()
    if len(fields) < 13:
        return None
    return ThreadState(fields[0].decode(), (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS)


class ProcessWatch:
    """One child. ``limit_s``: so long it may be silent; ``send`` sends it a beat."""

    def __init__(
        self, pid: int, limit_s: float, send: Callable[[], None],
        look: Callable[[int], ThreadState | None] = look_at,
    ) -> None:  # fmt: skip
        self._pid = pid
        self._limit_s = limit_s
        self._send = send
        self._look = look
        self._started = False  # it has returned a beat
        self._asked: ThreadState | None = (
            None  # as it was seen last, since it was sent a beat that it has not returned
        )
        self._silent_s = 0.0
        self._stopped_s = 0.0

    def heard(self) -> None:
        """It returned a beat."""
        self._started = True
        self._asked = None

    def tick(self, *, paused: bool = False) -> str:
        """Look at it; why it is to be ended, or "". ``paused``: the watcher was, so silence begins anew."""
        before, now = self._asked, self._look(self._pid)
        if now is None:
            return ""
        self._asked = now
        if before is None:
            self._silent_s = self._stopped_s = 0.0
            self._send()
            return ""
        if paused:
            self._silent_s = self._stopped_s = 0.0
        self._stopped_s = self._stopped_s + TICK_S if now.stopped else 0.0
        self._silent_s += _could_answer_s(before, now)
        if self._stopped_s >= STOPPED_SHARE * self._limit_s:
            return f"it has been stopped by a signal for {self._stopped_s:.1f} s"
        if self._silent_s >= (self._limit_s if self._started else START_TIMES * self._limit_s):
            return f"it has not answered for {self._silent_s:.1f} s in which it could have"
        return ""


def _could_answer_s(before: ThreadState, now: ThreadState) -> float:
    """Of a tick, how long the process had what it needs to answer."""
    match now.state:
        case "R":  # it runs, or wants to
            return min(TICK_S, now.ran_s - before.ran_s)
        case "D":  # the kernel waits for a device on its behalf, and could not end it either
            return 0.0
        case _:
            return TICK_S
