"""One (code, batch size) whose tensors all have known sizes: the path that is made short. Decides nothing.

Its inputs and outputs have a place in the device's I/O area and stay bound to it. A tensor of a request
that fills the batch alone is bound where it is instead, if it is large, and given back after the run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from clockwork_serve.devices.arena import Scratch
from clockwork_serve.devices.base import NUMPY_DTYPES, Array, CallBuffers, Phases
from clockwork_serve.devices.onnx_session import Value, value_of
from clockwork_serve.devices.onnx_weights import Bound
from clockwork_serve.devices.tensors import check_input, full_shape, is_static, nbytes_of, room_error
from clockwork_serve.messages import Code, TensorRef, TensorSpec
from clockwork_serve.units import KIB, align

COPIED_MAX: Final = 32 * KIB
"""Up to this many bytes, copying (1-2 us) is cheaper than binding a request's memory and back (3 us)."""


@dataclass(slots=True, eq=False)
class Slot:
    """One input or output and its place in the I/O area: ``array``, which the runtime knows as ``value``."""

    spec: TensorSpec
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    array: Array
    value: Value
    large: bool


@dataclass(slots=True)
class Lent:
    """Memory of a request that is bound for one run."""

    arrays: list[Array] = field(default_factory=list)
    inputs: list[Slot] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)


@dataclass(slots=True)
class Layout:
    """Where the outputs of a call with so many rows go in its room."""

    shapes: list[tuple[int, ...]]
    refs: list[TensorRef]
    nbytes: int


def fits_area(code: Code, batch: int, scratch: Scratch) -> bool:
    """Whether a code can be run this way: every size known, nothing optional, and room in the I/O area."""
    specs = (*code.inputs, *code.outputs)
    if not all(is_static(spec) and not spec.optional for spec in specs):
        return False
    return scratch.claim(sum(align((spec.row_bytes or 0) * batch) for spec in specs))


class StaticBatch:
    """How a code is run at one batch size. Used by the exec lane only, like the I/O area."""

    def __init__(self, code: Code, batch: int, scratch: Scratch) -> None:
        self._code = code
        self._batch = batch
        self._layout_by_rows: dict[int, Layout] = {}
        offset = 0
        slots = []
        for spec in (*code.inputs, *code.outputs):
            shape, dtype = full_shape(code, spec, batch), NUMPY_DTYPES[spec.datatype]
            array = scratch.array(shape, dtype, offset)
            value = value_of(array, spec.datatype)
            slots.append(Slot(spec, spec.name, shape, dtype, array, value, array.nbytes > COPIED_MAX))
            offset += align(array.nbytes)
        self._inputs, self._outputs = slots[: len(code.inputs)], slots[len(code.inputs) :]

    def run(self, bound: Bound, calls: Sequence[CallBuffers], rows: Sequence[int], started_ns: int) -> Phases:
        """Run the calls as one batch."""
        binding = bound.binding
        if bound.bound_by is not self:
            self._bind(bound)
        alone = len(calls) == 1 and rows[0] == self._batch
        layouts = [self._layout(call, count) for call, count in zip(calls, rows, strict=True)]
        lent = Lent()
        try:
            if alone:
                self._enter_alone(binding, calls[0], layouts[0], lent)
            else:
                self._enter(calls, rows)
            entered_ns = time.monotonic_ns()
            bound.session.run_with_iobinding(binding)
            ran_ns = time.monotonic_ns()
            self._leave(calls, rows, layouts, lent)
        finally:
            for slot in lent.inputs:
                binding.bind_ortvalue_input(slot.name, slot.value)
            for slot in lent.outputs:
                binding.bind_ortvalue_output(slot.name, slot.value)
        return Phases(entered_ns - started_ns, ran_ns - entered_ns, time.monotonic_ns() - ran_ns)

    def _bind(self, bound: Bound) -> None:
        """Bind every tensor to its place, after another batch size had the binding."""
        bound.bound_by = None
        for slot in self._inputs:
            bound.binding.bind_ortvalue_input(slot.name, slot.value)
        for slot in self._outputs:
            bound.binding.bind_ortvalue_output(slot.name, slot.value)
        bound.bound_by = self

    def _enter_alone(self, binding: Any, call: CallBuffers, layout: Layout, lent: Lent) -> None:
        """Bring in the inputs of a call that fills the batch: large ones stay where they are."""
        for slot in self._inputs:
            array = call.inputs.get(slot.name)
            if array is None or array.shape != slot.shape or array.dtype != slot.dtype:
                check_input(self._code, slot.spec, array, self._batch)
                assert array is not None
            if not slot.large:
                slot.array[...] = array
                continue
            if not (array.flags.c_contiguous and array.flags.aligned):
                array = np.array(array)
            lent.arrays.append(array)
            lent.inputs.append(slot)
            binding.bind_ortvalue_input(slot.name, value_of(array, slot.spec.datatype))
        for slot, ref in zip(self._outputs, layout.refs, strict=True):
            if slot.large:
                array = np.ndarray(slot.shape, slot.dtype, buffer=call.output, offset=ref.offset)
                lent.arrays.append(array)
                lent.outputs.append(slot)
                binding.bind_ortvalue_output(slot.name, value_of(array, slot.spec.datatype))

    def _enter(self, calls: Sequence[CallBuffers], rows: Sequence[int]) -> None:
        """Copy the rows of the calls into the batch; rows left over repeat the last: a valid one."""
        for slot in self._inputs:
            start = 0
            target = slot.array
            row_shape = slot.shape[1:]
            for call, count in zip(calls, rows, strict=True):
                array = call.inputs.get(slot.name)
                if array is None or array.shape != (count, *row_shape) or array.dtype != slot.dtype:
                    check_input(self._code, slot.spec, array, count)
                end = start + count
                target[start:end] = array
                start = end
            if start < self._batch:
                target[start:] = target[start - 1]

    def _leave(
        self, calls: Sequence[CallBuffers], rows: Sequence[int], layouts: Sequence[Layout], lent: Lent
    ) -> None:
        """Copy out what the run did not write in place."""
        start = 0
        for call, count, layout in zip(calls, rows, layouts, strict=True):
            end = start + count
            for slot, ref, shape in zip(self._outputs, layout.refs, layout.shapes, strict=True):
                if ref.nbytes and slot not in lent.outputs:
                    target: Array = np.ndarray(shape, slot.dtype, buffer=call.output, offset=ref.offset)
                    target[...] = slot.array[start:end] if self._code.batched else slot.array
            call.outputs[:] = layout.refs
            start = end

    def _layout(self, call: CallBuffers, rows: int) -> Layout:
        layout = self._layout_by_rows.get(rows)
        if layout is None:
            layout = self._layout_by_rows[rows] = _lay_out(self._code, rows)
        if layout.nbytes > len(call.output) or call.output.readonly:
            raise room_error(call.output, layout.refs[-1], layout.nbytes)
        return layout


def _lay_out(code: Code, rows: int) -> Layout:
    layout = Layout([], [], 0)
    for spec in code.outputs:
        shape = full_shape(code, spec, rows)
        nbytes = nbytes_of(shape, NUMPY_DTYPES[spec.datatype])
        offset = align(layout.nbytes)
        layout.shapes.append(shape)
        layout.refs.append(
            TensorRef(name=spec.name, datatype=spec.datatype, shape=shape, offset=offset, nbytes=nbytes)
        )
        layout.nbytes = offset + nbytes
    return layout
