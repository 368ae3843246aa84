"""Requests as bytes, read again by the server's own codecs."""

from __future__ import annotations

import pytest

from clockwork_lab.bench.messages import NO_SLO_NS, Maker, Tensor, decode
from clockwork_lab.bench.server import Address
from clockwork_serve.errors import ConfigError
from clockwork_serve.oip import parse_infer
from clockwork_serve.oip.protobuf import ModelInferRequest
from clockwork_serve.units import NS_PER_MS

TENSORS = (Tensor("x", "FP32", (1, 2), b"12345678"), Tensor("y", "UINT8", (3,), b"abc"))
PLACE = Address("host", 80, tls=False, base="/v")


def test_an_http_request_says_all_that_the_server_reads() -> None:
    maker = Maker(PLACE, [("X-One", "1")], "header")
    message = maker.http("a/b", TENSORS, 25 * NS_PER_MS, 3)
    head, _, text = message.head.partition(b"\r\n\r\n")
    body = text + maker.bodies[message.body]
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v/v2/models/a%2Fb/infer HTTP/1.1"
    assert b"X-One: 1" in lines
    assert b"x-slo-ms: 25" in lines
    assert b"Content-Length: %d" % len(body) in lines
    call = parse_infer(memoryview(body), len(text))
    assert [(each.name, each.datatype, tuple(each.shape), bytes(each.data)) for each in call.inputs] == [
        ("x", "FP32", (1, 2), b"12345678"), ("y", "UINT8", (3,), b"abc"),
    ]  # fmt: skip
    assert call.parameters["priority"] == 3


def test_a_grpc_request_is_the_protocols() -> None:
    maker = Maker(PLACE, [], "grpc")
    message = maker.grpc("m", TENSORS, 2_500_000, 2)
    data = message.lead + maker.bodies[message.body]
    assert data[0] == 0
    assert int.from_bytes(data[1:5], "big") == len(data) - 5
    request = ModelInferRequest.FromString(data[5:])
    assert [(each.name, tuple(each.shape)) for each in request.inputs] == [("x", (1, 2)), ("y", (3,))]
    assert list(request.raw_input_contents) == [b"12345678", b"abc"]
    assert request.parameters["priority"].int64_param == 2
    headers = decode(message.head)
    assert headers[":path"] == "/inference.GRPCInferenceService/ModelInfer"
    assert headers["grpc-timeout"] == "2500000n"


@pytest.mark.parametrize(("ms", "text"), [(50, "50000000n"), (500, "500000u"), (3_600_000, "3600000m")])
def test_grpcs_timeouts_have_at_most_eight_digits(ms: int, text: str) -> None:
    assert decode(Maker(PLACE, [], "grpc").grpc("m", TENSORS, ms * NS_PER_MS, 0).head)["grpc-timeout"] == text


@pytest.mark.parametrize("deadline", ["header", "timeout", "grpc"])
def test_no_slo_is_not_told(deadline) -> None:
    maker = Maker(PLACE, [], deadline)
    http, grpc = maker.http("m", TENSORS, NO_SLO_NS, 0), maker.grpc("m", TENSORS, NO_SLO_NS, 0)
    assert b"x-slo-ms" not in http.head
    assert b"timeout" not in http.head + grpc.head + grpc.lead


def test_equal_inputs_share_a_body() -> None:
    maker = Maker(PLACE, [], "header")
    assert len({maker.http(f"m{n}", TENSORS, n + 1, 0).body for n in range(100)}) == 1
    assert len(maker.bodies) == 1


@pytest.mark.parametrize(
    ("url", "protocol", "address"),
    [
        ("127.0.0.1:8000", "http", Address("127.0.0.1", 8000, tls=False, base="")),
        ("https://host/serve/", "http", Address("host", 443, tls=True, base="/serve")),
        ("[::1]:8001", "grpc", Address("::1", 8001, tls=False, base="")),
        ("grpcs://host:1", "grpc", Address("host", 1, tls=True, base="")),
    ],
)
def test_where_a_server_is(url: str, protocol, address: Address) -> None:
    assert Address.of(url, protocol) == address


@pytest.mark.parametrize(
    ("url", "protocol"),
    [("host", "http"), ("ftp://host:1", "http"), ("grpc://h:1", "http"), ("http://h:x", "http"), ("", "http"),
     ("http://h:1/?q=1", "http"), ("host", "grpc"), ("http://h:99999", "raw")],
)  # fmt: skip
def test_what_is_no_place_is_refused(url: str, protocol) -> None:
    with pytest.raises(ConfigError, match=r"url: expected http://HOST:PORT"):
        Address.of(url, protocol)
