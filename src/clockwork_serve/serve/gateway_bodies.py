"""A connection's socket past the loop: large bodies are read, as much as is there, to where they stay.

Or nowhere. Responses are sent at once, and the kernel says when bytes came.

The loop reads from a socket once in a turn, and a turn is long where many clients have something to say. What
is read makes room for what waits at the client's end, and on one host that is there at once. What the loop is
given to write it writes at the end of its turn, when the deadline that was kept may be over.

Linux drops what is read with ``MSG_TRUNC`` from a TCP socket without copying it (tcp(7)). Measured, 602 kB
over loopback: 21 us of CPU instead of 61.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Callable
from typing import Final

from clockwork_serve.units import KIB, NS_PER_MS

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


class Source:
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

    def __init__(self, source: Source, buffer: memoryview, left: int) -> None:
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
