"""Connections spread evenly over the gateways that share a port: who accepts one passes it to who has fewest.

The kernel spreads them by a hash, which knows no numbers: of 16 connections, one of two gateways gets 10 or
more almost every second time. Passing takes a message between two gateways, once in a connection's life. It
never holds a connection up: one that nobody else takes is kept. A gateway whose loop does not turn, as one
that is stopped, is passed none: it would neither read it nor refuse it.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import numpy as np
import numpy.typing as npt
from msgspec import Struct

BURST: Final = 64
"""Most connections that are taken over before the loop may do other things."""
BEAT_S: Final = 0.25
STILL: Final = 3
"""A gateway that has not beaten by so many of our own beats gets none: nobody is slow because we were."""
_FD: Final = struct.Struct("i")
_SINCE: Final = struct.Struct("q")


class Tally:
    """How many connections each gateway has, in a file that all map; ``beats``: how its loop turns.

    Row ``i`` counts the connections that gateway ``i`` gave to each (itself included), the last two rows
    those that have ended, and beats. Every cell has one writer: ``i`` writes row ``i`` and its own cells of
    the last two. Nothing is locked: who reads in the middle is wrong by one, and the next connection sets it
    right.
    """

    def __init__(self, path: Path, gateways: int, number: int) -> None:
        """What an earlier process of that number had has ended with it."""
        size = (gateways + 2) * gateways * 8
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            self._memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        cells = np.frombuffer(self._memory, np.int64).reshape(gateways + 2, gateways)
        self._given: npt.NDArray[np.int64] = cells[:gateways]
        self._ended: npt.NDArray[np.int64] = cells[gateways]
        self.beats: npt.NDArray[np.int64] = cells[gateways + 1]
        self._number = number
        self._ended[number] = self._given[:, number].sum()

    def open(self) -> npt.NDArray[np.int64]:
        """By gateway, how many it has or is about to be given."""
        found: npt.NDArray[np.int64] = self._given.sum(axis=0) - self._ended
        return found

    def gave(self, to: int) -> None:
        """One more is that gateway's; it may be our own."""
        self._given[self._number, to] += 1

    def ended(self) -> None:
        """One of ours is gone."""
        self._ended[self._number] += 1

    def beat(self) -> None:
        """Our loop turned once more."""
        self.beats[self._number] += 1


class Share(Struct, frozen=True):
    """Gateway ``number`` of ``gateways`` (from 0), which meet in ``folder`` under a port's ``name``."""

    folder: Path
    name: str
    gateways: int
    number: int


class Sharing:
    """One gateway's part in it. All methods are for the loop's own thread. Raises OSError."""

    def __init__(self, share: Share) -> None:
        self._tally = Tally(share.folder / f"{share.name}.tally", share.gateways, share.number)
        self._number = number = share.number
        self._take: Callable[[socket.socket, int], None] = lambda accepted, _: accepted.close()
        self._paths = [str(share.folder / f"{share.name}-{other}.sock") for other in range(share.gateways)]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # noqa: FBT003 - the socket's own word
        own = Path(self._paths[number])
        own.unlink(missing_ok=True)
        self._socket.bind(str(own))
        own.chmod(0o600)
        self._loop = asyncio.get_running_loop()
        self._tally.beat()
        self._beats = self._tally.beats.copy()  # as we saw them when we beat last
        self._still = np.zeros(share.gateways, np.int64)  # by gateway, our beats since its last one
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, take: Callable[[socket.socket, int], None]) -> None:
        """Have ``take`` called with connections of other gateways, and since when they may wait."""
        self._take = take
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._beat()

    def passed_on(self, fd: int, since_ns: int = 0) -> bool:
        """Whether another gateway has that connection now, and ours can be closed. It may wait since then.

        Else it counts as ours, until :meth:`ended`.
        """
        connections = self._tally.open()
        own = connections[self._number]
        if connections.min() < own:
            # Not ``send_fds``: it ignores the address.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(fd))]
            for other in map(int, np.argsort(connections, kind="stable")):
                if connections[other] >= own:
                    break
                if self._stands_still(other):
                    continue
                try:
                    self._socket.sendmsg([_SINCE.pack(since_ns)], rights, 0, self._paths[other])
                except OSError:
                    continue  # it is not there, or has not taken in what it was given before
                self._tally.gave(other)
                return True
        self._tally.gave(self._number)
        return False

    def ended(self) -> None:
        """A connection that counted as ours is gone."""
        self._tally.ended()

    def close(self) -> None:
        """Take no more; what was given and not taken is closed."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        Path(self._paths[self._number]).unlink(missing_ok=True)

    def _stands_still(self, other: int) -> bool:
        """Whether a gateway's loop does not turn. One that was started again since our last beat does."""
        return bool(self._still[other] >= STILL and self._tally.beats[other] == self._beats[other])

    def _beat(self) -> None:
        self._timer = self._loop.call_later(BEAT_S, self._beat)
        self._tally.beat()
        beats = self._tally.beats.copy()
        self._still = np.where(beats == self._beats, self._still + 1, 0)
        self._beats = beats

    def _receive(self) -> None:
        for _ in range(BURST):
            try:
                told, fds, _, _ = socket.recv_fds(self._socket, _SINCE.size, 1)
            except (BlockingIOError, InterruptedError):
                return
            if not fds:
                self._tally.ended()  # the system had no more files for us, and closed it
            for fd in fds:
                self._take(socket.socket(fileno=fd), *_SINCE.unpack(told))


class Newcomer(asyncio.Protocol):
    """A connection that the loop accepted: it goes to another gateway before it is read, or becomes ours.

    So it is where nothing is encrypted, for a socket that we accept ourselves costs 0.1 ms more than one that
    the loop accepts.
    """

    def __init__(self, sharing: Sharing, make: Callable[[], asyncio.BaseProtocol], since_ns: int) -> None:
        self._since_ns = since_ns
        self._sharing = sharing
        self._make = make

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Pass it on, or have what ``make`` gives take it from here."""
        made = cast("asyncio.Transport", transport)
        if self._sharing.passed_on(made.get_extra_info("socket").fileno(), self._since_ns):
            made.abort()  # it lives on where it went
            return
        protocol = self._make()
        made.set_protocol(protocol)
        protocol.connection_made(made)
