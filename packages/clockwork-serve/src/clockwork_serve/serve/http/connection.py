"""One HTTP/1.1 connection: bytes to requests, and responses to bytes in the requests' order.

The parser's events, heads that were parsed before, and when to read on are here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import httptools
import numpy as np

from clockwork_serve.config import Settings
from clockwork_serve.serve.gateway.access import KeyRing
from clockwork_serve.serve.gateway.client_shm import is_loopback
from clockwork_serve.serve.gateway.requests import spread_s
from clockwork_serve.serve.gateway.settings import (
    LINGER_S,
    PIPELINED_MAX,
    UNWANTED_MAX,
    excess,
    json_excess,
    overdue,
)
from clockwork_serve.serve.gateway.timing import AT_ONCE, Arrival, BodySocket, Turns, Unwanted
from clockwork_serve.serve.http.exchange import (
    UPGRADED,
    WANTED,
    HttpExchange,
    Outbox,
    Sender,
    byte_count,
    denial,
)
from clockwork_serve.serve.http.responses import Response, error_response, tripped
from clockwork_serve.serve.http.routes import Route
from clockwork_serve.units import KIB, NS_PER_S

# ------------------------------------------------------------
# Heads of HTTP requests that were parsed before: a client that keeps its connection sends the same again.
#
# A head is remembered only where it says everything about how its request is read: a length, and no encoding,
# expectation or wish to close.


HEAD_BYTES_MAX: Final = 2048
TURN_BYTES: Final = KIB
"""Parsed before it is looked how many requests there were; more of a body whose length is known."""
_END: Final = b"\r\n\r\n"
_OTHERWISE: Final = (b"transfer-encoding", b"content-encoding", b"expect")


class HeadParser:
    """Has requests parsed, and keeps what the parser tells of a head, piece by piece."""

    TURN_MAX: Final = 8
    """Requests that are taken in at once, about a millisecond; the others wait for the loop's next turn."""

    def __init__(self) -> None:
        self.parser: Any = None  # it names us: none before there is something to parse
        self.begin_head()

    def parse_afresh(self) -> None:
        """What comes next is a request, whatever came before."""
        self.parser = httptools.HttpRequestParser(self)

    def parse(self, data: memoryview, body_left: int) -> memoryview:
        """Parse a little, or what is left of a body; what follows that, and to be parsed next.

        After a request for another protocol, which is not spoken, it is another request.
        """
        size = max(body_left, TURN_BYTES)
        try:
            self.parser.feed_data(data[:size])
        except httptools.HttpParserUpgrade as upgrade:
            self.parse_afresh()
            return data[upgrade.args[0] :]
        return data[size:]

    def begin_head(self) -> None:
        """Another request's begins."""
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self._header_count = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Its target, or a piece of it."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; most mean nothing to us."""
        self._header_count += 1
        self._header_bytes += len(name) + len(value)
        name = name.lower()
        if name in WANTED:
            self.headers[name] = value

    def beyond(self, settings: Settings) -> str:
        """Which limit it is beyond; "" if none."""
        if self._header_count > settings.max_headers:
            return excess("max_headers", settings.max_headers, self._header_count)
        if self._header_bytes + len(self.url) > settings.max_head:
            return excess("max_head", settings.max_head)
        return ""

    def body_beyond(self, settings: Settings, length: int) -> str:
        """Which limit a body of ``length`` is beyond, that the head announces; "" if none."""
        if length > settings.max_body:
            return excess("max_body", settings.max_body, length)
        binary = b"inference-header-content-length" in self.headers
        return "" if binary else json_excess(settings, length)


class ParsedHead:
    """``raw`` is the head as it was sent; with its body a request has ``whole`` bytes."""

    __slots__ = (
        "_accepted",
        "_header_length",
        "_json_length",
        "_local",
        "_method",
        "_route",
        "_slo",
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
        length = like.header_length
        self._json_length = None if length is None else byte_count(length)

    def fits(self, received: bytearray, nbytes: int) -> bool:
        """Whether what was received is one whole request that begins so."""
        return nbytes == self.whole and received.startswith(self.raw)

    def again(self, on_response: Callable[[], None]) -> HttpExchange:
        """Another request with this head."""
        exchange = HttpExchange(on_response, self._method, self._route)
        exchange.keep_alive = True
        exchange.local = self._local
        exchange.header_length = self._header_length
        exchange.json_length = self._json_length
        exchange.accepted = self._accepted
        exchange.slo_header = self._slo
        return exchange


def head_of(data: memoryview, exchange: HttpExchange, headers: dict[bytes, bytes]) -> ParsedHead | None:
    """The head of ``data``, which is one whole request; None where it must be parsed each time."""
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
# Whether an HTTP connection reads from its socket, and how much is on its way; what it is, is for others.


class Arriving:
    """One connection's part of what its server has received of large bodies."""

    __slots__ = ("_all", "_bytes")

    def __init__(self, all_: HttpHost) -> None:
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


class ReadControl:
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
        self.source = BodySocket(transport)
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


# ------------------------------------------------------------
# What an HTTP connection needs of the server that it belongs to. Nothing is done here.


class HttpHost(Sender, Protocol):
    """``buffer`` is where all connections read, one at a time, and ``received`` is the memory behind it.

    ``small_buffer`` is its beginning.

    ``arriving_bytes`` of large bodies are here, outside the region, and not whole yet.
    """

    keys: KeyRing | None
    loop: asyncio.AbstractEventLoop
    readers: RoundRobin
    buffer: memoryview
    small_buffer: memoryview
    received: bytearray
    arriving_bytes: int
    find_route: Callable[[bytes], Route | None]

    def opened(self, connection: HttpConnection) -> None:
        """A connection was made; perhaps one too many."""

    def reached(self, limit: str) -> None:
        """A client was cut off by the limit of that setting; to be told in the log."""

    def closed(self, connection: HttpConnection) -> None:
        """A connection is gone."""

    def room(self, exchange: HttpExchange, length: int) -> memoryview:
        """Where to receive a large body."""

    def announce(self, exchange: HttpExchange, arrived_ns: Callable[[], int]) -> None:
        """Ask whether a request with a large body is worth receiving it."""

    def dispatch(self, exchange: HttpExchange) -> None:
        """Have a request that is complete answered."""


# ------------------------------------------------------------
# One HTTP/1.1 connection: bytes to requests, and responses to bytes in the requests' order. It never waits.
#
# Bodies are limited and read to where they stay if they are large. Who sends or reads too slowly is cut off.


DIRECT_BYTES: Final = 64 * KIB
"""Bodies above this are read from the socket to where they stay."""

_IDLE, _HEAD, _BODY = range(3)


class HttpConnection(HeadParser, asyncio.BufferedProtocol):
    """One client's connection. ``due_s``: when what it waits for must have come."""

    def __init__(self, server: HttpHost, since_ns: int | None = None) -> None:
        """``since_ns``: since when it may have waited, if another gateway accepted it."""
        super().__init__()
        self._since_ns = since_ns
        self._server = server
        self._gateway = server.gateway
        self._settings = server.config.settings
        self._transport: asyncio.Transport | None = None
        self._outbox: Outbox
        self._intake: ReadControl
        self._queue: deque[HttpExchange] = deque()  # requests without a sent response, in order
        self._local, self._phase = False, _IDLE
        self._head: ParsedHead | None = None  # of the last request, if others like it need not be parsed
        self._complete: list[HttpExchange] = []  # requests that became so in this read
        self._head_bytes = 0  # read since the head or the last piece of a body; -1: in this very read
        self._current: HttpExchange | None = None  # the request whose body is being received
        self._content: bytes | memoryview = b""
        self._content_bytes = self._length = 0  # so many of the body; of one that comes next, if it is known
        self._direct: memoryview | None = None  # where a large body goes; _content_bytes of it have arrived
        self._unwanted: Unwanted | None = None  # of the body of a request that is answered already
        self._arriving = Arriving(server)
        self._began_bytes = -1  # of the read that the request began in, if that is this one
        self._closing = self._stopped = False  # what arrives matters no more; nothing more is written
        self.due_s = 0.0

    # What the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._local = bool(peer) and is_loopback(peer[0])
        turns = self._gateway.turns
        since_ns = turns.before_ns if self._since_ns is None else self._since_ns
        self._intake = ReadControl(self._transport, self._server.readers, self._feed, turns, since_ns)
        self._outbox = Outbox(self._transport, self._server, self._intake.source)
        self.parse_afresh()
        self.due_s = self._server.tick_s + self._settings.head_s  # not idle_s: it has asked for nothing yet
        self._server.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._direct is not None and not self._closing:
            return self._direct[self._content_bytes : self._content_bytes + AT_ONCE]
        if self._unwanted is not None and not self._closing:
            return self._unwanted.room()
        # Little at a time where it may be many requests or chunks: they are dealt with while all others wait.
        small, left = self._server.small_buffer, self._length - self._content_bytes
        return self._server.buffer[:left] if left > len(small) else small

    def buffer_updated(self, nbytes: int) -> None:
        """Take in what arrived."""
        if self._closing:
            return
        if self._unwanted is not None:
            if self._unwanted.received(nbytes):
                self._unwanted = None
                self.parse_afresh()
                self._await_next()
            return
        if self._direct is None:
            head = self._head
            if head is not None and self._phase == _IDLE and head.fits(self._server.received, nbytes):
                self._take_again(head)
                return
            self._feed(self._server.buffer[:nbytes], nbytes)
            if nbytes == len(self._server.small_buffer) and not self._length:
                self._intake.let_others_go_first()
            return
        nbytes += self._intake.source.read(self._direct[self._content_bytes + nbytes :])
        self._content_bytes += nbytes
        self._intake.arrival.read(first=False)
        self._began_bytes = -1
        self._count(nbytes)
        if self._direct is not None and self._content_bytes == len(self._direct):
            # The parser has not seen this body's end, and never will.
            self.parse_afresh()
            self.on_message_complete()
        elif nbytes >= AT_ONCE:
            self._intake.let_others_go_first()

    def eof_received(self) -> bool:
        """The client closed its side: to us, it went away."""
        return False

    def pause_writing(self) -> None:
        """The client does not read; nor do we."""
        self._outbox.pause()
        self._set_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._outbox.resume()
        self._set_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, and needs no answer; and what was read waits for no collection of garbage."""
        self._transport = self.parser = None
        self._intake.source.close()
        del self._outbox, self._intake  # whose transport, over TLS, names us
        self._closing = True
        self._abandon_all()
        self._server.closed(self)

    # What the parser calls

    def on_message_begin(self) -> None:
        """A request starts."""
        self._phase, self._head_bytes = _HEAD, -1
        self.due_s = self._server.tick_s + self._settings.head_s
        self.begin_head()

    def on_headers_complete(self) -> None:
        """Now it is known what it wants."""
        if self._closing:
            return
        self._phase, self._head_bytes = _BODY, -1
        headers, parser, keys = self.headers, self.parser, self._server.keys
        exchange = HttpExchange(self.pump, parser.get_method(), self._server.find_route(self.url))
        exchange.keep_alive = parser.should_keep_alive()
        exchange.local, exchange.old = self._local, parser.get_http_version() == "1.0"
        self._current = exchange
        self._queue.append(exchange)
        if wrong := self.beyond(self._settings):
            self._refuse(431, wrong)
        elif keys is not None and (denied := denial(keys, exchange, headers)) is not None:
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
                # Not a list of pieces: they may be many, and small. Room for the longest body takes no memory
                # before something arrives, and what is there need not be moved when more does.
                before, room = room, np.empty(self._settings.max_body, np.uint8).data
                room[:start] = before
                self._content = room
            room[start:end] = content
            self._count(len(content))

    def on_message_complete(self) -> None:
        """All of it is there."""
        if self._closing:
            return
        exchange, self._current = self._current, None
        assert exchange is not None
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
        if self._gateway.announcements.awaited(exchange.announced_id):
            exchange.on_complete = self._server.dispatch
        else:
            self._server.dispatch(exchange)

    # Inside

    def pump(self) -> None:
        """Send all responses whose turn it is."""
        if self._transport is None:
            return
        if self._current is not None and self._current.response is not None:
            self._stop_receiving(self._current)
        queue = self._queue
        while queue and (response := queue[0].response) is not None:
            exchange = queue.popleft()
            outbox = self._outbox
            if outbox.unread and outbox.full:
                exchange.abandon(self._gateway)
                self.cut("max_unsent")
                return
            outbox.write(exchange, exchange.in_time(response, self._gateway))
            if not exchange.keep_alive:
                self._close()
                return
        if queue and queue[0].wants_continue:
            queue[0].wants_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._intake.paused:
            self._set_reading()

    def check(self, tick_s: float) -> None:
        """Cut it off if it was too slow, or silent for too long."""
        if self._outbox.due_s < tick_s:
            self.cut("send_s")
        elif self.due_s >= tick_s or (self._closing and not self._stopped):
            return
        elif self._stopped:
            self.cut("send_s")
        elif self._phase == _IDLE:
            if not self._queue:
                self.stop()
        else:
            what, limit = ("header", "head_s") if self._phase == _HEAD else ("body", "body_s")
            self._server.reached(limit)
            self._refuse(408, overdue(what, limit))

    def stop(self) -> None:
        """Close, whatever is in flight; what was written is still sent, unless nobody reads it."""
        if self._transport is not None:
            self._outbox.flush()
            self._stopped = True
            self.due_s = self._server.tick_s + self._settings.send_s
            self._transport.close()

    def cut(self, limit: str) -> None:
        """Close at once, without a word: its client would not read it."""
        transport, self._transport = self._transport, None
        if transport is not None:
            self._server.reached(limit)
            transport.abort()

    def turn_away(self, limit: str) -> None:
        """Tell a client that there is too much of something already."""
        self._server.reached(limit)
        wait_s = spread_s(NS_PER_S, self._gateway.dice)
        self._refuse(429, excess(limit, getattr(self._settings, limit)), b"Retry-After: %d\r\n" % wait_s)

    @property
    def idle(self) -> bool:
        """Whether no response is owed."""
        return not self._queue

    def _await_next(self) -> None:
        self._content_bytes = self._length = 0
        self._arriving.forget()
        self._phase = _IDLE
        self.due_s = self._server.tick_s + self._settings.idle_s

    def _stop_receiving(self, exchange: HttpExchange) -> None:
        """It is answered before its body is there: read the rest and throw it away, if it is not too much."""
        assert self._direct is not None and self._transport is not None
        left = len(self._direct) - self._content_bytes
        self._unwanted = Unwanted(self._intake.source, self._server.buffer, left)
        self._current = self._direct = None
        if left > UNWANTED_MAX:
            exchange.keep_alive, self._closing = False, True

    def _feed(self, data: memoryview, fresh_bytes: int = 0) -> None:
        """``fresh_bytes`` of it were read just now, and not kept."""
        content_bytes, whole = self._content_bytes, self._phase == _IDLE
        self._intake.arrival.read(first=whole, kept=not fresh_bytes)
        self._began_bytes = fresh_bytes if whole else -1
        rest = data
        try:
            while rest and not self._closing and len(self._complete) < self.TURN_MAX:
                rest = self.parse(rest, self._length - self._content_bytes)
        except httptools.HttpParserError as error:
            ours = isinstance(error, httptools.HttpParserCallbackError)
            self._refuse_with(tripped() if ours else error_response(400, f"malformed HTTP request: {error}"))
            self._complete.clear()
            return
        if rest and not self._closing:
            self._intake.keep(rest)
        if self._phase != _IDLE:
            # Where in the first read it began is not known. Chunks' sizes and trailers count as heads do.
            fresh = self._head_bytes < 0 or self._content_bytes != content_bytes
            self._head_bytes = 0 if fresh else self._head_bytes + len(data) - len(rest)
            if self._head_bytes > self._settings.max_head:
                self._refuse(431, excess("max_head", self._settings.max_head))
        elif whole and len(self._complete) == 1 and not self._closing:
            self._head = head_of(data, self._complete[0], self.headers)
        self._complete.clear()
        if len(self._queue) > PIPELINED_MAX:
            self._set_reading()

    def _take_again(self, head: ParsedHead) -> None:
        """Take a whole request whose head is the last one's, byte for byte."""
        exchange = head.again(self.pump)
        self._queue.append(exchange)
        keys = self._server.keys
        if keys is not None and (denied := denial(keys, exchange, head.headers)) is not None:
            self._current = exchange
            self._refuse_with(denied)
            return
        exchange.arrival_ns = self._intake.arrival.of_one()
        exchange.content = memoryview(bytes(self._server.buffer[len(head.raw) : head.whole]))
        self.due_s = self._server.tick_s + self._settings.idle_s
        try:
            self._server.dispatch(exchange)
        except Exception:  # noqa: BLE001 - as where the parser calls
            self._current = exchange
            self._refuse_with(tripped())
        if len(self._queue) > PIPELINED_MAX:
            self._set_reading()

    def _read_headers(self, exchange: HttpExchange, headers: dict[bytes, bytes]) -> None:
        settings = self._settings
        length = byte_count(headers.get(b"content-length", b"0")) or 0
        self._length = length
        if much := self.body_beyond(settings, length):
            self._refuse(413, much)
            return
        if wrong := exchange.take(headers):
            self._refuse(417, wrong)
            return
        if not length and b"transfer-encoding" not in headers:
            return
        if self.parser.should_upgrade():
            self._refuse(400, UPGRADED)
            return
        if length > DIRECT_BYTES:
            self._direct = self._server.room(exchange, length)
            self._server.announce(exchange, self._arrived_ns)
            self._set_reading()
        expected_bytes = length or settings.max_body
        self.due_s = self._server.tick_s + settings.body_s + expected_bytes / self._server.config.bytes_per_s
        if exchange.wants_continue:
            self.pump()

    def _arrived_ns(self) -> int:
        """When the request came that is being received now.

        If others came with it, the kernel tells only of the last: then it counts from when there was nothing.
        """
        arrival, read_bytes = self._intake.arrival, self._began_bytes
        if read_bytes < 0:  # it began in an earlier read
            return arrival.arrived_ns
        head_bytes = self._server.received.find(b"\r\n\r\n", 0, read_bytes) + 4
        alone = not self._complete and head_bytes > 3 and head_bytes + self._length >= read_bytes
        return arrival.arrived_ns if alone else arrival.oldest_ns

    def _refuse(self, status: int, message: str, headers: bytes = b"") -> None:
        self._refuse_with(error_response(status, message, headers))

    def _refuse_with(self, response: Response) -> None:
        """Answer what cannot be read to its end, after what came before it, and close."""
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
        self._arriving.forget()
        self._gateway.drop_body(exchange)
        self._gateway.announcements.withdraw(exchange.announced_id)
        exchange.keep_alive = False
        exchange.respond(response)

    def _close(self) -> None:
        """Close once all that was written is sent; and read on for a while if the client still sends."""
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
        """Nobody waits for the requests that are left."""
        for exchange in self._queue:
            exchange.abandon(self._gateway)
        self._queue.clear()
        self._current = None
        self._direct = None
        self._arriving.forget()

    def _count(self, nbytes: int) -> None:
        """More of a large body is here; too much of all of them together is not kept."""
        if self._current is not None and self._current.body is None:
            self._arriving.add(nbytes)
            if self._server.arriving_bytes > self._settings.gateway_memory:
                self.turn_away("gateway_memory")

    def _set_reading(self) -> None:
        held = self._current is not None and self._current.held
        if self._intake.hold(pause=held or self._outbox.unread or len(self._queue) > PIPELINED_MAX):
            self.due_s = max(self.due_s, self._server.tick_s + self._settings.head_s)
