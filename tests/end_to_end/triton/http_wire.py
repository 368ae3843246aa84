"""Requests that are odd or wrong as HTTP, whatever they ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.end_to_end.triton.asking import Http

BODY = json.dumps({"inputs": [{"name": "X", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}).encode()
HEAD = b"Host: HOST\r\nConnection: close\r\n"
INFER = b"POST /v2/models/ident/infer HTTP/1.1\r\n"
SIZED = b"Content-Length: %d\r\n\r\n" % len(BODY)
PIECE = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"

HEADERS: dict[str, tuple[tuple[str, str], ...]] = {
    "no Content-Type": (),
    "Content-Type: text/plain": (("Content-Type", "text/plain"),),
    "Content-Type: of a form": (("Content-Type", "application/x-www-form-urlencoded"),),
    "Content-Type: octet-stream, yet JSON": (("Content-Type", "application/octet-stream"),),
    "names in small letters": (("content-type", "application/json"), ("accept", "*/*")),
    "Accept: text/html": (("Accept", "text/html"),),
    "Expect: 100-continue": (("Expect", "100-continue"),),
    "Expect: another": (("Expect", "a-miracle"),),
    "Upgrade: h2c": (("Upgrade", "h2c"),),
    "Upgrade: h2c, as it is offered": (
        ("Connection", "Upgrade, HTTP2-Settings"),
        ("Upgrade", "h2c"),
        ("HTTP2-Settings", "AAMAAABkAAQCAAAA"),
    ),
    "a header of 6000 letters": (("X-Long", "x" * 6000),),
    "80 headers": tuple((f"X-{index}", "x") for index in range(80)),
    "an empty header": (("X-Empty", ""),),
    "traceparent": (("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),),
    "Authorization nobody wants": (("Authorization", "Bearer nothing"),),
}

RAW: dict[str, bytes] = {
    "chunked": INFER + HEAD + CHUNKED + b"\r\n" + PIECE,
    "chunked in small pieces": INFER + HEAD + CHUNKED + b"\r\n"
    + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n",
    "chunked with a wrong size": INFER + HEAD + CHUNKED + b"\r\nzz\r\n" + BODY + b"\r\n0\r\n\r\n",
    "HTTP/1.0": INFER.replace(b"1.1", b"1.0") + HEAD + SIZED + BODY,
    "HTTP/1.0 without Host": INFER.replace(b"1.1", b"1.0") + SIZED + BODY,
    "HTTP/1.1 without Host": INFER + b"Connection: close\r\n" + SIZED + BODY,
    "HTTP/3.0": INFER.replace(b"1.1", b"3.0") + HEAD + SIZED + BODY,
    "no version of HTTP": b"GET /v2/health/live\r\n\r\n",
    "unknown verb": b"GRAB /v2/health/live HTTP/1.1\r\n" + HEAD + b"\r\n",
    "verb in small letters": b"get /v2/health/live HTTP/1.1\r\n" + HEAD + b"\r\n",
    "no slash before the path": b"GET v2/health/live HTTP/1.1\r\n" + HEAD + b"\r\n",
    "the whole address as the path": b"GET http://HOST/v2/health/live HTTP/1.1\r\n" + HEAD + b"\r\n",
    "a fragment behind the path": b"GET /v2/health/live#here HTTP/1.1\r\n" + HEAD + b"\r\n",
    "two slashes before the path": b"GET //v2/health/live HTTP/1.1\r\n" + HEAD + b"\r\n",
    "dots in the path": b"GET /v2/models/../health/live HTTP/1.1\r\n" + HEAD + b"\r\n",
    "a header without a colon": b"GET /v2/health/live HTTP/1.1\r\n" + HEAD + b"nonsense\r\n\r\n",
    "a space before the colon": b"GET /v2/health/live HTTP/1.1\r\n" + HEAD + b"X-A : b\r\n\r\n",
    "lines that end without CR": b"GET /v2/health/live HTTP/1.1\nHost: HOST\nConnection: close\n\n",
    "an empty line before": b"\r\nGET /v2/health/live HTTP/1.1\r\n" + HEAD + b"\r\n",
    "Content-Length: a text": INFER + HEAD + b"Content-Length: many\r\n\r\n" + BODY,
    "Content-Length: negative": INFER + HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
    "Content-Length: twice, not the same": INFER + HEAD + b"Content-Length: 3\r\n" + SIZED + BODY,
    "Content-Length: and chunked": INFER + HEAD + CHUNKED + SIZED + PIECE,
    "Content-Length: missing": INFER + HEAD + b"\r\n",
    "a body with a GET": b"GET /v2/health/live HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\n{}",
    "two requests at once": b"GET /v2/health/live HTTP/1.1\r\nHost: HOST\r\n\r\n"
    b"GET /v2/health/live HTTP/1.1\r\n" + HEAD + b"\r\n",
    "TLS to a port without it": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
}  # fmt: skip


def wires() -> Iterator[Http]:
    """All of them."""
    for name, headers in HEADERS.items():
        yield Http(
            name=f"headers: {name}", method="POST", path="/v2/models/ident/infer", body=BODY, headers=headers
        )
    for name, raw in RAW.items():
        yield Http(name=f"wire: {name}", raw=raw)
