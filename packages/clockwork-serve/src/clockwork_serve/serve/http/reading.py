"""Whether an HTTP connection reads from its socket, and which one reads next."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from clockwork_serve.serve.gateway.timing import Arrival, BodySocket, LoopTurns


class RoundRobin:
    """Connections that wait to be read: ``at_once`` of them in a turn of the loop, so that it stays short."""

    __slots__ = ("_at_once", "_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, at_once: int = 1) -> None:
        self._loop = loop
        self._at_once = at_once
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, work: Callable[[], None]) -> None:
        """Schedule work after that of others."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        waiting = self._waiting
        left = min(self._at_once, len(waiting))
        try:
            while left:
                left -= 1
                waiting[0]()
                waiting.popleft()
        except BaseException:
            waiting.popleft()
            raise
        finally:
            if waiting:
                self._loop.call_soon(self._step)


class ReadControl:
    """Pauses and resumes reading of a connection. ``feed`` handles read bytes, and may call :meth:`keep`.

    ``source`` reads large bodies from the socket directly; ``arrival`` measures when bytes arrived.
    """

    __slots__ = (
        "_feed", "_kept", "_readers", "_refused", "_resting", "_transport", "arrival", "paused", "source",
    )  # fmt: skip

    def __init__(
        self, transport: asyncio.Transport, readers: RoundRobin, refused: RoundRobin,
        feed: Callable[[memoryview], None], turns: LoopTurns, since_ns: int,
    ) -> None:  # fmt: skip
        self._transport = transport
        self.source = BodySocket(transport)
        self.source.note_receipts()
        self._readers, self._refused = readers, refused
        self._resting = False  # until it is its turn among those that were refused
        self.arrival = Arrival(self.source, turns, since_ns)
        self._feed = feed
        self._kept = b""  # read, and to be fed before anything more is read
        self.paused = False

    def set_paused(self, *, pause: bool) -> bool:
        """Pause or resume reading; whether it was resumed."""
        before = self.paused
        if self._transport.is_closing() or pause == before:
            return False
        self.paused = pause
        if pause:
            self._pause()
        elif self._kept:
            self._readers.add(self._read_on)
        elif not self._resting:
            self._resume()
        return before

    def rest(self) -> None:
        """Go on reading when it is this connection's turn among those whose clients were refused.

        Clients that ask again at once would otherwise fill each turn of the loop with refusals, while answers
        wait to be written.
        """
        if not (self._resting or self._transport.is_closing()):
            self._resting = True
            self._pause()
            self._refused.add(self._rested)

    def _rested(self) -> None:
        self._resting = False
        if not (self._kept or self._transport.is_closing()):  # what is kept came before it rested
            self.arrival.rested(self.source.waited_ns())
        self._read_on()

    def keep(self, rest: memoryview) -> None:
        """Feed these bytes in the loop's next turn."""
        self._kept = bytes(rest)
        self.continue_next_turn()

    def continue_next_turn(self) -> None:
        """Go on reading in the loop's next turn.

        The loop otherwise reads from one socket, and from no other, for as long as that fills the buffer.
        """
        if not self._transport.is_closing():
            self._pause()
            self._readers.add(self._read_on)

    def _read_on(self) -> None:
        if self.paused or self._resting or self._transport.is_closing():
            return
        kept, self._kept = self._kept, b""
        if kept:
            self._feed(memoryview(kept))
        if not (self._kept or self.paused or self._resting or self._transport.is_closing()):
            self._resume()

    def _pause(self) -> None:
        self.arrival.pause()
        self._transport.pause_reading()

    def _resume(self) -> None:
        self.arrival.resume()
        self._transport.resume_reading()
