"""Heads of HTTP requests that were parsed before: a client that keeps its connection sends the same again.

A head is remembered only where it says everything about how its request is read: a length, and no encoding,
expectation or wish to close.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import httptools

from clockwork_serve.serve.gateway_exchange import WANTED, Exchange, byte_count
from clockwork_serve.serve.gateway_limits import HttpLimits, excess, json_excess
from clockwork_serve.units import KIB

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

    def beyond(self, limits: HttpLimits) -> str:
        """Which limit it is beyond; "" if none."""
        if self._header_count > limits.headers:
            return excess("headers", limits.headers, self._header_count)
        if self._header_bytes + len(self.url) > limits.header_bytes:
            return excess("header_bytes", limits.header_bytes)
        return ""

    def body_beyond(self, limits: HttpLimits, length: int) -> str:
        """Which limit a body of ``length`` is beyond, that the head announces; "" if none."""
        if length > limits.body_bytes:
            return excess("body_bytes", limits.body_bytes, length)
        binary = b"inference-header-content-length" in self.headers
        return "" if binary else json_excess(limits, length)


class Head:
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

    def __init__(self, raw: bytes, whole: int, headers: dict[bytes, bytes], like: Exchange) -> None:
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

    def again(self, on_response: Callable[[], None]) -> Exchange:
        """Another request with this head."""
        exchange = Exchange(on_response, self._method, self._route)
        exchange.keep_alive = True
        exchange.local = self._local
        exchange.header_length = self._header_length
        exchange.json_length = self._json_length
        exchange.accepted = self._accepted
        exchange.slo_header = self._slo
        return exchange


def head_of(data: memoryview, exchange: Exchange, headers: dict[bytes, bytes]) -> Head | None:
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
    return Head(raw, len(data), headers, exchange)
