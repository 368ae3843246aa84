"""What an HTTP connection sends, and whether its client reads it; cutting it off is for others."""

from __future__ import annotations

import asyncio
import math
from typing import Final, Protocol

from clockwork_serve.oip.records import Buffer
from clockwork_serve.serve.gateway import Gateway
from clockwork_serve.serve.gateway_bodies import SEND_NOW, Source
from clockwork_serve.serve.gateway_exchange import Exchange
from clockwork_serve.serve.gateway_limits import HttpLimits
from clockwork_serve.serve.gateway_responses import Response
from clockwork_serve.units import KIB, NS_PER_MS

JOIN_BYTES: Final = 64 * KIB
"""Responses up to this are copied together, which is cheaper than several buffers in one write."""


HELD_MAX: Final = 32
"""Responses that wait for one another at most: about half a millisecond."""
HELD_NS: Final = NS_PER_MS
"""And for no longer than this, where the core is not ours alone: they were in time when they were made."""


class Sender(Protocol):
    """``tick_s`` is the loop's time, to a second; ``held_ns`` is since when the first of ``held`` waits."""

    tick_s: float
    gateway: Gateway
    held: list[Outbox]
    held_ns: int


class Outbox:
    """``unread``: more was written than the loop likes to hold; by ``due_s`` the client must have read it."""

    __slots__ = ("_held", "_limits", "_sender", "_socket", "_transport", "due_s", "unread")

    def __init__(
        self, transport: asyncio.Transport, limits: HttpLimits, sender: Sender, sock: Source
    ) -> None:
        self._transport = transport
        self._socket = sock
        self._limits = limits
        self._sender = sender
        self._held = b""
        self.unread = False
        self.due_s = math.inf

    def write(self, exchange: Exchange, response: Response) -> None:
        """Send a response."""
        connection = b""
        if not exchange.keep_alive:
            connection = b"Connection: close\r\n"
        elif exchange.old:
            connection = b"Connection: keep-alive\r\n"
        length = response.body_bytes
        message: bytes | list[Buffer]
        message = head = response.head(length, connection)
        if exchange.method != b"HEAD":
            message = [head, *response.parts]
            if length <= JOIN_BYTES:
                message = b"".join(message)
        sender = self._sender
        if isinstance(message, list):
            self.flush()
            self._transport.writelines(message)
        elif self._held:
            self._held += message
            if len(self._held) > JOIN_BYTES:
                self.flush()
        elif sender.gateway.batching and not self.unread:
            self._held = message
            now_ns = sender.gateway.looked_ns
            if not sender.held:
                sender.held_ns = now_ns
            sender.held.append(self)
            if len(sender.held) >= HELD_MAX or now_ns - sender.held_ns > HELD_NS:
                send_held(sender.held)
        else:
            self._send(message)
        if self.unread:
            self._expect()

    def flush(self) -> None:
        """Send what was held."""
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._send(held)

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

    def _send(self, message: bytes) -> None:
        """Now, and not at the end of the loop's turn, unless something else is still to be sent."""
        transport, send_now = self._transport, self._socket.send_now
        if send_now is not None and not transport.get_write_buffer_size():
            try:
                sent = send_now(message, SEND_NOW)
            except OSError:  # it is full, or broken: that is for the loop to find
                sent = 0
            if sent == len(message):
                return
            message = message[sent:]
        transport.write(message)

    def _expect(self) -> None:
        limits = self._limits
        allowed_s = limits.send_s + self._transport.get_write_buffer_size() / limits.bytes_per_s
        self.due_s = self._sender.tick_s + allowed_s


def send_held(held: list[Outbox]) -> None:
    """Send what all of them hold, one after the other: a client that wakes up finds more to do."""
    for outbox in held:
        outbox.flush()
    held.clear()
