"""Inference messages of gRPC to calls and back; large ones are walked on the wire before they are built."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from clockwork_client.datatypes import Buffer, Parameter, encode_strings
from clockwork_client.tensors import DTYPES
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.model import (
    BINARY_ONLY,
    InferCall,
    InputTensor,
    OutputTensor,
    OutputWish,
    Served,
    any_shared,
    check_input,
    shared_and_sent,
    wish_of,
)
from clockwork_serve.oip.protobuf import (
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
    varint,
)
from clockwork_serve.oip.shared_memory import SharedRef, shared_ref
from clockwork_serve.oip.strings import LENGTH, STRING_BYTES_AT_ONCE, STRINGS_AT_ONCE

# ------------------------------------------------------------
# A ``ModelInferRequest`` walked on the wire: where its tensors lie, found before anything is built of them.
#
# protobuf makes an object of every element, and a byte or two on the wire can be one: 8 MiB of empty strings
# take its parser 0.2 s and 128 MiB. Here a message's few fields are stepped over, tensors stay where they
# are, and typed contents are counted against what their shape says before they are decoded. All else is left
# to protobuf's own parser, and is small. It knows no model.


SMALL_BYTES: Final = 16 * 1024
"""Messages up to this are left to protobuf whole: of the worst of them it makes 8,000 objects, in 0.4 ms."""
BESIDE_TENSORS_BYTES: Final = 32 * 1024
"""Of names, shapes, parameters: what protobuf parses of a message of any size."""
FIELDS_MAX: Final = 1024  # of a message and its inputs, tensors' elements aside. A step takes a microsecond
VARINT_BYTES_MAX: Final = 320 * 1024
"""Of typed contents whose elements must be decoded: 150,000 bytes as ``int_contents`` fit, in 4 ms."""
TYPED_STRINGS_MAX: Final = 8192
"""Elements of ``bytes_contents``: they are walked twice, once in this form and once in wire form, each time
a piece at a time."""
UNPACKED_MAX: Final = 512  # pieces of typed contents: clients pack them all into one

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_TAG_BYTES_MAX: Final = 5
_VARINT_LONGEST: Final = 10
_INPUT, _RAW = 5, 7  # fields of a ModelInferRequest
_CONTENTS: Final = 5  # field of an InferInputTensor
_CONTENTS_EMPTY: Final = b"\x2a\x00"
_STRING_TAG: Final = 8 << 3 | _DELIMITED  # of an InferTensorContents
FIELDS: Final = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""The field of typed contents that a datatype has."""
_NAMES: Final = {
    1: "bool_contents", 2: "int_contents", 3: "int64_contents", 4: "uint_contents", 5: "uint64_contents",
    6: "fp32_contents", 7: "fp64_contents", 8: "bytes_contents",
}  # fmt: skip
_ELEMENT_TYPE: Final = dict.fromkeys(_NAMES.values(), _VARINT) | {
    "fp32_contents": _FIXED32, "fp64_contents": _FIXED64, "bytes_contents": _DELIMITED,
}  # fmt: skip
_FIXED: Final = {_FIXED32: 4, _FIXED64: 8}
Span = tuple[int, int]


class MalformedMessage(InvalidRequest):
    """The bytes are no message of that type."""

    def __init__(self) -> None:
        super().__init__("ModelInferRequest: expected a message as protobuf writes it, found other bytes")


class WalkedRequest:
    """``head`` is the message without its tensors' bytes; an input has ``contents`` there if it was sent so.

    ``raw`` are its raw contents, and ``contents`` for each input where the pieces of its typed ones lie.
    """

    __slots__ = ("contents", "data", "head", "raw")

    def __init__(self, data: bytes, head: Any, raw: list[memoryview], contents: list[list[Span]]) -> None:
        self.data = data
        self.head = head
        self.raw = raw
        self.contents = contents

    @property
    def has_strings(self) -> bool:
        """Whether BYTES are among its typed contents."""
        tensors = zip(self.head.inputs, self.contents, strict=True)
        return any(spans and tensor.datatype == "BYTES" for tensor, spans in tensors)

    @property
    def model_name(self) -> str:
        """As the message has it."""
        return str(self.head.model_name)

    @property
    def model_version(self) -> str:
        """As the message has it."""
        return str(self.head.model_version)

    @property
    def id(self) -> str:
        """As the message has it."""
        return str(self.head.id)


def walk(data: bytes) -> WalkedRequest:
    """Find the tensors of a message.

    Raises :class:`MalformedMessage`, :class:`InvalidRequest` for more fields than any request has, and what
    protobuf raises.
    """
    view = memoryview(data)
    rest: list[Buffer] = []
    raw: list[memoryview] = []
    contents: list[list[Span]] = []
    beside = steps = 0
    for number, kind, start, at, end in _fields(data, 0, len(data)):
        steps += 1
        if kind == _DELIMITED and number == _RAW:
            raw.append(view[at:end])
        elif kind == _DELIMITED and number == _INPUT:
            head, spans, found = _input_on_the_wire(data, at, end, FIELDS_MAX - steps)
            steps += found
            beside += len(head)
            rest += (_field(_INPUT, len(head)), head)
            contents.append(spans)
        else:
            beside += end - start
            _check_beside(beside)
            rest.append(view[start:end])
        _check_steps(steps)
    _check_beside(beside)
    return WalkedRequest(data, ModelInferRequest.FromString(b"".join(rest)), raw, contents)


def decode_contents(name: str, datatype: str, count: int, data: bytes, spans: Sequence[Span]) -> Buffer:
    """Typed contents of ``count`` elements, other than BYTES, in wire form, built only if there are so many.

    Raises :class:`InvalidRequest`, and :class:`MalformedMessage`.
    """
    field = FIELDS[datatype]
    kind = _ELEMENT_TYPE[field]
    pieces = _pieces(name, field, kind, data, spans)
    nbytes = sum(len(piece) for piece in pieces)
    if kind != _VARINT:
        if nbytes % _FIXED[kind]:
            raise MalformedMessage
        _check_count(name, field, count, nbytes // _FIXED[kind])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    # Cheap, and before the rest: an element takes a byte at least.
    if nbytes > _VARINT_LONGEST * count:
        raise _wrong_count(name, field, count, "more")
    if nbytes > VARINT_BYTES_MAX:
        raise InvalidRequest(
            f"inference input '{name}': contents.{field}: expected at most {VARINT_BYTES_MAX} bytes, found "
            f"{nbytes}; send it as raw_input_contents"
        )
    packed = np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), np.uint8)
    _check_count(name, field, count, int(np.count_nonzero(packed < 0x80)))
    return _numbers(name, datatype, packed)


def _input_on_the_wire(data: bytes, start: int, end: int, steps_max: int) -> tuple[bytes, list[Span], int]:
    """An input without the bytes of its contents, where those lie, and how many fields it has."""
    rest: list[bytes] = []
    spans: list[Span] = []
    steps = beside = 0
    for number, kind, first, at, last in _fields(data, start, end):
        steps += 1
        _check_steps(steps + FIELDS_MAX - steps_max)
        if number == _CONTENTS and kind == _DELIMITED:
            spans.append((at, last))
        else:
            beside += last - first
            _check_beside(beside)
            rest.append(data[first:last])
    if spans:
        rest.append(_CONTENTS_EMPTY)
    return b"".join(rest), spans, steps


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Number, wire type, start, start of the content and end of each field."""
    while at < end:
        start = at
        tag, at = _read_varint(data, at, end, _TAG_BYTES_MAX)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise MalformedMessage
        content = at
        if kind == _DELIMITED:
            length, content = _read_varint(data, at, end, _TAG_BYTES_MAX)
            at = content + length
        elif kind == _VARINT:
            _, at = _read_varint(data, at, end, _VARINT_LONGEST)
        elif kind in _FIXED:
            at += _FIXED[kind]
        else:  # groups, which no version of this protocol had
            raise MalformedMessage
        if at > end:
            raise MalformedMessage
        yield number, kind, start, content, at


def _read_varint(data: bytes, at: int, end: int, longest: int) -> tuple[int, int]:
    """The number there, and where it ends."""
    found = shift = 0
    for index in range(at, min(end, at + longest)):
        byte = data[index]
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return found, index + 1
        shift += 7
    raise MalformedMessage


def _pieces(name: str, field: str, kind: int, data: bytes, spans: Sequence[Span]) -> list[memoryview]:
    """The elements' bytes: one piece where they are packed, else a piece for each."""
    view = memoryview(data)
    pieces: list[memoryview] = []
    for start, end in spans:
        for number, found, _, at, last in _fields(data, start, end):
            if len(pieces) >= UNPACKED_MAX:
                raise InvalidRequest(
                    f"inference input '{name}': contents.{field}: expected its elements packed, found more "
                    f"than {UNPACKED_MAX} pieces; send it as raw_input_contents"
                )
            if _NAMES.get(number) == field and found in (_DELIMITED, kind):
                pieces.append(view[at:last])
            else:
                _check_field(name, field, number)
    return pieces or [view[:0]]


def decode_strings(
    name: str, count: int, data: bytes, spans: Sequence[Span]
) -> Generator[None, None, bytearray]:
    """The same of BYTES, a piece at a time; no more than one element too many is looked at."""
    if count > TYPED_STRINGS_MAX:
        raise InvalidRequest(
            f"inference input '{name}': contents.bytes_contents: expected at most {TYPED_STRINGS_MAX} "
            f"elements, found {count}; send fewer in one request, or as raw_input_contents"
        )
    found, wire, pack = 0, bytearray(), LENGTH.pack
    parts: list[bytes] = []  # of the piece: lengths and elements
    left = STRING_BYTES_AT_ONCE
    for start, end in spans:
        at = start
        while at < end:
            if data[at] != _STRING_TAG:
                _check_field(name, "bytes_contents", data[at] >> 3 if data[at] < 0x80 else 0)
                raise MalformedMessage
            # In line, for it is most of what this costs.
            length = data[at + 1] if at + 1 < end else 0x80
            at += 2
            if length >= 0x80:
                length, at = _read_varint(data, at - 1, end, _TAG_BYTES_MAX)
            if found == count:
                raise _wrong_count(name, "bytes_contents", count, "more")
            if at + length > end:
                raise MalformedMessage
            found += 1
            parts.append(pack(length))
            while length > left:
                parts.append(data[at : at + left])
                at, length = at + left, length - left
                wire += b"".join(parts)
                parts, left = [], STRING_BYTES_AT_ONCE
                yield
            parts.append(data[at : at + length])
            at, left = at + length, left - length
            if len(parts) > 2 * STRINGS_AT_ONCE:
                wire += b"".join(parts)
                parts, left = [], STRING_BYTES_AT_ONCE
                yield
    _check_count(name, "bytes_contents", count, found)
    wire += b"".join(parts)
    return wire


def _numbers(name: str, datatype: str, packed: NDArray[np.uint8]) -> bytes:
    """Varints decoded, and cut as protobuf cuts what is too long for the field's type."""
    dtype = DTYPES[datatype]
    ends = np.flatnonzero(packed < 0x80)
    if len(packed) and (not len(ends) or ends[-1] != len(packed) - 1):
        raise MalformedMessage
    if len(ends) == len(packed):
        wide = packed.astype(np.uint64)
    else:
        starts = np.empty_like(ends)
        starts[:1] = 0
        starts[1:] = ends[:-1] + 1
        lengths = ends - starts + 1
        longest = int(lengths.max())
        if longest > _VARINT_LONGEST:
            raise MalformedMessage
        wide = (packed[starts] & 0x7F).astype(np.uint64)
        for index in range(1, longest):
            longer = np.flatnonzero(lengths > index)
            more = (packed[starts[longer] + index] & 0x7F).astype(np.uint64)
            wide[longer] |= more << np.uint64(7 * index)
    if datatype == "BOOL":
        return bytes((wide != 0).data)
    if FIELDS[datatype] in ("int_contents", "uint_contents"):
        values = wide.astype(np.uint32).view(np.int32 if dtype.kind == "i" else np.uint32)
        limits = np.iinfo(dtype)
        if len(values) and (values.min() < limits.min or values.max() > limits.max):
            raise InvalidRequest(
                f"inference input '{name}': a number in contents.{FIELDS[datatype]} is out of range for "
                f"{datatype}"
            )
        return values.astype(dtype).tobytes()
    return wide.tobytes()


def _check_field(name: str, field: str, number: int) -> None:
    other = _NAMES.get(number)
    if other is not None and other != field:
        raise InvalidRequest(
            f"inference input '{name}': expected its elements in contents.{field}, found contents.{other}"
        )


def _check_count(name: str, field: str, expected: int, found: int) -> None:
    if found != expected:
        raise _wrong_count(name, field, expected, str(found))


def _wrong_count(name: str, field: str, expected: int, found: str) -> InvalidRequest:
    return InvalidRequest(
        f"inference input '{name}': expected {expected} elements in contents.{field} for its shape, found "
        f"{found}"
    )


def _check_steps(steps: int) -> None:
    if steps > FIELDS_MAX:
        raise InvalidRequest(
            f"ModelInferRequest: expected at most {FIELDS_MAX} fields, found more; send fewer inputs, "
            "outputs and parameters"
        )


def _check_beside(nbytes: int) -> None:
    if nbytes > BESIDE_TENSORS_BYTES:
        raise InvalidRequest(
            f"ModelInferRequest: expected at most {BESIDE_TENSORS_BYTES} bytes beside its tensors, found "
            "more; send shorter names, shapes and parameters"
        )


# ------------------------------------------------------------
# Inference messages of gRPC to calls and back.


InferRequest = Any  # a ``ModelInferRequest``, or a large one as it was walked: a :class:`WalkedRequest`

_RAW_OUTPUT_CONTENTS: Final[int] = ModelInferResponse.DESCRIPTOR.fields_by_name["raw_output_contents"].number
_INFER_RESPONSE: Final[int] = ModelStreamInferResponse.DESCRIPTOR.fields_by_name["infer_response"].number


def parse_infer(request: InferRequest, served: Served) -> InferCall:
    """A call to that model from a message, read or made. Raises :class:`InvalidRequest`."""
    steps = parse_in_steps(request, served)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            call: InferCall = end.value
            return call


def parse_in_steps(request: InferRequest, served: Served) -> Generator[None, None, InferCall]:
    """The same, a piece at a time: 8 MiB of strings in typed contents take 10 ms."""
    walked: WalkedRequest | None = None
    if isinstance(request, WalkedRequest):
        walked, request = request, request.head
    if len(request.inputs) > served.tensors_max or len(request.outputs) > served.tensors_max:
        served.check_counts(len(request.inputs), len(request.outputs))
    if len(request.inputs) > 1:
        served.check_names([tensor.name for tensor in request.inputs])
    raw = request.raw_input_contents if walked is None else walked.raw
    places = [
        shared_ref("input", each.name, parameters_of(each.parameters)) if each.parameters else None
        for each in request.inputs
    ]
    sent = places.count(None)
    if raw and len(raw) != sent:
        raise InvalidRequest(
            f"raw_input_contents: expected one entry for each of the {sent} inputs, found {len(raw)}"
        )
    contents = iter(raw)
    inputs = []
    for index, (tensor, place) in enumerate(zip(request.inputs, places, strict=True)):
        if not raw and place is None:
            inputs.append((yield from _typed(tensor, served, walked, index)))
        else:
            inputs.append(_input(tensor, next(contents) if place is None else None, place))
    outputs = [_wish(output) for output in request.outputs] if request.outputs else None
    parameters = parameters_of(request.parameters) if request.parameters else {}
    return InferCall(inputs, outputs, request.id, parameters, binary=True, shared=any_shared(inputs, outputs))


def encode_infer(
    call: InferCall, served: Served, outputs: Sequence[OutputTensor], parameters: Mapping[str, Parameter],
    *, streamed: bool = False,
) -> bytes:  # fmt: skip
    """The ``ModelInferResponse`` as it is sent; ``streamed``: the ``ModelStreamInferResponse`` that holds it.

    Its tensors are copied once, all of it at once.
    """
    response = ModelInferResponse(
        model_name=served.model.name, model_version=served.model.version, id=call.id
    )
    by_name = {tensor.name: tensor for tensor in outputs}
    contents: list[Buffer] = []
    for wish in served.wanted(call):
        tensor = by_name[wish.name]
        if wish.classes:
            tensor = served.classified(tensor, wish.classes)
        head = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if wish.shared is None:
            contents += (_field(_RAW_OUTPUT_CONTENTS, len(tensor.data)), tensor.data)
            continue
        # Clients count entries to find the others.
        contents.append(_field(_RAW_OUTPUT_CONTENTS, 0))
        for name, place in wish.shared.parameters(len(tensor.data)).items():
            _set_parameter(head.parameters[name], place)
    for name, value in parameters.items():
        _set_parameter(response.parameters[name], value)
    # Fields may come in any order. Through the message, large tensors would be copied three times.
    parts = [response.SerializeToString(), *contents]
    if streamed:
        parts.insert(0, _field(_INFER_RESPONSE, sum(map(len, parts))))
    return b"".join(parts)


def _field(number: int, length: int) -> bytes:
    """The head of a field of protobuf whose content is so many bytes."""
    return varint(number << 3 | _DELIMITED) + varint(length)


def parameters_of(given: Mapping[str, Any]) -> dict[str, Parameter]:
    """A map of ``InferParameter`` as plain values."""
    found: dict[str, Parameter] = {}
    for name, value in given.items():
        which = value.WhichOneof("parameter_choice")
        if which is None:
            raise InvalidRequest(f"parameter '{name}': expected a value, found none")
        found[name] = getattr(value, which)
    return found


def _set_parameter(target: Any, value: Parameter) -> None:
    if isinstance(value, bool):
        target.bool_param = value
    elif isinstance(value, int):
        target.int64_param = value
    elif isinstance(value, float):
        target.double_param = value
    else:
        target.string_param = value


def _input(tensor: Any, raw: Buffer | None, shared: SharedRef | None) -> InputTensor:
    name, datatype, shape = _head(tensor)
    if shared is not None:
        if tensor.HasField("contents"):
            raise shared_and_sent(name)
        return InputTensor(name, datatype, shape, b"", shared)
    assert raw is not None
    if tensor.HasField("contents"):
        raise InvalidRequest(
            f"inference input '{name}': expected no 'contents' beside raw_input_contents, found both"
        )
    return InputTensor(name, datatype, shape, raw)


def _typed(
    tensor: Any, served: Served, walked: WalkedRequest | None, index: int
) -> Generator[None, None, InputTensor]:
    """An input with typed contents, which are counted before they are made a tensor of."""
    name, datatype, shape = _head(tensor)
    if datatype in BINARY_ONLY:
        raise InvalidRequest(
            f"inference input '{name}': {datatype} has no typed contents; use raw_input_contents"
        )
    served.check_head(name, datatype, shape)
    count = math.prod(shape)
    data: Buffer
    if walked is None:
        data = _packed(name, datatype, tensor.contents)
    elif datatype == "BYTES":
        data = yield from decode_strings(name, count, walked.data, walked.contents[index])
    else:
        data = decode_contents(name, datatype, count, walked.data, walked.contents[index])
    return InputTensor(name, datatype, shape, data)


def _head(tensor: Any) -> tuple[str, str, tuple[int, ...]]:
    name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
    check_input(name, datatype, shape)
    return name, datatype, shape


def _packed(name: str, datatype: str, contents: Any) -> bytes:
    """Typed contents of a small message in wire form."""
    field = FIELDS[datatype]
    for descriptor, _ in contents.ListFields():
        if descriptor.name != field:
            raise InvalidRequest(
                f"inference input '{name}': expected {datatype} in contents.{field}, "
                f"found contents.{descriptor.name}"
            )
    elements = getattr(contents, field)
    if datatype == "BYTES":
        return encode_strings(elements)
    try:
        return np.array(list(elements), DTYPES[datatype]).tobytes()
    except OverflowError:
        raise InvalidRequest(
            f"inference input '{name}': a number in contents.{field} is out of range for {datatype}"
        ) from None


def _wish(output: Any) -> OutputWish:
    if not output.parameters:
        return OutputWish(output.name, binary=True)
    return wish_of(output.name, parameters_of(output.parameters))
