"""When a request's bytes reached this machine, and the gateway's own delay.

Deadlines count from when the bytes arrived, however late a busy loop read them.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from clockwork_serve.controller.estimates import VALID_NS, WindowMax
from clockwork_serve.units import KIB, NS_PER_MS, NS_PER_S, NS_PER_US

# ------------------------------------------------------------
# Direct access to a connection's socket: large bodies are read into their final place in few calls, bodies
# that are not needed are discarded, responses are sent at once, and the kernel reports when bytes arrived.
#
# The loop reads from a socket once in a turn, and a turn is long when many clients send. A read makes room
# for what the client has still to send, which on the same host arrives at once. What the loop is given to
# write is written at the end of its turn, when a deadline that was met before may have passed.
#
# Linux drops what is read with ``MSG_TRUNC`` from a TCP socket without copying it (tcp(7)). Measured, 602 kB
# over loopback: 21 us of CPU instead of 61.


PROBE_BYTES: Final = 4096
"""Bytes of an unneeded body to read the usual way; a full read shows that there is more."""
AT_ONCE: Final = 768 * KIB
"""Bytes to read before other connections get their turn: under a millisecond, where memory is accessed for
the first time. An image of 224 x 224 x 3 floats, 588 KiB, is read in one go."""
_SO_TIMESTAMPNS: Final = 35  # not in Python's ``socket``: the time of receipt, by the wall clock (socket(7))
_TIMESPEC: Final = struct.Struct("qq")
_NOTED_BYTES: Final = 64
_INFO_BYTES: Final = 60  # size of ``struct tcp_info`` up to and including ``tcpi_last_data_recv``
_LAST_DATA_AT: Final = 56
_last_data_ms: Final = struct.Struct("I").unpack_from
# Plain numbers: to join flags of an enumeration takes longer than the system call.
_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
SEND_NOW: Final = _DONTWAIT | int(socket.MSG_NOSIGNAL)


def _kernel_reports_receipt() -> bool:
    """Whether this kernel reports when data was last received.

    If it does, it reports its uptime for a socket that never received any.
    """
    with socket.socket() as unused:
        try:
            found = unused.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:
            return False
    return len(found) == _INFO_BYTES and _last_data_ms(found, _LAST_DATA_AT)[0] > 0


_KERNEL_REPORTS_RECEIPT: Final = _kernel_reports_receipt()


class BodySocket:
    """Direct access to the TCP socket of a transport, which still owns it: close this before the transport.

    Over TLS the socket carries other bytes than the application's: nothing is read or sent here then.
    """

    __slots__ = ("_plain", "_socket", "send_now")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._socket: socket.socket | None = None
        self._plain = False
        self.send_now: Callable[[bytes, int], int] | None = None
        """``send`` of the socket itself, for the flags :data:`SEND_NOW`; None over TLS."""
        found = transport.get_extra_info("socket")
        if found is not None:
            # With all arguments given, Python makes no system calls to find them.
            self._socket = socket.socket(
                socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=found.fileno()
            )
            self._plain = transport.get_extra_info("sslcontext") is None
            self.send_now = self._socket.send if self._plain else None

    def __del__(self) -> None:
        """Detach: otherwise garbage collection would close a socket that the transport owns."""
        self.close()

    def close(self) -> None:
        """Stop using the socket."""
        lent, self._socket = self._socket, None
        self._plain = False
        self.send_now = None
        if lent is not None:
            lent.detach()

    @property
    def plain(self) -> bool:
        """Whether it can be read here."""
        return self._plain

    def quiet_ns(self) -> int | None:
        """Time since the last bytes were received, to a tick of the kernel; None if unknown."""
        if self._socket is None or not _KERNEL_REPORTS_RECEIPT:
            return None
        try:
            found = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:
            return None
        last_ms: int = _last_data_ms(found, _LAST_DATA_AT)[0]
        return last_ms * NS_PER_MS

    def note_receipts(self) -> None:
        """Have the kernel note from now on when bytes are received; see :meth:`waited_ns`."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)

    def waited_ns(self) -> int | None:
        """How long ago the first byte that is not read was received; 0 if there is none; None if unknown.

        Unknown over TLS, whose layer reads on while its reader is paused. By the wall clock: if that is set
        back meanwhile, bytes seem younger.
        """
        if self._socket is None or not self._plain:
            return None
        try:
            _, noted, _, _ = self._socket.recvmsg(1, _NOTED_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return None
        for level, kind, data in noted:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(data) == _TIMESPEC.size:
                at: tuple[int, int] = _TIMESPEC.unpack(data)
                return max(0, time.time_ns() - at[0] * NS_PER_S - at[1])
        return None

    def read(self, room: memoryview) -> int:
        """Read what is available into ``room``; the number of bytes."""
        end = min(len(room), AT_ONCE)
        at = 0
        while at < end and (found := self._receive(room[at:end])):
            at += found
        return at

    def drop(self, buffer: memoryview, most: int) -> int:
        """Discard up to ``most`` available bytes; how many. The content of ``buffer`` is overwritten."""
        left = most
        while left and (found := self._receive(buffer[:left], socket.MSG_TRUNC)):
            left -= found
        return most - left

    def _receive(self, room: memoryview, how: int = 0) -> int:
        if not self._plain or self._socket is None:
            return 0
        try:
            return self._socket.recv_into(room, len(room), how | _DONTWAIT)
        except OSError:  # nothing available, or disconnected: the loop will find out
            return 0


class DiscardedBody:
    """The rest of a body that is not needed, ``left`` bytes: read into ``buffer`` and discarded."""

    __slots__ = ("_buffer", "_source", "left")

    def __init__(self, source: BodySocket, buffer: memoryview, left: int) -> None:
        self.left = left
        self._buffer = buffer
        self._source = source

    def room(self) -> memoryview:
        """The buffer for the next read."""
        return self._buffer[: min(self.left, PROBE_BYTES if self._source.plain else len(self._buffer))]

    def received(self, nbytes: int) -> bool:
        """Count bytes that were read, and discard what else is available; whether that was all."""
        self.left -= nbytes
        self.left -= self._source.drop(self._buffer, self.left)
        return not self.left


# ------------------------------------------------------------
# When the bytes of a connection reached this machine, however late a busy loop read them.
#
# Bytes that are read now arrived after the last poll that found their socket empty. :class:`LoopTurns` notes
# when that was. A timer makes the loop poll even while nothing happens, so that the instant is old only if
# the loop was held up, or the process stopped. An idle loop is held up by nothing, but its last poll may be
# milliseconds ago, which requests would not have: then the kernel is asked when the bytes that wait came,
# before they are read. Where it does not tell (TLS), it reports how long ago the last segment arrived
# (``TCP_INFO``, in steps of a tick: 1 to 4 ms on most hosts).


BEAT_S: Final = 0.005  # the loop polls at least this often, unless something holds it up
IDLE_BEAT_S: Final = 0.02
IDLE_AFTER: Final = 40
"""After this many beats without any other event they come every ``IDLE_BEAT_S``: an idle gateway took 1.8 %
of a core."""
NEAR_NS: Final = 4 * NS_PER_MS
"""A poll this recent is precise enough: the kernel's value, a call of 1.5 us, is no more precise."""
PEEK_NS: Final = 500 * NS_PER_US
"""A poll this recent is precise enough not to ask when bytes came, a call of 3 us: a busy loop never does.

By polls alone, a request had 2 ms less than its SLO (median; 4.6 at most) at 440 requests a second."""
NEVER_NS: Final = 1 << 62


class LoopTurns:
    """Notes when the event loop polls. After the instant ``before_ns`` there has been a complete poll.

    All events of that poll have been handled. Instants are noted at the start of a turn, before the poll:
    uvloop runs what :meth:`begin` schedules right before it. So there is a whole poll between two such
    instants. A timer adds turns while nothing happens; ``on_beat`` is called by it.
    """

    __slots__ = ("_beats", "_last_ns", "_loop", "_on_beat", "_timer", "before_ns", "clock", "noting")

    def __init__(
        self, clock: Callable[[], int] = time.monotonic_ns, on_beat: Callable[[], None] = lambda: None
    ) -> None:
        self.clock = clock
        self._loop = asyncio.get_running_loop()
        self._on_beat = on_beat
        self.before_ns = self._last_ns = clock()
        self.noting = False  # whether the next poll is to be noted already
        self._beats = 0  # in a row, without any other event
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    def begin(self) -> None:
        """Note the next poll; to be called by everything that the loop does."""
        if not self.noting:
            self.noting = True
            self._loop.call_soon(self._note)

    def close(self) -> None:
        """Stop the timer."""
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
    """When connections began to wait for acceptance: the loop accepts only one in a turn."""

    __slots__ = ("_accepted_ns", "_since_ns", "_turns")

    def __init__(self, turns: LoopTurns) -> None:
        self._turns = turns
        self._since_ns = self._accepted_ns = 0

    def since_ns(self) -> int:
        """A connection is accepted now: an instant at which the queue was still empty."""
        turns = self._turns
        turns.begin()
        if turns.before_ns > self._accepted_ns:  # a whole turn since the last connection found none
            self._since_ns = turns.before_ns
        self._accepted_ns = turns.clock()
        return self._since_ns


class Arrival:
    """The arrival time of what is read from one connection.

    If it took several reads, only the time that bytes waited for the loop counts, not the time that the
    client took to send them: ``arrived_ns`` is when the last byte would have arrived without these waits.
    """

    __slots__ = (
        "_clock", "_paused_ns", "_read_ns", "_received_ns", "_since_ns", "_source", "_turns", "_unpolled_ns",
        "_waited_ns", "oldest_ns",
    )  # fmt: skip

    def __init__(self, source: BodySocket, turns: LoopTurns, since_ns: int) -> None:
        """``since_ns``: when the accepting loop polled last before the connection was there."""
        self._source = source
        self._turns = turns
        self._clock = turns.clock
        # Its bytes may have arrived before it was accepted: no poll has found it empty yet.
        self._since_ns = self._paused_ns = since_ns
        self._unpolled_ns = turns.clock()  # polled from then on; NEVER_NS while it is paused
        self._read_ns = self._waited_ns = 0
        self._received_ns = 0  # when the kernel received what is to be read now; 0 if it was not asked
        self.oldest_ns = 0  # a lower bound of the arrival of what was read last

    def pause(self) -> None:
        """Reading stops: bytes that arrive from now on wait for us."""
        if self._turns.before_ns >= self._unpolled_ns:  # else no poll has looked since the pause before
            self._since_ns = self._paused_ns = self._turns.before_ns
        self._unpolled_ns = NEVER_NS

    def resume(self) -> None:
        """Reading goes on."""
        self._unpolled_ns = self._clock()

    def rested(self, waited_ns: int | None) -> None:
        """While reading was paused nothing came before ``waited_ns`` ago; None if that is not known.

        That is when the last of several segments came which the kernel keeps as one: of several requests the
        first may have come before.
        """
        if waited_ns is not None:
            self._since_ns = max(self._since_ns, self._clock() - waited_ns)

    def bound(self) -> int:
        """The last instant at which its socket was known to be empty."""
        before_ns = self._turns.before_ns
        return self._since_ns if before_ns < self._unpolled_ns else before_ns

    def peek(self) -> None:
        """The first bytes of a request are about to be read: find out when they came."""
        now_ns = self._clock()
        if now_ns - self.bound() > PEEK_NS:
            waited_ns = self._source.waited_ns()
            self._received_ns = 0 if waited_ns is None else now_ns - waited_ns

    def of_single_read(self) -> int:
        """The arrival of a request that was all there was to read."""
        turns = self._turns
        if not turns.noting:
            turns.begin()
        before_ns = turns.before_ns  # bound() inline: this runs for each small request
        bound_ns = self._since_ns if before_ns < self._unpolled_ns else before_ns
        now_ns = self._clock()
        if self._received_ns:
            received_ns, self._received_ns = self._received_ns, 0
            return max(bound_ns, received_ns)
        return bound_ns if now_ns - bound_ns <= NEAR_NS else self._refined(bound_ns, now_ns)

    def read(self, *, first: bool, kept: bool = False, full: bool = False) -> None:
        """Note a read.

        ``first``: it begins a request. ``kept``: it was read some time ago, and is handled now. ``full``: it
        filled its buffer. What the kernel reports is then about bytes that may have come long after these.
        """
        turns = self._turns
        if not turns.noting:
            turns.begin()
        # bound() inline: this runs often for a large body.
        before_ns, now_ns = turns.before_ns, self._clock()
        bound_ns = self._since_ns if before_ns < self._unpolled_ns else before_ns
        if first:
            self._read_ns = self._waited_ns = 0
            self.oldest_ns = self._paused_ns if before_ns < self._unpolled_ns else before_ns
        received_ns, self._received_ns = self._received_ns, 0
        if not (kept or full):
            if received_ns:
                bound_ns = max(bound_ns, received_ns)
            elif now_ns - bound_ns > NEAR_NS:
                bound_ns = self._refined(bound_ns, now_ns)
        self._waited_ns += now_ns - max(bound_ns, self._read_ns)
        self._read_ns = now_ns

    @property
    def arrived_ns(self) -> int:
        """The arrival of what was read so far."""
        return self._read_ns - self._waited_ns

    def _refined(self, bound_ns: int, now_ns: int) -> int:
        quiet_ns = self._source.quiet_ns()
        return bound_ns if quiet_ns is None else max(bound_ns, now_ns - quiet_ns)


# ------------------------------------------------------------
# The gateway's delay: how long requests and answers wait inside a busy gateway.
#
# A request may have waited in its socket before it was read, and an answer waits before it is written. The
# latter is measured, from the end of a lane's action until the response was written to the socket. The former
# takes about as long, for it waits for the same loop. The scheduler reserves time for both.


BOTH_WAYS: Final = 1.5
"""Factor for both ways, which seldom both take longest. Measured at twice what a core can do: with 1, 0.6 %
of answers were late; with 2 none, and 4 % fewer were in time than with 1."""
SHARE: Final = 2  # the delay takes at most this fraction of the time that a request has: a half


class GatewayDelay:
    """The longest delay of the last answers."""

    __slots__ = ("_ended_ns", "_last_ns", "_worst")

    def __init__(self) -> None:
        self._worst = WindowMax()
        self._ended_ns = NEVER_NS  # of the answers being written, the earliest end of a lane's action
        self._last_ns = 0

    def lane_ended(self, ended_ns: int) -> None:
        """An answer is about to be written, whose lane ended at that instant."""
        self._ended_ns = min(self._ended_ns, ended_ns)

    def answers_written(self, now_ns: int) -> None:
        """All these answers have been written."""
        if self._ended_ns != NEVER_NS:
            if now_ns > self._last_ns + VALID_NS:
                self._worst.clear()
            self._last_ns = now_ns
            self._worst.add(now_ns - self._ended_ns)
            self._ended_ns = NEVER_NS

    def reserve_ns(self, given_ns: int, now_ns: int) -> int:
        """The part of a request's time to reserve for the delay."""
        if now_ns > self._last_ns + VALID_NS:
            return 0
        return min(int(BOTH_WAYS * self._worst.value), given_ns // SHARE)
