"""Whatever a client sends, reading it ends in a call that fits or in an error of its own: nothing else."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import DATATYPES
from clockwork_serve.oip import Served, decompress, grpc_infer, parse_infer, requested_slo_ns
from clockwork_serve.oip.protobuf import ModelInferRequest
from tests.oip.models import served, spec

MODELS = [
    served((spec("X", "FP32", 2),), (spec("Y", "FP32", 2),)),
    served((spec("X", "INT8", -1, -1),), (spec("Y", "INT8", -1),)),
    served((spec("X", "BYTES", -1),), (spec("Y", "BYTES", -1),)),
    served((spec("X", "BOOL", 2), spec("Z", "FP16", 2, optional=True)), (spec("Y", "FP16", 2),)),
]
# Mostly what is nearly right: all else ends at the first letter.
WHOLE = st.one_of(st.integers(-2, 5), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400]))
VALUES = st.one_of(
    WHOLE, st.booleans(), st.none(), st.floats(), st.text(max_size=5),
    st.lists(WHOLE, max_size=5), st.lists(st.lists(WHOLE, max_size=3), max_size=3),
)  # fmt: skip
PARAMETERS = st.dictionaries(
    st.sampled_from(
        ["binary_data_size", "slo_ms", "timeout", "priority", "classification", "binary_data", "sequence_id",
         "binary_data_output", "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"]
    ),
    VALUES,
    max_size=3,
)  # fmt: skip
SHAPES = st.one_of(st.lists(st.integers(0, 3), max_size=3), st.lists(WHOLE, max_size=40))
INPUTS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["X", "Z", "", "\ud800", "X" * 300]),
        "datatype": st.sampled_from([*DATATYPES, "", "FP31"]),
        "shape": st.one_of(SHAPES, VALUES),
    },
    optional={"data": VALUES, "parameters": PARAMETERS},
)
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(INPUTS, max_size=3)},
    optional={
        "id": st.text(max_size=3),
        "parameters": PARAMETERS,
        "outputs": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["Y", "", "W"])}, optional={"parameters": PARAMETERS}
            ),
            max_size=3,
        ),
    },
)


def read(call_of: Any, model: Served) -> None:
    """As a gateway reads it."""
    try:
        call = call_of()
        if not call.shared:
            model.check(call)
            while call.strings is not None and call.strings.step():
                pass
        requested_slo_ns(call.parameters)
    except InvalidRequest as error:
        told = str(error)
        assert 0 < len(told.encode()) < 100_000


@given(st.sampled_from(MODELS), st.binary(max_size=200), st.integers(0, 210))
def test_any_body(model: Served, body: bytes, header_length: int) -> None:
    read(lambda: parse_infer(memoryview(body), None), model)
    if header_length:
        read(lambda: parse_infer(memoryview(body), header_length), model)
    else:
        read(lambda: model.raw_call(memoryview(body)), model)


@pytest.mark.slow
@given(st.sampled_from(MODELS), REQUESTS, st.binary(max_size=40), st.integers(-3, 3))
def test_any_json_and_binary_tensors(model: Served, request: Any, tensors: bytes, slip: int) -> None:
    head = json.dumps(request).encode()
    read(lambda: parse_infer(memoryview(head), None), model)
    length = max(1, len(head) + slip)
    read(lambda: parse_infer(memoryview(head + tensors), length), model)


@given(st.sampled_from(MODELS), REQUESTS, st.data())
def test_any_json_with_a_byte_turned(model: Served, request: Any, data: st.DataObject) -> None:
    head = bytearray(json.dumps(request).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    read(lambda: parse_infer(memoryview(head), None), model)


TENSORS = st.builds(
    lambda name, datatype, shape, numbers, texts: ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape,
        contents={**({"int_contents": numbers} if numbers else {}),
        **({"bytes_contents": texts} if texts else {})},
    ),
    st.sampled_from(["X", "Z", ""]),
    st.sampled_from([*DATATYPES, ""]),
    st.lists(st.one_of(st.integers(0, 3), st.integers(-(2**63), 2**63 - 1)), max_size=40),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    st.lists(st.binary(max_size=3), max_size=3),
)  # fmt: skip


@given(st.sampled_from(MODELS), st.lists(TENSORS, max_size=3), st.lists(st.binary(max_size=20), max_size=3))
def test_any_message(model: Served, tensors: list[Any], raw: list[bytes]) -> None:
    request = ModelInferRequest(model_name="m", inputs=tensors, raw_input_contents=raw)
    read(lambda: grpc_infer.parse_infer(request, model), model)


@given(
    st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "x-gzip"]), st.integers(0, 300), st.data()
)  # fmt: skip
def test_any_packed_body(content: bytes, encoding: str, limit: int, data: st.DataObject) -> None:
    packed = bytearray(zlib.compress(content) if encoding == "deflate" else gzip.compress(content, mtime=0))
    whole = bytes(packed)
    for _ in range(data.draw(st.integers(0, 2))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = packed[: data.draw(st.integers(0, len(packed)))]
    for body in (whole, bytes(packed), bytes(cut), content):
        try:
            found = decompress(body, encoding, limit)
        except InvalidRequest:
            assert body != whole or len(content) > limit
        else:
            assert len(found) <= limit
            assert body != whole or found == content


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([1] * 33, "at most 32 dimensions, found 33"),
        ([10**18] * 300, "at most 32 dimensions, found 300"),
        ([2**63, 2], "up to 9223372036854775807"),
        ([10**400], "up to 9223372036854775807"),
    ],
)
def test_shapes_are_refused_before_they_are_multiplied(shape: list[int], words: str) -> None:
    body = json.dumps({"inputs": [{"name": "X", "datatype": "FP32", "shape": shape, "data": [1]}]}).encode()
    with pytest.raises(InvalidRequest, match=words):
        parse_infer(memoryview(body), None)


def test_so_are_those_of_grpc() -> None:
    tensor = ModelInferRequest.InferInputTensor(name="X", datatype="FP32", shape=[1] * 33)
    with pytest.raises(InvalidRequest, match="at most 32 dimensions, found 33"):
        grpc_infer.parse_infer(ModelInferRequest(inputs=[tensor], raw_input_contents=[b""]), MODELS[0])


@pytest.mark.parametrize("name", ["slo_ms", "timeout"])
def test_a_limit_larger_than_any_float_is_told(name: str) -> None:
    with pytest.raises(InvalidRequest, match="24 h"):
        requested_slo_ns({name: 10**400})
