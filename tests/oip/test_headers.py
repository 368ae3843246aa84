"""JSON headers that were read before: remembered where they say all, and never where they do not."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest

from clockwork_serve.oip import InferCall, OutputTensor, Served, encode_infer, parse_infer
from clockwork_serve.oip.model import HEADERS_MAX
from tests.oip.models import identity, served, spec

X = np.arange(4, dtype="<f4")


def body(tensor: bytes = X.tobytes(), datatype: str = "FP32", **more: Any) -> tuple[memoryview, int]:
    inputs = [
        {"name": "X", "shape": [2, 2], "datatype": datatype, "parameters": {"binary_data_size": len(tensor)}}
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}, **more}).encode()
    return memoryview(head + tensor), len(head)


def learn(model: Served, sent: tuple[memoryview, int]) -> InferCall:
    """Read a request as if none like it was here, and remember what it says."""
    call = parse_infer(*sent)
    rows, signature = model.check(call)
    model.headers.remember(call, model.wanted(call), rows, signature, 7, 3)
    return call


def test_the_same_header_gives_the_same_call_with_the_tensors_of_its_own_body() -> None:
    model = identity()
    first = learn(model, body())
    found = model.headers.find(*body((X + 1).tobytes()))
    assert found is not None
    assert found.known is not None
    assert (found.known.rows, found.known.slo_ns, found.known.priority) == (2, 7, 3)
    assert bytes(found.inputs[0].data) == (X + 1).tobytes()
    assert (found.outputs, found.parameters, found.binary) == (first.outputs, first.parameters, first.binary)


def test_a_header_that_differs_in_a_byte_is_another() -> None:
    model = identity()
    learn(model, body())
    assert model.headers.find(*body(outputs=[])) is None


@pytest.mark.parametrize("change", [-1, 1])
def test_a_body_that_is_too_short_or_long_for_its_header_is_not_taken(change: int) -> None:
    model = identity()
    sent, length = body()
    learn(model, (sent, length))
    other = memoryview(bytes(sent)[:change] if change < 0 else bytes(sent) + b"x")
    assert model.headers.find(other, length) is None


@pytest.mark.parametrize("length", [0, 10**6, 10**9])
def test_a_length_that_is_no_header_s_finds_nothing(length: int) -> None:
    model = identity()
    learn(model, body())
    assert model.headers.find(body()[0], length) is None


def with_id(written: bytes) -> tuple[memoryview, int]:
    """The request with an id in front, as stock clients write it."""
    sent, length = body()
    return memoryview(b"{" + written + bytes(sent)[1:]), length + len(written)


@pytest.mark.parametrize("written", [b'"id":"42",', b'"id": "42", '])
def test_requests_that_differ_in_their_id_alone_are_alike(written: bytes) -> None:
    model = identity()
    learn(model, with_id(b'"id":"7",'))
    assert model.headers.find(*body()) is not None
    found = model.headers.find(*with_id(written))
    assert found is not None
    assert found == msgspec.structs.replace(parse_infer(*with_id(written)), known=found.known, header=b"")
    assert len(model.headers) == 1


@pytest.mark.parametrize(
    "written",
    [b'"id":"4\\u0032",', b'"id":"4"2",', b'"id":"\xc3\xa9",', b'"id":"4\n2",', b'"id":42,', b'"id":"4"'],
)
def test_an_id_that_is_written_in_another_way_is_left_to_the_parser(written: bytes) -> None:
    model = identity()
    learn(model, body())
    assert model.headers.find(*with_id(written)) is None


def test_a_header_with_two_ids_is_not_remembered() -> None:
    model = identity()
    for sent in (body(id="42"), body(id="")):
        learn(model, sent)
    assert len(model.headers) == 0
    learn(model, with_id(b'"id":"1","id":"2",'))
    assert len(model.headers) == 0


@pytest.mark.parametrize(("datatype", "tensor"), [("BOOL", b"\1\0\1\0"), ("BYTES", b"\1\0\0\0a" * 4)])
def test_requests_whose_values_can_be_wrong_are_looked_at_each_time(datatype: str, tensor: bytes) -> None:
    model = served((spec("X", datatype, 2),), (spec("Y", datatype, 2),))
    learn(model, body(tensor, datatype))
    assert len(model.headers) == 0


def test_headers_do_not_fill_memory() -> None:
    model = identity()
    for number in range(HEADERS_MAX * 2):
        learn(model, body(parameters={"slo_ms": number + 1}))
    assert 0 < len(model.headers) <= HEADERS_MAX


@pytest.mark.parametrize("request_id", [b"", b'"id":"a</b>",'])
@pytest.mark.parametrize("shape", [(2, 2), (1, 2)])
def test_a_response_is_the_same_bytes_as_if_it_was_the_first(
    shape: tuple[int, ...], request_id: bytes
) -> None:
    model = identity()
    sent = with_id(request_id) if request_id else body()
    first = learn(model, sent)
    again = model.headers.find(*sent)
    assert again is not None
    for turn in range(3):
        outputs = [OutputTensor("Y", "FP32", shape, (np.ones(shape, "<f4") * turn).tobytes())]
        parameters = {"queue_ms": turn / 7, "batch_size": 2, "cold_start": False}
        assert encode_infer(again, model, outputs, parameters) == encode_infer(
            first, model, outputs, parameters
        )


def test_outputs_that_are_asked_for_in_part_or_in_json_are_as_ever() -> None:
    model = served((spec("X", "FP32", 2),), (spec("Y", "FP32", 2), spec("Z", "FP32", 2)))
    z_first, alone = [{"name": "Z"}, {"name": "Y"}], ([{"name": "Y"}], [{"name": "Z"}])
    for wishes in (z_first, *alone, [{"name": "Y", "parameters": {"binary_data": False}}]):
        sent = body(outputs=wishes)
        first = learn(model, sent)
        again = model.headers.find(*sent)
        assert again is not None
        outputs = [OutputTensor(name, "FP32", (2, 2), X.tobytes()) for name in "YZ"]
        assert encode_infer(again, model, outputs, {}) == encode_infer(first, model, outputs, {})
