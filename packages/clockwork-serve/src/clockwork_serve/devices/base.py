"""The interface of a device to its worker: blocking calls, one thread per lane; tensors of calls."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_client.tensors import DTYPES
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import Code, DeviceSpec, Infer, Load, TensorRef, TensorSpec, Unload
from clockwork_serve.units import KIB, MIB, NS_PER_MS, align

# ------------------------------------------------------------
# The cores that this process may use, and how exactly its threads sleep.


QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
"""A container's quota: microseconds of CPU time for all its processes, per period of real time."""
QUOTA_BEFORE: Final = tuple(Path("/sys/fs/cgroup/cpu") / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
"""The same of control groups, version 1; a quota of -1 is none."""
_PR_SET_TIMERSLACK: Final = 29


def cores() -> float:
    """The cores that the process may run on, or its container's quota if that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = _quota()
    return allowed if quota is None else min(allowed, quota)


def _quota() -> float | None:
    """The container's quota in cores; None if there is none, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = QUOTA.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota_us, period_us = (int(path.read_text()) for path in QUOTA_BEFORE)
        return None if quota_us <= 0 else quota_us / period_us
    return None


def sleep_precisely() -> None:
    """End this thread's sleeps on time; by default the kernel ends them up to 50 us late to save wake-ups."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


# ------------------------------------------------------------
# The interface of a device to its worker: blocking calls, each made by the thread of one lane.


BOUND_TENSORS_MAX: Final = 100_000
"""Weights bound at once, over all bindings: each takes 0.5 to 1 kB; binding it again takes 2 to 3 us."""

_Prepared = TypeVar("_Prepared")
_Bound = TypeVar("_Bound")
_Size = TypeVar("_Size")


class DeviceConfig(Struct, frozen=True, kw_only=True):
    """What to build: ``device`` is its name (``cpu:0``), ``kind`` one of ``kinds.BACKENDS``.

    ``memory_bytes`` is the weights arena, cut into pages of ``page_bytes``. ``profile`` (emulated only) is a
    file or the name of a built-in profile. ``jitter`` is the share by which emulated durations vary.
    ``memory_share`` (cuda only), if not 0, is the share of the GPU's free memory to take instead of
    ``memory_bytes``. ``pool_bytes`` (torch only) is the host memory that keeps weights files ready to be
    copied (0: each LOAD reads the file). ``graphs`` (cuda only) bounds the CUDA graphs kept (0: none).
    ``warm_up_ns`` bounds the time that ``prepare`` spends on running batch sizes beyond the first.
    ``apart`` (emulated only) gives it a worker process of its own, as every real device has.
    """

    device: str
    kind: str = "cpu"
    memory_bytes: int = 1024 * MIB
    page_bytes: int = 256 * KIB
    workspace_bytes: int = 1024 * MIB
    io_bytes: int = 256 * MIB
    threads: int = 1
    profile: str = ""
    jitter: float = 0.0
    seed: int = 0
    warm_up_ns: int = 100 * NS_PER_MS
    memory_share: float = 0.0
    pool_bytes: int = 0
    graphs: int = 256
    apart: bool = False

    @property
    def lanes_share(self) -> bool:
        """Whether LOADs slow INFERs down, as the CPU does both and has no core left for LOADs."""
        return cores() < self.threads + 1

    def spec(self, kind: str, pages: int, **more: Any) -> DeviceSpec:
        """What the device tells of itself."""
        return DeviceSpec(
            device=self.device, kind=kind, pages=pages, page_bytes=self.page_bytes,
            workspace_bytes=self.workspace_bytes, io_bytes=self.io_bytes, **more,
        )  # fmt: skip


@dataclass(slots=True)
class CallBuffers:
    """One call's tensors.

    ``inputs`` maps names to arrays of the request's full shape (BYTES: object arrays of ``bytes``).
    ``output`` is the room for outputs, writable; ``outputs`` is filled by ``infer`` with references whose
    offsets count from the start of ``output``, each aligned to ``units.TENSOR_ALIGN``.
    """

    inputs: Mapping[str, npt.NDArray[Any]]
    output: memoryview
    outputs: list[TensorRef] = field(default_factory=list)

    def grow(self, nbytes: int) -> None:
        """Replace ``output`` by at least ``nbytes``. :class:`~clockwork_serve.errors.ModelError` without."""
        self.output = memoryview(bytearray(nbytes))


@dataclass(slots=True)
class Phases:
    """How the lane time of an INFER was spent, in ns."""

    input_ns: int
    run_ns: int
    output_ns: int


class PreparedCodes(dict[str, _Prepared]):
    """What a device prepared of each code, by its id; a DeviceError for a code that it did not prepare."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __missing__(self, code_id: str) -> _Prepared:
        raise DeviceError(f"code {code_id}: not prepared on {self._device}")


class Bindings(Generic[_Bound]):
    """What is bound to weights, by (code, first page), the least recently used dropped first. Thread-safe."""

    def __init__(self) -> None:
        self._tensors = 0  # the weights in all bindings held
        self._bound_by_place: OrderedDict[tuple[str, int], tuple[_Bound, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, code_id: str, page: int) -> _Bound | None:
        """What is bound for a code at a page, if present."""
        with self._lock:
            found = self._bound_by_place.get((code_id, page))
            if found is None:
                return None
            self._bound_by_place.move_to_end((code_id, page))
            return found[0]

    def put(self, code_id: str, page: int, bound: _Bound, tensors: int) -> None:
        """Add a binding of that many tensors."""
        with self._lock:
            self._forget((code_id, page))
            self._bound_by_place[code_id, page] = bound, tensors
            self._tensors += tensors
            while self._tensors > BOUND_TENSORS_MAX and len(self._bound_by_place) > 1:
                self._forget(next(iter(self._bound_by_place)))

    def retire(self, code_id: str) -> None:
        """Delete every binding of a code."""
        with self._lock:
            for place in [place for place in self._bound_by_place if place[0] == code_id]:
                self._forget(place)

    def __len__(self) -> int:
        return len(self._bound_by_place)

    def _forget(self, place: tuple[str, int]) -> None:
        _, tensors = self._bound_by_place.pop(place, (None, 0))
        self._tensors -= tensors


def check_blob(load: Load, blob_bytes: int) -> None:
    """DeviceError unless the weights of a LOAD are as long as its code's index says."""
    if load.weights.size != blob_bytes:
        raise DeviceError(
            f"weights {load.weights.weights_id}: expected {blob_bytes} bytes for code {load.code_id}, found"
            f" {load.weights.size}; compile the model again"
        )


def within(sizes: Iterable[_Size], limit_ns: int) -> Iterator[_Size]:
    """Batch sizes in order to be run, the first always, the others while time allows."""
    for size in sizes:
        began_ns = time.monotonic_ns()
        yield size
        took_ns = time.monotonic_ns() - began_ns
        limit_ns -= took_ns
        if limit_ns < 2 * took_ns:  # the next size takes about twice as long
            return


class Device(Protocol):
    """One device. ``load``, ``unload`` and ``prepare`` run on the load lane, ``infer`` on the exec lane.

    Errors: :class:`~clockwork_serve.errors.ModelError` if the model raised,
    :class:`~clockwork_serve.errors.DeviceError` for any other expected error.
    """

    spec: DeviceSpec

    def prepare(self, code: Code) -> None:
        """Make a code ready to run (session, buffers, one warm-up per batch size). Idempotent."""

    def retire(self, code_id: str) -> None:
        """Free the resources of ``prepare``; unknown codes are ignored."""

    def load(self, action: Load) -> int:
        """Copy the weights into the extent and verify them; blocks until that is done.

        Returns the share of its time (ns) that a further LOAD of the same weights will not need: their first
        verification. :class:`~clockwork_serve.errors.DamageError` if they do not match their id.
        """

    def unload(self, action: Unload) -> None:
        """Forget the weights in the extent."""

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Run one batch; returns when every call's outputs are written."""

    def close(self) -> None:
        """Free everything."""


@dataclass(slots=True, frozen=True)
class Underway:
    """An action that ends at ``end_ns`` by itself; ``output_ns`` of it went by with writing outputs."""

    end_ns: int
    output_ns: int = 0


@runtime_checkable
class TimedDevice(Device, Protocol):
    """A device whose LOADs and INFERs only take time, so that no thread has to wait for their ends.

    It reads no inputs. Errors are those of a :class:`Device`; what has begun does not fail any more.
    """

    def begin_load(self, action: Load) -> Underway:
        """Begin to copy the weights."""

    def begin_infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Underway:
        """Begin to run one batch, whose outputs are written at once."""


Array = npt.NDArray[Any]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {**DTYPES, "BYTES": np.dtype("O")}
"""OIP element types as numpy dtypes; BF16 travels as its 16 bits."""
WIRE_LENGTH: Final = np.dtype("<u4")  # what stands before each string on the wire


# ------------------------------------------------------------
# Tensors of calls: shapes, rows of a batch, and the room for outputs, which grows where it is too small.


def full_shape(code: Code, spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """The shape of ``spec`` with its batch axis, if the code has one; -1 stays where a request chooses."""
    return (rows, *spec.shape) if code.batched else spec.shape


def is_static(spec: TensorSpec) -> bool:
    """Whether a tensor's size is the same in every request."""
    return spec.datatype != "BYTES" and all(dim >= 0 for dim in spec.shape)


def nbytes_of(shape: Iterable[int], dtype: np.dtype[np.generic]) -> int:
    """Bytes of an array."""
    size = dtype.itemsize
    for dim in shape:
        size *= dim
    return size


def io_bytes(code: Code, batch: int) -> int:
    """Bytes of inputs and outputs of one INFER at that batch size, static tensors only."""
    rows = batch if code.batched else 1
    return sum(
        align((spec.row_bytes or 0) * rows) for spec in (*code.inputs, *code.outputs) if is_static(spec)
    )


def rows_of(code: Code, action: Infer, calls: Sequence[CallBuffers]) -> list[int]:
    """Rows of each call; DeviceError if the action is inconsistent with itself, the code or the buffers."""
    if len(calls) != len(action.calls) or not calls:
        raise DeviceError(f"calls: expected buffers for {len(action.calls)} calls, found {len(calls)}")
    if not code.batched:
        if len(calls) != 1:
            raise DeviceError(
                f"calls: code {code.code_id} has no batch axis, expected 1 call, found {len(calls)}"
            )
        return [1]
    if action.batch not in code.batch_sizes:
        raise DeviceError(
            f"batch: expected one of {code.batch_sizes} of code {code.code_id}, found {action.batch}"
        )
    rows = [call.rows for call in action.calls]
    if min(rows) < 1 or sum(rows) > action.batch:
        raise DeviceError(f"rows: expected at most {action.batch} in all and 1 each, found {rows}")
    return rows


def check_input(code: Code, spec: TensorSpec, array: Array | None, rows: int) -> None:
    """DeviceError unless an input is what the code declares."""
    if array is None:
        raise DeviceError(f"input {spec.name}: expected by code {code.code_id}, missing in the call")
    expected = full_shape(code, spec, rows)
    if array.dtype != NUMPY_DTYPES[spec.datatype]:
        raise DeviceError(f"input {spec.name}: expected {spec.datatype}, found an array of {array.dtype}")
    if not fits(expected, array.shape):
        raise DeviceError(f"input {spec.name}: expected shape {expected}, found {array.shape}")


def fits(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether a shape is the expected one, -1 standing for anything."""
    return len(expected) == len(found) and all(a in (-1, b) for a, b in zip(expected, found, strict=True))


def gather(code: Code, spec: TensorSpec, calls: Sequence[CallBuffers], rows: Sequence[int]) -> list[Array]:
    """One input of every call, checked: shapes must be equal except for the rows."""
    arrays = []
    for call, count in zip(calls, rows, strict=True):
        array = call.inputs.get(spec.name)
        check_input(code, spec, array, count)
        assert array is not None
        arrays.append(array)
        if array.shape[1:] != arrays[0].shape[1:]:
            raise DeviceError(
                f"input {spec.name}: expected rows of shape {arrays[0].shape[1:]} in the whole batch,"
                f" found {array.shape[1:]}"
            )
    return arrays


def stack(arrays: Sequence[Array], target: Array) -> None:
    """Copy the rows of several calls into a batch; the last row is repeated to fill it."""
    start = 0
    for array in arrays:
        end = start + array.shape[0]
        target[start:end] = array
        start = end
    if start < target.shape[0]:
        target[start:] = target[start - 1]


def write_outputs(
    code: Code, outputs: Iterable[Array], batch: int, calls: Sequence[CallBuffers], rows: Sequence[int]
) -> None:
    """Copy whole outputs, in the code's order, into the rooms of their calls, which grow as needed.

    ModelError if one's shape is not as declared, or a room cannot grow.
    """
    arrays = list(zip(code.outputs, outputs, strict=True))
    for spec, array in arrays:
        expected = full_shape(code, spec, batch)
        if not fits(expected, array.shape):
            raise ModelError(f"output {spec.name}: expected shape {expected}, found {tuple(array.shape)}")
    start = 0
    for call, count in zip(calls, rows, strict=True):
        end = start + count
        put_outputs(call, [(spec, array[start:end] if code.batched else array) for spec, array in arrays])
        start = end


def forget_outputs(calls: Sequence[CallBuffers]) -> None:
    """Take away the references of a run that failed: what they point to is of no answer."""
    for call in calls:
        call.outputs.clear()


def lay_out(outputs: Iterable[tuple[TensorSpec, tuple[int, ...], int]]) -> tuple[list[TensorRef], int]:
    """References to outputs of these shapes and bytes, one after the other in a room; and where they end."""
    refs: list[TensorRef] = []
    end = 0
    for spec, shape, nbytes in outputs:
        offset = align(end)
        end = offset + nbytes
        refs.append(
            TensorRef(name=spec.name, datatype=spec.datatype, shape=shape, offset=offset, nbytes=nbytes)
        )
    return refs, end


def plan_outputs(code: Code, rows: int) -> tuple[list[TensorRef], int]:
    """As :func:`lay_out` before a run: open dimensions are 1, strings are empty."""
    placed = []
    for spec in code.outputs:
        shape = tuple([1 if dim < 0 else dim for dim in full_shape(code, spec, rows)])
        dtype = WIRE_LENGTH if spec.datatype == "BYTES" else NUMPY_DTYPES[spec.datatype]
        placed.append((spec, shape, nbytes_of(shape, dtype)))
    return lay_out(placed)


def put_outputs(call: CallBuffers, outputs: Iterable[tuple[TensorSpec, Array]]) -> None:
    """Copy one call's outputs into its room, BYTES in wire form; :class:`ModelError` if it cannot grow."""
    placed: list[tuple[TensorSpec, tuple[int, ...], int]] = []
    sources: list[Array | bytes] = []
    for spec, array in outputs:
        source = encode_bytes(array) if spec.datatype == "BYTES" else array
        sources.append(source)
        nbytes = len(source) if type(source) is bytes else nbytes_of(array.shape, NUMPY_DTYPES[spec.datatype])
        placed.append((spec, array.shape, nbytes))
    refs, end = lay_out(placed)
    if end > len(call.output):
        call.grow(end)
    memory = call.output
    for ref, source in zip(refs, sources, strict=True):
        if isinstance(source, bytes):
            memory[ref.offset : ref.offset + ref.nbytes] = source
        elif ref.nbytes:
            dtype = NUMPY_DTYPES[ref.datatype]
            target: Array = np.ndarray(ref.shape, dtype, buffer=memory, offset=ref.offset)
            target[...] = source
    call.outputs[:] = refs


def encode_bytes(array: Array) -> bytes:
    """Strings in wire form: of each element a 4-byte little-endian length, then its bytes (text: UTF-8)."""
    parts = []
    for element in array.ravel().tolist():
        data = element.encode() if isinstance(element, str) else bytes(element)
        parts.append(struct.pack("<I", len(data)))
        parts.append(data)
    return b"".join(parts)
