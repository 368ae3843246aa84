"""HTTP responses as bytes, and their compression."""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, Final

import msgspec

from clockwork_client.datatypes import Buffer
from clockwork_serve.messages import Outcome
from clockwork_serve.oip import Coding, compress, encode_infer
from clockwork_serve.serve.gateway.requests import InferResponse
from clockwork_serve.units import KIB, MIB, NS_PER_MS

# ------------------------------------------------------------
# HTTP responses as bytes.


JSON: Final = b"application/json"
_BINARY: Final = b"application/octet-stream"
_PHRASES: Final = {status.value: status.phrase.encode() for status in http.HTTPStatus}
_encode = msgspec.json.Encoder().encode
_log = logging.getLogger(__name__)


class HttpResponse(msgspec.Struct, frozen=True):
    """A response to send. ``headers`` are whole lines, each with its line end.

    With ``follow`` it has no length: what follows its head is written to the transport that this gets, until
    the connection ends.
    """

    status: int
    parts: Sequence[Buffer] = ()
    content_type: bytes = JSON
    headers: bytes = b""
    follow: Callable[[asyncio.WriteTransport], None] | None = None

    @property
    def body_bytes(self) -> int:
        """The length of the body."""
        length = 0
        for part in self.parts:
            length += len(part)
        return length

    def head(self, length: int, connection: bytes = b"") -> bytes:
        """Status line and headers for a body of ``length``; ``connection`` is a header line or empty."""
        size = b"Content-Length: %d\r\n" % length if self.follow is None else b""
        return b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\n%s%s%s\r\n" % (
            self.status, _PHRASES.get(self.status, b"Unknown"), self.content_type, size, self.headers,
            connection,
        )  # fmt: skip


def json_response(found: Any) -> HttpResponse:
    """A response with a JSON body."""
    return HttpResponse(200, (_encode(found),))


def error_response(status: int, message: str, headers: bytes = b"", **more: Any) -> HttpResponse:
    """A response with the body ``{"error": message}`` and more fields."""
    return HttpResponse(status, (_encode({"error": message, **more}),), JSON, headers)


def internal_error_response() -> HttpResponse:
    """The response to a request that triggered a bug; the exception being handled is logged."""
    _log.exception("answering a request failed")
    return error_response(500, "the gateway failed to answer the request; see its log")


def http_response(response: InferResponse) -> HttpResponse:
    """The response to an inference request; it refers to the outputs' memory only if that is their own."""
    identity = b"Clockwork-Request-Id: %s\r\n" % response.request_id.encode() if response.request_id else b""
    if response.outcome is not Outcome.OK:
        return _failure(response, identity)
    assert response.served is not None
    assert response.call is not None
    body = encode_infer(
        response.call, response.served, response.outputs, response.parameters, response.texts,
        own=response.own,
    )  # fmt: skip
    parts, header_length = body.parts, body.header_length
    if header_length is None:
        return HttpResponse(200, parts, JSON, identity)
    return HttpResponse(
        200, parts, _BINARY, b"%sInference-Header-Content-Length: %d\r\n" % (identity, header_length)
    )


def _failure(response: InferResponse, headers: bytes) -> HttpResponse:
    body: dict[str, Any] = {"error": response.text, "outcome": response.outcome, "reason": response.reason}
    if response.call is not None and response.call.id:
        body["id"] = response.call.id
    if response.parameters:
        body["parameters"] = response.parameters
    if response.retry_after_ns > 0:
        body["retry_after_ms"] = response.retry_after_ns / NS_PER_MS
        headers += b"Retry-After: %d\r\n" % response.retry_after_s
    if response.status.http == http.HTTPStatus.NOT_IMPLEMENTED:
        headers += b"Accept-Encoding: gzip, deflate\r\n"
    return HttpResponse(response.status.http, (_encode(body),), JSON, headers)


# ------------------------------------------------------------
# Compression of responses for clients that accept it.
#
# One thread does it, so that a gateway spends at most one core on it. While too much is queued, responses are
# sent uncompressed, which HTTP allows.


LEAST_BYTES: Final = KIB  # smaller bodies fit into one packet anyway
INLINE_BYTES: Final = 4 * KIB
"""Bodies up to this size are compressed in the loop, in at most 0.1 ms: handing them to a thread takes as
long."""
WAITING_BYTES: Final = 4 * MIB
"""Bytes that may be queued for the thread, 100 ms at most; or one response of any size."""


class Packer:
    """Compresses responses. All methods are for the running loop's thread."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._waiting_bytes = 0

    def pack(self, response: HttpResponse, coding: Coding) -> HttpResponse | Awaitable[HttpResponse]:
        """The response compressed, at once or later; as it is, if compression is not worthwhile."""
        size = sum(map(len, response.parts))
        # Stock clients do not expect compressed errors.
        if response.status != HTTPStatus.OK or (size < LEAST_BYTES and not coding.must):
            return response
        if size <= INLINE_BYTES:
            return _packed(response, coding, size)
        if self._waiting_bytes and self._waiting_bytes + size > WAITING_BYTES and not coding.must:
            return response
        self._waiting_bytes += size
        return self._pack_soon(response, coding, size)

    def close(self) -> None:
        """End the thread after its current job."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _pack_soon(self, response: HttpResponse, coding: Coding, size: int) -> HttpResponse:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "packer")
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, _packed, response, coding, size)
        finally:
            self._waiting_bytes -= size


def _packed(response: HttpResponse, coding: Coding, size: int) -> HttpResponse:
    parts = compress(response.parts, coding)
    if sum(map(len, parts)) >= size and not coding.must:
        return response
    headers = b"%sContent-Encoding: %s\r\n" % (response.headers, coding.name.encode())
    return HttpResponse(response.status, parts, response.content_type, headers)
