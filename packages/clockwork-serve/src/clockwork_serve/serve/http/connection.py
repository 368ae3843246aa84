"""One HTTP/1.1 connection: parses requests, and writes responses in the requests' order.

Also: the parser's callbacks, and a cache for the last head.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import httptools

from clockwork_serve.config import Settings
from clockwork_serve.oip import TRACE_HEADERS
from clockwork_serve.serve.gateway.access import AccessControl
from clockwork_serve.serve.gateway.client_shm import is_loopback
from clockwork_serve.serve.gateway.requests import spread_s
from clockwork_serve.serve.gateway.settings import (
    DISCARDED_MAX,
    LINGER_S,
    PIPELINED_MAX,
    excess,
    json_excess,
    overdue,
)
from clockwork_serve.serve.gateway.timing import AT_ONCE, DiscardedBody
from clockwork_serve.serve.http.exchange import (
    BODY_OF_CONNECT,
    HEADERS_READ,
    SINGLE_HEADERS,
    HttpExchange,
    Outbox,
    OutboxServer,
    byte_count,
    denial,
)
from clockwork_serve.serve.http.reading import ReadControl, RoundRobin
from clockwork_serve.serve.http.responses import HttpResponse, error_response, internal_error_response
from clockwork_serve.serve.http.routes import Route
from clockwork_serve.units import KIB, NS_PER_S

# ------------------------------------------------------------
# The last head of a connection, which need not be parsed again: most clients send the same one each time.
#
# A head is kept only if it determines how its request is read: with a length, and without encoding, Expect or
# Connection: close.


HEAD_BYTES_MAX: Final = 2048
TURN_BYTES: Final = KIB  # parsed at a time, before requests are counted; more if it is a body of known length
_END: Final = b"\r\n\r\n"
_OTHERWISE: Final = (b"transfer-encoding", b"content-encoding", b"expect")


class HeadParser:
    """Drives the parser, and collects what it reports of a head."""

    TURN_MAX: Final = 8
    """Requests handled at once, about a millisecond; further ones are left for the loop's next turn."""

    def __init__(self) -> None:
        self.parser: Any = None  # it refers to us; None before there is something to parse
        self.plain_head = b""  # to be parsed instead of the one that was
        self.begin_head()

    def new_parser(self) -> None:
        """Start a new parser: the next byte begins a request."""
        self.parser = httptools.HttpRequestParser(self)

    def parse(self, data: memoryview, body_left: int) -> memoryview:
        """Parse a little, or the rest of a body; what remains to be parsed.

        Another protocol is not spoken: an upgrade to one is ignored, and what follows its head is parsed as
        its body, if it has one, else as the next request.
        """
        size = max(body_left, TURN_BYTES)
        try:
            self.parser.feed_data(data[:size])
        except httptools.HttpParserUpgrade as upgrade:
            self.new_parser()
            plain, self.plain_head = self.plain_head, b""
            if plain:
                self.parser.feed_data(plain)
            return data[upgrade.args[0] :]
        return data[size:]

    def head_without_upgrade(self) -> bytes:
        """The head as it would be without ``Upgrade``, if a body follows it, else b"".

        A parser that has seen that header leaves the body to the other protocol.
        """
        headers, method = self.headers, self.parser.get_method()
        has_body = byte_count(headers.get(b"content-length", b"0")) or b"transfer-encoding" in headers
        if method == b"CONNECT" or not has_body:
            return b""
        version = self.parser.get_http_version().encode()
        last = b"keep-alive" if self.parser.should_keep_alive() else b"close"
        fields = b"".join(b"%s: %s\r\n" % field for field in headers.items())
        return b"%s %s HTTP/%s\r\nConnection: %s\r\n%s\r\n" % (method, self.url, version, last, fields)

    def begin_head(self) -> None:
        """Reset for another request's head."""
        self.url = self.plain_head = self.repeated = b""
        self.headers: dict[bytes, bytes] = {}
        self._header_count = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """The request's target, or a piece of it."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; most are ignored."""
        self._header_count += 1
        self._header_bytes += len(name) + len(value)
        name = name.lower()
        if name in HEADERS_READ:
            if name in self.headers and name in SINGLE_HEADERS:
                self.repeated = name
            self.headers[name] = value
        elif name in TRACE_HEADERS:
            before = self.headers.get(name)
            self.headers[name] = value if before is None else b"%s,%s" % (before, value)

    def limit_error(self, settings: Settings) -> str:
        """The error text for a head beyond a limit; "" if it is within all."""
        if self._header_count > settings.max_headers:
            return excess("max_headers", settings.max_headers, self._header_count)
        if self._header_bytes + len(self.url) > settings.max_head:
            return excess("max_head", settings.max_head)
        return ""

    def body_limit_error(self, settings: Settings, length: int) -> str:
        """The error text for a body of ``length`` beyond a limit, by its head; "" if it is within all."""
        if length > settings.max_body:
            return excess("max_body", settings.max_body, length)
        binary = b"inference-header-content-length" in self.headers
        return "" if binary else json_excess(settings, length)


class ParsedHead:
    """A head to be recognised: ``raw`` are its bytes; with its body a request has ``whole`` bytes."""

    __slots__ = (
        "_accepted",
        "_header_length",
        "_json_length",
        "_local",
        "_method",
        "_route",
        "_slo",
        "_trace",
        "headers",
        "raw",
        "whole",
    )

    def __init__(self, raw: bytes, whole: int, headers: dict[bytes, bytes], like: HttpExchange) -> None:
        self.raw = raw
        self.whole = whole
        self.headers = headers
        self._method, self._route, self._local = like.method, like.route, like.local
        self._header_length, self._slo, self._accepted = like.header_length, like.slo_header, like.accepted
        self._trace = like.trace
        length = like.header_length
        self._json_length = None if length is None else byte_count(length)

    def matches(self, received: bytearray, nbytes: int) -> bool:
        """Whether the received bytes are exactly one request with this head."""
        return nbytes == self.whole and received.startswith(self.raw)

    def new_exchange(self, on_response: Callable[[], None]) -> HttpExchange:
        """An exchange for another request with this head."""
        exchange = HttpExchange(on_response, self._method, self._route)
        exchange.keep_alive = True
        exchange.local = self._local
        exchange.header_length = self._header_length
        exchange.json_length = self._json_length
        exchange.accepted = self._accepted
        exchange.slo_header = self._slo
        if self._trace:
            exchange.trace = self._trace
        return exchange


def head_of(data: memoryview, exchange: HttpExchange, headers: dict[bytes, bytes]) -> ParsedHead | None:
    """The head of ``data``, which is exactly one request; None if such requests must be parsed each time."""
    size = len(data) - len(exchange.content)
    if size > HEAD_BYTES_MAX or not exchange.keep_alive or exchange.old or exchange.route is None:
        return None
    if byte_count(headers.get(b"content-length", b"0")) != len(exchange.content):
        return None
    if any(name in headers for name in _OTHERWISE):
        return None
    raw = bytes(data[:size])
    # Empty lines before it, or after its body, are not part of it.
    if raw.find(_END) != size - len(_END):
        return None
    return ParsedHead(raw, len(data), headers, exchange)


# ------------------------------------------------------------
# How much of an HTTP connection's body is incomplete.


class IncompleteBody:
    """The bytes of one connection's incomplete large body, within its server's total."""

    __slots__ = ("_all", "_bytes")

    def __init__(self, all_: HttpHost) -> None:
        self._all = all_
        self._bytes = 0

    def add(self, nbytes: int) -> None:
        """Count more bytes."""
        self._bytes += nbytes
        self._all.arriving_bytes += nbytes

    def forget(self) -> None:
        """The body is complete or dropped."""
        self._all.arriving_bytes -= self._bytes
        self._bytes = 0


# ------------------------------------------------------------
# What an HTTP connection needs of its server.


class HttpHost(OutboxServer, Protocol):
    """What a connection needs of its server.

    All connections read into ``buffer``, one at a time; ``received`` is its memory, ``small_buffer`` its
    first part. ``arriving_bytes`` counts large bodies that are incomplete and outside of the region.
    """

    access: AccessControl
    loop: asyncio.AbstractEventLoop
    readers: RoundRobin
    refused: RoundRobin
    buffer: memoryview
    small_buffer: memoryview
    received: bytearray
    arriving_bytes: int
    find_route: Callable[[bytes], Route | None]

    def opened(self, connection: HttpConnection) -> None:
        """A connection was made; it may exceed the limit."""

    def asked(self, connection: HttpConnection) -> None:
        """A connection that was ``quiet`` has a request."""

    def count_disconnect(self, limit: str) -> None:
        """A client was disconnected by the limit of that setting; counted for the log."""

    def closed(self, connection: HttpConnection) -> None:
        """A connection was closed."""

    def body_buffer(self, exchange: HttpExchange, length: int) -> memoryview:
        """The buffer for a large body."""

    def room(self, nbytes: int) -> memoryview:
        """Memory outside of the region."""

    def query_admission(self, exchange: HttpExchange, arrived_ns: Callable[[], int]) -> None:
        """Send an admission query for a request with a large body."""

    def dispatch(self, exchange: HttpExchange) -> None:
        """Handle a complete request."""


# ------------------------------------------------------------
# One HTTP/1.1 connection: bytes to requests, and responses to bytes in the requests' order.
#
# Bodies are limited in size, and read into their own buffers if they are large. Clients that send or read too
# slowly are disconnected.


DIRECT_BYTES: Final = 64 * KIB  # bodies above this size are read from the socket into their own buffer

NO_ANSWER: Final = 400  # the least status of what is no answer: refused, expired, wrong

_IDLE, _HEAD, _BODY = range(3)


class HttpConnection(HeadParser, asyncio.BufferedProtocol):
    """One client's connection, from the address ``host``.

    ``due_s``: by when the client must have sent what is expected next. While it is ``quiet``, its server
    disconnects it for another one, where there is no room for both.
    """

    def __init__(self, server: HttpHost, since_ns: int | None = None) -> None:
        """``since_ns``: since when it may have waited, if another gateway accepted it."""
        super().__init__()
        self._since_ns = since_ns
        self._server = server
        self._gateway = server.gateway
        self._settings = server.config.settings
        self._transport: asyncio.Transport | None = None
        self._outbox: Outbox
        self._read_control: ReadControl
        self._queue: deque[HttpExchange] = deque()  # requests without a sent response, in order
        self._local, self._phase = False, _IDLE
        self._head: ParsedHead | None = None  # of the last request, if it need not be parsed again
        self._complete: list[HttpExchange] = []  # requests completed by this read
        self._head_bytes = 0  # since the head's or the last body piece's read; -1: this read
        self._current: HttpExchange | None = None  # the request whose body is being received
        self._content: bytes | memoryview = b""
        self._content_bytes = self._length = 0  # received of the body; its whole length, if known
        self._direct: memoryview | None = None  # buffer of a large body; _content_bytes of it are filled
        self._discarding: DiscardedBody | None = None  # the rest of the body of a request that is answered
        self._incomplete = IncompleteBody(server)
        self._began_bytes = -1  # size of this read, if the request began in it
        self._closing = self._stopped = False  # input is discarded; nothing more is written
        self.due_s = 0.0
        self.host = ""
        self.quiet = False

    # Called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; called by the loop, or by what accepted the connection."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self.host = str(peer[0]) if peer else ""
        self._local = bool(peer) and is_loopback(peer[0])
        turns = self._gateway.turns
        since_ns = turns.before_ns if self._since_ns is None else self._since_ns
        self._read_control = ReadControl(
            self._transport, self._server.readers, self._server.refused, self._feed, turns, since_ns
        )
        self._outbox = Outbox(self._transport, self._server, self._read_control.source)
        self.new_parser()
        self.due_s = self._server.tick_s + self._settings.head_s  # not idle_s: there was no request yet
        self._server.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """The buffer for the next read."""
        if self._direct is not None and not self._closing:
            return self._direct[self._content_bytes : self._content_bytes + AT_ONCE]
        if self._discarding is not None and not self._closing:
            return self._discarding.room()
        if self._phase == _IDLE and not self._closing:
            self._read_control.arrival.peek()
        # Small reads where they may hold many requests or chunks, which are handled while all others wait.
        small, left = self._server.small_buffer, self._length - self._content_bytes
        return self._server.buffer[:left] if left > len(small) else small

    def buffer_updated(self, nbytes: int) -> None:
        """Handle bytes that were read."""
        if self._closing:
            return
        if self._discarding is not None:
            if self._discarding.received(nbytes):
                self._discarding = None
                self.new_parser()
                self._await_next()
            return
        if self._direct is None:
            head = self._head
            if head is not None and self._phase == _IDLE and head.matches(self._server.received, nbytes):
                self._handle_same_head(head)
                return
            self._feed(self._server.buffer[:nbytes], nbytes)
            if nbytes == len(self._server.small_buffer) and not self._length:
                self._read_control.continue_next_turn()
            return
        nbytes += self._read_control.source.read(self._direct[self._content_bytes + nbytes :])
        self._content_bytes += nbytes
        self._read_control.arrival.read(first=False)
        self._began_bytes = -1
        self._count(nbytes)
        if self._direct is not None and self._content_bytes == len(self._direct):
            # The parser did not see this body, so start a new one.
            self.new_parser()
            self.on_message_complete()
        elif nbytes >= AT_ONCE:
            self._read_control.continue_next_turn()

    def eof_received(self) -> bool:
        """The client closed its side: close ours."""
        return False

    def pause_writing(self) -> None:
        """The client does not read its responses: read no requests either."""
        self._outbox.pause()
        self._update_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._outbox.resume()
        self._update_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all requests, and break reference cycles, which would keep their buffers."""
        self._transport = self.parser = None
        self._read_control.source.close()
        del self._outbox, self._read_control  # over TLS their transport refers to us
        self._closing = True
        self._abandon_all()
        self._server.closed(self)

    # Called by the parser

    def on_message_begin(self) -> None:
        """A request begins."""
        self._phase, self._head_bytes = _HEAD, -1
        self.due_s = self._server.tick_s + self._settings.head_s
        self.begin_head()

    def on_headers_complete(self) -> None:
        """The head is complete: check its limits and its API key."""
        if self._closing:
            return
        self._phase, self._head_bytes = _BODY, -1
        headers, parser = self.headers, self.parser
        wrong = self.limit_error(self._settings)
        if parser.should_upgrade() and not wrong:
            self.plain_head = self.head_without_upgrade()
            if self.plain_head:
                return  # and come back with that
        exchange = HttpExchange(self.pump, parser.get_method(), self._server.find_route(self.url))
        if exchange.route is None:
            exchange.target = bytes(self.url)
        exchange.keep_alive = parser.should_keep_alive()
        exchange.local, exchange.old = self._local, parser.get_http_version() == "1.0"
        self._current = exchange
        self._queue.append(exchange)
        if wrong:
            self._refuse(431, wrong)
        elif self.repeated:
            self._refuse(400, f"header {self.repeated.decode()}: expected it once, found it more often")
        elif (denied := denial(self._server.access, exchange, headers)) is not None:
            self._refuse_with(denied)
        elif headers:
            self._read_headers(exchange, headers)

    def on_body(self, content: bytes) -> None:
        """A piece of the body."""
        if self._closing:
            return
        start, end = self._content_bytes, self._content_bytes + len(content)
        self._content_bytes = end
        if self._direct is not None:
            self._direct[start:end] = content
            self._count(len(content))
            return
        if end > self._settings.max_body:
            self._refuse(413, excess("max_body", self._settings.max_body))
        elif not self._content:
            self._content = content
        else:
            room = self._content
            if isinstance(room, bytes):
                # Not a list of pieces, which may be many and small. A buffer for the longest body takes no
                # memory before it is written to, and never grows, so nothing is moved.
                before, room = room, self._server.room(self._settings.max_body)
                room[:start] = before
                self._content = room
            room[start:end] = content
            self._count(len(content))

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self._closing or self.plain_head:
            return
        exchange, self._current = self._current, None
        assert exchange is not None
        if self.quiet:
            self._server.asked(self)
        if not exchange.arrival_ns:
            exchange.arrival_ns = self._arrived_ns()
        if self._direct is not None:
            exchange.content, self._direct = self._direct, None
        else:
            self._complete.append(exchange)
            if self._content:
                exchange.content = memoryview(self._content)[: self._content_bytes]
                self._content = b""
        self._await_next()
        if self._gateway.admission_queries.must_wait(exchange.query_id):
            exchange.on_complete = self._server.dispatch
        else:
            self._server.dispatch(exchange)

    # Inside

    def pump(self) -> None:
        """Write all responses that are next in order."""
        if self._transport is None:
            return
        if self._current is not None and self._current.response is not None:
            self._stop_receiving(self._current)
        queue = self._queue
        while queue and (response := queue[0].response) is not None:
            exchange = queue.popleft()
            outbox = self._outbox
            if response.follow is not None:
                exchange.keep_alive = False
            if outbox.unread and outbox.full:
                exchange.abandon(self._gateway)
                self.disconnect("max_unsent")
                return
            outbox.write(exchange, exchange.timely_response(response, self._gateway))
            if response.follow is not None:
                # It stays the one that is answered, until one of the two sides ends.
                outbox.flush()
                exchange.response, exchange.followed = None, True
                queue.appendleft(exchange)
                response.follow(self._transport)
                return
            if not exchange.keep_alive:
                self._close()
                return
            if response.status >= NO_ANSWER:
                self._read_control.rest()
        if queue and queue[0].wants_continue:
            queue[0].wants_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._read_control.paused:
            self._update_reading()

    def check(self, tick_s: float) -> None:
        """Disconnect a client that is too slow, or idle for too long; called every second or so."""
        if self._outbox.due_s < tick_s:
            self.disconnect("send_s")
        elif self.due_s >= tick_s or (self._closing and not self._stopped):
            return
        elif self._stopped:
            self.disconnect("send_s")
        elif self._phase == _IDLE:
            if not self._queue:
                self.stop()
        else:
            what, limit = ("header", "head_s") if self._phase == _HEAD else ("body", "body_s")
            self._server.count_disconnect(limit)
            self._refuse(408, overdue(what, limit))

    def stop(self) -> None:
        """Close, whatever is in flight; written responses are still sent, within ``send_s``."""
        if self._transport is not None:
            self._outbox.flush()
            self._stopped = True
            self.due_s = self._server.tick_s + self._settings.send_s
            self._transport.close()

    def disconnect(self, limit: str) -> None:
        """Close at once, without a response, which the client would not read."""
        transport, self._transport = self._transport, None
        if transport is not None:
            self._server.count_disconnect(limit)
            transport.abort()

    def reject_over_limit(self, limit: str) -> None:
        """Reject a request or a client that exceeds a limit which all of them share."""
        self._server.count_disconnect(limit)
        wait_s = spread_s(NS_PER_S, self._gateway.rng)
        self._refuse(429, excess(limit, getattr(self._settings, limit)), b"Retry-After: %d\r\n" % wait_s)

    @property
    def idle(self) -> bool:
        """Whether no response is owed; one that has no end is none."""
        return not self._queue or self._queue[0].followed

    def is_quiet_since(self, tick_s: float) -> bool:
        """Whether it became quiet: no response is owed, and no request has begun since then."""
        if self.quiet or self._closing or self._queue or self._phase != _IDLE:
            return False
        return self.due_s - self._settings.idle_s <= tick_s

    def _await_next(self) -> None:
        self._content_bytes = self._length = 0
        self._incomplete.forget()
        self._phase = _IDLE
        self.due_s = self._server.tick_s + self._settings.idle_s

    def _stop_receiving(self, exchange: HttpExchange) -> None:
        """The request was answered before its body was complete: discard the rest, or close if it is long."""
        assert self._direct is not None and self._transport is not None
        left = len(self._direct) - self._content_bytes
        self._discarding = DiscardedBody(self._read_control.source, self._server.buffer, left)
        self._current = self._direct = None
        if left > DISCARDED_MAX:
            exchange.keep_alive, self._closing = False, True

    def _feed(self, data: memoryview, fresh_bytes: int = 0) -> None:
        """Parse. ``fresh_bytes`` of ``data`` were read just now, and not kept."""
        content_bytes, whole = self._content_bytes, self._phase == _IDLE
        full = fresh_bytes >= len(self._server.small_buffer)
        self._read_control.arrival.read(first=whole, kept=not fresh_bytes, full=full)
        self._began_bytes = fresh_bytes if whole else -1
        rest = data
        try:
            while rest and not self._closing and len(self._complete) < self.TURN_MAX:
                rest = self.parse(rest, self._length - self._content_bytes)
        except httptools.HttpParserError as error:
            ours = isinstance(error, httptools.HttpParserCallbackError)
            self._refuse_with(
                internal_error_response() if ours else error_response(400, f"malformed HTTP request: {error}")
            )
            self._complete.clear()
            return
        if rest and not self._closing:
            self._read_control.keep(rest)
        if self._phase != _IDLE:
            # Where in the first read it began is unknown. Chunks' sizes and trailers count like heads.
            fresh = self._head_bytes < 0 or self._content_bytes != content_bytes
            self._head_bytes = 0 if fresh else self._head_bytes + len(data) - len(rest)
            if self._head_bytes > self._settings.max_head:
                self._refuse(431, excess("max_head", self._settings.max_head))
        elif whole and len(self._complete) == 1 and not self._closing:
            self._head = head_of(data, self._complete[0], self.headers)
        self._complete.clear()
        if len(self._queue) > PIPELINED_MAX:
            self._update_reading()

    def _handle_same_head(self, head: ParsedHead) -> None:
        """Handle one whole request whose head equals the last one's, byte for byte."""
        exchange = head.new_exchange(self.pump)
        self._queue.append(exchange)
        if self.quiet:
            self._server.asked(self)
        access = self._server.access
        if access.keys is not None and (denied := denial(access, exchange, head.headers)) is not None:
            self._current = exchange
            self._refuse_with(denied)
            return
        exchange.arrival_ns = self._read_control.arrival.of_single_read()
        exchange.content = memoryview(bytes(self._server.buffer[len(head.raw) : head.whole]))
        self.due_s = self._server.tick_s + self._settings.idle_s
        try:
            self._server.dispatch(exchange)
        except Exception:  # noqa: BLE001 - as in a callback of the parser
            self._current = exchange
            self._refuse_with(internal_error_response())
        if len(self._queue) > PIPELINED_MAX:
            self._update_reading()

    def _read_headers(self, exchange: HttpExchange, headers: dict[bytes, bytes]) -> None:
        settings = self._settings
        length = byte_count(headers.get(b"content-length", b"0")) or 0
        self._length = length
        if much := self.body_limit_error(settings, length):
            self._refuse(413, much)
            return
        if wrong := exchange.read_head(headers):
            self._refuse(417, wrong)
            return
        if not length and b"transfer-encoding" not in headers:
            return
        if self.parser.should_upgrade():
            self._refuse(400, BODY_OF_CONNECT)
            return
        if length > DIRECT_BYTES:
            self._direct = self._server.body_buffer(exchange, length)
            self._server.query_admission(exchange, self._arrived_ns)
            self._update_reading()
        expected_bytes = length or settings.max_body
        self.due_s = self._server.tick_s + settings.body_s + expected_bytes / self._server.config.bytes_per_s
        if exchange.wants_continue:
            self.pump()

    def _arrived_ns(self) -> int:
        """The arrival of the request that is being received.

        If others arrived in the same read, the kernel reports only the last; then it is the last instant at
        which the socket was empty.
        """
        arrival, read_bytes = self._read_control.arrival, self._began_bytes
        if read_bytes < 0:  # it began in an earlier read
            return arrival.arrived_ns
        head_bytes = self._server.received.find(b"\r\n\r\n", 0, read_bytes) + 4
        alone = not self._complete and head_bytes > 3 and head_bytes + self._length >= read_bytes
        return arrival.arrived_ns if alone else arrival.oldest_ns

    def _refuse(self, status: int, message: str, headers: bytes = b"") -> None:
        self._refuse_with(error_response(status, message, headers))

    def _refuse_with(self, response: HttpResponse) -> None:
        """Respond to a request that cannot be read to its end, after those before it, and close."""
        if self._closing:
            return
        self._closing = True
        exchange = self._current
        if exchange is None:
            exchange = HttpExchange(self.pump, b"", None)
            self._queue.append(exchange)
        self._current = None
        self._direct = None
        self._content = b""
        self._incomplete.forget()
        self._gateway.drop_body(exchange)
        self._gateway.admission_queries.withdraw(exchange.query_id)
        exchange.keep_alive = False
        exchange.respond(response)

    def _close(self) -> None:
        """Close once everything written is sent; read on for a while if the client still sends."""
        transport = self._transport
        assert transport is not None
        self._outbox.flush()
        self._abandon_all()
        if not self._closing:
            self._closing = True
            self.stop()
            return
        if not transport.is_closing() and transport.can_write_eof():
            transport.write_eof()
        self._server.loop.call_later(LINGER_S, self.stop)

    def _abandon_all(self) -> None:
        """The client left: drop all its requests."""
        for exchange in self._queue:
            exchange.abandon(self._gateway)
        self._queue.clear()
        self._current = None
        self._direct = None
        self._incomplete.forget()

    def _count(self, nbytes: int) -> None:
        """Count bytes of a large body; reject it if all such bodies together are too large."""
        if self._current is not None and self._current.body is None:
            self._incomplete.add(nbytes)
            if self._server.arriving_bytes > self._settings.gateway_memory:
                self.reject_over_limit("gateway_memory")

    def _update_reading(self) -> None:
        held = self._current is not None and self._current.body_deferred
        if self._read_control.set_paused(
            pause=held or self._outbox.unread or len(self._queue) > PIPELINED_MAX
        ):
            self.due_s = max(self.due_s, self._server.tick_s + self._settings.head_s)
