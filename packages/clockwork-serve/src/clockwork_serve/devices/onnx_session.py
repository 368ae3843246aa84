"""ONNX Runtime for devices: sessions, tensors of variable size, and bound weights."""

from __future__ import annotations

import ctypes
import functools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnxruntime as ort

from clockwork_serve.devices.arena import Bytes, Scratch
from clockwork_serve.devices.base import (
    NUMPY_DTYPES,
    Array,
    CallBuffers,
    Phases,
    check_input,
    gather,
    nbytes_of,
    stack,
    write_outputs,
)
from clockwork_serve.devices.files import read_record
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import Code, OnnxIndex, OnnxTensor, TensorSpec
from clockwork_serve.units import align

# ------------------------------------------------------------
# Sessions: one shared allocator, one thread, no spinning, plain error texts.


BFLOAT16: Final = 16  # ONNX's number for the element type that numpy lacks

_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_NODE = re.compile(r"while running (\w+) node\. Name:'([^']*)'")
_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ [^\[]*?\) ")

Session = Any
Value = Any


@functools.cache
def share_allocator() -> None:
    """Register the process-wide arena from which all sessions allocate workspace; before any session exists.

    One arena for six codes needs a third of the memory of an arena each, at the same speed.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


def open_session(path: Path, threads: int, graph: bytes | None = None) -> Session:
    """A session on a model file whose graph is already optimised; DeviceError, in one line, if it fails.

    ``graph`` is the content of the file, if it was already read.
    """
    share_allocator()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # we report errors, once
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Weights that are not lifted must be freed on UNLOAD, which the shared arena would not do.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    try:
        source = str(path) if graph is None else graph
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DeviceError(
            f"model {path}: cannot be opened: {one_line(error)}; compile the model again"
        ) from error


def one_line(error: Exception) -> str:
    """ONNX Runtime's error message without its own file names and codes."""
    text = " ".join(str(error).split())
    node = _NODE.search(text)
    text = text.rpartition("Status Message: ")[2]
    pieces = _PREFIX.split(text)
    text = _SOURCE.sub("", pieces[-1]).strip()
    return f"{node[1]} node {node[2]!r}: {text}" if node else text


def value_of(array: Any, datatype: str) -> Value:
    """An OrtValue on the memory of a contiguous array; the caller keeps the array alive while it is used."""
    if datatype == "BF16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Return the memory of deleted sessions to the system, which the C library otherwise keeps."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


# ------------------------------------------------------------
# Weights of lifted codes, bound to device memory.


_indices: Final = msgspec.json.Decoder(OnnxIndex)  # built before there are threads


def read_index(code: Code) -> OnnxIndex:
    """The code's ``index.json``; DeviceError if it is missing or inconsistent."""
    index = read_record(code, "index.json", _indices)
    for tensor in index.tensors:
        fault = _fault(tensor, index.blob_bytes)
        if fault:
            raise DeviceError(f"code {code.path}/index.json: {tensor.name}: {fault}; compile the model again")
    return index


def _fault(tensor: OnnxTensor, blob_bytes: int) -> str:
    """What is wrong with one entry; empty if nothing is."""
    if tensor.dtype != "float32":
        return f"dtype: expected float32, which alone is lifted, found {tensor.dtype!r}"
    if tensor.offset < 0 or tensor.offset + tensor.nbytes > blob_bytes:
        return f"expected to end by {blob_bytes}, found {tensor.offset + tensor.nbytes}"
    needed = nbytes_of(tensor.shape, np.dtype(np.float32))
    return (
        ""
        if needed == tensor.nbytes
        else f"expected {needed} bytes for {tensor.shape}, found {tensor.nbytes}"
    )


@dataclass(slots=True)
class BoundWeights:
    """A session with one set of weights bound. ``bound_by`` is what bound inputs and outputs, kept alive."""

    session: Session
    binding: Any
    weights: dict[str, Value]
    arrays: list[Array]  # the memory of the values
    bound_by: object = None

    def rebound(self) -> BoundWeights:
        """The same weights in a new binding, with no input bound."""
        binding = self.session.io_binding()
        for name, value in self.weights.items():
            binding.bind_ortvalue_input(name, value)
        return BoundWeights(self.session, binding, self.weights, self.arrays)


def bind(session: Session, index: OnnxIndex, memory: Bytes) -> BoundWeights:
    """Bind every weight of the index to its place in ``memory`` (``blob_bytes`` long); nothing is copied."""
    bound = BoundWeights(session, session.io_binding(), {}, [])
    for tensor in index.tensors:
        array = memory[tensor.offset : tensor.offset + tensor.nbytes].view(np.float32).reshape(tensor.shape)
        value = value_of(array, "FP32")
        bound.binding.bind_ortvalue_input(tensor.name, value)
        bound.weights[tensor.name] = value
        bound.arrays.append(array)
    return bound


# ------------------------------------------------------------
# One (code, batch size) with tensors of variable size, or optional ones.
#
# Everything is bound for each run and unbound after it, as a request's memory may be unmapped then.


class OpenBatch:
    """A code at one batch size. Used by the exec lane only, like the I/O area."""

    def __init__(self, code: Code, batch: int, scratch: Scratch, placeholder: Value) -> None:
        self._code = code
        self._batch = batch
        self._scratch = scratch
        self._placeholder = placeholder

    def run(
        self, bound: BoundWeights, calls: Sequence[CallBuffers], rows: Sequence[int], started_ns: int
    ) -> Phases:
        """Run the calls as one batch."""
        specs = _inputs_given(self._code, calls)
        if len(specs) < len(self._code.inputs):
            bound = bound.rebound()  # unbind the inputs of an earlier call
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
            write_outputs(self._code, outputs, self._batch, calls, rows)
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
    """A code with BYTES inputs, which the runtime cannot bind and copies."""

    def __init__(self, code: Code, batch: int) -> None:
        self._code = code
        self._batch = batch
        self._names = [spec.name for spec in code.outputs]

    def run(
        self, bound: BoundWeights, calls: Sequence[CallBuffers], rows: Sequence[int], started_ns: int
    ) -> Phases:
        """Run the calls as one batch."""
        feed: dict[str, Any] = dict(bound.weights)
        for spec in _inputs_given(self._code, calls):
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
        write_outputs(self._code, outputs, self._batch, calls, rows)
        return Phases(entered_ns - started_ns, ran_ns - entered_ns, time.monotonic_ns() - ran_ns)


def _inputs_given(code: Code, calls: Sequence[CallBuffers]) -> list[TensorSpec]:
    """The inputs of the first call; every call must have the same."""
    specs = [spec for spec in code.inputs if not spec.optional or spec.name in calls[0].inputs]
    for spec in specs:
        if spec.name not in calls[0].inputs:
            check_input(code, spec, None, 1)
    return specs


def _array_of(spec: TensorSpec, value: Value) -> Array:
    """An output that the run allocated, without a copy; valid as long as the value exists."""
    if spec.datatype != "BF16":
        array: Array = value.numpy()
        return array
    shape, dtype = value.shape(), NUMPY_DTYPES["BF16"]
    memory = (ctypes.c_uint8 * nbytes_of(shape, dtype)).from_address(value.data_ptr())
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)


def _as_text(spec: TensorSpec, array: Array) -> Array:
    """Strings as text, as ONNX requires."""
    text = np.empty(array.size, dtype=object)
    try:
        for place, item in enumerate(array.ravel().tolist()):
            text[place] = item if isinstance(item, str) else bytes(item).decode()
    except UnicodeDecodeError as error:
        raise ModelError(
            f"input {spec.name}: expected UTF-8 text, as ONNX strings are; found {error.object[:80]!r}"
        ) from error
    return text.reshape(array.shape)
