"""When a request's bytes reached this machine, and how long they are on the way inside it.

Deadlines count from when the bytes came, however late a busy loop read them.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Final

from clockwork_serve.controller.estimates import VALID_NS, WindowMax
from clockwork_serve.units import KIB, NS_PER_MS

# ------------------------------------------------------------
# A connection's socket past the loop: large bodies are read, as much as is there, to where they stay.
#
# Or nowhere. Responses are sent at once, and the kernel says when bytes came.
#
# The loop reads from a socket once in a turn, and a turn is long where many clients have something to say.
# What is read makes room for what waits at the client's end, and on one host that is there at once. What the
# loop is given to write it writes at the end of its turn, when the deadline that was kept may be over.
#
# Linux drops what is read with ``MSG_TRUNC`` from a TCP socket without copying it (tcp(7)). Measured, 602 kB
# over loopback: 21 us of CPU instead of 61.


SIP_BYTES: Final = 4096
"""So much of what nobody wants is read as usual, which tells that there is more."""
AT_ONCE: Final = 768 * KIB
"""Under a millisecond, where memory is touched for the first time: then others have their turn. An image of
224 x 224 x 3 floats, 588 KiB, is read in one go."""
_INFO_BYTES: Final = 60
"""Of ``struct tcp_info``: up to and with ``tcpi_last_data_recv``."""
_LAST_DATA_AT: Final = 56
_last_data_ms: Final = struct.Struct("I").unpack_from
# Plain numbers: to join flags of an enumeration takes longer than the system call.
_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
SEND_NOW: Final = _DONTWAIT | int(socket.MSG_NOSIGNAL)


def _kernel_tells() -> bool:
    """Whether this kernel says when data last came: of a socket that had none, it says how long it runs."""
    if sys.platform != "linux":
        return False
    with socket.socket() as unused:
        try:
            found = unused.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:
            return False
    return len(found) == _INFO_BYTES and _last_data_ms(found, _LAST_DATA_AT)[0] > 0


_KERNEL_TELLS: Final = _kernel_tells()


class BodySocket:
    """A transport's TCP socket, which stays the transport's: to be closed before that is.

    Over TLS its bytes are not those that the client meant: nothing is read or sent here then.
    """

    __slots__ = ("_lent", "_plain", "send_now")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._lent: socket.socket | None = None
        self._plain = False
        self.send_now: Callable[[bytes, int], int] | None = None
        """``send`` of the socket itself, for :data:`SEND_NOW`; None over TLS."""
        found = transport.get_extra_info("socket") if sys.platform == "linux" else None
        if found is not None:
            # All is told, so that nothing is asked of the system for it.
            self._lent = socket.socket(
                socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=found.fileno()
            )
            self._plain = transport.get_extra_info("sslcontext") is None
            self.send_now = self._lent.send if self._plain else None

    def __del__(self) -> None:
        """A socket that is forgotten would be closed, and this one is another's."""
        self.close()

    def close(self) -> None:
        """Use it no more."""
        lent, self._lent = self._lent, None
        self._plain = False
        self.send_now = None
        if lent is not None:
            lent.detach()

    @property
    def plain(self) -> bool:
        """Whether anything can be read here."""
        return self._plain

    def quiet_ns(self) -> int | None:
        """How long ago the last bytes came, to a tick of the kernel; None where that is not known."""
        if self._lent is None or not _KERNEL_TELLS:
            return None
        try:
            found = self._lent.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:
            return None
        last_ms: int = _last_data_ms(found, _LAST_DATA_AT)[0]
        return last_ms * NS_PER_MS

    def read(self, room: memoryview) -> int:
        """Fill ``room`` as far as bytes are there; so many were."""
        end = min(len(room), AT_ONCE)
        at = 0
        while at < end and (found := self._take(room[at:end])):
            at += found
        return at

    def drop(self, buffer: memoryview, most: int) -> int:
        """Throw away up to ``most`` bytes that are there; so many were. What ``buffer`` holds is lost."""
        left = most
        while left and (found := self._take(buffer[:left], socket.MSG_TRUNC)):
            left -= found
        return most - left

    def _take(self, room: memoryview, how: int = 0) -> int:
        if not self._plain or self._lent is None:
            return 0
        try:
            return self._lent.recv_into(room, len(room), how | _DONTWAIT)
        except OSError:  # nothing is there, or nothing comes any more: that is for the loop to find
            return 0


class Unwanted:
    """The rest of a body, ``left`` bytes. What is read of it goes to ``buffer``, and is overwritten."""

    __slots__ = ("_buffer", "_source", "left")

    def __init__(self, source: BodySocket, buffer: memoryview, left: int) -> None:
        self.left = left
        self._buffer = buffer
        self._source = source

    def room(self) -> memoryview:
        """Where the next bytes go."""
        return self._buffer[: min(self.left, SIP_BYTES if self._source.plain else len(self._buffer))]

    def received(self, nbytes: int) -> bool:
        """So much of it was read; whether that was all, with what could be dropped at once."""
        self.left -= nbytes
        self.left -= self._source.drop(self._buffer, self.left)
        return not self.left


# ------------------------------------------------------------
# When the bytes of a connection reached this machine, however late a busy loop came round to read them.
#
# Bytes that are read now came after the last poll at which their socket was seen empty. The loop's own turns
# tell when that was: a beat has it poll even while nothing happens, so that the instant is old only where the
# loop was held up, or the process stopped. Linux tells how long ago the last segment came (``TCP_INFO``, in
# steps of a tick: 1 to 4 ms on most hosts), which sharpens it where it is worth a system call.


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

    def __init__(self, source: BodySocket, turns: Turns, since_ns: int) -> None:
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
        # As in bound(), in line: of a large body this is often asked.
        before_ns, now_ns = turns.before_ns, self._clock()
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


# ------------------------------------------------------------
# How long what a gateway reads and says is on the way, while its core is busy: deadlines are the client's.
#
# A request may have waited in its socket before it was read, and an answer waits for its turn before it is
# written. The second is measured, from when a lane ended until the response was given to the socket; the
# first takes about as long, since it is the same loop that has to come round. Plans leave room for both.


BOTH: Final = 1.5
"""In and out, of which seldom both are the longest. Measured at twice what a core can do: with 1, 0.6 % of
answers were late, with 2 none, and 4 % fewer were in time than with 1."""
SHARE: Final = 2
"""At most this part of the time that a request has is left for the way: a half."""


class Way:
    """The longest way of the last answers."""

    __slots__ = ("_ended_ns", "_heard_ns", "_worst")

    def __init__(self) -> None:
        self._worst = WindowMax()
        self._ended_ns = NEVER_NS  # of what is being answered, the lane that ended first
        self._heard_ns = 0

    def ended(self, ended_ns: int) -> None:
        """A lane ended at that instant, and its answer is about to leave."""
        self._ended_ns = min(self._ended_ns, ended_ns)

    def left(self, now_ns: int) -> None:
        """All such answers left."""
        if self._ended_ns != NEVER_NS:
            if now_ns > self._heard_ns + VALID_NS:
                self._worst.clear()
            self._heard_ns = now_ns
            self._worst.add(now_ns - self._ended_ns)
            self._ended_ns = NEVER_NS

    def of(self, given_ns: int, now_ns: int) -> int:
        """What to leave of the time that a request was given."""
        if now_ns > self._heard_ns + VALID_NS:
            return 0
        return min(int(BOTH * self._worst.value), given_ns // SHARE)
