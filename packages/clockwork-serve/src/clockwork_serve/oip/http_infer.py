"""Inference bodies of HTTP to calls and back: JSON and binary tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import UNSET, Raw, Struct, UnsetType

from clockwork_client.datatypes import Buffer, Parameter, decode_strings, encode_strings
from clockwork_client.tensors import DTYPES
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.model import (
    BINARY_ONLY,
    DIMENSIONS_MAX,
    HEADER_BYTES_MAX,
    InferCall,
    InputTensor,
    Known,
    OutputTensor,
    OutputWish,
    Served,
    any_shared,
    check_input,
    shared_and_sent,
    wish_of,
)
from clockwork_serve.oip.shared_memory import shared_ref
from clockwork_serve.oip.status import TooLarge
from clockwork_serve.oip.strings import STRINGS_MAX

# ------------------------------------------------------------
# The ``data`` of JSON tensors, to wire form and back; counts and ranges are checked.


DEPTH_MAX: Final = 99  # lists in lists, of one element; Triton takes as many
PIECE_BYTES: Final = 256 * 1024
"""Numbers are decoded so much at a time: as Python's objects they take ten times the memory."""
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SPACE: Final = b" \t\r\n"
_OPENING: Final = re.compile(rb"[\[ \t\r\n]*")
_PYTHON_TYPES: Final[dict[str, type]] = {
    "b": bool, "u": int, "i": int, "f": float, "O": str,
}  # fmt: skip
_EXACT: Final = float(1 << 53)  # below it each whole number is a float of its own


def from_json(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> bytes:
    """JSON ``data``, flat or nested row-major, in wire form. Raises :class:`InvalidRequest`."""
    if datatype in BINARY_ONLY:
        raise InvalidRequest(
            f"inference input '{name}': {datatype} has no JSON form; "
            "send it with the binary tensor data extension"
        )
    count = math.prod(shape)
    if datatype != "BYTES" and len(raw) > PIECE_BYTES:
        pieces, found = [], 0
        for piece in _pieces(name, datatype, raw):
            pieces.append(_packed(name, datatype, piece))
            found += len(piece)
            if found > count:
                break
        _check_count(name, shape, count, found)
        return b"".join(pieces)
    if datatype == "BYTES":
        if count > STRINGS_MAX:
            raise InvalidRequest(
                f"inference input '{name}': expected at most {STRINGS_MAX} elements of BYTES, found {count}"
            )
        if len(raw) > PIECE_BYTES:
            _check_strings(name, shape, count, bytes(raw))
    flat = _flat(name, datatype, raw)
    _check_count(name, shape, count, len(flat))
    if datatype == "BYTES":
        return encode_strings([text.encode() for text in flat])
    return _packed(name, datatype, flat)


def to_json(datatype: str, data: Buffer) -> list[Any]:
    """Wire form as a flat list for JSON; not a number becomes null, for JSON has no other word."""
    if datatype == "BYTES":
        return [element.decode(errors="replace") for element in decode_strings(data)]
    found: list[Any] = np.frombuffer(data, DTYPES[datatype]).tolist()
    return found


def _check_count(name: str, shape: Sequence[int], expected: int, found: int) -> None:
    if found != expected:
        raise InvalidRequest(
            f"inference input '{name}': expected {expected} elements in 'data' for shape {list(shape)}, "
            f"found {found}{' or more' if found > expected else ''}"
        )


def _check_strings(name: str, shape: Sequence[int], count: int, raw: bytes) -> None:
    """Whether there are so few strings and brackets that they can be built."""
    # A string has two quotes that are not escaped; but the last one of "\\\\" looks as if it were.
    quotes = raw.count(b'"') - raw.count(b'\\"')
    if quotes > 2 * count:
        _check_count(name, shape, count, quotes // 2)
    brackets = _STRING.sub(b"", raw).count(b"[")
    if brackets > DIMENSIONS_MAX * count + DEPTH_MAX:
        raise InvalidRequest(
            f"inference input '{name}': expected {count} elements in 'data', found {brackets} lists"
        )


def _pieces(name: str, datatype: str, raw: memoryview, piece_bytes: int = PIECE_BYTES) -> Iterator[list[Any]]:
    """Numbers, so many bytes of them at a time: cut at commas, with brackets for those that are cut off."""
    depth = _depth(raw)
    at = level = 0
    while at < len(raw):
        piece = bytes(raw[at : at + piece_bytes])
        last = at + piece_bytes >= len(raw)
        if not last:
            piece = piece[: max(piece.rfind(b","), 0)]
        # What is wrong beside a comma that is cut out, the decoder would not see.
        if (at and piece.lstrip(_SPACE)[:1] in (b"]", b"")) or (
            not last and piece.rstrip(_SPACE)[-1:] in (b"[", b"")
        ):
            raise InvalidRequest(
                f"inference input '{name}': 'data' is not {datatype} in JSON: expected a number on each side "
                f"of a comma near byte {at + len(piece)}"
            )
        before, level = level, level + piece.count(b"[") - piece.count(b"]")
        closing = b"" if last else b"]" * level
        yield _flat(name, datatype, memoryview(b"[" * before + piece + closing), depth)
        at += len(piece) + 1
    if level:
        raise InvalidRequest(f"inference input '{name}': 'data' is not {datatype} in JSON: it is truncated")


def _depth(raw: memoryview) -> int:
    opening = _OPENING.match(raw)
    assert opening is not None
    return opening[0].count(b"[")


def _flat(name: str, datatype: str, raw: memoryview, depth: int | None = None) -> list[Any]:
    depth = _depth(raw) if depth is None else depth
    if depth > DEPTH_MAX:
        # Triton's words, with its count of them.
        raise InvalidRequest(
            f"inference input '{name}': JSON nesting depth exceeds maximum allowed limit ({DEPTH_MAX + 1}): "
            f"expected at most {DEPTH_MAX} lists in lists in 'data', found {depth}"
        )
    kind = "O" if datatype == "BYTES" else DTYPES[datatype].kind
    try:
        nested, whole = _decoded(kind, max(depth, 1), raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"inference input '{name}': 'data' is not {datatype} in JSON: {error}") from None
    for _ in range(depth - 1):
        nested = list(chain.from_iterable(nested))
    return nested if whole else _whole(name, datatype, nested)


def _decoded(kind: str, depth: int, raw: memoryview) -> tuple[list[Any], bool]:
    """Nested lists; and whether their numbers are of that kind, or floats where integers were expected."""
    try:
        return _decoder(kind, depth).decode(raw), True
    except msgspec.ValidationError:
        if kind in ("i", "u"):
            with suppress(msgspec.ValidationError):
                return _decoder("f", depth).decode(raw), False
        raise


def _whole(name: str, datatype: str, numbers: list[float]) -> list[int]:
    """Integers, some of which are written as languages with one kind of number do: 1.0, 1e3."""
    array = np.array(numbers, np.float64)
    exact = (np.trunc(array) == array) & (abs(array) < _EXACT)
    if not exact.all():
        raise InvalidRequest(
            f"inference input '{name}': 'data' is not {datatype} in JSON: expected whole numbers, and below "
            f"2**53 where one has a point or an exponent; found {numbers[int(exact.argmin())]!r}"
        )
    found: list[int] = array.astype(np.int64).tolist()
    return found


@lru_cache(maxsize=256)
def _decoder(kind: str, depth: int) -> msgspec.json.Decoder[list[Any]]:
    wanted: Any = _PYTHON_TYPES[kind]
    for _ in range(depth):
        wanted = list[wanted]
    return msgspec.json.Decoder(wanted)


def _packed(name: str, datatype: str, flat: list[Any]) -> bytes:
    dtype = DTYPES[datatype]
    try:
        # A float that does not fit becomes infinite; JSON cannot have meant that.
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype)
        fits = dtype.kind != "f" or bool(np.isfinite(array).all())
    except OverflowError:
        fits = False
    if not fits:
        raise InvalidRequest(f"inference input '{name}': a number in 'data' is out of range for {datatype}")
    return array.tobytes()


# ------------------------------------------------------------
# Inference bodies of HTTP, JSON and binary tensors, to calls and back.


TENSORS_MAX: Final = 1024  # inputs of a request, or outputs, where it is not known how many its model has
JSON_LARGE: Final = 64 * 1024  # of a request, beside its inputs; more in all is looked at before it is built
Parameters = dict[str, Parameter]


class _JsonInput(Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: Raw | UnsetType = UNSET


class _JsonWish(Struct):
    name: str
    parameters: Parameters | None = None


class _JsonRequest(Struct):
    inputs: list[_JsonInput]
    outputs: list[_JsonWish] | None = None
    id: str = ""
    parameters: dict[str, Any] | None = None


class _JsonOutput(Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int] | None = None
    data: list[Any] | Raw | UnsetType = UNSET


_WRITTEN: Final = Raw(b'"@"')
"""Where data go that are JSON already: no data are text, so this can stand for nothing else."""


class _JsonResponse(Struct, omit_defaults=True):
    id: str | UnsetType
    model_name: str
    model_version: str
    parameters: dict[str, Any]
    outputs: list[_JsonOutput]


class InferBody(Struct, frozen=True):
    """A response body in parts. ``header_length`` is the JSON's where binary tensors follow, else None."""

    parts: list[Buffer]
    header_length: int | None


class _Skeleton(Struct):
    inputs: Raw


_skeletons = msgspec.json.Decoder(_Skeleton)
_requests = msgspec.json.Decoder(_JsonRequest)
_responses = msgspec.json.Encoder()


def parse_infer(body: memoryview, header_length: int | None, tensors_max: int = TENSORS_MAX) -> InferCall:
    """A call from a request body, whose JSON is the first ``header_length`` bytes (None: all of it).

    It names ``tensors_max`` inputs at most, and as many outputs. Tensors stay views of ``body``. Raises
    :class:`InvalidRequest`. A ``header_length`` of 0 is for :meth:`Served.raw_call`.
    """
    if header_length is not None and not 0 < header_length <= len(body):
        raise InvalidRequest(
            f"inference header size should be in range (0, {len(body)}), got: {header_length}"
        )
    head = body if header_length is None else body[:header_length]
    try:
        if len(head) > JSON_LARGE:
            _check_beside_data(head)
        request = _requests.decode(head)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request JSON is not an inference request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"failed to parse the request JSON buffer: {error}") from None
    for what, named in (("inputs", request.inputs), ("outputs", request.outputs or ())):
        if len(named) > tensors_max:
            raise InvalidRequest(f"{what}: expected at most {tensors_max}, found {len(named)}")
    parameters = request.parameters
    if parameters:
        _check_parameters(parameters)
    tensors = _Binary(body, len(body) if header_length is None else header_length)
    inputs = [_input(each, tensors) for each in request.inputs]
    tensors.check_end()
    outputs = None if not request.outputs else [_wish(each, parameters) for each in request.outputs]
    call = InferCall(
        inputs, outputs, request.id, parameters or {},
        _flag(parameters, "binary_data_output", default=False), any_shared(inputs, outputs),
    )  # fmt: skip
    if header_length is not None and header_length <= HEADER_BYTES_MAX:
        call.header = bytes(head)
    return call


def encode_infer(
    call: InferCall, served: Served, outputs: Sequence[OutputTensor], parameters: dict[str, Any],
    texts: Mapping[str, Buffer] | None = None, *, own: bool = False,
) -> InferBody:  # fmt: skip
    """The response body. Unless it is their ``own``, nothing in it refers to the outputs' memory any more.

    ``outputs`` are all of the model's; those that the call asks for are sent. ``texts`` are the data in JSON
    of those that were written before, by name.
    """
    known = call.known
    if (
        known is not None
        and known.outputs_in_order is not None
        and len(outputs) == len(known.outputs_in_order)
    ):
        found = _encode_again(known, call.id, served, outputs, parameters, own)
        if found is not None:
            return found
    by_name = {tensor.name: tensor for tensor in outputs}
    heads: list[_JsonOutput] = []
    parts: list[Buffer] = []
    written: list[Buffer] = []
    for wish in served.wanted(call):
        tensor = by_name[wish.name]
        if wish.classes:
            tensor = served.classified(tensor, wish.classes)
        head = _JsonOutput(tensor.name, tensor.datatype, tensor.shape)
        # One in shared memory has no data, and no parameters: a stock client looks there for a size.
        if wish.shared is None and wish.binary:
            head.parameters = {"binary_data_size": len(tensor.data)}
            parts.append(tensor.data if own else bytes(tensor.data))
        elif texts is not None and wish.name in texts:
            head.data = _WRITTEN
            written.append(texts[wish.name])
        elif wish.shared is None:
            head.data = to_json(tensor.datatype, tensor.data)
        heads.append(head)
    model = served.model
    text = _responses.encode(_JsonResponse(call.id or UNSET, model.name, model.version, parameters, heads))
    around = text.split(b'"data":"@"') if written else [text]
    head_parts: list[Buffer] = [around[0]]
    for data, after in zip(written, around[1:], strict=True):
        head_parts += (b'"data":', data, after)
    header_length = sum(map(len, head_parts)) if parts else None
    return InferBody([*head_parts, *parts], header_length)


def _encode_again(
    known: Known,
    call_id: str,
    served: Served,
    outputs: Sequence[OutputTensor],
    parameters: dict[str, Any],
    own: bool,  # noqa: FBT001
) -> InferBody | None:
    """The same, where all outputs are wanted as they are, and only values and times differ each time."""
    parts: list[Buffer] = [b""]
    shapes: list[Any] = []
    for name, tensor in zip(known.outputs_in_order or (), outputs, strict=True):
        if name != tensor.name:
            return None
        data = tensor.data if own else bytes(tensor.data)
        parts.append(data)
        shapes += (tensor.shape, len(data))
    key = tuple(shapes)
    around = known.around_parameters.get(key)
    if around is None:
        heads = [
            _JsonOutput(tensor.name, tensor.datatype, tensor.shape, {"binary_data_size": len(tensor.data)})
            for tensor in outputs
        ]
        model = served.model
        text = _responses.encode(_JsonResponse(UNSET, model.name, model.version, {}, heads))
        before, mark, after = text.partition(b'"parameters":{}')
        assert mark
        around = known.keep(key, (before + mark[:-2], after))
    before, after = around
    if call_id:
        before = b'{"id":%s,%s' % (_responses.encode(call_id), before[1:])
    head = parts[0] = b"%s%s%s" % (before, _responses.encode(parameters), after)
    return InferBody(parts, len(head) if outputs else None)


def _check_beside_data(head: memoryview) -> None:
    """Whether all but the inputs is so little that it can be built. Raises what the decoder does, too."""
    beside = len(head) - len(memoryview(_skeletons.decode(head).inputs))
    if beside > JSON_LARGE:
        raise TooLarge(
            f"JSON: expected at most {JSON_LARGE} bytes beside its inputs, found {beside}; send fewer "
            "parameters and outputs, and a shorter id"
        )


class _Binary:
    """The binary tensors of a body, taken off in order."""

    def __init__(self, body: memoryview, start: int) -> None:
        self._body = body
        self._at = start

    def take(self, name: str, size: Any) -> memoryview:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise InvalidRequest(
                f"inference input '{name}': parameter 'binary_data_size': expected a number of bytes, "
                f"found {size!r}"
            )
        left = len(self._body) - self._at
        if size > left:
            raise InvalidRequest(
                f"inference input '{name}': expected {size} bytes of binary data after the JSON, found {left}"
                "; the body is truncated, or Inference-Header-Content-Length is missing or wrong"
            )
        self._at += size
        return self._body[self._at - size : self._at]

    def check_end(self) -> None:
        left = len(self._body) - self._at
        if left:
            raise InvalidRequest(
                f"expected the body to end after its tensors, found {left} bytes more; "
                "is every binary input's 'binary_data_size' right?"
            )


def _input(given: _JsonInput, tensors: _Binary) -> InputTensor:
    name, datatype, parameters = given.name, given.datatype, given.parameters
    shape = tuple(given.shape)
    check_input(name, datatype, shape)
    size = None
    if parameters:
        size = parameters.get("binary_data_size")
        shared = shared_ref("input", name, parameters)
        if shared is not None:
            if given.data is not UNSET or size is not None:
                raise shared_and_sent(name)
            return InputTensor(name, datatype, shape, b"", shared)
    if given.data is UNSET:
        if size is None:
            raise InvalidRequest(
                f"inference input '{name}': expected 'data' or parameter 'binary_data_size', found neither"
            )
        return InputTensor(name, datatype, shape, tensors.take(name, size))
    if size is not None:
        raise InvalidRequest(
            f"inference input '{name}': expected either 'data' or parameter 'binary_data_size', found both"
        )
    return InputTensor(name, datatype, shape, from_json(name, datatype, shape, memoryview(given.data)))


def _wish(given: _JsonWish, request: Parameters | None) -> OutputWish:
    parameters = given.parameters
    binary = _flag(request, "binary_data_output", default=False)
    if not parameters:
        return OutputWish(given.name, binary)
    wish = wish_of(given.name, parameters)
    if wish.shared is None:
        wish.binary = _flag(parameters, "binary_data", default=binary)
    return wish


def _flag(parameters: Parameters | None, name: str, *, default: bool) -> bool:
    value = parameters.get(name, default) if parameters else default
    if not isinstance(value, bool):
        raise InvalidRequest(f"parameter '{name}': expected true or false, found {value!r}")
    return value


def _check_parameters(parameters: dict[str, Any]) -> None:
    for name, value in parameters.items():
        if not isinstance(value, bool | int | float | str):
            raise InvalidRequest(
                f"parameter '{name}': expected true or false, a number or a string, "
                f"found {type(value).__name__}"
            )
