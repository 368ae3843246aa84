"""One HTTP request and its response: API key, parsing, writing of the response."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, Protocol

from msgspec import structs

from clockwork_client.datatypes import Buffer
from clockwork_serve.errors import ClockworkError, InvalidRequest
from clockwork_serve.messages import Outcome
from clockwork_serve.oip import InferCall, Served, parse_infer, trace_context
from clockwork_serve.serve.gateway.access import AccessControl, AccessDenied, Right
from clockwork_serve.serve.gateway.codec import LargeOutputs, has_large_outputs
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.gateway.requests import Body, InferResponse
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.gateway.timing import SEND_NOW, BodySocket
from clockwork_serve.serve.http.responses import HttpResponse, error_response, http_response
from clockwork_serve.serve.http.routes import (
    METRICS_ENDPOINTS,
    OPEN_ENDPOINTS,
    READING_POSTS,
    Route,
    live_page,
)
from clockwork_serve.units import KIB, NS_PER_MS

# ------------------------------------------------------------
# One HTTP request and its response, without sockets and parsing of heads.


HEADERS_READ: Final = frozenset(
    {b"content-length", b"content-encoding", b"transfer-encoding", b"inference-header-content-length",
     b"x-slo-ms", b"expect", b"accept-encoding", b"authorization", b"x-api-key", b"host", b"origin",
     b"accept"}
)  # fmt: skip
"""The headers that are read."""
SINGLE_HEADERS: Final = frozenset(
    {b"authorization", b"x-api-key", b"host", b"origin", b"x-slo-ms", b"inference-header-content-length"}
)
"""Those that a request may have once: of two, a proxy and this server might not heed the same one."""
BODY_OF_CONNECT: Final = "method CONNECT: expected no body, found one; there is no tunnel here"
"""The parser treats such a body as the next request, which the client did not send as one."""
_DIGITS_MAX: Final = 20


@lru_cache(maxsize=64)
def byte_count(text: bytes) -> int | None:
    """A header's number of bytes; None if it is not a number, or longer than Python converts."""
    digits = text.strip()
    if not digits.isdigit():
        return None
    digits = digits.lstrip(b"0")
    return int(digits or b"0") if len(digits) <= _DIGITS_MAX else None


class HttpExchange:
    """One request on a connection, and later its response. It is the gateway's :class:`Exchange`."""

    # Class attributes, for most requests never set them.
    model = ""
    version = ""
    identity = ""
    narrow = False  # its key may see its tenant's requests, and nothing else
    keep_alive = False
    local = False
    old = False  # HTTP/1.0
    wants_continue = False
    encoding = b""
    accepted = b""
    pack: Callable[[HttpExchange, HttpResponse], None] | None = None  # what compresses its response
    target = b""  # what was asked for, where it has no route
    header_length: bytes | None = None
    json_length: int | None = None  # the same, where it was parsed before
    slo_header: str | None = None
    trace = ""
    remaining_s: float | None = None
    every_output_binary = False
    arrival_ns = 0
    content: memoryview = memoryview(b"")
    body: Body | None = None
    request_id = ""
    query_id = ""  # of its admission query, while that is open
    body_deferred = False  # its body is not read while the query is open
    on_complete: Callable[[HttpExchange], None] | None = None  # called at its end if the body is complete
    response: HttpResponse | None = None
    followed = False  # its head was written, and others write what follows
    abandoned = False
    write: Callable[[HttpExchange, LargeOutputs], None] | None = (
        None  # has the codec process encode large outputs
    )
    copy: Callable[[HttpExchange, InferResponse], None] | None = (
        None  # copies large outputs, and ends it then
    )
    read: InferCall | ClockworkError | None = None  # its parsed JSON, where the codec process did it
    unreported: InferResponse | None = None  # until it was reported whether it was in time

    def __init__(self, on_response: Callable[[], None], method: bytes, route: Route | None) -> None:
        self.on_response = on_response
        self.method = method
        self.route = route
        if route is not None:
            self.model = route.model
            self.version = route.version

    def read_head(self, headers: dict[bytes, bytes]) -> str:
        """Read the head's headers; an error text if its ``Expect`` is not supported, else ""."""
        expected = headers.get(b"expect")
        if expected is not None:
            if expected.lower() != b"100-continue":
                return f"header 'Expect': expected 100-continue, found {expected.decode('latin-1')!r}"
            self.wants_continue = True
        self.encoding = headers.get(b"content-encoding", b"")
        self.accepted = headers.get(b"accept-encoding", b"")
        length = headers.get(b"inference-header-content-length")
        self.header_length = None if length is None else length.strip()
        slo = headers.get(b"x-slo-ms")
        self.slo_header = None if slo is None else slo.decode("latin-1")
        route = self.route
        if self.method == b"GET" and route is not None and route.endpoint in METRICS_ENDPOINTS:
            wanted = b"application/openmetrics-text" in headers.get(b"accept", b"")
            self.route = structs.replace(route, openmetrics=wanted)
        if b"traceparent" in headers:
            state = headers.get(b"tracestate", b"").decode("latin-1")
            self.trace = trace_context(headers[b"traceparent"].decode("latin-1"), state)
        return ""

    @property
    def json_bytes(self) -> int:
        """The JSON part of its body, in bytes, if its head is right."""
        length = None if self.header_length is None else byte_count(self.header_length)
        return len(self.content) if length is None else min(length, len(self.content))

    def abandon(self, gateway: Gateway) -> None:
        """The client left: cancel the request and free its memory."""
        self.abandoned = True
        gateway.drop_body(self)
        gateway.admission_queries.withdraw(self.query_id)
        if self.unreported is not None:
            gateway.discard(self.unreported)
            self.unreported = None
        if self.request_id:
            gateway.cancel(self.request_id)

    def call(self, served: Served) -> InferCall:
        """Parse it. Raises :class:`InvalidRequest`."""
        if self.read is not None:
            # Dropped at once: an error's traceback refers to us, and the cycle would keep the body alive.
            read, self.read = self.read, None
            if isinstance(read, InferCall):
                return read
            try:
                raise read
            finally:
                del read
        if self.header_length is None:
            return parse_infer(self.content, None, served.tensors_max)
        length = byte_count(self.header_length) if self.json_length is None else self.json_length
        if length is None:
            raise InvalidRequest(
                "header 'Inference-Header-Content-Length': expected a number of bytes, found "
                f"{self.header_length.decode('latin-1')!r}"
            )
        if not length:
            return served.raw_call(self.content)
        return served.headers.find(self.content, length) or parse_infer(
            self.content, length, served.tensors_max
        )

    def query_done(self) -> None:
        """Its admission query is done: go on, unless the request has ended."""
        self.query_id = ""
        if self.body_deferred:
            self.body_deferred = False
            self.on_response()  # which resumes reading
        go_on, self.on_complete = self.on_complete, None
        if go_on is not None and self.response is None and not self.abandoned:
            go_on(self)

    def end(self, response: InferResponse, *, written: bool = False) -> None:
        """Make the response. ``written``: the codec process has encoded large outputs already."""
        if self.abandoned:
            return
        if response.keep is not None and self.copy is not None:
            self.copy(self, response)
            return
        known = None if response.call is None else response.call.known
        # In the common case all outputs are sent as they are, and has_large_outputs() need not be called.
        if (
            (known is None or known.outputs_in_order is None)
            and self.write is not None
            and not written
            and response.outcome is Outcome.OK
            and has_large_outputs(response)
        ):
            self.write(self, LargeOutputs(response))
            return
        made = http_response(response)
        if response.deadline_ns:
            response.outputs = []
            self.unreported = response
        if self.pack is not None:
            self.pack(self, made)
        elif self.response is None:
            self.response = made
            self.on_response()

    def timely_response(self, response: HttpResponse, gateway: Gateway) -> HttpResponse:
        """The response to write now: the given one, or another if the deadline has passed."""
        unreported = self.unreported
        if unreported is None:
            return response
        self.unreported = None
        now_ns = gateway.batch_now_ns = gateway.clock()
        if now_ns <= unreported.deadline_ns:
            gateway.link.in_time.append(unreported.request_id)
            return response
        late = gateway.check_late(unreported)
        return response if late is None else http_response(late)

    def respond(self, response: HttpResponse) -> None:
        """Set the response, to be sent after those before it."""
        if self.response is None:
            self.response = response
            self.on_response()


# ------------------------------------------------------------
# What an HTTP connection sends, and whether its client reads it.


JOIN_BYTES: Final = 64 * KIB
"""Responses up to this size are copied into one buffer, which is cheaper than a write of several."""


HELD_MAX: Final = 32  # the most responses that are held back to be sent together: about half a millisecond
HELD_NS: Final = NS_PER_MS
"""The longest that one is held back, for a core shared with others: it was in time when it was made."""


class OutboxServer(Protocol):
    """What an outbox needs of its server.

    ``tick_s`` is the loop's time, to a second. ``held`` are the outboxes that hold responses back, the first
    of them since ``held_since_ns``.
    """

    tick_s: float
    config: GatewayConfig
    gateway: Gateway
    held: list[Outbox]
    held_since_ns: int


class Outbox:
    """Writes the responses of one connection.

    ``unread``: the transport's buffer is too full, because the client does not read; it must do so by
    ``due_s``.
    """

    __slots__ = ("_held", "_server", "_socket", "_transport", "due_s", "unread")

    def __init__(self, transport: asyncio.Transport, server: OutboxServer, sock: BodySocket) -> None:
        self._transport = transport
        self._socket = sock
        self._server = server
        self._held = b""
        self.unread = False
        self.due_s = math.inf

    def write(self, exchange: HttpExchange, response: HttpResponse) -> None:
        """Write a response, or hold it back for a moment."""
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
        server = self._server
        if isinstance(message, list):
            self.flush()
            self._transport.writelines(message)
        elif self._held:
            self._held += message
            if len(self._held) > JOIN_BYTES:
                self.flush()
        elif server.gateway.batching and not self.unread:
            self._held = message
            now_ns = server.gateway.batch_now_ns
            if not server.held:
                server.held_since_ns = now_ns
            server.held.append(self)
            if len(server.held) >= HELD_MAX or now_ns - server.held_since_ns > HELD_NS:
                send_held(server.held)
        else:
            self._send(message)
        if self.unread:
            self._expect()

    def flush(self) -> None:
        """Write what was held back."""
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._send(held)

    @property
    def full(self) -> bool:
        """Whether the client left too much unread to get more. One response alone is never too much."""
        return (
            self.unread and self._transport.get_write_buffer_size() > self._server.config.settings.max_unsent
        )

    def pause(self) -> None:
        """The client does not read."""
        self.unread = True
        self._expect()

    def resume(self) -> None:
        """It reads again."""
        self.unread = False
        self.due_s = math.inf

    def _send(self, message: bytes) -> None:
        """Write at once, not at the end of the loop's turn, unless earlier bytes are still queued."""
        transport, send_now = self._transport, self._socket.send_now
        if send_now is not None and not transport.get_write_buffer_size():
            try:
                sent = send_now(message, SEND_NOW)
            except OSError:  # full or disconnected: the loop will find out
                sent = 0
            if sent == len(message):
                return
            message = message[sent:]
        transport.write(message)

    def _expect(self) -> None:
        config = self._server.config
        unread_s = self._transport.get_write_buffer_size() / config.bytes_per_s
        self.due_s = self._server.tick_s + config.settings.send_s + unread_s


def send_held(held: list[Outbox]) -> None:
    """Write what all outboxes hold back, in one go: a client that wakes up finds more to do."""
    for outbox in held:
        outbox.flush()
    held.clear()


# ------------------------------------------------------------
# The right that a request over HTTP needs, and the response to one that lacks it.


_READS: Final = (b"GET", b"HEAD")


def right_of(method: bytes, route: Route | None) -> Right | None:
    """The right that a request needs; None if none.

    Reading and inference need INFER; everything else, unknown endpoints included, needs ADMIN.
    """
    if route is None:
        # A client without a key cannot find out which paths exist.
        return Right.INFER
    endpoint = route.endpoint
    if endpoint is None:
        return Right.INFER
    if endpoint in OPEN_ENDPOINTS:
        return None
    if endpoint in METRICS_ENDPOINTS:
        return Right.METRICS
    return Right.INFER if method in _READS or endpoint in READING_POSTS else Right.ADMIN


def denial(
    access: AccessControl, exchange: HttpExchange, headers: Mapping[bytes, bytes]
) -> HttpResponse | None:
    """The response if access is denied; None if not: then the exchange has the key's tenant from now on."""
    if exchange.route is not None and exchange.route.endpoint is live_page:
        return _page_denial(access, exchange, headers)
    right = right_of(exchange.method, exchange.route)
    if right is None:
        return None
    try:
        if access.keys is not None:
            holder = access.keys.authorize(right, headers.get(b"authorization"), headers.get(b"x-api-key"))
            exchange.identity = holder.tenant
        elif right is Right.ADMIN:
            access.sites.check(headers.get(b"host"), headers.get(b"origin"))
    except AccessDenied as denied:
        if denied.known:
            return error_response(403, str(denied))
        return error_response(401, str(denied), b"WWW-Authenticate: Bearer\r\n")
    return None


def _page_denial(
    access: AccessControl, exchange: HttpExchange, headers: Mapping[bytes, bytes]
) -> HttpResponse | None:
    """The same for the live page: who may read metrics sees all, who may infer his tenant's requests.

    A browser asks for a name and a password, which is the key. Without keys, the page of another site may not
    read this one: it has the names of all models.
    """
    given = headers.get(b"authorization"), headers.get(b"x-api-key")
    if given[0] is not None and given[0][:6].lower() == b"basic ":
        given = None, _password(given[0][6:])
    try:
        if access.keys is None:
            access.sites.check(headers.get(b"host"), headers.get(b"origin"))
            return None
        try:
            access.keys.authorize(Right.METRICS, *given)
        except AccessDenied as denied:
            if not denied.known:
                raise
            exchange.identity = access.keys.authorize(Right.INFER, *given).tenant
            exchange.narrow = True
    except AccessDenied as denied:
        if denied.known:
            return error_response(403, str(denied))
        return error_response(401, str(denied), b'WWW-Authenticate: Basic realm="clockwork"\r\n')
    return None


def _password(credentials: bytes) -> bytes | None:
    """What a browser was told as the password; the name is not looked at."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return None
