"""One (code, batch size) with tensors whose sizes a request chooses, or that a request may leave out.

Everything is bound anew for each run and let go after it: the memory of a request may be unmapped then.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from clockwork_serve.devices.arena import Scratch
from clockwork_serve.devices.base import NUMPY_DTYPES, Array, CallBuffers, Phases
from clockwork_serve.devices.onnx_session import Value, value_of
from clockwork_serve.devices.onnx_weights import Bound
from clockwork_serve.devices.tensors import Room, check_input, gather, nbytes_of, split, stack
from clockwork_serve.errors import ModelError
from clockwork_serve.messages import Code, TensorSpec
from clockwork_serve.units import align


class OpenBatch:
    """How a code is run at one batch size. Used by the exec lane only, like the I/O area."""

    def __init__(self, code: Code, batch: int, scratch: Scratch, placeholder: Value) -> None:
        self._code = code
        self._batch = batch
        self._scratch = scratch
        self._placeholder = placeholder

    def run(self, bound: Bound, calls: Sequence[CallBuffers], rows: Sequence[int], started_ns: int) -> Phases:
        """Run the calls as one batch."""
        specs = _given(self._code, calls)
        if len(specs) < len(self._code.inputs):
            bound = bound.anew()  # what an earlier call gave must not linger
        binding, bound.bound_by = bound.binding, None
        arrays = self._inputs(specs, calls, rows)
        try:
            for spec, array in zip(specs, arrays, strict=True):
                binding.bind_ortvalue_input(spec.name, value_of(array, spec.datatype))
            for spec in self._code.outputs:
                binding.bind_output(spec.name, "cpu")
            entered_ns = time.monotonic_ns()
            bound.session.run_with_iobinding(binding)
            ran_ns = time.monotonic_ns()
            found = zip(self._code.outputs, binding.get_outputs(), strict=True)
            outputs = [_array_of(spec, value) for spec, value in found]
            write(self._code, outputs, self._batch, calls, rows)
        finally:
            binding.clear_binding_outputs()
            for spec in specs:
                binding.bind_ortvalue_input(spec.name, self._placeholder)
        return Phases(entered_ns - started_ns, ran_ns - entered_ns, time.monotonic_ns() - ran_ns)

    def _inputs(
        self, specs: Sequence[TensorSpec], calls: Sequence[CallBuffers], rows: Sequence[int]
    ) -> list[Array]:
        """Each input as one array: the request's own if it fills the batch, else in the I/O area."""
        arrays, end = [], 0
        for spec in specs:
            if len(calls) == 1 and rows[0] == self._batch:
                array = calls[0].inputs[spec.name]
                check_input(self._code, spec, array, rows[0])
                whole = array.flags.c_contiguous and array.flags.aligned
                arrays.append(array if whole else np.array(array))
                continue
            parts = gather(self._code, spec, calls, rows)
            shape, dtype = (self._batch, *parts[0].shape[1:]), NUMPY_DTYPES[spec.datatype]
            start, end = end, end + align(nbytes_of(shape, dtype))
            fits = self._scratch.claim(end)
            array = self._scratch.array(shape, dtype, start) if fits else np.empty(shape, dtype)
            stack(parts, array)
            arrays.append(array)
        return arrays


class TextBatch:
    """A code with BYTES inputs, which the runtime cannot bind: it copies them."""

    def __init__(self, code: Code, batch: int) -> None:
        self._code = code
        self._batch = batch
        self._names = [spec.name for spec in code.outputs]

    def run(self, bound: Bound, calls: Sequence[CallBuffers], rows: Sequence[int], started_ns: int) -> Phases:
        """Run the calls as one batch."""
        feed: dict[str, Any] = dict(bound.weights)
        for spec in _given(self._code, calls):
            parts = gather(self._code, spec, calls, rows)
            array = parts[0]
            if self._code.batched:
                array = np.empty((self._batch, *parts[0].shape[1:]), parts[0].dtype)
                stack(parts, array)
            feed[spec.name] = (
                _as_text(spec, array)
                if spec.datatype == "BYTES"
                else value_of(np.ascontiguousarray(array), spec.datatype)
            )
        entered_ns = time.monotonic_ns()
        outputs = bound.session.run(self._names, feed)
        ran_ns = time.monotonic_ns()
        write(self._code, outputs, self._batch, calls, rows)
        return Phases(entered_ns - started_ns, ran_ns - entered_ns, time.monotonic_ns() - ran_ns)


def write(
    code: Code, outputs: Sequence[Array], batch: int, calls: Sequence[CallBuffers], rows: Sequence[int]
) -> None:
    """Copy whole outputs, in the code's order, into the calls' rooms."""
    rooms = [Room(call) for call in calls]
    for spec, array in zip(code.outputs, outputs, strict=True):
        split(code, spec, array, batch, rows, rooms)


def _given(code: Code, calls: Sequence[CallBuffers]) -> list[TensorSpec]:
    """The inputs that the first call has, which are then expected of every call."""
    specs = [spec for spec in code.inputs if not spec.optional or spec.name in calls[0].inputs]
    for spec in specs:
        if spec.name not in calls[0].inputs:
            check_input(code, spec, None, 1)
    return specs


def _array_of(spec: TensorSpec, value: Value) -> Array:
    """An output that the run allocated, without a copy; valid while the value is."""
    if spec.datatype != "BF16":
        array: Array = value.numpy()
        return array
    shape, dtype = value.shape(), NUMPY_DTYPES["BF16"]
    memory = (ctypes.c_uint8 * nbytes_of(shape, dtype)).from_address(value.data_ptr())
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)


def _as_text(spec: TensorSpec, array: Array) -> Array:
    """ONNX strings are text."""
    text = np.empty(array.size, dtype=object)
    try:
        for place, item in enumerate(array.ravel().tolist()):
            text[place] = item if isinstance(item, str) else bytes(item).decode()
    except UnicodeDecodeError as error:
        raise ModelError(
            f"input {spec.name}: expected UTF-8 text, as ONNX strings are; found {error.object[:80]!r}"
        ) from error
    return text.reshape(array.shape)
