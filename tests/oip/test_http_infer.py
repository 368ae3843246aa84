"""Request bodies to calls and answers to bodies, right ones and wrong ones."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import (
    InferCall,
    InputTensor,
    OutputTensor,
    OutputWish,
    Served,
    SharedRef,
    encode_infer,
    parse_infer,
)
from tests.oip.models import identity, served, spec

X = np.arange(4, dtype="<f4").reshape(2, 2)


def parse(head: dict[str, Any], *tensors: bytes, header: int | None = None) -> InferCall:
    text = json.dumps(head).encode()
    if tensors and header is None:
        header = len(text)
    return parse_infer(memoryview(text + b"".join(tensors)), header)


def x(**fields: Any) -> dict[str, Any]:
    return {"name": "X", "shape": [2, 2], "datatype": "FP32", **fields}


@pytest.mark.parametrize("data", [[0, 1, 2, 3], [[0.0, 1.0], [2.0, 3.0]], [[[0], [1]], [[2], [3]]]])
def test_json_data_may_be_flat_or_nested(data: list[Any]) -> None:
    call = parse({"id": "42", "inputs": [x(data=data)]})
    assert call.id == "42"
    assert call.outputs is None
    assert not call.binary
    (tensor,) = call.inputs
    assert (tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data)) == (
        "X", "FP32", (2, 2), X.tobytes(),
    )  # fmt: skip


def test_binary_data_follows_the_json_in_order_mixed_with_json_data() -> None:
    y = np.array([7, 8], "<i8")
    call = parse(
        {
            "inputs": [
                x(parameters={"binary_data_size": 16}),
                {"name": "J", "shape": [1], "datatype": "BOOL", "data": [True]},
                {"name": "Y", "shape": [2], "datatype": "INT64", "parameters": {"binary_data_size": 16}},
            ],
            "parameters": {"binary_data_output": True, "slo_ms": 20},
        },
        X.tobytes(),
        y.tobytes(),
    )
    assert [bytes(tensor.data) for tensor in call.inputs] == [X.tobytes(), b"\x01", y.tobytes()]
    assert call.binary
    assert call.parameters["slo_ms"] == 20


def test_outputs_choose_their_form() -> None:
    call = parse(
        {
            "inputs": [x(data=[0, 1, 2, 3])],
            "outputs": [
                {"name": "A"},
                {"name": "B", "parameters": {"binary_data": False}},
                {"name": "C", "parameters": {"classification": 3}},
            ],
            "parameters": {"binary_data_output": True},
        }
    )
    assert call.outputs == [
        OutputWish("A", binary=True),
        OutputWish("B", binary=False),
        OutputWish("C", binary=True, classes=3),
    ]


@pytest.mark.parametrize(
    ("datatype", "data", "packed"),
    [
        ("BOOL", [True, False], b"\x01\x00"),
        ("UINT8", [0, 255], b"\x00\xff"),
        ("INT16", [-1, 2], struct.pack("<2h", -1, 2)),
        ("UINT64", [2**64 - 1, 0], struct.pack("<2Q", 2**64 - 1, 0)),
        ("INT64", [-(2**63), 2**63 - 1], struct.pack("<2q", -(2**63), 2**63 - 1)),
        ("FP64", [0.1, 2], struct.pack("<2d", 0.1, 2)),
        ("BYTES", ["ab", "é"], b"\x02\0\0\0ab\x02\0\0\0\xc3\xa9"),
    ],
)
def test_json_data_of_each_type(datatype: str, data: list[Any], packed: bytes) -> None:
    call = parse({"inputs": [{"name": "X", "shape": [2], "datatype": datatype, "data": data}]})
    assert call.inputs[0].data == packed


@pytest.mark.parametrize(
    ("datatype", "data", "words"),
    [
        ("INT32", [1.5, 2], "not INT32"),
        ("UINT8", [256, 0], "out of range for UINT8"),
        ("UINT8", [-1, 0], "out of range for UINT8"),
        ("INT64", [2**63, 0], "out of range for INT64"),
        ("FP32", [1e300, 0], "out of range for FP32"),
        ("FP32", ["1", "2"], "not FP32"),
        ("FP32", [True, False], "not FP32"),
        ("BOOL", [1, 0], "not BOOL"),
        ("BYTES", [1, 2], "not BYTES"),
        ("FP32", [[1], 2], "not FP32"),
        ("FP32", {"a": 1}, "not FP32"),
        ("FP32", [], r"expected 2 elements in 'data' for shape \[2\], found 0"),
        ("FP32", [1, 2, 3], "found 3"),
        ("FP16", [1, 2], "FP16 has no JSON form"),
    ],
)
def test_wrong_json_data_is_named(datatype: str, data: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse({"inputs": [{"name": "X", "shape": [2], "datatype": datatype, "data": data}]})
    assert "'X'" in str(caught.value)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ([], "not an inference request"),
        ({}, "missing required field `inputs`"),
        ({"inputs": [{"name": "X"}]}, r"missing required field `shape`.*\$.inputs\[0\]"),
        ({"inputs": [x()]}, "expected 'data' or parameter 'binary_data_size', found neither"),
        ({"inputs": [x(data=[1], parameters={"binary_data_size": 4})]}, "found both"),
        ({"inputs": [x(datatype="FP33", data=[1])]}, "expected one of BOOL,.*found 'FP33'"),
        ({"inputs": [x(shape=[-1, 2], data=[1])]}, "no negative dimension"),
        ({"inputs": [x(shape=[2.5], data=[1])]}, r"Expected `int`.*shape"),
        ({"inputs": [x(parameters={"binary_data_size": "16"})]}, "expected a number of bytes, found '16'"),
        ({"inputs": [x(parameters={"binary_data_size": -1})]}, "found -1"),
        (
            {"inputs": [x(parameters={"binary_data_size": 16})]},
            "expected 16 bytes .* found 0; the body is trunc",
        ),
        (
            {"inputs": [], "parameters": {"binary_data_output": 1}},
            "'binary_data_output': expected true or false",
        ),
        ({"inputs": [], "parameters": {"a": [1]}}, "parameter 'a'.*found list"),
        (
            {"inputs": [], "outputs": [{"name": "Y", "parameters": {"classification": "many"}}]},
            "'classification': expected a number of classes",
        ),
    ],
)
def test_wrong_requests_are_named(head: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse(head)


@pytest.mark.parametrize("text", [b'{"inputs":[', b"", b"\xff\xfe", b"hello"])
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match="failed to parse the request JSON buffer"):
        parse_infer(memoryview(text), None)


@pytest.mark.parametrize("header", [-1, 0, 9999])
def test_the_json_must_be_inside_the_body(header: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"should be in range \(0, 2\), got: {header}"):
        parse_infer(memoryview(b"{}"), header)


def test_bytes_after_the_tensors_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="found 3 bytes more"):
        parse({"inputs": [x(parameters={"binary_data_size": 16})]}, X.tobytes() + b"abc")


PLACE = {"shared_memory_region": "r", "shared_memory_offset": 8, "shared_memory_byte_size": 16}


def test_a_tensor_may_be_in_shared_memory() -> None:
    wish = {"name": "Y", "parameters": PLACE | {"binary_data": False}}
    call = parse({"inputs": [x(parameters=PLACE)], "outputs": [wish]})

    ref = SharedRef("r", 8, 16)
    assert call.shared
    assert call.inputs == [InputTensor("X", "FP32", (2, 2), b"", ref)]
    assert call.outputs == [OutputWish("Y", binary=True, shared=ref)]
    assert not parse({"inputs": [x(data=[1, 2, 3, 4])], "outputs": [{"name": "Y"}]}).shared


def test_data_is_in_one_place() -> None:
    with pytest.raises(InvalidRequest, match=r"'X'.*either here or in shared memory, found both"):
        parse({"inputs": [x(parameters=PLACE, data=[1, 2, 3, 4])]})
    with pytest.raises(InvalidRequest, match=r"'X'.*found both"):
        parse({"inputs": [x(parameters=PLACE | {"binary_data_size": 16})]}, X.tobytes())
    with pytest.raises(InvalidRequest, match=r"'Y'.*'classification' or shared memory, found both"):
        parse({"inputs": [], "outputs": [{"name": "Y", "parameters": PLACE | {"classification": 1}}]})


def test_an_output_in_shared_memory_has_a_shape_and_no_data() -> None:
    call = InferCall([], [OutputWish("Y", binary=True, shared=SharedRef("r", 8, 100))], shared=True)
    head, parts = answer(call, identity(), OutputTensor("Y", "FP32", (2, 2), X.tobytes()))

    assert parts == []
    assert head["outputs"] == [{"name": "Y", "datatype": "FP32", "shape": [2, 2]}]


def answer(call: InferCall, of: Served, *outputs: OutputTensor, **parameters: Any) -> tuple[Any, list[Any]]:
    body = encode_infer(call, of, outputs, parameters)
    if body.header_length is not None:
        assert body.header_length == len(body.parts[0])
    return json.loads(bytes(body.parts[0])), body.parts[1:]


def test_answers_in_json() -> None:
    head, rest = answer(
        InferCall([], id="7"),
        identity(),
        OutputTensor("Y", "FP32", (1, 2), b"\0\0\x80?\0\0\0@"),
        batch_size=4,
    )
    assert rest == []
    assert head == {
        "id": "7",
        "model_name": "ident",
        "model_version": "1",
        "parameters": {"batch_size": 4},
        "outputs": [{"name": "Y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}],
    }


def test_answers_in_binary_carry_their_sizes() -> None:
    of = served((), (spec("A", "FP16", 2), spec("B", "BYTES", 1)), batched=False)
    a, b = OutputTensor("A", "FP16", (2,), b"abcd"), OutputTensor("B", "BYTES", (1,), b"\x01\0\0\0z")
    head, rest = answer(InferCall([], binary=True), of, a, b)
    assert "id" not in head
    assert [output["parameters"]["binary_data_size"] for output in head["outputs"]] == [4, 5]
    assert rest == [b"abcd", b"\x01\0\0\0z"]
    head, rest = answer(InferCall([], [OutputWish("B"), OutputWish("A", binary=True)]), of, a, b)
    assert head["outputs"][0]["data"] == ["z"]
    assert rest == [b"abcd"]


def test_not_a_number_is_null_in_json() -> None:
    head, _ = answer(InferCall([]), identity(), OutputTensor("Y", "FP32", (1, 2), b"\0\0\xc0\x7f\0\0\0@"))
    assert head["outputs"][0]["data"] == [None, 2.0]


def test_the_best_classes_instead_of_numbers() -> None:
    of = served((), (spec("Y", "FP32", 3),), labels={"Y": ("cat", "dog")})
    data = np.array([[0.5, 2.0, 1.0], [3.0, 3.0, 0.0]], "<f4").tobytes()
    call = InferCall([], [OutputWish("Y", classes=2)])
    head, _ = answer(call, of, OutputTensor("Y", "FP32", (2, 3), data))
    assert head["outputs"] == [
        {
            "name": "Y", "datatype": "BYTES", "shape": [2, 2],
            "data": ["2.000000:1:dog", "1.000000:2", "3.000000:0:cat", "3.000000:1:dog"],
        }
    ]  # fmt: skip
