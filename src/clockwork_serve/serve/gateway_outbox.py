"""What an HTTP connection sends, and whether its client reads it; cutting it off is for others."""

from __future__ import annotations

import asyncio
import math
from typing import Final, Protocol

from clockwork_serve.serve.gateway_exchange import Exchange
from clockwork_serve.serve.gateway_limits import HttpLimits
from clockwork_serve.serve.gateway_responses import Response
from clockwork_serve.units import KIB

JOIN_BYTES: Final = 64 * KIB
"""Responses up to this are copied together, which is cheaper than several buffers in one write."""


class Ticking(Protocol):
    """``tick_s`` is the loop's time, to a second."""

    tick_s: float


class Outbox:
    """``unread``: more was written than the loop likes to hold; by ``due_s`` the client must have read it."""

    __slots__ = ("_clock", "_limits", "_transport", "due_s", "unread")

    def __init__(self, transport: asyncio.Transport, limits: HttpLimits, clock: Ticking) -> None:
        self._transport = transport
        self._limits = limits
        self._clock = clock
        self.unread = False
        self.due_s = math.inf

    def write(self, exchange: Exchange, response: Response) -> None:
        """Send a response."""
        transport = self._transport
        connection = b""
        if not exchange.keep_alive:
            connection = b"Connection: close\r\n"
        elif exchange.old:
            connection = b"Connection: keep-alive\r\n"
        head = response.head(connection)
        parts = response.parts
        if exchange.method == b"HEAD":
            transport.write(head)
        elif sum(map(len, parts)) <= JOIN_BYTES:
            transport.write(b"".join((head, *parts)))
        else:
            transport.writelines([head, *parts])
        if self.unread:
            self._expect()

    @property
    def full(self) -> bool:
        """Whether a client left so much unread that it gets no more. One response alone is never too much."""
        return self.unread and self._transport.get_write_buffer_size() > self._limits.unsent_bytes

    def pause(self) -> None:
        """The client does not read."""
        self.unread = True
        self._expect()

    def resume(self) -> None:
        """It reads again."""
        self.unread = False
        self.due_s = math.inf

    def _expect(self) -> None:
        limits = self._limits
        allowed_s = limits.send_s + self._transport.get_write_buffer_size() / limits.bytes_per_s
        self.due_s = self._clock.tick_s + allowed_s
