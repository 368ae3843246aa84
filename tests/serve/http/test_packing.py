"""Compression of responses: only for clients that accept it, complete, and in order."""

from __future__ import annotations

import gzip
import socket
import ssl
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clockwork_serve.messages import Answer, Outcome, Request
from clockwork_serve.oip import Coding
from clockwork_serve.serve.http.responses import (
    INLINE_BYTES,
    LEAST_BYTES,
    WAITING_BYTES,
    HttpResponse,
    Packer,
)
from tests.serve.certificates import certificates
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import IDENT_JSON, INFER, Found, ask, get, post, tensor

ANY = "/v2/models/any/infer"
GZIP = Coding("gzip", must=False)
UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}


def numbers(count: int) -> Any:
    return (np.arange(count) % 7).astype(np.float32)


def any_json(count: int) -> bytes:
    data = ",".join(str(n % 7) for n in range(count))
    return b'{"inputs":[{"name":"X","shape":[%d],"datatype":"FP32","data":[%s]}]}' % (count, data.encode())


def message(client: socket.socket, left: bytes) -> tuple[Found, bytes]:
    """The next response of a connection, and the bytes after it."""
    while b"\r\n\r\n" not in left:
        left += client.recv(65536)
    length = Found(left).headers["content-length"]
    end = left.index(b"\r\n\r\n") + 4 + int(length)
    while len(left) < end:
        left += client.recv(65536)
    return Found(left[:end]), left[end:]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("count", [500, 100_000])
def test_a_stock_client_that_accepts_it_gets_compression(
    gateway: RunningGateway, client: Any, coding: str, count: int
) -> None:
    data = numbers(count)
    inputs = [tensor("X", data, "FP32")]
    found = client.infer("any", inputs, response_compression_algorithm=coding)
    np.testing.assert_array_equal(found.as_numpy("Y"), data)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("count", [700, 50_000])
@pytest.mark.parametrize("binary", [True, False])
def test_the_decompressed_body_is_the_same(
    gateway: RunningGateway, coding: str, count: int, *, binary: bool
) -> None:
    body = any_json(count)
    if binary:
        body = b'{"parameters":{"binary_data_output":true},' + body[1:]
    plain = ask(gateway, post(ANY, body))
    packed = ask(gateway, post(ANY, body, f"Accept-Encoding: {coding}"))
    assert (packed.status, packed.headers["content-encoding"]) == (200, coding)
    assert int(packed.headers["content-length"]) == len(packed.body) < len(plain.body)
    assert UNPACK[coding](packed.body) == plain.body
    same = ("content-type", "inference-header-content-length")
    assert [packed.headers.get(name) for name in same] == [plain.headers.get(name) for name in same]


@pytest.mark.parametrize("said", ["gzip, deflate, br", "identity", "gzip;q=0", "*", "br"])
def test_without_accept_encoding_nothing_is_compressed(gateway: RunningGateway, said: str) -> None:
    found = ask(gateway, post(ANY, any_json(1000), f"Accept-Encoding: {said}"))
    assert found.status == 200
    assert "content-encoding" not in found.headers
    assert len(found.json["outputs"][0]["data"]) == 1000


def test_small_responses_are_not_compressed_unless_they_must_be(gateway: RunningGateway) -> None:
    small = ask(gateway, post(INFER, IDENT_JSON, "Accept-Encoding: gzip"))
    assert (small.status, small.headers.get("content-encoding")) == (200, None)
    packed = ask(gateway, post(INFER, IDENT_JSON, "Accept-Encoding: gzip, identity;q=0"))
    assert gzip.decompress(packed.body) == small.body


def test_errors_are_not_compressed(gateway: RunningGateway) -> None:
    def answered(request: Request) -> Answer:
        return gateway.controller.answer(request, outcome=Outcome.FAILED, message="so it is " * 1000)

    gateway.controller.on_request = answered
    found = ask(gateway, post(INFER, IDENT_JSON, "Accept-Encoding: gzip"))
    assert (found.status, found.headers.get("content-encoding")) == (500, None)
    assert found.json["outcome"] == "failed"


def test_only_inference_is_compressed(gateway: RunningGateway) -> None:
    for sent in (
        get("/v2/models/ident/config", "Accept-Encoding: gzip"),
        get("/metrics", "Accept-Encoding: gzip"),
        get("/metrics", "Accept-Encoding: gzip", method="HEAD"),
        get(ANY, "Accept-Encoding: gzip", method="HEAD"),
    ):
        assert "content-encoding" not in ask(gateway, sent).headers


def test_responses_keep_their_order_on_one_connection(gateway: RunningGateway) -> None:
    sent = [
        post(ANY, any_json(50_000), "Accept-Encoding: gzip", close=False),
        post(INFER, IDENT_JSON, close=False),
        post(ANY, any_json(600), "Accept-Encoding: deflate", close=False),
        post(ANY, any_json(600), close=False),
    ]
    with gateway.connect() as client:
        client.sendall(b"".join(sent))
        left, found = b"", []
        for _ in sent:
            one, left = message(client, left)
            found.append(one)
    assert [one.headers.get("content-encoding") for one in found] == ["gzip", None, "deflate", None]
    assert b'"any"' in gzip.decompress(found[0].body)
    assert found[1].json["model_name"] == "ident"
    assert b'"any"' in zlib.decompress(found[2].body)
    assert left == b""


def test_over_tls_a_connection_stays_usable(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    context = ssl.create_default_context(cafile=files.ca)
    with (
        running_gateway(tmp_path, tls_certificate=files.certificate, tls_key=files.key) as found,
        context.wrap_socket(found.connect(), server_hostname="localhost") as client,
    ):
        for coding, unpack in UNPACK.items():
            client.sendall(post(ANY, any_json(50_000), f"Accept-Encoding: {coding}", close=False))
            one, left = message(client, b"")
            assert (one.headers["content-encoding"], left) == (coding, b"")
            assert b'"any"' in unpack(one.body)
        client.sendall(get("/v2/health/live"))
        assert message(client, b"")[0].json == {"live": True}


def test_a_client_that_disconnects_meanwhile_harms_no_other(gateway: RunningGateway) -> None:
    for _ in range(5):
        with gateway.connect() as client:
            client.sendall(post(ANY, any_json(200_000), "Accept-Encoding: gzip"))
            gateway.until(lambda: gateway.controller.requests)
        gateway.controller.requests.clear()
    assert ask(gateway, post(INFER, IDENT_JSON)).status == 200
    gateway.until(lambda: not gateway.servers.http._packer._waiting_bytes)


# What waits


def response(size: int) -> HttpResponse:
    return HttpResponse(200, (bytes(size),))


async def test_while_much_is_queued_responses_are_not_compressed() -> None:
    packer = Packer()
    sizes = (WAITING_BYTES * 2, INLINE_BYTES + 1, INLINE_BYTES, LEAST_BYTES)
    found = [packer.pack(response(size), GZIP) for size in sizes]
    done = [one if isinstance(one, HttpResponse) else await one for one in found]
    again = packer.pack(response(INLINE_BYTES + 1), GZIP)
    assert not isinstance(again, HttpResponse), "there is room again"
    done.append(await again)
    packer.close()
    assert ["gzip" if b"Content-Encoding: gzip" in one.headers else "" for one in done] == [
        "gzip",
        "",
        "gzip",
        "gzip",
        "gzip",
    ]


def test_incompressible_responses_are_sent_as_they_are() -> None:
    noise = HttpResponse(200, (np.random.default_rng(1).bytes(2000),))
    assert Packer().pack(noise, GZIP) is noise
    packed = Packer().pack(noise, Coding("gzip", must=True))
    assert isinstance(packed, HttpResponse)
    assert gzip.decompress(b"".join(packed.parts)) == noise.parts[0]
