"""One HTTP/1.1 connection: bytes to requests, and responses to bytes in the requests' order. It never waits.

Bodies are limited, read to where they stay if they are large, and cut off where they are too slow.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import httptools

from clockwork_serve.serve.gateway import Gateway
from clockwork_serve.serve.gateway_exchange import Exchange, HttpLimits
from clockwork_serve.serve.gateway_regions import is_loopback
from clockwork_serve.serve.gateway_responses import Response, error_response
from clockwork_serve.serve.gateway_routes import Route
from clockwork_serve.units import KIB, MIB

DIRECT_BYTES: Final = 64 * KIB
"""Bodies above this are read from the socket to where they stay."""
JOIN_BYTES: Final = 64 * KIB
"""Responses up to this are copied together, which is cheaper than several buffers in one write."""
PIPELINED_MAX: Final = 128
"""Requests of one connection without an answer, before no more is read from it."""
UNWANTED_MAX: Final = 8 * MIB
"""So much of a body that is not wanted any more is read, so that the connection can be used again."""
LINGER_S: Final = 2.0
"""How long the rest of a request that was refused is read and thrown away, so that its client sees why."""

_WANTED: Final = frozenset(
    {b"content-length", b"content-encoding", b"transfer-encoding", b"inference-header-content-length",
     b"x-slo-ms", b"expect"}
)  # fmt: skip
_IDLE, _HEAD, _BODY = range(3)


class HttpHost(Protocol):
    """What a connection needs of its server. ``buffer`` is where all connections read, one at a time.

    ``tick_s`` is the loop's time, to a second.
    """

    gateway: Gateway
    limits: HttpLimits
    loop: asyncio.AbstractEventLoop
    buffer: memoryview
    tick_s: float
    find_route: Callable[[bytes], Route | None]

    def opened(self, connection: HttpConnection) -> None:
        """A connection was made."""

    def closed(self, connection: HttpConnection) -> None:
        """A connection is gone."""

    def room(self, exchange: Exchange, length: int) -> memoryview:
        """Where to receive a large body."""

    def announce(self, exchange: Exchange) -> None:
        """Ask whether a request with a large body is worth receiving it."""

    def dispatch(self, exchange: Exchange) -> None:
        """Have a request that is complete answered."""


class HttpConnection(asyncio.BufferedProtocol):
    """One client's connection. ``due_s``: when what it waits for must have come."""

    def __init__(self, server: HttpHost) -> None:
        self._server = server
        self._gateway = server.gateway
        self._limits = server.limits
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._queue: deque[Exchange] = deque()  # requests without a sent response, in order
        self._local = False
        self._phase = _IDLE
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._current: Exchange | None = None  # the request whose body is being received
        self._chunks: list[bytes] = []
        self._content_bytes = 0
        self._direct: memoryview | None = None  # where a large body goes; _content_bytes of it have arrived
        self._unwanted_bytes = 0  # of the body of a request that is answered already, so many are to come
        self._closing = False  # nothing that arrives matters any more
        self._paused = False
        self._unsent = False  # the client does not read
        self.due_s = 0.0

    # What the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._local = bool(peer) and is_loopback(peer[0])
        self._server.opened(self)
        self.due_s = self._server.tick_s + self._limits.idle_s

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._direct is not None and not self._closing:
            return self._direct[self._content_bytes :]
        if self._unwanted_bytes and not self._closing:
            return self._server.buffer[: self._unwanted_bytes]
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take in what arrived."""
        if self._closing:
            return
        if self._unwanted_bytes:
            self._unwanted_bytes -= nbytes
            if not self._unwanted_bytes:
                self._parser = httptools.HttpRequestParser(self)
                self._await_next()
            return
        if self._direct is None:
            self._feed(self._server.buffer[:nbytes])
            return
        self._content_bytes += nbytes
        if self._content_bytes == len(self._direct):
            # The parser has not seen this body's end, and never will.
            self._parser = httptools.HttpRequestParser(self)
            self.on_message_complete()

    def eof_received(self) -> bool:
        """The client closed its side: to us, it went away."""
        return False

    def pause_writing(self) -> None:
        """The client does not read; nor do we."""
        self._unsent = True
        self._set_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._unsent = False
        self._set_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, and needs no answer."""
        self._transport = None
        self._closing = True
        self._abandon_all()
        self._server.closed(self)

    # What the parser calls

    def on_message_begin(self) -> None:
        """A request starts."""
        self._phase = _HEAD
        self._head_bytes = -1
        self.due_s = self._server.tick_s + self._limits.header_s
        self._url = b""
        self._headers = {}

    def on_url(self, url: bytes) -> None:
        """Its target, or a piece of it."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; most mean nothing to us."""
        name = name.lower()
        if name in _WANTED:
            self._headers[name] = value

    def on_headers_complete(self) -> None:
        """Now it is known what it wants."""
        if self._closing:
            return
        self._phase = _BODY
        headers, parser = self._headers, self._parser
        exchange = Exchange(self.pump, parser.get_method(), self._server.find_route(self._url))
        exchange.keep_alive = parser.should_keep_alive()
        exchange.local = self._local
        exchange.old = parser.get_http_version() == "1.0"
        self._current = exchange
        self._queue.append(exchange)
        if headers:
            self._read_headers(exchange, headers)

    def on_body(self, content: bytes) -> None:
        """A piece of the body."""
        if self._closing:
            return
        start = self._content_bytes
        self._content_bytes = end = start + len(content)
        if self._direct is not None:
            self._direct[start:end] = content
            return
        if end > self._limits.body_bytes:
            self._refuse(413, _too_large(self._limits.body_bytes, f"{end} and more"))
            return
        self._chunks.append(content)

    def on_message_complete(self) -> None:
        """All of it is there."""
        if self._closing:
            return
        exchange, self._current = self._current, None
        assert exchange is not None
        if self._direct is not None:
            exchange.content = self._direct
            self._direct = None
        elif self._chunks:
            chunks, self._chunks = self._chunks, []
            exchange.content = memoryview(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        self._await_next()
        if exchange.announced_id:
            exchange.on_complete = self._server.dispatch
        else:
            self._server.dispatch(exchange)

    # Inside

    def pump(self) -> None:
        """Send all responses whose turn it is."""
        if self._current is not None and self._current.response is not None:
            self._stop_receiving(self._current)
        queue = self._queue
        while queue and (response := queue[0].response) is not None:
            exchange = queue.popleft()
            if self._transport is None:
                return
            self._write(exchange, response)
            if not exchange.keep_alive:
                self._close()
                return
        if queue and queue[0].wants_continue and self._transport is not None:
            queue[0].wants_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._paused:
            self._set_reading()

    def overdue(self) -> None:
        """It was too slow, or silent for too long."""
        if self._phase == _IDLE:
            if not self._queue:
                self.stop()
            return
        what = "header" if self._phase == _HEAD else "body"
        self._refuse(408, f"the request's {what} did not arrive in time; its connection is closed")

    def stop(self) -> None:
        """Close, whatever is in flight."""
        if self._transport is not None:
            self._transport.close()

    @property
    def idle(self) -> bool:
        """Whether no response is owed."""
        return not self._queue

    def _await_next(self) -> None:
        self._content_bytes = 0
        self._phase = _IDLE
        self.due_s = self._server.tick_s + self._limits.idle_s

    def _stop_receiving(self, exchange: Exchange) -> None:
        """It is answered before its body is there: read the rest and throw it away, if it is not too much."""
        assert self._direct is not None
        self._unwanted_bytes = len(self._direct) - self._content_bytes
        self._current = self._direct = None
        if self._unwanted_bytes > UNWANTED_MAX:
            exchange.keep_alive = False
            self._closing = True

    def _feed(self, data: memoryview) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # Other protocols are not spoken: the request was answered as one of HTTP/1.1, the next follows.
            self._parser = httptools.HttpRequestParser(self)
            rest = data[upgrade.args[0] :]
            if rest and not self._closing:
                self._feed(rest)
            return
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError as error:
            self._refuse(400, f"malformed HTTP request: {error}")
            return
        if self._phase == _HEAD:
            # Where in the first read the header began is not known.
            self._head_bytes = 0 if self._head_bytes < 0 else self._head_bytes + len(data)
            if self._head_bytes > self._limits.header_bytes:
                self._refuse(431, f"header: expected at most {self._limits.header_bytes} bytes, found more")
        if len(self._queue) > PIPELINED_MAX:
            self._set_reading()

    def _read_headers(self, exchange: Exchange, headers: dict[bytes, bytes]) -> None:
        limits = self._limits
        length = int(headers.get(b"content-length", b"0"))
        if length > limits.body_bytes:
            self._refuse(413, _too_large(limits.body_bytes, str(length)))
            return
        expected = headers.get(b"expect")
        if expected is not None:
            if expected.lower() != b"100-continue":
                self._refuse(
                    417, f"header 'Expect': expected 100-continue, found {expected.decode('latin-1')!r}"
                )
                return
            exchange.wants_continue = True
        exchange.encoding = headers.get(b"content-encoding", b"")
        exchange.header_length = headers.get(b"inference-header-content-length")
        slo = headers.get(b"x-slo-ms")
        exchange.slo_header = None if slo is None else slo.decode("latin-1")
        if length > DIRECT_BYTES:
            self._direct = self._server.room(exchange, length)
            self._server.announce(exchange)
        if length or b"transfer-encoding" in headers:
            expected_bytes = length or limits.body_bytes
            self.due_s = self._server.tick_s + limits.body_s + expected_bytes / limits.bytes_per_s
            if exchange.wants_continue:
                self.pump()

    def _write(self, exchange: Exchange, response: Response) -> None:
        transport = self._transport
        assert transport is not None
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

    def _refuse(self, status: int, message: str) -> None:
        """Answer what cannot be read to its end, after what came before it, and close."""
        if self._closing:
            return
        self._closing = True
        exchange = self._current
        if exchange is None:
            exchange = Exchange(self.pump, b"", None)
            self._queue.append(exchange)
        self._current = None
        self._direct = None
        self._chunks = []
        self._gateway.drop_body(exchange)
        self._gateway.announcements.withdraw(exchange.announced_id)
        exchange.keep_alive = False
        exchange.respond(error_response(status, message))

    def _close(self) -> None:
        """Close once all that was written is sent; and read on for a while if the client still sends."""
        transport = self._transport
        assert transport is not None
        self._abandon_all()
        if not self._closing:
            self._closing = True
            transport.close()
            return
        if not transport.is_closing():
            transport.write_eof()
        self._server.loop.call_later(LINGER_S, self.stop)

    def _abandon_all(self) -> None:
        """Nobody waits for the requests that are left."""
        for exchange in self._queue:
            exchange.abandoned = True
            self._gateway.drop_body(exchange)
            self._gateway.announcements.withdraw(exchange.announced_id)
            if exchange.request_id:
                self._gateway.cancel(exchange.request_id)
        self._queue.clear()
        self._current = None
        self._direct = None

    def _set_reading(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        pause = self._unsent or len(self._queue) > PIPELINED_MAX
        if pause and not self._paused:
            transport.pause_reading()
        elif self._paused and not pause:
            transport.resume_reading()
        self._paused = pause


def _too_large(limit: int, found: str) -> str:
    return f"body: expected at most {limit} bytes, found {found}; send less at once"
