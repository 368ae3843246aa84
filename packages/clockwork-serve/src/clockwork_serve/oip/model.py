"""A served model as both protocols see it, and a request held against it: records, datatypes, metadata.

Nothing wrong passes here, and nothing is copied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from msgspec import Struct, json
from msgspec.structs import replace

from clockwork_client.datatypes import DATATYPES, Buffer, Parameter, encode_strings
from clockwork_client.tensors import DTYPES
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import Code, Model, TensorSpec
from clockwork_serve.oip.shared_memory import SharedRef, shared_ref
from clockwork_serve.oip.status import TooLarge, Unsupported
from clockwork_serve.oip.strings import StringsWalk

# ------------------------------------------------------------
# An inference request and its answer as both protocols see them, without sockets and without a model.
#
# Tensor data is in wire form, see clockwork_client.datatypes.


class InputTensor(Struct):
    """An input as sent: full ``shape`` (batch axis included), ``data`` in wire form.

    ``shared`` is where the data is to be read from first, if the client left it in shared memory.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer
    shared: SharedRef | None = None


class OutputWish(Struct):
    """An output that the client asked for; ``classes`` > 0 asks for that many best classes instead.

    ``shared`` is where its data goes, if the client wants it in shared memory.
    """

    name: str
    binary: bool = False
    classes: int = 0
    shared: SharedRef | None = None


class InferCall(Struct):
    """One inference request. ``outputs`` is None where the client named none: all, ``binary`` or not.

    ``shared``: whether any of its tensors is, or goes, into shared memory. ``known``: what is known of its
    header, if one like it was here before and was good; else ``header`` is that, if it may be remembered.
    ``strings``: what is left to be looked at of its inputs once it was checked.
    """

    inputs: list[InputTensor]
    outputs: list[OutputWish] | None = None
    id: str = ""
    parameters: dict[str, Parameter] = {}
    binary: bool = False
    shared: bool = False
    known: Known | None = None
    header: bytes = b""
    strings: StringsWalk | None = None


class OutputTensor(Struct):
    """An output to send: full ``shape``, ``data`` in wire form, valid until the call that got it returns."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer


_Tensor = TypeVar("_Tensor", bound=InputTensor | OutputTensor)


# ------------------------------------------------------------
# JSON headers of requests that were read before: clients send the same one again and again.
#
# A header whose inputs are all binary says everything about a request but the values of its tensors. What it
# says, and that it fits the model, is worked out once and remembered by its bytes.


HEADER_BYTES_MAX: Final = 1024
HEADERS_MAX: Final = 64  # of one version of a model; beyond that all are forgotten
_ID: Final = re.compile(rb'\{ ?"id": ?"([\x20-\x21\x23-\x5b\x5d-\x7e]+)", ?')


class Known(Struct):
    """What a header says. ``tensors``: name, datatype, shape and bytes of each input, in the body's order.

    ``slo_ns`` and ``decide_ns`` are what its parameters ask for. ``outputs_in_order``: their names, where all
    are to be sent as they are, in binary; then ``around_parameters`` is what a response's JSON has before and
    after its parameters, by the outputs' shapes and bytes.
    """

    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]
    nbytes: int
    outputs: list[OutputWish] | None
    parameters: dict[str, Parameter]
    binary: bool
    rows: int
    signature: str
    slo_ns: int | None
    priority: int
    decide_ns: int = -1
    outputs_in_order: tuple[str, ...] | None = None
    around_parameters: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}

    def keep(self, key: tuple[Any, ...], around: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        """Remember that; returns it."""
        if len(self.around_parameters) >= HEADERS_MAX:
            self.around_parameters.clear()
        self.around_parameters[key] = around
        return around

    def call(self, body: memoryview, at: int, request_id: str) -> InferCall | None:
        """The request whose tensors are in ``body`` from ``at`` on; None if they are too long or short."""
        if len(body) - at != self.nbytes:
            return None
        inputs = []
        for name, datatype, shape, size in self.tensors:
            inputs.append(InputTensor(name, datatype, shape, body[at : at + size]))
            at += size
        return InferCall(inputs, self.outputs, request_id, self.parameters, self.binary, known=self)


class Headers:
    """Of one version of a model."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, body: memoryview, length: int) -> InferCall | None:
        """The request whose header is the first ``length`` bytes, if one like it was here."""
        if length > HEADER_BYTES_MAX or length >= len(body):
            return None
        header = bytes(body[:length])
        known, request_id = self._known.get(header), ""
        if known is None:
            header, request_id = _without_id(header)
            known = self._known.get(header) if request_id else None
        return None if known is None else known.call(body, length, request_id)

    def remember(
        self, call: InferCall, wanted: Sequence[OutputWish], rows: int, signature: str, slo_ns: int | None,
        priority: int, *, decide_ns: int = -1,
    ) -> Known:  # fmt: skip
        """What a good request's header says but for its id. It is kept unless values must be looked at."""
        header, _ = _without_id(call.header)
        if not header or b'"id"' in header or call.shared or not all(map(_plain, call.inputs)):
            return Known((), 0, None, {}, call.binary, rows, signature, slo_ns, priority, decide_ns)
        if len(self._known) >= HEADERS_MAX:
            self._known.clear()
        tensors = tuple(
            (tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in call.inputs
        )
        known = self._known[header] = Known(
            tensors, sum(tensor[3] for tensor in tensors), call.outputs, call.parameters, call.binary, rows,
            signature, slo_ns, priority, decide_ns, _in_order(wanted),
        )  # fmt: skip
        return known


def _without_id(header: bytes) -> tuple[bytes, str]:
    """The header without the id that it begins with, as stock clients write it, and that id; "" if none."""
    found = _ID.match(header)
    return (header, "") if found is None else (b"{" + header[found.end() :], found[1].decode())


def _in_order(wanted: Sequence[OutputWish]) -> tuple[str, ...] | None:
    if any(wish.classes or wish.shared is not None or not wish.binary for wish in wanted):
        return None
    return tuple(wish.name for wish in wanted)


def _plain(tensor: InputTensor) -> bool:
    """Whether its size is all that can be wrong with its bytes."""
    return type(tensor.data) is memoryview and tensor.datatype not in ("BOOL", "BYTES")


# ------------------------------------------------------------
# What is checked of every request, whatever the model.


CLASSES_MAX: Final = 1 << 16
DIMENSIONS_MAX: Final = 32  # of one tensor: as many as NumPy's arrays could always have
_DIMENSION_MAX: Final = 2**63 - 1


def check_input(name: str, datatype: str, shape: tuple[int, ...]) -> None:
    """Raise :class:`InvalidRequest` for what is no tensor's, before it is multiplied or told back.

    Clients choose how many dimensions they name: their product could have a million digits.
    """
    if datatype not in DATATYPES:
        raise InvalidRequest(
            f"inference input '{name}': datatype: expected one of {', '.join(DATATYPES)}, found '{datatype}'"
        )
    if len(shape) > DIMENSIONS_MAX:
        raise InvalidRequest(
            f"inference input '{name}': shape: expected at most {DIMENSIONS_MAX} dimensions, "
            f"found {len(shape)}"
        )
    if shape and min(shape) < 0:
        raise InvalidRequest(
            f"inference input '{name}': shape: expected no negative dimension, found {list(shape)}"
        )
    if shape and max(shape) > _DIMENSION_MAX:
        raise InvalidRequest(
            f"inference input '{name}': shape: expected dimensions up to {_DIMENSION_MAX}, "
            f"found {list(shape)}"
        )


def wish_of(name: str, parameters: Mapping[str, Any]) -> OutputWish:
    """An output as its parameters ask for it, in binary. Raises :class:`InvalidRequest`."""
    classes = parameters.get("classification", 0)
    if isinstance(classes, bool) or not isinstance(classes, int) or not 0 <= classes <= CLASSES_MAX:
        raise InvalidRequest(
            f"inference output '{name}': parameter 'classification': expected a number of classes from 0 to "
            f"{CLASSES_MAX}, found {classes!r}"
        )
    shared = shared_ref("output", name, parameters)
    if shared is not None and classes:
        raise InvalidRequest(
            f"inference output '{name}': expected either 'classification' or shared memory, found both"
        )
    return OutputWish(name, binary=True, classes=classes, shared=shared)


def shared_and_sent(name: str) -> InvalidRequest:
    """What to tell a client that sends an input and names shared memory for it too."""
    return InvalidRequest(
        f"inference input '{name}': expected its data either here or in shared memory, found both"
    )


def any_shared(inputs: list[InputTensor], outputs: list[OutputWish] | None) -> bool:
    """Whether one of them is in shared memory."""
    for tensor in inputs:
        if tensor.shared is not None:
            return True
    return outputs is not None and any(wish.shared is not None for wish in outputs)


BINARY_ONLY: Final = frozenset({"FP16", "BF16"})  # types that have no form but the binary one


# ------------------------------------------------------------
# The classification extension: the best classes of an output instead of its numbers.


def classify(tensor: OutputTensor, count: int, labels: Sequence[str], *, batched: bool) -> OutputTensor:
    """BYTES ``value:index[:label]`` of the ``count`` highest values, of each row if batched."""
    values = np.frombuffer(tensor.data, DTYPES[tensor.datatype])
    rows = tensor.shape[0] if batched else 1
    values = values.reshape(rows, -1)
    count = min(count, values.shape[1])
    # Stable, so that of equals the first class wins.
    best = np.argsort(-values.astype(np.float64), axis=1, kind="stable")[:, :count]
    texts = [_text(values[row, index], int(index), labels) for row in range(rows) for index in best[row]]
    shape = (rows, count) if batched else (count,)
    return OutputTensor(tensor.name, "BYTES", shape, encode_strings(text.encode() for text in texts))


def _text(value: np.generic, index: int, labels: Sequence[str]) -> str:
    shown = f"{float(value):f}" if value.dtype.kind == "f" else str(int(value))
    return f"{shown}:{index}:{labels[index]}" if index < len(labels) else f"{shown}:{index}"


# ------------------------------------------------------------
# A served model, and validation of requests against it; no tensor is copied.


_SEQUENCE: Final = ("sequence_id", "sequence_start", "sequence_end")

SPARE_TENSORS: Final = 64
"""Beyond a model's own, so that what is wrong with the names is told as long as that is cheap."""

JSON_ELEMENT_BYTES: Final = 64
"""Of a number with its comma, brackets and indentation; the longest that doubles need is 25."""
JSON_BESIDE_TENSORS: Final = 64 * 1024
BOOLEANS_MAX: Final = 16 << 20
"""Of one tensor: each is looked at, while all others wait, 3 ms for all of them."""
RAW_STRING_BYTES_MAX: Final = 2 << 20  # of a body that is a string, which is copied behind its length


class Checked(NamedTuple):
    """What the scheduler must know of a request that fits; ``signature`` only if its shapes are its own."""

    rows: int
    signature: str


@dataclass(slots=True, frozen=True)
class _Input:
    spec: TensorSpec
    element_bytes: int
    row_bytes: int | None  # None where the shape leaves it open, or elements differ in size


class Served:
    """A model with its code, whose tensors have the shapes that clients see.

    ``default_slo_ns`` is for requests that carry none.
    """

    def __init__(self, model: Model, code: Code, default_slo_ns: int) -> None:
        self.model = model
        seen = _reshaped_dims(model.config, "input")
        self._own_dims = {spec.name: spec.shape for spec in code.inputs if spec.name in seen}
        self._output_dims = _reshaped_dims(model.config, "output")
        self.code = code = replace(
            code, inputs=_with_dims(code.inputs, seen), outputs=_with_dims(code.outputs, self._output_dims)
        )
        self.default_slo_ns = default_slo_ns
        self.headers = Headers()
        self.rows_max = max(model.batch_sizes) if code.batched else 1
        self.outputs_open = code.outputs_open
        self._inputs = {
            spec.name: _Input(spec, DATATYPES[spec.datatype], spec.row_bytes) for spec in code.inputs
        }
        self._outputs = {spec.name: spec for spec in code.outputs}
        self.tensors_max = max(len(self._inputs), len(self._outputs)) + SPARE_TENSORS
        """Inputs, or outputs, that a request may name before that alone is what is wrong with it."""
        self._required = [spec.name for spec in code.inputs if not spec.optional]
        self._static = all(not spec.optional and -1 not in spec.shape for spec in code.inputs)
        self._has_strings = any(spec.datatype == "BYTES" for spec in code.inputs)
        self._strings_are_text = code.backend == "onnx"
        self._binary_only = [spec.name for spec in code.outputs if spec.datatype in BINARY_ONLY]

    def shown_shape(self, spec: TensorSpec) -> list[int]:
        """A tensor's shape as clients see it: the batch axis is -1."""
        return [-1, *spec.shape] if self.code.batched else list(spec.shape)

    def sent(self, inputs: list[InputTensor]) -> list[InputTensor]:
        """Inputs in the shapes that the model has."""
        return _reshaped(inputs, self._own_dims, self.code) if self._own_dims else inputs

    def answered(self, outputs: list[OutputTensor]) -> list[OutputTensor]:
        """Outputs in the shapes that clients see."""
        return _reshaped(outputs, self._output_dims, self.code) if self._output_dims else outputs

    def check(self, call: InferCall, *, binary_only_allowed: bool = False) -> Checked:
        """Raise :class:`InvalidRequest` unless the call fits the model.

        ``binary_only_allowed`` is for protocols where every output travels as bytes. Many or large strings
        are left to the call's ``strings``.
        """
        if call.parameters:
            self._check_parameters(call)
        strings = StringsWalk() if self._has_strings else None
        rows = self._check_inputs(call.inputs, strings)
        self._check_outputs(call, binary_only_allowed)
        if strings is not None and strings.step():
            call.strings = strings
        return Checked(rows, "" if self._static else self._signature(call.inputs))

    def check_counts(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InvalidRequest` for far more of either than the model has: each takes time."""
        for what, found, known in (("inputs", inputs, self._inputs), ("outputs", outputs, self._outputs)):
            if found > self.tensors_max:
                raise InvalidRequest(
                    f"{what}: expected at most {len(known)} for model '{self.model.name}', found {found}"
                )

    def check_names(self, given: Sequence[str]) -> None:
        """Raise :class:`InvalidRequest` for more inputs than the model has, before data are looked at.

        They could be the same one's a hundred times.
        """
        if len(given) > len(self._inputs):
            for name in given:
                self._known(name)
            self._check_names(given)

    @property
    def json_max(self) -> int | None:
        """Bytes of JSON that a request for this model can need; None where its shapes leave that open."""
        found = JSON_BESIDE_TENSORS
        for known in self._inputs.values():
            if known.row_bytes is None:
                return None
            found += self.rows_max * (known.row_bytes // known.element_bytes) * JSON_ELEMENT_BYTES
        return found

    def check_json(self, nbytes: int) -> None:
        """Raise :class:`TooLarge` for more JSON than a request for this model can need."""
        most = self.json_max
        if most is not None and nbytes > most:
            raise TooLarge(
                f"JSON: expected at most {most} bytes for the inputs of model '{self.model.name}', found "
                f"{nbytes}; write numbers shorter, or send tensors as binary data"
            )

    def check_head(self, name: str, datatype: str, shape: tuple[int, ...]) -> None:
        """Raise :class:`InvalidRequest` unless an input may look like that, whatever its data are."""
        self._check_head(self._known(name), datatype, shape)

    def wanted(self, call: InferCall) -> list[OutputWish]:
        """The outputs to answer with, in order."""
        if call.outputs is not None:
            return call.outputs
        return [OutputWish(name, call.binary) for name in self._outputs]

    def classified(self, tensor: OutputTensor, count: int) -> OutputTensor:
        """The ``count`` best classes of an output instead of its numbers."""
        return classify(tensor, count, self.model.labels.get(tensor.name, ()), batched=self.code.batched)

    def output_bytes(self, name: str, rows: int) -> int | None:
        """What an output of so many rows takes; None where only running the model tells."""
        row_bytes = self._outputs[name].row_bytes
        return None if row_bytes is None else row_bytes * rows

    def raw_call(self, body: memoryview) -> InferCall:
        """A request that is nothing but its only input's bytes. Raises :class:`InvalidRequest`."""
        name = self.model.name
        if len(self.code.inputs) != 1:
            raise InvalidRequest(
                f"raw binary request for model '{name}': expected a model with one input, "
                f"found one with {len(self.code.inputs)}; send a JSON header that names them"
            )
        spec = self.code.inputs[0]
        if spec.datatype == "BYTES":
            if len(body) > RAW_STRING_BYTES_MAX:
                raise TooLarge(
                    f"raw binary request for model '{name}': expected at most {RAW_STRING_BYTES_MAX} bytes "
                    f"for a BYTES input, found {len(body)}; send a JSON header before the bytes"
                )
            shape = tuple(1 for _ in spec.shape)
            data = len(body).to_bytes(4, "little") + bytes(body)
        else:
            shape, data = self._raw_shape(spec, len(body)), body  # type: ignore[assignment]
        if self.code.batched:
            shape = (1, *shape)
        return InferCall([InputTensor(spec.name, spec.datatype, shape, data)], binary=True)

    def _raw_shape(self, spec: TensorSpec, size: int) -> tuple[int, ...]:
        open_dims = spec.shape.count(-1)
        if open_dims > 1:
            raise InvalidRequest(
                f"raw binary request for model '{self.model.name}': expected at most one dimension that a "
                f"request chooses, found {self.shown_shape(spec)}; send a JSON header with the shape"
            )
        step = math.prod(dim for dim in spec.shape if dim >= 0) * DATATYPES[spec.datatype]
        if open_dims and step and size % step == 0:
            return tuple(size // step if dim < 0 else dim for dim in spec.shape)
        return tuple(1 if dim < 0 else dim for dim in spec.shape)

    def _check_parameters(self, call: InferCall) -> None:
        for field in _SEQUENCE:
            if call.parameters.get(field):
                raise Unsupported(
                    f"parameter '{field}': model '{self.model.name}' keeps no state between requests; "
                    "send requests without sequence parameters"
                )

    def _check_inputs(self, inputs: list[InputTensor], strings: StringsWalk | None) -> int:
        if len(inputs) > len(self._inputs):
            self.check_names([tensor.name for tensor in inputs])
        rows = 0
        for tensor in inputs:
            known = self._inputs.get(tensor.name) or self._known(tensor.name)
            own_rows = self._check_input(known, tensor, strings)
            if rows not in (0, own_rows):
                raise InvalidRequest(
                    f"inference input '{tensor.name}': expected a batch of {rows} as in '{inputs[0].name}', "
                    f"found {own_rows} in shape {list(tensor.shape)}"
                )
            rows = own_rows
        # One input that is known cannot be there twice: the common case needs no look at the names.
        if len(inputs) != 1 or len(self._inputs) != 1:
            self._check_names([tensor.name for tensor in inputs])
        return rows or 1

    def _check_names(self, given: Sequence[str]) -> None:
        missing = [name for name in self._required if name not in given]
        if missing:
            raise InvalidRequest(
                f"expected {len(self._required)} inputs but got {len(given)} inputs for model "
                f"'{self.model.name}'. Got input(s) {given}, but missing required input(s) {missing}. "
                "Please provide all required input(s)."
            )
        if len(set(given)) != len(given):
            twice = next(name for name in given if given.count(name) > 1)
            raise InvalidRequest(
                f"inference input '{twice}': expected once, found {given.count(twice)} times"
            )

    def _known(self, name: str) -> _Input:
        known = self._inputs.get(name)
        if known is None:
            raise InvalidRequest(
                f"unexpected inference input '{name}' for model '{self.model.name}'; "
                f"expected {list(self._inputs)}"
            )
        return known

    def _check_head(self, known: _Input, datatype: str, shape: tuple[int, ...]) -> int:
        """Check all of an input but its data; its rows."""
        spec = known.spec
        if datatype != spec.datatype:
            raise InvalidRequest(
                f"inference input '{spec.name}' data-type is '{datatype}', but model "
                f"'{self.model.name}' expects '{spec.datatype}'"
            )
        rows, own = (shape[0] if shape else 0, shape[1:]) if self.code.batched else (1, shape)
        if own != spec.shape and not _fits(spec.shape, own):
            raise self._wrong_shape(spec, shape)
        if rows < 1:
            raise self._wrong_shape(spec, shape)
        if rows > self.rows_max:
            raise InvalidRequest(
                f"inference request batch-size must be <= {self.rows_max} for '{self.model.name}', "
                f"found {rows} in shape {list(shape)} of input '{spec.name}'"
            )
        return rows

    def _check_input(self, known: _Input, tensor: InputTensor, strings: StringsWalk | None) -> int:
        """Check one input, but leave elements of BYTES to ``strings``; its rows."""
        spec, shape = known.spec, tensor.shape
        rows = self._check_head(known, tensor.datatype, shape)
        if not known.element_bytes:
            assert strings is not None
            strings.add(spec.name, tensor.data, math.prod(shape), text=self._strings_are_text)
            return rows
        row_bytes = known.row_bytes
        if row_bytes is None:
            own = shape[1:] if self.code.batched else shape
            row_bytes = math.prod(own) * known.element_bytes
        if len(tensor.data) != rows * row_bytes:
            raise InvalidRequest(
                f"inference input '{spec.name}': expected {rows * row_bytes} bytes for shape {list(shape)} "
                f"of {spec.datatype}, found {len(tensor.data)}"
            )
        if spec.datatype == "BOOL" and len(tensor.data) > BOOLEANS_MAX:
            raise InvalidRequest(
                f"inference input '{spec.name}': expected at most {BOOLEANS_MAX} elements of BOOL, found "
                f"{len(tensor.data)}; send fewer in one request"
            )
        if spec.datatype == "BOOL" and np.frombuffer(tensor.data, np.uint8).max() > 1:
            raise InvalidRequest(
                f"inference input '{spec.name}': expected bytes 0 or 1 for BOOL, found others"
            )
        return rows

    def _wrong_shape(self, spec: TensorSpec, shape: tuple[int, ...]) -> InvalidRequest:
        return InvalidRequest(
            f"unexpected shape for input '{spec.name}' for model '{self.model.name}'. "
            f"Expected {self.shown_shape(spec)}, got {list(shape)}"
            + (" (every dimension at least 1)" if -1 in self.shown_shape(spec) else "")
        )

    def _check_outputs(self, call: InferCall, binary_only_allowed: bool) -> None:  # noqa: FBT001
        wishes = call.outputs
        if wishes is None:
            if self._binary_only and not call.binary and not binary_only_allowed:
                raise self._no_json(self._binary_only[0])
            return
        if len({wish.name for wish in wishes}) != len(wishes):
            raise InvalidRequest("outputs: expected each output once, found one twice")
        for wish in wishes:
            spec = self._outputs.get(wish.name)
            if spec is None:
                raise InvalidRequest(
                    f"unexpected inference output '{wish.name}' for model '{self.model.name}'; "
                    f"expected {list(self._outputs)}"
                )
            if wish.classes:
                if spec.datatype in ("BYTES", "BOOL", "BF16"):
                    raise InvalidRequest(f"inference output '{wish.name}': {spec.datatype} has no classes")
            elif spec.datatype in BINARY_ONLY and not (wish.binary or binary_only_allowed):
                raise self._no_json(wish.name)

    def _no_json(self, name: str) -> InvalidRequest:
        return InvalidRequest(
            f"inference output '{name}': {self._outputs[name].datatype} has no JSON form; ask for it with "
            "parameter binary_data (or binary_data_output)"
        )

    def _signature(self, inputs: list[InputTensor]) -> str:
        """Which requests could share a batch: the same inputs with the same shapes beside the batch axis."""
        start = 1 if self.code.batched else 0
        return ";".join(
            sorted(f"{tensor.name}:{'x'.join(map(str, tensor.shape[start:]))}" for tensor in inputs)
        )


def _reshaped_dims(config: bytes, role: str) -> dict[str, tuple[int, ...]]:
    """Dims that clients see of the inputs or outputs that a model's configuration reshapes, by name."""
    if b'"reshape"' not in config:
        return {}
    return {each["name"]: tuple(each["dims"]) for each in json.decode(config)[role] if "reshape" in each}


def _with_dims(specs: tuple[TensorSpec, ...], dims: Mapping[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    return tuple([replace(spec, shape=dims.get(spec.name, spec.shape)) for spec in specs])


def _reshaped(tensors: list[_Tensor], dims: Mapping[str, tuple[int, ...]], code: Code) -> list[_Tensor]:
    """Copies of tensors, whose data stay as they are, with other dims."""
    found: list[_Tensor] = []
    for each in tensors:
        rows = each.shape[:1] if code.batched else ()
        found.append(replace(each, shape=(*rows, *dims[each.name])) if each.name in dims else each)
    return found


def _fits(declared: tuple[int, ...], own: tuple[int, ...]) -> bool:
    return len(declared) == len(own) and all(
        dim >= 1 if wanted < 0 else dim == wanted for wanted, dim in zip(declared, own, strict=True)
    )


def missing(name: str, version: str = "") -> str:
    """What to tell a client that names a model, or a version of it, that is not served."""
    which = f"'{name}' version {version}" if version else f"'{name}'"
    return f"Request for unknown model: {which} is not found"


# ------------------------------------------------------------
# Descriptions of the server and its models, as both protocols give them.


SERVER_NAME: Final = "clockwork-serve"
EXTENSIONS: Final = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters",
    "statistics",
)  # fmt: skip
"""Extensions of the protocol that this server always has."""
_DESCRIPTION: Final = Path(__file__).with_name("openapi.json")


def server_metadata(version: str, *more: str) -> dict[str, Any]:
    """Who serves, and what of the protocol; ``more`` are extensions that were turned on."""
    return {"name": SERVER_NAME, "version": version, "extensions": sorted((*EXTENSIONS, *more))}


def http_description(version: str) -> dict[str, Any]:
    """The HTTP port as OpenAPI 3.1, for ``GET /v2/openapi.json``: ``openapi.json`` with a version."""
    document: dict[str, Any] = json.decode(_DESCRIPTION.read_bytes())
    document["info"]["version"] = version
    return document


def model_metadata(served: Served, versions: list[str]) -> dict[str, Any]:
    """A model's inputs and outputs, with the batch axis as -1, and the versions of it that are served."""
    code = served.code
    return {
        "name": served.model.name,
        "versions": versions,
        "platform": served.model.platform,
        "inputs": [_tensor(served, spec) for spec in code.inputs],
        "outputs": [_tensor(served, spec) for spec in code.outputs],
    }


def _tensor(served: Served, spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": served.shown_shape(spec)}
