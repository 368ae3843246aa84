"""Whether an HTTP connection reads from its socket, and how much is on its way; what it is, is for others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from clockwork_serve.serve.gateway_arrivals import Arrival, Turns
from clockwork_serve.serve.gateway_bodies import Source


class Counting(Protocol):
    """``arriving_bytes`` of large bodies are here, outside the region, and not whole yet."""

    arriving_bytes: int


class Arriving:
    """One connection's part of that."""

    __slots__ = ("_all", "_bytes")

    def __init__(self, all_: Counting) -> None:
        self._all = all_
        self._bytes = 0

    def add(self, nbytes: int) -> None:
        """More is here."""
        self._bytes += nbytes
        self._all.arriving_bytes += nbytes

    def forget(self) -> None:
        """The body is whole, or comes to nothing."""
        self._all.arriving_bytes -= self._bytes
        self._bytes = 0


class RoundRobin:
    """Who has much to read: one of them in a turn of the loop, so that many hold it no longer than one."""

    __slots__ = ("_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, work: Callable[[], None]) -> None:
        """Do that after what others asked for."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        try:
            self._waiting[0]()
        finally:
            self._waiting.popleft()
            if self._waiting:
                self._loop.call_soon(self._step)


class Intake:
    """``paused``: it is not to read until told so. ``feed`` takes what was read, and may keep some of it.

    From ``source`` large bodies are read past the loop; ``arrival`` knows when what was read came.
    """

    __slots__ = ("_feed", "_kept", "_readers", "_transport", "arrival", "paused", "source")

    def __init__(
        self,
        transport: asyncio.Transport,
        readers: RoundRobin,
        feed: Callable[[memoryview], None],
        turns: Turns,
        since_ns: int,
    ) -> None:
        self._transport = transport
        self.source = Source(transport)
        self._readers = readers
        self.arrival = Arrival(self.source, turns, since_ns)
        self._feed = feed
        self._kept = b""  # read, and to be fed before anything more is read
        self.paused = False

    def hold(self, *, pause: bool) -> bool:
        """Read no more, or read on; whether it reads again that did not."""
        before = self.paused
        if self._transport.is_closing() or pause == before:
            return False
        self.paused = pause
        if pause:
            self._pause()
        elif self._kept:
            self._readers.add(self._read_on)
        else:
            self._resume()
        return before

    def keep(self, rest: memoryview) -> None:
        """Feed that in the loop's next turn."""
        self._kept = bytes(rest)
        self.let_others_go_first()

    def let_others_go_first(self) -> None:
        """Read on in the loop's next turn.

        The loop reads from one socket for as long as that fills a buffer, and looks at no other.
        """
        if not self._transport.is_closing():
            self._pause()
            self._readers.add(self._read_on)

    def _read_on(self) -> None:
        if self.paused or self._transport.is_closing():
            return
        kept, self._kept = self._kept, b""
        if kept:
            self._feed(memoryview(kept))
        if not (self._kept or self.paused or self._transport.is_closing()):
            self._resume()

    def _pause(self) -> None:
        self.arrival.pause()
        self._transport.pause_reading()

    def _resume(self) -> None:
        self.arrival.resume()
        self._transport.resume_reading()
