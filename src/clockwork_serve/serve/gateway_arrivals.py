"""When the bytes of a connection reached this machine, however late a busy loop came round to read them.

Bytes that are read now came after the last poll at which their socket was seen empty. The loop's own turns
tell when that was: a beat has it poll even while nothing happens, so that the instant is old only where the
loop was held up, or the process stopped. Linux tells how long ago the last segment came (``TCP_INFO``, in
steps of a tick: 1 to 4 ms on most hosts), which sharpens it where it is worth a system call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from clockwork_serve.serve.gateway_bodies import Source
from clockwork_serve.units import NS_PER_MS

BEAT_S: Final = 0.005
"""The loop polls at least as often as that, if it can."""
IDLE_BEAT_S: Final = 0.02
IDLE_AFTER: Final = 40
"""And as often as this once only so many beats were all that it did: an idle gateway took 1.8 % of a core."""
NEAR_NS: Final = 4 * NS_PER_MS
"""A poll that is no longer ago is near enough: the kernel, which takes 1.5 us to ask, knows no more."""
NEVER_NS: Final = 1 << 62


class Turns:
    """The turns of a loop. ``before_ns``: the loop has polled since, and dealt with what it found.

    An instant is noted before a poll, at the beginning of a turn. uvloop calls what :meth:`begin` asks for
    right before the next poll, so that between two such instants there is always a whole poll.
    """

    __slots__ = ("_beats", "_last_ns", "_loop", "_on_beat", "_timer", "before_ns", "clock", "noting")

    def __init__(
        self, clock: Callable[[], int] = time.monotonic_ns, on_beat: Callable[[], None] = lambda: None
    ) -> None:
        self.clock = clock
        self._loop = asyncio.get_running_loop()
        self._on_beat = on_beat
        self.before_ns = self._last_ns = clock()
        self.noting = False
        """Whether that was asked for in this turn."""
        self._beats = 0  # in a row, without anything else
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    def begin(self) -> None:
        """The loop does something: note the next poll."""
        if not self.noting:
            self.noting = True
            self._loop.call_soon(self._note)

    def close(self) -> None:
        """Beat no more."""
        self._timer.cancel()

    def _note(self) -> None:
        self.noting = False
        self._beats = 0
        self.before_ns, self._last_ns = self._last_ns, self.clock()

    def _note_beat(self) -> None:
        beats = self._beats
        self._note()
        self._beats = beats + 1

    def _beat(self) -> None:
        if not self.noting:
            self.noting = True
            self._loop.call_soon(self._note_beat)
        self._timer = self._loop.call_later(BEAT_S if self._beats < IDLE_AFTER else IDLE_BEAT_S, self._beat)
        self._on_beat()


class AcceptQueue:
    """Where connections wait to be accepted: the loop takes one in a turn, and the others wait on."""

    __slots__ = ("_accepted_ns", "_since_ns", "_turns")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._since_ns = self._accepted_ns = 0

    def since_ns(self) -> int:
        """A connection is accepted now: when none was waiting there."""
        turns = self._turns
        turns.begin()
        if turns.before_ns > self._accepted_ns:  # since the last one came, a whole turn brought none
            self._since_ns = turns.before_ns
        self._accepted_ns = turns.clock()
        return self._since_ns


class Arrival:
    """When what is read from one connection came.

    Where that took several reads, only the time that it waited for us counts, not what its client took to
    send it: ``arrived_ns`` is when it would have been here, had it not had to wait.
    """

    __slots__ = (
        "_clock", "_read_ns", "_since_ns", "_source", "_turns", "_unpolled_ns", "_waited_ns", "oldest_ns",
    )  # fmt: skip

    def __init__(self, source: Source, turns: Turns, since_ns: int) -> None:
        """``since_ns``: when who accepted it looked last, and it was not there."""
        self._source = source
        self._turns = turns
        self._clock = turns.clock
        # Its bytes may have come before it was accepted: no poll has seen it empty.
        self._since_ns = since_ns
        self._unpolled_ns = turns.clock()  # until then it was not polled; NEVER_NS while it is not
        self._read_ns = self._waited_ns = 0
        self.oldest_ns = 0
        """What was read last came no earlier."""

    def pause(self) -> None:
        """It is not read from: what comes meanwhile waits for us."""
        self._since_ns = self.bound()
        self._unpolled_ns = NEVER_NS

    def resume(self) -> None:
        """It is read from again."""
        self._unpolled_ns = self._clock()

    def bound(self) -> int:
        """When it was last seen empty."""
        before_ns = self._turns.before_ns
        return self._since_ns if before_ns < self._unpolled_ns else before_ns

    def of_one(self) -> int:
        """When a request came that was all that there was to read."""
        turns = self._turns
        if not turns.noting:
            turns.begin()
        before_ns = turns.before_ns  # as in bound(); this is for each small request
        bound_ns = self._since_ns if before_ns < self._unpolled_ns else before_ns
        now_ns = self._clock()
        return bound_ns if now_ns - bound_ns <= NEAR_NS else self._sharpened(bound_ns, now_ns)

    def read(self, *, first: bool, kept: bool = False) -> None:
        """Something was read. ``first``: nothing before it belongs to it; ``kept``: it was, some time ago."""
        turns = self._turns
        if not turns.noting:
            turns.begin()
        before_ns, now_ns = (
            turns.before_ns,
            self._clock(),
        )  # as in bound(): of a large body this is often asked
        bound_ns = self._since_ns if before_ns < self._unpolled_ns else before_ns
        if first:
            self._read_ns = self._waited_ns = 0
            self.oldest_ns = bound_ns
        if not kept and now_ns - bound_ns > NEAR_NS:
            bound_ns = self._sharpened(bound_ns, now_ns)
        self._waited_ns += now_ns - max(bound_ns, self._read_ns)
        self._read_ns = now_ns

    @property
    def arrived_ns(self) -> int:
        """When what was read so far came."""
        return self._read_ns - self._waited_ns

    def _sharpened(self, bound_ns: int, now_ns: int) -> int:
        quiet_ns = self._source.quiet_ns()
        return bound_ns if quiet_ns is None else max(bound_ns, now_ns - quiet_ns)
