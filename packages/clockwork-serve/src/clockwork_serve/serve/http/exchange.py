"""One HTTP request and its response: who may ask, what is sent, whether its client reads it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, Protocol

from clockwork_client.datatypes import Buffer
from clockwork_serve.errors import ClockworkError, InvalidRequest
from clockwork_serve.messages import Outcome
from clockwork_serve.oip import InferCall, Served, parse_infer
from clockwork_serve.serve.gateway.access import Denied, KeyRing, Right
from clockwork_serve.serve.gateway.codec import Heavy, is_heavy
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.gateway.requests import Body, Ending
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.gateway.timing import SEND_NOW, BodySocket
from clockwork_serve.serve.http.responses import Response, error_response, infer_response
from clockwork_serve.serve.http.routes import METRICS_ENDPOINTS, OPEN_ENDPOINTS, READING_POSTS, Route
from clockwork_serve.units import KIB, NS_PER_MS

# ------------------------------------------------------------
# One HTTP request and its response once there is one; it knows neither socket nor parser.


WANTED: Final = frozenset(
    {b"content-length", b"content-encoding", b"transfer-encoding", b"inference-header-content-length",
     b"x-slo-ms", b"expect", b"accept-encoding", b"authorization", b"x-api-key"}
)  # fmt: skip
"""The headers that mean something to us."""
UPGRADED: Final = (
    "header 'Upgrade': expected none beside a body, found one; only HTTP/1.1 is spoken here: send it without"
)
"""The parser takes such a body for what follows the request: for another one, which nobody sent as such."""
_DIGITS_MAX: Final = 20


@lru_cache(maxsize=64)
def byte_count(text: bytes) -> int | None:
    """A header's number of bytes; None for what is none, and for a thousand digits, which Python refuses."""
    digits = text.strip()
    if not digits.isdigit():
        return None
    digits = digits.lstrip(b"0")
    return int(digits or b"0") if len(digits) <= _DIGITS_MAX else None


class HttpExchange:
    """One request on a connection, and its response once there is one. To the gateway, an inquiry."""

    # Of the class, for most requests never set them.
    model = ""
    version = ""
    identity = ""
    keep_alive = False
    local = False
    old = False  # HTTP/1.0
    wants_continue = False
    encoding = b""
    accepted = b""
    pack: Callable[[HttpExchange, Response], None] | None = None  # what compresses its response
    header_length: bytes | None = None
    json_length: int | None = None  # the same, where it was read before
    slo_header: str | None = None
    remaining_s: float | None = None
    every_output_binary = False
    arrival_ns = 0
    content: memoryview = memoryview(b"")
    body: Body | None = None
    request_id = ""
    announced_id = ""  # while it is asked whether it is worth its body
    held = False  # until then, its body is not read
    on_complete: Callable[[HttpExchange], None] | None = None  # what waits for that, if the body is there
    response: Response | None = None
    abandoned = False
    write: Callable[[HttpExchange, Heavy], None] | None = None  # what writes a large response elsewhere
    read: InferCall | ClockworkError | None = None  # what its JSON says, where that was read elsewhere
    ending: Ending | None = None  # while the core must still hear whether it was in time

    def __init__(self, on_response: Callable[[], None], method: bytes, route: Route | None) -> None:
        self.on_response = on_response
        self.method = method
        self.route = route
        if route is not None:
            self.model = route.model
            self.version = route.version

    def take(self, headers: dict[bytes, bytes]) -> str:
        """Take in what the head says; what is wrong with its expectation, if that is not ours."""
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
        return ""

    @property
    def json_bytes(self) -> int:
        """How much of its body is JSON, as far as its head tells the truth."""
        length = None if self.header_length is None else byte_count(self.header_length)
        return len(self.content) if length is None else min(length, len(self.content))

    def abandon(self, gateway: Gateway) -> None:
        """Nobody waits for it any more."""
        self.abandoned = True
        gateway.drop_body(self)
        gateway.announcements.withdraw(self.announced_id)
        if self.ending is not None:
            gateway.undelivered(self.ending)
            self.ending = None
        if self.request_id:
            gateway.cancel(self.request_id)

    def call(self, served: Served) -> InferCall:
        """Parse it. Raises :class:`InvalidRequest`."""
        if self.read is not None:
            # Not kept: an error's traceback names us, and each would hold the other, with the body.
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

    def foretold(self) -> None:
        """Go on, if it was not ended."""
        self.announced_id = ""
        if self.held:
            self.held = False
            self.on_response()  # whose part it is to read on
        go_on, self.on_complete = self.on_complete, None
        if go_on is not None and self.response is None and not self.abandoned:
            go_on(self)

    def end(self, ending: Ending, *, written: bool = False) -> None:
        """Answer the client. ``written``: what is large in it was, elsewhere."""
        if self.abandoned:
            return
        known = None if ending.call is None else ending.call.known
        # The common case, where all outputs are sent as they are, is not looked at more closely.
        if (
            (known is None or known.outputs_in_order is None)
            and self.write is not None
            and not written
            and ending.outcome is Outcome.OK
            and is_heavy(ending)
        ):
            self.write(self, Heavy(ending))
            return
        response = infer_response(ending)
        if ending.deadline_ns:
            ending.outputs = []
            self.ending = ending
        if self.pack is not None:
            self.pack(self, response)
        elif self.response is None:
            self.response = response
            self.on_response()

    def in_time(self, response: Response, gateway: Gateway) -> Response:
        """What to send instead of a response: itself, unless it comes too late."""
        ending = self.ending
        if ending is None:
            return response
        self.ending = None
        now_ns = gateway.looked_ns = gateway.clock()
        if now_ns <= ending.deadline_ns:
            gateway.link.in_time.append(ending.request_id)
            return response
        late = gateway.late(ending)
        return response if late is None else infer_response(late)

    def respond(self, response: Response) -> None:
        """Send the response when it is its turn."""
        if self.response is None:
            self.response = response
            self.on_response()


# ------------------------------------------------------------
# What an HTTP connection sends, and whether its client reads it; cutting it off is for others.


JOIN_BYTES: Final = 64 * KIB
"""Responses up to this are copied together, which is cheaper than several buffers in one write."""


HELD_MAX: Final = 32
"""Responses that wait for one another at most: about half a millisecond."""
HELD_NS: Final = NS_PER_MS
"""And for no longer than this, where the core is not ours alone: they were in time when they were made."""


class Sender(Protocol):
    """``tick_s`` is the loop's time, to a second; since ``held_since_ns`` the first of ``held`` waits."""

    tick_s: float
    config: GatewayConfig
    gateway: Gateway
    held: list[Outbox]
    held_since_ns: int


class Outbox:
    """``unread``: more was written than the loop likes to hold; by ``due_s`` the client must have read it."""

    __slots__ = ("_held", "_sender", "_socket", "_transport", "due_s", "unread")

    def __init__(self, transport: asyncio.Transport, sender: Sender, sock: BodySocket) -> None:
        self._transport = transport
        self._socket = sock
        self._sender = sender
        self._held = b""
        self.unread = False
        self.due_s = math.inf

    def write(self, exchange: HttpExchange, response: Response) -> None:
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
                sender.held_since_ns = now_ns
            sender.held.append(self)
            if len(sender.held) >= HELD_MAX or now_ns - sender.held_since_ns > HELD_NS:
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
        return (
            self.unread and self._transport.get_write_buffer_size() > self._sender.config.settings.max_unsent
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
        config = self._sender.config
        unread_s = self._transport.get_write_buffer_size() / config.bytes_per_s
        self.due_s = self._sender.tick_s + config.settings.send_s + unread_s


def send_held(held: list[Outbox]) -> None:
    """Send what all of them hold, one after the other: a client that wakes up finds more to do."""
    for outbox in held:
        outbox.flush()
    held.clear()


# ------------------------------------------------------------
# Which right a request over HTTP needs, and the answer to one that lacks it. It reads no file.


_READS: Final = (b"GET", b"HEAD")


def right_of(method: bytes, route: Route | None) -> Right | None:
    """None: anybody may. What only reads, and inference, is one right; all else is another, come what may."""
    if route is None:
        # Which paths there are is nobody's business.
        return Right.INFER
    endpoint = route.endpoint
    if endpoint is None:
        return Right.INFER
    if endpoint in OPEN_ENDPOINTS:
        return None
    if endpoint in METRICS_ENDPOINTS:
        return Right.METRICS
    return Right.INFER if method in _READS or endpoint in READING_POSTS else Right.ADMIN


def denial(keys: KeyRing, exchange: HttpExchange, headers: Mapping[bytes, bytes]) -> Response | None:
    """The answer to who may not; None for who may, whose tenant the exchange has from then on."""
    right = right_of(exchange.method, exchange.route)
    if right is None:
        return None
    try:
        holder = keys.admit(right, headers.get(b"authorization"), headers.get(b"x-api-key"))
    except Denied as denied:
        if denied.known:
            return error_response(403, str(denied))
        return error_response(401, str(denied), b"WWW-Authenticate: Bearer\r\n")
    exchange.identity = holder.tenant
    return None
