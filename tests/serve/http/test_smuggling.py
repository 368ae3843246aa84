"""A request that a proxy could parse differently is rejected, and its connection is closed."""

from __future__ import annotations

import pytest

from tests.serve.http.any_bytes import answers

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 0\r\nContent-Length: %d" % len(HIDDEN),
        b"Content-Length: %d\r\nTransfer-Encoding: chunked" % len(HIDDEN),
        b"Transfer-Encoding: chunked\r\nContent-Length: 0",
        b"Transfer-Encoding: xchunked\r\nContent-Length: %d" % len(HIDDEN),
        b"Transfer-Encoding : chunked\r\nContent-Length: 0",
        b"Content-Length: +%d" % len(HIDDEN),
        b"Content-Length: 0x10",
        b"Content-Length: 0\r\n Content-Length: 5",
        b"X: a\0b\r\nContent-Length: 0",
    ],
)
def test_a_request_with_two_lengths_is_rejected(head: bytes) -> None:
    said = answers([b"POST /v2 HTTP/1.1\r\nHost: h\r\n" + head + b"\r\n\r\n" + HIDDEN])

    assert said.startswith(b"HTTP/1.1 400"), said
    assert said.endswith(b"|")
    assert said.count(b"HTTP/1.1 ") == 1
