"""gRPC messages to calls and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import DATATYPES
from clockwork_serve.oip import InferCall, InputTensor, OutputTensor, OutputWish, Served, SharedRef
from clockwork_serve.oip.grpc_infer import encode_infer, parse_infer
from clockwork_serve.oip.protobuf import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from tests.oip.models import identity, served, spec


def request(**tensor: Any) -> Any:
    found = ModelInferRequest(model_name="ident", id="9")
    found.inputs.add(
        name="X", datatype=tensor.pop("datatype", "FP32"), shape=tensor.pop("shape", [1, 2]), **tensor
    )
    return found


def parsed(sent: Any, of: Served | None = None) -> InferCall:
    """What becomes of a message; without a model, of any that it fits."""
    return parse_infer(sent, of or model_of(sent))


def model_of(sent: Any) -> Served:
    inputs = tuple(
        spec(tensor.name, tensor.datatype, *([-1] * len(tensor.shape)))
        for tensor in sent.inputs
        if tensor.datatype in DATATYPES
    )
    return served(inputs, (spec("Y", "FP32", 1), spec("Z", "FP32", 1)), batched=False)


def test_raw_contents_belong_to_the_inputs_in_order() -> None:
    sent = request()
    sent.inputs.add(name="B", datatype="INT8", shape=[1])
    sent.raw_input_contents.extend([b"12345678", b"9"])
    sent.parameters["slo_ms"].double_param = 2.5
    sent.parameters["timeout"].int64_param = 7
    sent.outputs.add(name="Y").parameters["classification"].int64_param = 2
    sent.outputs.add(name="Z")
    call = parsed(sent)
    assert [(each.name, each.datatype, each.shape, each.data) for each in call.inputs] == [
        ("X", "FP32", (1, 2), b"12345678"),
        ("B", "INT8", (1,), b"9"),
    ]
    assert call.id == "9"
    assert call.parameters == {"slo_ms": 2.5, "timeout": 7}
    assert call.outputs == [OutputWish("Y", binary=True, classes=2), OutputWish("Z", binary=True)]


@pytest.mark.parametrize(
    ("datatype", "field", "elements", "packed"),
    [
        ("BOOL", "bool_contents", [True, False], b"\x01\0"),
        ("INT8", "int_contents", [-1, 2], b"\xff\x02"),
        ("UINT16", "uint_contents", [1, 65535], b"\x01\0\xff\xff"),
        ("INT64", "int64_contents", [1, 2], np.array([1, 2], "<i8").tobytes()),
        ("UINT64", "uint64_contents", [1, 2**64 - 1], np.array([1, 2**64 - 1], "<u8").tobytes()),
        ("FP32", "fp32_contents", [0.5, 2], np.array([0.5, 2], "<f4").tobytes()),
        ("FP64", "fp64_contents", [0.1, 2], np.array([0.1, 2], "<f8").tobytes()),
        ("BYTES", "bytes_contents", [b"a", b""], b"\x01\0\0\0a\0\0\0\0"),
    ],
)
def test_typed_contents(datatype: str, field: str, elements: list[Any], packed: bytes) -> None:
    call = parsed(request(datatype=datatype, contents={field: elements}))
    assert call.inputs[0].data == packed


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (request(datatype="FP33"), "found 'FP33'"),
        (request(shape=[-1, 2]), "no negative dimension"),
        (
            request(contents={"int_contents": [1, 2]}),
            "FP32 in contents.fp32_contents, found contents.int_contents",
        ),
        (request(datatype="INT8", contents={"int_contents": [300, 2]}), "out of range for INT8"),
        (request(datatype="FP16"), "FP16 has no typed contents"),
    ],
)
def test_wrong_messages_are_named(sent: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parsed(sent)


def test_raw_and_typed_contents_do_not_mix() -> None:
    sent = request(contents={"fp32_contents": [1, 2]})
    sent.raw_input_contents.append(b"12345678")
    with pytest.raises(InvalidRequest, match="found both"):
        parsed(sent)
    sent.raw_input_contents.append(b"more")
    with pytest.raises(InvalidRequest, match="each of the 1 inputs, found 2"):
        parsed(sent)


def place(parameters: Any, offset: int = 8) -> None:
    parameters["shared_memory_region"].string_param = "r"
    parameters["shared_memory_offset"].int64_param = offset
    parameters["shared_memory_byte_size"].int64_param = 16


def test_raw_contents_belong_to_the_inputs_that_are_not_in_shared_memory() -> None:
    sent = request()
    place(sent.inputs[0].parameters)
    sent.inputs.add(name="B", datatype="INT8", shape=[1])
    sent.raw_input_contents.append(b"9")
    place(sent.outputs.add(name="Y").parameters)
    call = parsed(sent)
    ref = SharedRef("r", 8, 16)
    assert call.shared
    assert call.inputs == [InputTensor("X", "FP32", (1, 2), b"", ref), InputTensor("B", "INT8", (1,), b"9")]
    assert call.outputs == [OutputWish("Y", binary=True, shared=ref)]
    sent.raw_input_contents.append(b"9")
    with pytest.raises(InvalidRequest, match="each of the 1 inputs, found 2"):
        parsed(sent)


def test_data_is_in_one_place() -> None:
    sent = request(contents={"fp32_contents": [1, 2]})
    place(sent.inputs[0].parameters)
    with pytest.raises(InvalidRequest, match=r"'X'.*either here or in shared memory, found both"):
        parsed(sent)


def test_an_output_in_shared_memory_is_named_not_sent() -> None:
    call = InferCall([], [OutputWish("Y", shared=SharedRef("r", 0, 100)), OutputWish("Z")], shared=True)
    of = served((spec("X", "INT8", 1),), (spec("Y", "INT8", 1), spec("Z", "INT8", 1)))
    outputs = [OutputTensor("Y", "INT8", (1, 1), b"1"), OutputTensor("Z", "INT8", (1, 1), b"2")]
    response = ModelInferResponse.FromString(encode_infer(call, of, outputs, {}))
    assert list(response.raw_output_contents) == [b"", b"2"]
    told = {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in response.outputs[0].parameters.items()
    }
    assert told == {"shared_memory_region": "r", "shared_memory_byte_size": 1}
    assert not response.outputs[1].parameters


def test_empty_parameters_are_refused() -> None:
    sent = request(contents={"fp32_contents": [1, 2]})
    assert sent.parameters["nothing"].WhichOneof("parameter_choice") is None
    with pytest.raises(InvalidRequest, match="'nothing': expected a value"):
        parsed(sent)


def test_answers_are_raw() -> None:
    of = served((), (spec("A", "FP32", 2), spec("B", "BYTES", 1)), labels={"A": ("cat", "dog")})
    a = OutputTensor("A", "FP32", (1, 2), memoryview(np.array([1, 2], "<f4").tobytes()))
    b = OutputTensor("B", "BYTES", (1, 1), b"\x01\0\0\0z")
    encoded = encode_infer(
        InferCall([], id="9", binary=True), of, [b, a],
        {"cold_start": True, "batch_size": 4, "queue_ms": 0.5, "note": "n"},
    )  # fmt: skip
    found = ModelInferResponse.FromString(encoded)
    assert (found.model_name, found.model_version, found.id) == ("ident", "1", "9")
    assert [(each.name, each.datatype, list(each.shape)) for each in found.outputs] == [
        ("A", "FP32", [1, 2]),
        ("B", "BYTES", [1, 1]),
    ]
    assert list(found.raw_output_contents) == [bytes(a.data), b.data]
    assert found.parameters["cold_start"].bool_param
    assert found.parameters["batch_size"].int64_param == 4
    assert found.parameters["queue_ms"].double_param == 0.5
    assert found.parameters["note"].string_param == "n"
    classes = encode_infer(InferCall([], [OutputWish("A", classes=1)]), of, [a, b], {})
    assert list(ModelInferResponse.FromString(classes).raw_output_contents) == [
        b"\x0e\0\0\0" + b"2.000000:1:dog"
    ]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_contents_of_every_size_arrive_whole(size: int) -> None:
    of = served((), (spec("A", "INT8", -1),))
    data = np.random.default_rng(1).integers(0, 255, size, np.uint8).tobytes()
    encoded = encode_infer(InferCall([]), of, [OutputTensor("A", "INT8", (1, size), memoryview(data))], {})
    expected = ModelInferResponse(model_name="ident", model_version="1", raw_output_contents=[data])
    expected.outputs.add(name="A", datatype="INT8", shape=[1, size])
    assert ModelInferResponse.FromString(encoded) == expected
    in_stream = encode_infer(
        InferCall([]), of, [OutputTensor("A", "INT8", (1, size), memoryview(data))], {}, streamed=True
    )
    assert ModelStreamInferResponse.FromString(in_stream).infer_response == expected


def test_an_answer_is_what_a_request_was() -> None:
    call = parsed(request(contents={"fp32_contents": [1, 2]}))
    assert identity().check(call, binary_only_allowed=True).rows == 1
