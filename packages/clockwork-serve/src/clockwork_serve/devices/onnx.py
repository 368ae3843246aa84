"""The ``cpu`` device, and its ONNX models: weights are copied into arena pages and bound in place.

Codes whose tensors all have known sizes use a fast path; each batch size is warmed up before it is needed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve.devices.arena import Arena, Scratch, used_bytes
from clockwork_serve.devices.base import (
    NUMPY_DTYPES,
    Array,
    Bindings,
    CallBuffers,
    DeviceConfig,
    Phases,
    PreparedCodes,
    check_blob,
    check_input,
    forget_outputs,
    full_shape,
    is_static,
    plan_outputs,
    rows_of,
    within,
)
from clockwork_serve.devices.files import Blobs, has_file, read_file
from clockwork_serve.devices.onnx_session import (
    BoundWeights,
    OpenBatch,
    Session,
    TextBatch,
    Value,
    bind,
    one_line,
    open_session,
    read_index,
    trim,
    value_of,
)
from clockwork_serve.devices.python import PythonBackend
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import (
    Code,
    Infer,
    Load,
    Model,
    OnnxIndex,
    TensorRef,
    TensorSpec,
    Unload,
    Weights,
)
from clockwork_serve.units import KIB, align

# ------------------------------------------------------------
# One (code, batch size) whose tensors all have known sizes: the fast path.
#
# Its inputs and outputs have a place in the device's I/O area and stay bound to it. If one request fills the
# batch, its large tensors are bound in place instead, and unbound after the run.


COPIED_MAX: Final = 32 * KIB
"""Up to this many bytes, copying (1-2 us) is cheaper than binding a request's memory and back (3 us)."""


@dataclass(slots=True, eq=False)
class OnnxSlot:
    """One input or output and its place in the I/O area: ``array``, which the runtime knows as ``value``."""

    spec: TensorSpec
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    array: Array
    value: Value
    large: bool


@dataclass(slots=True)
class BorrowedMemory:
    """Memory of a request that is bound for one run."""

    arrays: list[Array] = field(default_factory=list)
    inputs: list[OnnxSlot] = field(default_factory=list)
    outputs: list[OnnxSlot] = field(default_factory=list)


def fits_area(code: Code, batch: int, scratch: Scratch) -> bool:
    """Whether a code can use the fast path: every size known, nothing optional, and room in the I/O area."""
    specs = (*code.inputs, *code.outputs)
    # ONNX Runtime leaves the memory of an output that is an input as it is: with another request's answer.
    if {spec.name for spec in code.inputs} & {spec.name for spec in code.outputs}:
        return False
    if not all(is_static(spec) and not spec.optional for spec in specs):
        return False
    return scratch.claim(sum(align((spec.row_bytes or 0) * batch) for spec in specs))


class StaticBatch:
    """A code at one batch size. Used by the exec lane only, like the I/O area."""

    def __init__(self, code: Code, batch: int, scratch: Scratch) -> None:
        self._code = code
        self._batch = batch
        self._layout_by_rows: dict[int, tuple[list[TensorRef], int]] = {}
        offset = 0
        slots = []
        for spec in (*code.inputs, *code.outputs):
            shape, dtype = full_shape(code, spec, batch), NUMPY_DTYPES[spec.datatype]
            array = scratch.array(shape, dtype, offset)
            value = value_of(array, spec.datatype)
            slots.append(OnnxSlot(spec, spec.name, shape, dtype, array, value, array.nbytes > COPIED_MAX))
            offset += align(array.nbytes)
        self._inputs, self._outputs = slots[: len(code.inputs)], slots[len(code.inputs) :]

    def run(
        self, bound: BoundWeights, calls: Sequence[CallBuffers], rows: Sequence[int], started_ns: int
    ) -> Phases:
        """Run the calls as one batch."""
        binding = bound.binding
        if bound.bound_by is not self:
            self._bind(bound)
        alone = len(calls) == 1 and rows[0] == self._batch
        layouts = [self._layout(call, count) for call, count in zip(calls, rows, strict=True)]
        borrowed = BorrowedMemory()
        try:
            if alone:
                self._bind_inputs(binding, calls[0], layouts[0], borrowed)
            else:
                self._write_inputs(calls, rows)
            entered_ns = time.monotonic_ns()
            bound.session.run_with_iobinding(binding)
            ran_ns = time.monotonic_ns()
            self._copy_outputs(calls, rows, layouts, borrowed)
        finally:
            for slot in borrowed.inputs:
                binding.bind_ortvalue_input(slot.name, slot.value)
            for slot in borrowed.outputs:
                binding.bind_ortvalue_output(slot.name, slot.value)
        return Phases(entered_ns - started_ns, ran_ns - entered_ns, time.monotonic_ns() - ran_ns)

    def _bind(self, bound: BoundWeights) -> None:
        """Bind every tensor to its place, after another batch size used the binding."""
        bound.bound_by = None
        for slot in self._inputs:
            bound.binding.bind_ortvalue_input(slot.name, slot.value)
        for slot in self._outputs:
            bound.binding.bind_ortvalue_output(slot.name, slot.value)
        bound.bound_by = self

    def _bind_inputs(
        self, binding: Any, call: CallBuffers, refs: list[TensorRef], borrowed: BorrowedMemory
    ) -> None:
        """Read the inputs of a call that fills the batch; large ones are bound in place."""
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
            borrowed.arrays.append(array)
            borrowed.inputs.append(slot)
            binding.bind_ortvalue_input(slot.name, value_of(array, slot.spec.datatype))
        for slot, ref in zip(self._outputs, refs, strict=True):
            if slot.large:
                array = np.ndarray(slot.shape, slot.dtype, buffer=call.output, offset=ref.offset)
                borrowed.arrays.append(array)
                borrowed.outputs.append(slot)
                binding.bind_ortvalue_output(slot.name, value_of(array, slot.spec.datatype))

    def _write_inputs(self, calls: Sequence[CallBuffers], rows: Sequence[int]) -> None:
        """Copy the rows of the calls into the batch; the last row, a valid one, is repeated to fill it."""
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

    def _copy_outputs(
        self, calls: Sequence[CallBuffers], rows: Sequence[int], layouts: Sequence[list[TensorRef]],
        borrowed: BorrowedMemory,
    ) -> None:  # fmt: skip
        """Copy out the outputs that the run did not write in place."""
        start = 0
        for call, count, refs in zip(calls, rows, layouts, strict=True):
            end = start + count
            for slot, ref in zip(self._outputs, refs, strict=True):
                if ref.nbytes and slot not in borrowed.outputs:
                    target: Array = np.ndarray(ref.shape, slot.dtype, buffer=call.output, offset=ref.offset)
                    target[...] = slot.array[start:end] if self._code.batched else slot.array
            call.outputs[:] = refs
            start = end

    def _layout(self, call: CallBuffers, rows: int) -> list[TensorRef]:
        """Where the outputs of a call of so many rows are in its room, which is large enough afterwards."""
        layout = self._layout_by_rows.get(rows)
        if layout is None:
            layout = self._layout_by_rows[rows] = plan_outputs(self._code, rows)
        refs, end = layout
        if end > len(call.output):
            call.grow(end)
        assert not call.output.readonly, "outputs are written in place"
        return refs


# ------------------------------------------------------------
# A first run of each batch size, so that its workspace is allocated before a request needs it.


class ProbeInput(Struct, frozen=True, kw_only=True):
    """An input of one row that the graph runs on: ``low`` everywhere, for integers (``probe.json``)."""

    name: str
    shape: tuple[int, ...]
    low: int = 0


def warm_up(code: Code, bound: BoundWeights, sizes: Sequence[int], limit_ns: int) -> None:
    """Run batch sizes while time allows.

    A graph may refuse generated inputs (and weights that are all zero); real ones may still work.
    """
    names = [spec.name for spec in code.outputs]
    fills = _fills(code)
    for size in within(sizes, limit_ns):
        with contextlib.suppress(Exception):
            bound.session.run(names, {**bound.weights, **_made_up(code, size, fills)})


def _made_up(code: Code, size: int, fills: dict[str, ProbeInput]) -> dict[str, Any]:
    """Inputs by name, but optional ones: of the probed shape where the code leaves it open."""
    inputs = {}
    for spec in code.inputs:
        if spec.optional:
            continue
        fill = fills.get(spec.name)
        shape = full_shape(code, spec, size)
        if fill is not None and -1 in shape and len(fill.shape) == len(shape):
            shape = (size, *fill.shape[1:]) if code.batched else fill.shape
        shape = tuple(1 if dim < 0 else dim for dim in shape)
        if spec.datatype == "BYTES":
            inputs[spec.name] = np.full(shape, "", dtype=object)
            continue
        dtype = NUMPY_DTYPES[spec.datatype]
        value = fill.low if fill is not None and dtype.kind in "iu" and spec.datatype != "BF16" else 0
        array = np.full(shape, value, dtype)
        inputs[spec.name] = value_of(array, "BF16") if spec.datatype == "BF16" else array
    return inputs


def _fills(code: Code) -> dict[str, ProbeInput]:
    """The fills of the compilation's trial, if they were stored."""
    if not has_file(code, "probe.json"):
        return {}
    try:
        fills = msgspec.json.decode(read_file(code, "probe.json"), type=tuple[ProbeInput, ...])
    except (ValueError, RecursionError, msgspec.DecodeError):
        return {}
    return {fill.name: fill for fill in fills}


# ------------------------------------------------------------
# ONNX models on the CPU: weights are copied into arena pages and bound in place.


NO_WEIGHTS = OnnxIndex(tensors=(), blob_bytes=0)


OnnxBatch = StaticBatch | OpenBatch | TextBatch
"""A code at one batch size; its ``run`` raises ONNX Runtime's errors."""


@dataclass(slots=True)
class PreparedOnnx:
    """A prepared code. ``session`` is None if each model has a session of its own (not lifted)."""

    code: Code
    session: Session | None
    index: OnnxIndex
    batches: dict[int, OnnxBatch]


class OnnxBackend:
    """Runs codes of backend ``onnx``. Blobs are in the arena, which no other backend uses."""

    def __init__(self, config: DeviceConfig, arena: Arena) -> None:
        self._config = config
        self._arena = arena
        self.scratch = Scratch(config.io_bytes)
        self._blobs = Blobs()
        self._bindings: Bindings[BoundWeights] = Bindings()
        self._prepared = PreparedCodes[PreparedOnnx](config.device)
        # Sessions of models that are not lifted.
        self._opened_by_page: dict[int, tuple[str, BoundWeights]] = {}
        self._placeholder = value_of(np.zeros(1, np.float32), "FP32")

    def prepare(self, code: Code) -> None:
        """Open the code's session and warm it up; DeviceError if the artefact is unusable."""
        if code.code_id in self._prepared:
            return
        index, session = NO_WEIGHTS, None
        if code.lifted:
            index = read_index(code)
            graph = read_file(code, "model.onnx")
            session = open_session(Path(code.path) / "model.onnx", self._config.threads, graph)
            _check_names(code, index, session)
        sizes = code.batch_sizes if code.batched else (1,)
        batches = {size: self._batch(code, size) for size in sizes}
        if session is not None:
            # A separate buffer of zeros: the arena's pages may hold weights of other models.
            memory = np.zeros(index.blob_bytes, np.uint8)
            warm_up(code, bind(session, index, memory), sizes, self._config.warm_up_ns)
        self._prepared[code.code_id] = PreparedOnnx(code, session, index, batches)

    def retire(self, code_id: str) -> None:
        """Delete the code's session, bindings and models."""
        if self._prepared.pop(code_id, None) is None:
            return
        self._bindings.retire(code_id)
        for page in [page for page, (owner, _) in self._opened_by_page.items() if owner == code_id]:
            del self._opened_by_page[page]
        trim()

    def load(self, action: Load) -> int:
        """Read the blob into its extent, or open the session of a model that is not lifted."""
        prepared = self._prepared[action.code_id]
        page, weights = action.extent.first, action.weights
        if not prepared.code.lifted:
            return self._open_own_session(prepared, action)
        check_blob(action, prepared.index.blob_bytes)
        once_ns = self._blobs.read_into(weights, self._arena.view(action.extent, weights.size))
        if self._bindings.get(action.code_id, page) is None:
            self._bind(prepared, action.code_id, page)
        return once_ns

    def verify(self, weights: Weights) -> None:
        """Verify a weights file; thread-safe. DamageError if it does not match its id."""
        self._blobs.verify(weights)

    def _open_own_session(self, prepared: PreparedOnnx, action: Load) -> int:
        """Open the session of a model that is not lifted. It is opened by path, so it is verified twice."""
        self._arena.view(action.extent, 0)
        began_ns = time.monotonic_ns()
        self._blobs.verify(action.weights)
        once_ns = time.monotonic_ns() - began_ns
        session = open_session(Path(action.weights.path), self._config.threads)
        self._blobs.verify(action.weights)
        _check_names(prepared.code, NO_WEIGHTS, session)
        bound = bind(session, NO_WEIGHTS, np.empty(0, np.uint8))
        warm_up(prepared.code, bound, (1,), self._config.warm_up_ns)
        self._opened_by_page[action.extent.first] = (action.code_id, bound)
        return once_ns

    def unload(self, action: Unload) -> None:
        """Forget the model. Bindings stay, for the next weights in these pages."""
        if self._opened_by_page.pop(action.extent.first, None) is not None:
            trim()

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Run one batch on the weights in the action's extent."""
        started_ns = time.monotonic_ns()
        prepared = self._prepared[action.code_id]
        rows = rows_of(prepared.code, action, calls)
        batch = prepared.batches[action.batch if prepared.code.batched else 1]
        try:
            return batch.run(self._bound(prepared, action), calls, rows, started_ns)
        except DeviceError:
            forget_outputs(calls)
            raise
        except Exception as error:  # whatever ONNX Runtime raises: its classes have no common base
            forget_outputs(calls)
            raise ModelError(f"model {action.model}: {one_line(error)}") from error

    def close(self) -> None:
        """Free everything but the arena."""
        for code_id in list(self._prepared):
            self.retire(code_id)
        self._blobs.close()
        self.scratch.close()

    def _bound(self, prepared: PreparedOnnx, action: Infer) -> BoundWeights:
        """The session, with the weights in the extent bound."""
        page, code_id = action.extent.first, action.code_id
        if prepared.session is not None:
            return self._bindings.get(code_id, page) or self._bind(prepared, code_id, page)
        owner, bound = self._opened_by_page.get(page, ("", None))
        if bound is None or owner != code_id:
            raise DeviceError(f"model {action.model}: not loaded at page {page} of {self._config.device}")
        return bound

    def _batch(self, code: Code, size: int) -> OnnxBatch:
        if any(spec.datatype == "BYTES" for spec in code.inputs):
            return TextBatch(code, size)
        if fits_area(code, size, self.scratch):
            return StaticBatch(code, size, self.scratch)
        return OpenBatch(code, size, self.scratch, self._placeholder)

    def _bind(self, prepared: PreparedOnnx, code_id: str, page: int) -> BoundWeights:
        index = prepared.index
        bound = bind(prepared.session, index, self._arena.bytes_at(page, index.blob_bytes))
        self._bindings.put(code_id, page, bound, len(bound.arrays))
        return bound


def _check_names(code: Code, index: OnnxIndex, session: Session) -> None:
    """DeviceError unless code, index and graph name the same tensors."""
    given = {spec.name for spec in code.inputs} | {tensor.name for tensor in index.tensors}
    wanted = {node.name for node in session.get_inputs()}
    made = {node.name for node in session.get_outputs()}
    lacking = wanted - given
    unknown = {spec.name for spec in code.inputs if not spec.optional} - wanted
    unknown |= {tensor.name for tensor in index.tensors} - wanted
    unknown |= {spec.name for spec in code.outputs} - made
    if lacking or unknown:
        raise DeviceError(
            f"code {code.code_id}: the graph and its description differ: not described {sorted(lacking)[:5]},"
            f" not in the graph {sorted(unknown)[:5]}; compile the model again"
        )


# ------------------------------------------------------------
# The ``cpu`` device: one arena, and a backend for each kind of code that it runs.


Backend = OnnxBackend | PythonBackend


class CpuDevice:
    """Runs ``onnx`` and ``python`` codes."""

    def __init__(self, config: DeviceConfig) -> None:
        self._arena = Arena(config.memory_bytes, config.page_bytes)
        self._onnx = OnnxBackend(config, self._arena)
        self._backends: dict[str, Backend] = {
            "onnx": self._onnx,
            "python": PythonBackend(config, self._arena),
        }
        self._backend_by_code = PreparedCodes[Backend](config.device)
        self._expected: dict[str, int] = {}  # by known model, the pages that its weights take
        self._expected_pages = 0
        self.spec = config.spec(
            "cpu", self._arena.pages, backends=tuple(self._backends), lanes_share=config.lanes_share
        )

    def prepare(self, code: Code) -> None:
        """Prepare the code with its backend; DeviceError if there is none for it here."""
        backend = self._backends.get(code.backend)
        if backend is None:
            raise DeviceError(
                f"code {code.code_id}: backend: expected one of {sorted(self._backends)} on"
                f" {self.spec.device}, found {code.backend!r}; serve it on a device of that kind"
            )
        backend.prepare(code)
        self._backend_by_code[code.code_id] = backend

    def retire(self, code_id: str) -> None:
        """Free the resources of ``prepare``."""
        backend = self._backend_by_code.pop(code_id, None)
        if backend is not None:
            backend.retire(code_id)

    def load(self, action: Load) -> int:
        """Load with the code's backend."""
        return self._backend_by_code[action.code_id].load(action)

    def expect(self, model: Model) -> None:
        """A model may be loaded: touch as much memory as all that are known take together, and no more."""
        pages = self.spec.pages_of(model.weights.size)
        self._expected_pages += pages - self._expected.get(model.key, 0)
        self._expected[model.key] = pages
        self._arena.touch(self._expected_pages * self.spec.page_bytes)

    def used_bytes(self) -> int:
        """Memory in use beside arena and I/O area: the workspace of batches, and sessions."""
        return used_bytes(self._arena, self._onnx.scratch)

    def verify(self, weights: Weights) -> None:
        """Verify a weights file before it is needed; thread-safe."""
        self._onnx.verify(weights)

    def unload(self, action: Unload) -> None:
        """Release the extent in every backend: the action does not name its code."""
        for backend in self._backends.values():
            backend.unload(action)

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Run with the code's backend."""
        return self._backend_by_code[action.code_id].infer(action, calls)

    def close(self) -> None:
        """Free everything."""
        for backend in self._backends.values():
            backend.close()
        self._backend_by_code.clear()
        self._arena.close()
