"""Large messages walked on the wire: the same as protobuf reads, and no work for what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from clockwork_client.datatypes import encode_strings
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import InferCall, Served
from clockwork_serve.oip.grpc_infer import (
    BESIDE_TENSORS_BYTES,
    FIELDS,
    FIELDS_MAX,
    SMALL_BYTES,
    MalformedMessage,
    decode_strings,
    parse_infer,
    walk,
)
from clockwork_serve.oip.protobuf import ModelInferRequest, message
from clockwork_serve.oip.strings import STRING_BYTES_AT_ONCE, STRINGS_AT_ONCE
from tests.oip.models import Recorded, served, spec

MIB = 1 << 20
Contents = message("inference.InferTensorContents")
Input = ModelInferRequest.InferInputTensor

_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    "INT8": st.integers(-128, 127), "INT16": st.integers(-(2**15), 2**15 - 1),
    "INT32": st.integers(-(2**31), 2**31 - 1), "INT64": st.integers(-(2**63), 2**63 - 1),
    "UINT8": st.integers(0, 255), "UINT16": st.integers(0, 2**16 - 1),
    "UINT32": st.integers(0, 2**32 - 1), "UINT64": st.integers(0, 2**64 - 1),
    "FP32": st.floats(width=32, allow_nan=False), "FP64": st.floats(allow_nan=False),
    "BYTES": st.binary(max_size=300),
}  # fmt: skip
_PARAMETERS = st.dictionaries(
    st.sampled_from(["slo_ms", "n", "t"]),
    st.one_of(
        st.builds(lambda v: {"int64_param": v}, st.integers(-5, 2**40)),
        st.builds(lambda v: {"string_param": v}, st.text(max_size=3)),
        st.builds(lambda v: {"bool_param": v}, st.booleans()),
    ),
    max_size=2,
)


@st.composite
def _inputs(draw: st.DrawFn, index: int) -> Any:
    datatype = draw(st.sampled_from([*_VALUES]))
    values = draw(st.lists(_VALUES[datatype], min_size=1, max_size=5))
    shape = [len(values) + draw(st.sampled_from([0, 0, 0, 1]))]
    wrong = draw(st.sampled_from([False] * 9 + [True]))
    field = draw(st.sampled_from([*FIELDS.values()])) if wrong else FIELDS[datatype]
    tensor = Input(name=f"X{index}", datatype=datatype, shape=shape)
    with suppress(TypeError, ValueError):
        getattr(tensor.contents, field).extend(values)
    for name, value in draw(_PARAMETERS).items():
        tensor.parameters[name].MergeFrom(message("inference.InferParameter")(**value))
    return tensor


@st.composite
def _requests(draw: st.DrawFn) -> Any:
    found = ModelInferRequest(model_name=draw(st.text(max_size=3)), id=draw(st.text(max_size=3)))
    for index in range(draw(st.integers(0, 3))):
        found.inputs.append(draw(_inputs(index)))
    if draw(st.booleans()):
        for tensor in found.inputs:
            tensor.ClearField("contents")
        found.raw_input_contents.extend(draw(st.lists(st.binary(max_size=200), max_size=3)))
    for name, value in draw(_PARAMETERS).items():
        found.parameters[name].MergeFrom(message("inference.InferParameter")(**value))
    for name in draw(st.lists(st.sampled_from("YZ"), max_size=2)):
        found.outputs.add(name=name)
    return found


def _model(request: Any) -> Served:
    inputs = tuple(spec(tensor.name, tensor.datatype, -1) for tensor in request.inputs)
    return served(inputs, (spec("Y", "FP32", 1), spec("Z", "FP32", 1)), batched=False)


def _outcome(request: Any, model: Served) -> Any:
    """The call, its tensors as bytes; "" where it is refused, with the same exception for both ways."""
    try:
        call = parse_infer(request, model)
        model.check(call, binary_only_allowed=True)
    except InvalidRequest:
        return ""
    return _plain(call)


def _plain(call: InferCall) -> Any:
    tensors = [(each.name, each.datatype, each.shape, bytes(each.data)) for each in call.inputs]
    return tensors, call.outputs, call.id, call.parameters, call.shared


@given(_requests())
def test_walked_or_parsed_a_message_is_the_same(request: Any) -> None:
    model = _model(request)
    data = request.SerializeToString()
    walked = walk(data)
    assert (walked.model_name, walked.model_version, walked.id) == (request.model_name, "", request.id)
    assert _outcome(walked, model) == _outcome(request, model)


@given(_requests(), st.data())
def test_any_bytes_are_the_same_or_refused_by_one_of_both(request: Any, data: st.DataObject) -> None:
    model = _model(request)
    turned = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(0, 3)) if turned else 0):
        turned[data.draw(st.integers(0, len(turned) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = ModelInferRequest.FromString(bytes(turned))
    except DecodeError:
        parsed = None
    try:
        walked = walk(bytes(turned))
    except (DecodeError, InvalidRequest):
        return  # a group, or no message at all
    if parsed is None:
        # Contents are not looked at before somebody wants them.
        assert _outcome(walked, model) == "" or walked.contents
    else:
        found = _outcome(walked, model)
        assert not found or found == _outcome(parsed, model)


def _field(number: int, content: bytes) -> bytes:
    length, head = len(content), [number << 3 | 2]
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*head, length]) + content


def _large(name: str, datatype: str, shape: list[int], contents: bytes) -> bytes:
    head = Input(name=name, datatype=datatype, shape=shape).SerializeToString()
    request: bytes = ModelInferRequest(model_name="m").SerializeToString()
    return request + _field(5, head + _field(5, contents))


@pytest.mark.parametrize(
    ("datatype", "contents"),
    [
        ("BYTES", b"\x42\0" * (4 * MIB)),
        ("INT32", _field(2, bytes(8 * MIB))),
        ("BOOL", b"\x08\x01" * (4 * MIB)),
        ("FP32", _field(6, bytes(8 * MIB))),
        ("FP32", b"\x35\0\0\0\0" * MIB),
        ("INT8", b"\x12\0" * (4 * MIB)),
    ],
)
def test_more_elements_than_the_shape_has_are_refused_unbuilt(datatype: str, contents: bytes) -> None:
    model = served((spec("x", datatype, 2),), (spec("y", "FP32", 1),), batched=True)
    read = walk(_large("x", datatype, [1, 2], contents))
    with pytest.raises(InvalidRequest, match="'x'"):
        parse_infer(read, model)
    # A shape that promises as many is no way round the model's.
    read = walk(_large("x", datatype, [1, 4 * MIB], contents))
    with pytest.raises(InvalidRequest, match="unexpected shape for input 'x'"):
        parse_infer(read, model)


def test_no_more_than_one_string_too_many_is_looked_at() -> None:
    contents = Recorded(b"\x42\0" * MIB)
    with pytest.raises(InvalidRequest, match=r"expected 3 elements .* found more"):
        next(decode_strings("x", 3, contents, [(0, len(contents))]))
    assert len(contents.taken) == 3


@pytest.mark.parametrize(("count", "nbytes"), [(7090, 1180), (8192, 3), (3, 3 * MIB), (1, 0)])
def test_strings_are_built_a_piece_at_a_time(count: int, nbytes: int) -> None:
    contents = Recorded(_field(8, b"x" * nbytes) * count)
    wire: list[bytearray] = []

    def built() -> Iterator[None]:
        wire.append((yield from decode_strings("x", count, contents, [(0, len(contents))])))

    taken = 0
    for _ in built():
        assert sum(contents.taken) <= STRING_BYTES_AT_ONCE
        assert len(contents.taken) <= STRINGS_AT_ONCE + 1
        taken += sum(contents.taken)
        contents.taken.clear()
    assert taken + sum(contents.taken) == count * nbytes
    assert wire == [encode_strings([b"x" * nbytes] * count)]


def test_one_input_a_hundred_times_is_refused_unbuilt() -> None:
    model = served((spec("x", "BYTES", -1),), (spec("y", "FP32", 1),), batched=False)
    once = Input(name="x", datatype="BYTES", shape=[8000]).SerializeToString()
    read = walk(_field(5, once + _field(5, b"\x42\0" * 8000)) * 60)
    read.data = Recorded(read.data)
    with pytest.raises(InvalidRequest, match="'x': expected once, found 60 times"):
        parse_infer(read, model)
    assert not read.data.taken


@pytest.mark.parametrize(
    "data",
    [
        ModelInferRequest(inputs=[Input()] * 40_000).SerializeToString(),
        _field(5, b"\x18\x01" * 20_000),
        _field(7, b"") * 40_000,
        ModelInferRequest(id="i" * (BESIDE_TENSORS_BYTES + 1)).SerializeToString(),
        _field(6, bytes(BESIDE_TENSORS_BYTES)),
    ],
)
def test_much_beside_tensors_is_refused(data: bytes) -> None:
    assert len(data) > SMALL_BYTES
    with pytest.raises(InvalidRequest, match=f"at most ({FIELDS_MAX} fields|{BESIDE_TENSORS_BYTES} bytes)"):
        walk(data)


def test_many_inputs_of_a_small_message_are_refused_at_once() -> None:
    request = ModelInferRequest(inputs=[Input(name="x")] * 1000)
    with pytest.raises(InvalidRequest, match="inputs: expected at most 1 for model 'ident', found 1000"):
        parse_infer(request, served((spec("x", "FP32", 1),), ()))


def test_split_messages_are_merged() -> None:
    head = Input(name="x", datatype="INT8", shape=[4]).SerializeToString()
    first, second = (Contents(int_contents=each).SerializeToString() for each in ([1, -2], [300 - 256, 4]))
    unpacked = b"\x10\x05"
    data = _field(5, head + _field(5, first) + _field(5, second + unpacked))
    model = served((spec("x", "INT8", -1),), (), batched=False)
    with pytest.raises(InvalidRequest, match=r"expected 4 elements .* found 5"):
        parse_infer(walk(data), model)
    data = _field(5, head + _field(5, first) + _field(5, unpacked + b"\x10\x06"))
    assert bytes(parse_infer(walk(data), model).inputs[0].data) == np.array([1, -2, 5, 6], "i1").tobytes()


def test_groups_and_cut_messages_are_malformed() -> None:
    for data in (b"\x0b\x0c", b"\x0a\x05ab", b"\x00", b"\x3a\xff\xff\xff\xff\xff\xff"):
        with pytest.raises(MalformedMessage):
            walk(data)
