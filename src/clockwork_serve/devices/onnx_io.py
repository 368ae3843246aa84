"""Inputs and outputs of one (code, batch size), bound to a request's own memory where it fills the batch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clockwork_serve.devices.arena import Scratch
from clockwork_serve.devices.base import NUMPY_DTYPES, Array, CallBuffers
from clockwork_serve.devices.onnx_session import Value, value_of
from clockwork_serve.devices.tensors import (
    Room,
    check_input,
    full_shape,
    gather,
    is_static,
    nbytes_of,
    split,
    stack,
)
from clockwork_serve.errors import ModelError
from clockwork_serve.messages import Code, TensorSpec
from clockwork_serve.units import align


@dataclass(slots=True)
class Slot:
    """One input or output. ``shape``, ``array`` and ``value`` are there if the size is known beforehand."""

    spec: TensorSpec
    shape: tuple[int, ...] = ()
    array: Array | None = None
    value: Value | None = None


@dataclass(slots=True)
class Use:
    """One INFER's use of a binding: what must stay alive until it has run, and what it takes back after."""

    arrays: list[Array] = field(default_factory=list)
    borrowed: list[str] = field(default_factory=list)  # inputs bound to memory of a request
    end: int = 0  # of what is taken in the I/O area
    rooms: list[Room] = field(default_factory=list)
    direct: bool = False  # outputs are written where they belong by the run itself


class Batch:
    """How a code is run at one batch size. Used by the exec lane only, like the I/O area."""

    def __init__(self, code: Code, batch: int, scratch: Scratch, placeholder: Value) -> None:
        self._code = code
        self._batch = batch if code.batched else 1
        self._scratch = scratch
        self._placeholder = placeholder
        self._end = 0
        self._inputs = [self._slot(spec) for spec in code.inputs]
        self._outputs = [self._slot(spec) for spec in code.outputs]
        self._outputs_static = all(is_static(spec) for spec in code.outputs)

    def bind_inputs(self, binding: Any, calls: Sequence[CallBuffers], rows: Sequence[int]) -> Use:
        """Bind every input, copying only where several calls share the batch or one does not fill it."""
        use = Use(end=self._end)
        alone = len(calls) == 1 and rows[0] == self._batch
        for slot in self._inputs:
            if slot.spec.optional and slot.spec.name not in calls[0].inputs:
                continue
            if alone:
                value = self._borrow(slot, calls[0], rows[0], use)
            else:
                arrays = gather(self._code, slot.spec, calls, rows)
                array, value = self._place(slot, (self._batch, *arrays[0].shape[1:]), use)
                stack(arrays, array)
            binding.bind_ortvalue_input(slot.spec.name, value)
        use.direct = alone and self._outputs_static
        return use

    def bind_outputs(self, binding: Any, calls: Sequence[CallBuffers], use: Use) -> None:
        """Bind every output: to its call's room, to the I/O area, or to memory that the run allocates."""
        use.rooms = [Room(call) for call in calls]
        for slot in self._outputs:
            spec = slot.spec
            if not is_static(spec):
                binding.bind_output(spec.name, "cpu")
            elif use.direct:
                array = use.rooms[0].array(spec, slot.shape)
                use.arrays.append(array)
                binding.bind_ortvalue_output(spec.name, value_of(array, spec.datatype))
            else:
                binding.bind_ortvalue_output(spec.name, self._place(slot, slot.shape, use)[1])

    def read_outputs(self, binding: Any, rows: Sequence[int], use: Use) -> None:
        """Copy what the run did not write in place into the calls' rooms."""
        if use.direct:
            return
        for slot, value in zip(self._outputs, binding.get_outputs(), strict=True):
            split(self._code, slot.spec, _array_of(slot, value), self._batch, rows, use.rooms)

    def release(self, binding: Any, use: Use) -> None:
        """Let go of the requests' memory, which may be unmapped from now on."""
        binding.clear_binding_outputs()
        for name in use.borrowed:
            binding.bind_ortvalue_input(name, self._placeholder)

    def run_plainly(
        self, session: Any, weights: dict[str, Value], calls: Sequence[CallBuffers], rows: Sequence[int]
    ) -> tuple[Use, list[Array]]:
        """Run a code with BYTES inputs, which cannot be bound; its outputs in the code's order."""
        feed: dict[str, Any] = dict(weights)
        for slot in self._inputs:
            if slot.spec.optional and slot.spec.name not in calls[0].inputs:
                continue
            arrays = gather(self._code, slot.spec, calls, rows)
            shape = (self._batch, *arrays[0].shape[1:]) if self._code.batched else arrays[0].shape
            array = np.empty(shape, arrays[0].dtype)
            stack(arrays, array) if self._code.batched else np.copyto(array, arrays[0])
            feed[slot.spec.name] = _as_text(slot.spec, array) if slot.spec.datatype == "BYTES" else array
        return Use(rooms=[Room(call) for call in calls]), session.run([s.spec.name for s in self._outputs], feed)

    def write_outputs(self, arrays: Sequence[Array], rows: Sequence[int], use: Use) -> None:
        """Copy outputs, in the code's order, into the calls' rooms."""
        for slot, array in zip(self._outputs, arrays, strict=True):
            split(self._code, slot.spec, array, self._batch, rows, use.rooms)

    def _slot(self, spec: TensorSpec) -> Slot:
        if not is_static(spec):
            return Slot(spec)
        slot = Slot(spec, full_shape(self._code, spec, self._batch))
        dtype = NUMPY_DTYPES[spec.datatype]
        end = self._end + align(nbytes_of(slot.shape, dtype))
        if self._scratch.claim(end):
            slot.array = self._scratch.array(slot.shape, dtype, self._end)
            slot.value = value_of(slot.array, spec.datatype)
            self._end = end
        return slot

    def _borrow(self, slot: Slot, call: CallBuffers, rows: int, use: Use) -> Value:
        """An input where it is, in the request's own memory."""
        spec = slot.spec
        array = call.inputs.get(spec.name)
        if array is None or array.shape != slot.shape or array.dtype != NUMPY_DTYPES[spec.datatype]:
            check_input(self._code, spec, array, rows)
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        use.arrays.append(array)
        use.borrowed.append(spec.name)
        return value_of(array, spec.datatype)

    def _place(self, slot: Slot, shape: tuple[int, ...], use: Use) -> tuple[Array, Value]:
        """Memory for a whole batch of one tensor: its own place in the I/O area, or the next free one."""
        if slot.array is not None and slot.array.shape == shape:
            return slot.array, slot.value
        dtype = NUMPY_DTYPES[slot.spec.datatype]
        end = use.end + align(nbytes_of(shape, dtype))
        if self._scratch.claim(end):
            array = self._scratch.array(shape, dtype, use.end)
            use.end = end
        else:
            array = np.empty(shape, dtype)
        use.arrays.append(array)
        use.borrowed.append(slot.spec.name)
        return array, value_of(array, slot.spec.datatype)


def _array_of(slot: Slot, value: Value) -> Array:
    """An output that was run into the I/O area or into memory of the run's own, as an array."""
    if slot.array is not None and slot.array.ctypes.data == value.data_ptr():
        return slot.array
    array: Array = value.numpy()
    return array


def _as_text(spec: TensorSpec, array: Array) -> Array:
    """ONNX strings are text."""
    text = np.empty(array.shape, dtype=object)
    try:
        text.ravel()[:] = [item if isinstance(item, str) else bytes(item).decode() for item in array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise ModelError(f"input {spec.name}: expected UTF-8 text, which is what ONNX strings are ({error})") from error
    return text
