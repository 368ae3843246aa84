"""The codec process: the same calls and errors as in the loop, and what happens when it dies."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import Outcome, Reason
from clockwork_serve.oip import OK, InferCall, OutputTensor, OutputWish, TooLarge, encode_infer, parse_infer
from clockwork_serve.serve.gateway import codec as gateway_codec
from clockwork_serve.serve.gateway.codec import Codec, CodecBusy, CodecFailed, LargeOutputs, has_large_outputs
from clockwork_serve.serve.gateway.requests import InferResponse
from clockwork_serve.serve.http.exchange import HttpExchange
from tests.oip.models import served, spec
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import ask, post

TENSORS_MAX = 8


def body(data: Any, shape: list[int], datatype: str = "FP32", **more: Any) -> bytes:
    tensor = {"name": "X", "shape": shape, "datatype": datatype, "data": data}
    return json.dumps({"id": "7", "inputs": [tensor], "parameters": {"slo_ms": 500}, **more}).encode()


def repeated(datum: str, times: int, shape: list[int], datatype: str) -> bytes:
    """A body whose data is one and the same so many times, quickly made."""
    before, after = body([], shape, datatype).split(b'"data": []')
    return before + b'"data": [' + b", ".join([datum.encode()] * times) + b"]" + after


MIXED_JSON = json.dumps(
    {
        "inputs": [
            {"name": "A", "shape": [3], "datatype": "INT8", "parameters": {"binary_data_size": 3}},
            {"name": "B", "shape": [2], "datatype": "INT64", "data": [1, -2]},
            {"name": "C", "shape": [1], "datatype": "INT8", "parameters": {"binary_data_size": 1}},
        ],
        "outputs": [{"name": "Y", "parameters": {"classification": 3}}],
    }
).encode()


@pytest.mark.parametrize(
    ("text", "binary"),
    [
        (body([[1.5, 2], [3, 4]], [2, 2]), None),
        (body(["a", "\u00e9"], [2], "BYTES"), None),
        (MIXED_JSON, b"abcd"),
    ],
)
def test_the_call_is_the_same(text: bytes, binary: bytes | None) -> None:
    whole = memoryview(text + (binary or b""))
    length = None if binary is None else len(text)
    found = read(text, whole, length)
    expected = parse_infer(whole, length)
    assert [bytes(tensor.data) for tensor in found.inputs] == [bytes(each.data) for each in expected.inputs]
    for call in (found, expected):
        call.header = b""
        for tensor in call.inputs:
            tensor.data = b""
    assert found == expected


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (body([1], [2]), InvalidRequest, "expected 2 elements"),
        (b"{", InvalidRequest, "failed to parse the request JSON"),
        (body([1], [1], id="\ud800"), InvalidRequest, "JSON"),
        (body([1], [1], parameters={"n": 10**30}), InvalidRequest, "out of range"),
        (json.dumps({"inputs": [{"name": "X", "shape": [1], "datatype": "INT8", "data": [1]}] * 9}).encode(),
         InvalidRequest, "inputs: expected at most 8, found 9"),
        (body([1], [1], parameters={f"{n:x}": 0 for n in range(99_999)}), TooLarge, "beside its inputs"),
        (repeated('["a"]', 200_000, [2], "BYTES"), InvalidRequest, "expected 2 elements"),
        (repeated("[]", 200_000, [2], "BYTES"), InvalidRequest, "found 200001 lists"),
        (repeated("0", 6_000_000, [6_000_000], "INT64")[:-40] + b"}", InvalidRequest, "JSON"),
    ],
)  # fmt: skip
def test_the_error_is_the_same(text: bytes, kind: type[InvalidRequest], words: str) -> None:
    with pytest.raises(kind, match=words):
        read(text, memoryview(text), None)


def test_json_that_needs_too_much_memory_is_rejected() -> None:
    many = b'{"inputs":[' + b"{}," * 4_000_000 + b"{}]}"
    with pytest.raises((InvalidRequest, CodecFailed)):
        read(many, memoryview(many), None)


def read(text: bytes, whole: memoryview, length: int | None) -> InferCall:
    async def main() -> InferCall:
        codec = Codec()
        try:
            return await codec.read(text, whole, length, TENSORS_MAX, lambda: True)
        finally:
            codec.close()

    return asyncio.run(main())


async def test_a_process_that_dies_fails_one_request_and_is_restarted() -> None:
    once = (
        sys.executable, "-c",
        ("import socket, os; from clockwork_serve.serve.gateway import codec_process as c; "
        "c.receive(socket.socket(fileno=os.dup(0)))"),
    )  # fmt: skip
    codec = Codec(once)
    text = body([1], [1])
    try:
        with pytest.raises(CodecFailed, match="send tensors as binary data"):
            await codec.read(text, memoryview(text), None, TENSORS_MAX, lambda: True)
        codec._command = Codec()._command
        assert (await codec.read(text, memoryview(text), None, TENSORS_MAX, lambda: True)).id == "7"
    finally:
        codec.close()


async def test_an_idle_process_trims_its_memory_once(tmp_path: Path) -> None:
    trimmed = tmp_path / "trimmed"
    trimming = (
        sys.executable, "-c",
        ("import sys; from clockwork_serve.serve.gateway import codec_process as c; c.IDLE_S = 0.05; "
        "c._trim = lambda: open(sys.argv[1], 'a').write('t'); c.main()"),
        str(trimmed),
    )  # fmt: skip
    codec = Codec(trimming)
    text = body([1], [1])
    try:
        for times in (1, 2):
            assert (await codec.read(text, memoryview(text), None, TENSORS_MAX, lambda: True)).id == "7"
            async with asyncio.timeout(60):
                while not trimmed.exists() or trimmed.stat().st_size < times:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert trimmed.stat().st_size == times
    finally:
        codec.close()


async def test_unwanted_json_is_skipped_and_a_long_queue_is_rejected() -> None:
    codec = Codec()
    text = body([1], [1])
    try:
        with pytest.raises(CodecFailed, match="the client left"):
            await codec.read(text, memoryview(text), None, TENSORS_MAX, lambda: False)
        assert codec._process is None
        codec._waiting_bytes = gateway_codec.WAITING_BYTES
        with pytest.raises(CodecBusy, match="are queued to be parsed already"):
            await codec.read(text, memoryview(text), None, TENSORS_MAX, lambda: True)
    finally:
        codec.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as found:
        yield found


def infer(model: str) -> Callable[[bytes], bytes]:
    return lambda text: post(f"/v2/models/{model}/infer", text)


def test_large_json_is_answered(gateway: RunningGateway) -> None:
    count = 40_000
    found = ask(gateway, infer("any")(body([0.25] * count, [count], parameters={"slo_ms": 9000})))
    assert found.status == 200, found.json
    assert found.json["outputs"][0]["data"] == [0.25] * count


def test_more_json_than_a_model_can_need_is_rejected_unread(gateway: RunningGateway) -> None:
    found = ask(gateway, infer("ident")(body([0.25] * 40_000, [40_000])))
    assert (found.status, found.json["outcome"]) == (413, "invalid")
    assert "bytes for the inputs of model 'ident'" in found.json["error"]


def test_large_json_of_an_unknown_model_is_not_read(gateway: RunningGateway) -> None:
    assert ask(gateway, infer("nobody")(body([0.25] * 40_000, [40_000]))).status == 404


def test_invalid_large_json_holds_no_body(gateway: RunningGateway) -> None:
    def exchanges() -> int:
        return sum(type(each) is HttpExchange for each in gc.get_objects())

    gateway.until(lambda: gateway.servers.gateway.connections == 0)
    gateway.do(gc.collect)
    gc.disable()
    try:
        for text in (body([1] * 40_000, [2]), body([0.25] * 40_000, [40_000])):
            for model in ("any", "ident", "nobody"):
                assert ask(gateway, infer(model)(text)).status != 200 or model == "any"
        gateway.until(lambda: not exchanges())
    finally:
        gc.enable()


def test_bodies_of_other_endpoints_are_limited(gateway: RunningGateway) -> None:
    found = ask(gateway, post("/v2/repository/index", b"{" + b" " * 70_000 + b"}"))
    assert found.status == 413


def test_large_responses_are_encoded_like_small_ones() -> None:
    of = served((spec("X", "FP32", 1),), (spec("A", "FP32", -1), spec("B", "FP32", -1), spec("C", "INT8", 2)))
    count = 20_000
    values = np.random.default_rng(1).standard_normal((2, count), np.float32)
    outputs = [
        OutputTensor("A", "FP32", (2, count), values.data.cast("B")),
        OutputTensor("B", "FP32", (2, count), values[::-1].tobytes()),
        OutputTensor("C", "INT8", (2, 2), b"1234"),
    ]
    for wishes in (
        [OutputWish("A"), OutputWish("C", binary=True), OutputWish("B", classes=3)],
        [OutputWish("B", binary=True, classes=3), OutputWish("A")],
        [OutputWish("C"), OutputWish("A")],
    ):
        response = InferResponse(
            Outcome.OK, Reason.NONE, OK, served=of, call=InferCall([], wishes), outputs=outputs
        )
        assert has_large_outputs(response)
        assert not has_large_outputs(msgspec.structs.replace(response, outputs=[outputs[2]]))
        plain = encode_infer(response.call, of, outputs, {})  # type: ignore[arg-type]

        async def main(response: InferResponse = response) -> InferResponse:
            codec = Codec()
            try:
                return await LargeOutputs(response).response(codec, lambda: True)
            finally:
                codec.close()

        found = asyncio.run(main())
        assert found.call is not None
        large = encode_infer(found.call, of, found.outputs, {}, found.texts)
        assert b"".join(large.parts) == b"".join(plain.parts)
        assert large.header_length == plain.header_length
