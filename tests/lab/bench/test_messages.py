"""Requests as bytes, read again by the server's own codecs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_client.datatypes import decode_strings
from clockwork_client.tensors import DTYPES
from clockwork_lab.bench.messages import (
    NO_SLO_NS,
    Data,
    Maker,
    Tensor,
    Undecodable,
    decode,
    literal,
    read_shapes,
)
from clockwork_lab.bench.server import ServerAddress, TensorInfo
from clockwork_serve.errors import ConfigError
from clockwork_serve.oip import parse_infer
from clockwork_serve.oip.protobuf import ModelInferRequest
from clockwork_serve.units import NS_PER_MS

TENSORS = (Tensor("x", "FP32", (1, 2), b"12345678"), Tensor("y", "UINT8", (3,), b"abc"))
PLACE = ServerAddress("host", 80, tls=False, base="/v")


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
        ("127.0.0.1:8000", "http", ServerAddress("127.0.0.1", 8000, tls=False, base="")),
        ("https://host/serve/", "http", ServerAddress("host", 443, tls=True, base="/serve")),
        ("[::1]:8001", "grpc", ServerAddress("::1", 8001, tls=False, base="")),
        ("grpcs://host:1", "grpc", ServerAddress("host", 1, tls=True, base="")),
    ],
)
def test_where_a_server_is(url: str, protocol, address: ServerAddress) -> None:
    assert ServerAddress.of(url, protocol) == address


@pytest.mark.parametrize(
    ("url", "protocol"),
    [("host", "http"), ("ftp://host:1", "http"), ("grpc://h:1", "http"), ("http://h:x", "http"), ("", "http"),
     ("http://h:1/?q=1", "http"), ("host", "grpc"), ("http://h:99999", "raw")],
)  # fmt: skip
def test_what_is_no_place_is_refused(url: str, protocol) -> None:
    with pytest.raises(ConfigError, match=r"url: expected http://HOST:PORT"):
        ServerAddress.of(url, protocol)


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=400)


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        # RFC 7541, C.2.2, C.2.4, C.4.1 and parts of C.6.1
        ("040c2f73616d706c652f70617468", {":path": "/sample/path"}),
        ("82", {":method": "GET"}),
        (
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            {":method": "GET", ":scheme": "http", ":path": "/", ":authority": "www.example.com"},
        ),
        ("48826402", {":status": "302"}),
        ("6196d07abe941054d444a8200595040b8166e082a62d1bff", {"date": "Mon, 21 Oct 2013 20:13:21 GMT"}),
        ("6e919d29ad171863c78f0b97c8e9ae82ae43d3", {"location": "https://www.example.com"}),
        ("2082", {":method": "GET"}),
        ("", {}),
    ],
)  # fmt: skip
def test_the_examples_of_the_standard(block: str, headers: dict[str, str]) -> None:
    assert decode(bytes.fromhex(block)) == headers


@given(st.dictionaries(TEXT.filter(bool), TEXT))
def test_what_is_written_is_read(headers: dict[str, str]) -> None:
    assert decode(b"".join(literal(name, value) for name, value in headers.items())) == headers


@pytest.mark.parametrize(
    "block", ["80", "be", "3fe11f", "00", "0001", "000161", "7f", "00ffffffffffffffff", "0003616263"]
)
def test_what_is_no_block_is_refused(block: str) -> None:
    with pytest.raises(Undecodable):
        decode(bytes.fromhex(block))


@given(st.binary(max_size=60))
def test_any_bytes_are_headers_or_refused(block: bytes) -> None:
    try:
        decode(block)
    except Undecodable:
        return


X = TensorInfo("x", "FP32", (-1, 4))
WORDS = TensorInfo("words", "BYTES", (2,))


@pytest.mark.parametrize("datatype", sorted(DTYPES))
@pytest.mark.parametrize("source", ["random", "zeros"])
def test_every_datatype_is_filled(datatype: str, source: str) -> None:
    (tensor,) = Data(source, 1).tensors("m", [TensorInfo("x", datatype, (3, 5))], {})
    assert len(tensor.data) == 15 * DTYPES[datatype].itemsize
    values = np.frombuffer(tensor.data, DTYPES[datatype]).astype(float)
    assert (values == 0).all() == (source == "zeros")
    if datatype in ("FP16", "FP32", "FP64"):
        assert ((values >= 0) & (values <= 1)).all()
    again = Data(source, 1).tensors("m", [TensorInfo("x", datatype, (3, 5))], {})[0]
    assert again == tensor


def test_strings_are_words() -> None:
    (tensor,) = Data("random", 1).tensors("m", [WORDS], {})
    words = list(decode_strings(tensor.data))
    assert [len(word) for word in words] == [8, 8]
    assert b"".join(words).isalpha()


def test_an_open_first_size_is_a_batch_of_one_and_shape_says_others() -> None:
    assert Data("zeros", 1).tensors("m", [X], {})[0].shape == (1, 4)
    shapes = read_shapes(["x:7,4", "other:x:2,4"])
    assert Data("zeros", 1).tensors("m", [X], shapes)[0].shape == (7, 4)
    assert Data("zeros", 1).tensors("other", [X], shapes)[0].shape == (2, 4)


def test_a_file_of_numpy_is_sent_as_it_is(tmp_path: Path) -> None:
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.save(tmp_path / "x.npy", array)
    (tensor,) = Data(str(tmp_path / "x.npy"), 1).tensors("m", [X], {})
    assert (tensor.shape, tensor.data) == ((2, 4), array.tobytes())
    np.savez(tmp_path / "both.npz", x=array, words=np.array(["a", "bc"]))
    x, words = Data(str(tmp_path / "both.npz"), 1).tensors("m", [X, WORDS], {})
    assert x.data == array.tobytes()
    assert list(decode_strings(words.data)) == [b"a", b"bc"]


@pytest.mark.parametrize("text", ["x", "x:", "x:1,,2", "x:-1", "x:1.5", ":1", "a:b:c:1", ""])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"shape: expected \[MODEL:\]INPUT:1,3,224,224, found"):
        read_shapes([text])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 5), np.float32))
    np.save(tmp_path / "ints.npy", np.zeros((2, 4), np.int64))
    np.savez(tmp_path / "y.npz", y=np.zeros((2, 4), np.float32))
    (tmp_path / "no.npy").write_bytes(b"nothing of numpy's")
    image = TensorInfo("image", "FP32", (-1, 3, -1, -1))

    def complaint(source: str, infos: list[TensorInfo], *shapes: str) -> str:
        with pytest.raises(ConfigError) as caught:
            Data(source if source == "random" else str(tmp_path / source), 1).tensors(
                "m", infos, read_shapes(shapes)
            )
        return str(caught.value)

    assert "give --shape image:1,3,N,N with numbers for N" in complaint("random", [image])
    assert "expected [-1, 4] for input 'x' of model 'm', found [4, 5] in --shape" in complaint(
        "random", [X], "x:4,5"
    )
    assert "expected [-1, 4]" in complaint("x.npy", [X])
    assert "expected FP32 for input 'x' of model 'm', found int64" in complaint("ints.npy", [X])
    assert "expected an array called 'x'" in complaint("y.npz", [X])
    assert "write them with numpy.savez" in complaint("x.npy", [X, WORDS])
    assert "input_data: expected random, zeros, or a file" in complaint("no.npy", [X])
    assert "input_data: expected random, zeros, or a file" in complaint("missing.npy", [X])
