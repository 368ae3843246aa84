"""Inference messages of gRPC to calls and back; it knows no channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import DATATYPES
from clockwork_serve.oip.classification import classify
from clockwork_serve.oip.datatypes import BINARY_ONLY, DTYPES, encode_strings
from clockwork_serve.oip.grpc_wire import FIELDS, SMALL_BYTES, WalkedRequest, decode_contents, walk
from clockwork_serve.oip.http_infer import any_shared, check_shape, classes_of, shared_and_sent, shared_wish
from clockwork_serve.oip.protobuf import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from clockwork_serve.oip.records import Buffer, InferCall, InputTensor, OutputTensor, OutputWish, Parameter
from clockwork_serve.oip.served import Served
from clockwork_serve.oip.shared_memory import SharedRef, shared_ref

InferRequest = Any
"""A ``ModelInferRequest``, or a large one as it was walked: a :class:`WalkedRequest`."""

_LENGTH_DELIMITED: Final = 2
_RAW_OUTPUT_CONTENTS: Final[int] = ModelInferResponse.DESCRIPTOR.fields_by_name["raw_output_contents"].number
_INFER_RESPONSE: Final[int] = ModelStreamInferResponse.DESCRIPTOR.fields_by_name["infer_response"].number


def read_infer(data: bytes) -> InferRequest:
    """A message as it came, its tensors not looked at.

    Raises :class:`InvalidRequest`, and what protobuf raises.
    """
    return ModelInferRequest.FromString(data) if len(data) <= SMALL_BYTES else walk(data)


def parse_infer(request: InferRequest, served: Served) -> InferCall:
    """A call to that model from a message, read or made. Raises :class:`InvalidRequest`."""
    walked: WalkedRequest | None = None
    if isinstance(request, WalkedRequest):
        walked, request = request, request.head
    if len(request.inputs) > served.tensors_max or len(request.outputs) > served.tensors_max:
        served.check_counts(len(request.inputs), len(request.outputs))
    raw = request.raw_input_contents if walked is None else walked.raw
    places = [_shared_ref(tensor) if tensor.parameters else None for tensor in request.inputs]
    sent = places.count(None)
    if raw and len(raw) != sent:
        raise InvalidRequest(
            f"raw_input_contents: expected one entry for each of the {sent} inputs, found {len(raw)}"
        )
    contents = iter(raw)
    inputs = []
    for index, (tensor, place) in enumerate(zip(request.inputs, places, strict=True)):
        if not raw and place is None:
            inputs.append(_typed(tensor, served, walked, index))
        else:
            inputs.append(_input(tensor, next(contents) if place is None else None, place))
    outputs = [_wish(output) for output in request.outputs] if request.outputs else None
    parameters = parameters_of(request.parameters) if request.parameters else {}
    return InferCall(inputs, outputs, request.id, parameters, binary=True, shared=any_shared(inputs, outputs))


def encode_infer(
    call: InferCall, served: Served, outputs: Sequence[OutputTensor], parameters: Mapping[str, Parameter]
) -> bytes:
    """The ``ModelInferResponse`` as it is sent."""
    response = ModelInferResponse(
        model_name=served.model.name, model_version=served.model.version, id=call.id
    )
    by_name = {tensor.name: tensor for tensor in outputs}
    contents: list[Buffer] = []
    for wish in served.wanted(call):
        tensor = by_name[wish.name]
        if wish.classes:
            labels = served.model.labels.get(wish.name, ())
            tensor = classify(tensor, wish.classes, labels, batched=served.code.batched)
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
    return b"".join((response.SerializeToString(), *contents))


def streamed(response: bytes) -> bytes:
    """The ``ModelStreamInferResponse`` that holds a ``ModelInferResponse``."""
    return _field(_INFER_RESPONSE, len(response)) + response


def _field(number: int, length: int) -> bytes:
    """The head of a field of protobuf whose content is so many bytes."""
    head = [number << 3 | _LENGTH_DELIMITED]
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head)


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


def _typed(tensor: Any, served: Served, walked: WalkedRequest | None, index: int) -> InputTensor:
    """An input with typed contents, which are counted before they are made a tensor of."""
    name, datatype, shape = _head(tensor)
    if datatype in BINARY_ONLY:
        raise InvalidRequest(
            f"inference input '{name}': {datatype} has no typed contents; use raw_input_contents"
        )
    served.check_head(name, datatype, shape)
    count = math.prod(shape)
    if walked is not None:
        data = decode_contents(name, datatype, count, walked.data, walked.contents[index])
    else:
        data = _packed(name, datatype, tensor.contents)
    return InputTensor(name, datatype, shape, data)


def _head(tensor: Any) -> tuple[str, str, tuple[int, ...]]:
    name, datatype, dims = tensor.name, tensor.datatype, tensor.shape
    if datatype not in DATATYPES:
        raise InvalidRequest(
            f"inference input '{name}': datatype: expected one of {', '.join(DATATYPES)}, found '{datatype}'"
        )
    shape = tuple(dims)
    check_shape(name, shape)
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
    parameters = parameters_of(output.parameters)
    classes = classes_of(output.name, parameters.get("classification", 0))
    shared = shared_ref("output", output.name, parameters)
    if shared is not None:
        return shared_wish(output.name, classes, shared)
    return OutputWish(output.name, binary=True, classes=classes)


def _shared_ref(tensor: Any) -> SharedRef | None:
    """Where an input is in shared memory, if there."""
    return shared_ref("input", tensor.name, parameters_of(tensor.parameters))
