"""A served model as requests are checked against it; nothing wrong passes here, and nothing is copied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import DATATYPES, Code, Model, TensorSpec
from clockwork_serve.oip.datatypes import BINARY_ONLY, check_strings
from clockwork_serve.oip.errors import TooLarge, Unsupported
from clockwork_serve.oip.headers import Headers
from clockwork_serve.oip.records import InferCall, InputTensor, OutputWish

_SEQUENCE: Final = ("sequence_id", "sequence_start", "sequence_end")

SPARE_TENSORS: Final = 64
"""Beyond a model's own, so that what is wrong with the names is told as long as that is cheap."""

JSON_ELEMENT_BYTES: Final = 64
"""Of a number with its comma, brackets and indentation; the longest that doubles need is 25."""
JSON_BESIDE_TENSORS: Final = 64 * 1024
BOOLEANS_MAX: Final = 16 << 20
"""Of one tensor: each is looked at, while all others wait, 3 ms for all of them."""
RAW_STRING_BYTES_MAX: Final = 2 << 20
"""Of a body that is a string, which is copied behind its length."""


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
    """A model with its code. ``default_slo_ns`` is for requests that carry none."""

    def __init__(self, model: Model, code: Code, default_slo_ns: int) -> None:
        self.model = model
        self.code = code
        self.default_slo_ns = default_slo_ns
        self.headers = Headers()
        self.rows_max = max(model.batch_sizes) if code.batched else 1
        self._inputs = {
            spec.name: _Input(spec, DATATYPES[spec.datatype], spec.row_bytes) for spec in code.inputs
        }
        self._outputs = {spec.name: spec for spec in code.outputs}
        self.tensors_max = max(len(self._inputs), len(self._outputs)) + SPARE_TENSORS
        """Inputs, or outputs, that a request may name before that alone is what is wrong with it."""
        self._required = [spec.name for spec in code.inputs if not spec.optional]
        self._static = all(not spec.optional and -1 not in spec.shape for spec in code.inputs)
        self._binary_only = [spec.name for spec in code.outputs if spec.datatype in BINARY_ONLY]

    def shown_shape(self, spec: TensorSpec) -> list[int]:
        """A tensor's shape as clients see it: the batch axis is -1."""
        return [-1, *spec.shape] if self.code.batched else list(spec.shape)

    def check(self, call: InferCall, *, binary_only_allowed: bool = False) -> Checked:
        """Raise :class:`InvalidRequest` unless the call fits the model.

        ``binary_only_allowed`` is for protocols where every output travels as bytes.
        """
        if call.parameters:
            self._check_parameters(call)
        rows = self._check_inputs(call.inputs)
        self._check_outputs(call, binary_only_allowed)
        return Checked(rows, "" if self._static else self._signature(call.inputs))

    def check_counts(self, inputs: int, outputs: int) -> None:
        """Raise :class:`InvalidRequest` for far more of either than the model has: each takes time."""
        for what, found, known in (("inputs", inputs, self._inputs), ("outputs", outputs, self._outputs)):
            if found > self.tensors_max:
                raise InvalidRequest(
                    f"{what}: expected at most {len(known)} for model '{self.model.name}', found {found}"
                )

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

    def _check_inputs(self, inputs: list[InputTensor]) -> int:
        if len(inputs) > len(self._inputs):
            # Before any data is looked at, which could be the same one's a hundred times.
            for tensor in inputs:
                self._known(tensor.name)
            self._check_names(inputs)
        rows = 0
        for tensor in inputs:
            known = self._inputs.get(tensor.name) or self._known(tensor.name)
            own_rows = self._check_input(known, tensor)
            if rows not in (0, own_rows):
                raise InvalidRequest(
                    f"inference input '{tensor.name}': expected a batch of {rows} as in '{inputs[0].name}', "
                    f"found {own_rows} in shape {list(tensor.shape)}"
                )
            rows = own_rows
        # One input that is known cannot be there twice: the common case needs no look at the names.
        if len(inputs) != 1 or len(self._inputs) != 1:
            self._check_names(inputs)
        return rows or 1

    def _check_names(self, inputs: list[InputTensor]) -> None:
        given = [tensor.name for tensor in inputs]
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

    def _check_input(self, known: _Input, tensor: InputTensor) -> int:
        """Check one input; its rows."""
        spec, shape = known.spec, tensor.shape
        rows = self._check_head(known, tensor.datatype, shape)
        if not known.element_bytes:
            check_strings(spec.name, tensor.data, math.prod(shape))
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


def _fits(declared: tuple[int, ...], own: tuple[int, ...]) -> bool:
    return len(declared) == len(own) and all(
        dim >= 1 if wanted < 0 else dim == wanted for wanted, dim in zip(declared, own, strict=True)
    )


def missing(name: str, version: str = "") -> str:
    """What to tell a client that names a model, or a version of it, that is not served."""
    which = f"'{name}' version {version}" if version else f"'{name}'"
    return f"Request for unknown model: {which} is not found"
