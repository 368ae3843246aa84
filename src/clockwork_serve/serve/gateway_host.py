"""What an HTTP connection needs of the server that it belongs to. Nothing is done here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from clockwork_serve.serve.gateway import Gateway
from clockwork_serve.serve.gateway_exchange import Exchange
from clockwork_serve.serve.gateway_intake import RoundRobin
from clockwork_serve.serve.gateway_keys import KeyRing
from clockwork_serve.serve.gateway_limits import HttpLimits
from clockwork_serve.serve.gateway_outbox import Outbox
from clockwork_serve.serve.gateway_routes import Route

if TYPE_CHECKING:
    from clockwork_serve.serve.gateway_connection import HttpConnection


class HttpHost(Protocol):
    """``buffer`` is where all connections read, one at a time, and ``received`` is the memory behind it.

    ``small_buffer`` is its beginning.

    ``tick_s`` is the loop's time, to a second. ``arriving_bytes`` of large bodies are here, outside the
    region, and not whole yet.
    """

    gateway: Gateway
    limits: HttpLimits
    keys: KeyRing | None
    loop: asyncio.AbstractEventLoop
    readers: RoundRobin
    buffer: memoryview
    small_buffer: memoryview
    received: bytearray
    tick_s: float
    arriving_bytes: int
    held: list[Outbox]
    held_ns: int
    find_route: Callable[[bytes], Route | None]

    def opened(self, connection: HttpConnection) -> None:
        """A connection was made; perhaps one too many."""

    def reached(self, limit: str) -> None:
        """A client was cut off by that limit; to be told in the log."""

    def closed(self, connection: HttpConnection) -> None:
        """A connection is gone."""

    def room(self, exchange: Exchange, length: int) -> memoryview:
        """Where to receive a large body."""

    def announce(self, exchange: Exchange, arrived_ns: Callable[[], int]) -> None:
        """Ask whether a request with a large body is worth receiving it."""

    def dispatch(self, exchange: Exchange) -> None:
        """Have a request that is complete answered."""
