"""One HTTP request and its response once there is one; it knows neither socket nor parser."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

from clockwork_serve.errors import ClockworkError, InvalidRequest
from clockwork_serve.messages import Outcome
from clockwork_serve.oip import InferCall, Served, parse_infer
from clockwork_serve.serve.gateway import Gateway
from clockwork_serve.serve.gateway_inquiry import Ending
from clockwork_serve.serve.gateway_outputs import Heavy, is_heavy
from clockwork_serve.serve.gateway_responses import Response, infer_response
from clockwork_serve.serve.gateway_routes import Route
from clockwork_serve.serve.gateway_slots import Body

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


class Exchange:
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
    pack: Callable[[Exchange, Response], None] | None = None  # what compresses its response
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
    on_complete: Callable[[Exchange], None] | None = None  # what waits for that, if the body is there
    response: Response | None = None
    abandoned = False
    write: Callable[[Exchange, Heavy], None] | None = None  # what writes a large response elsewhere
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
