"""The tensors of an INFER's calls: references into shared memory, made arrays and back. It copies none.

What a reference says is not believed: every byte it names must lie inside the region, and every region is
checked to be the gateway's still.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from clockwork_serve.devices.base import NUMPY_DTYPES, CallBuffers
from clockwork_serve.errors import DeviceError, TransportError
from clockwork_serve.messages import Call, Infer, TensorRef, Tensors
from clockwork_serve.serve.region import HEADER_BYTES, RegionGone, RegionMap, read_epoch

_LENGTH: Final = struct.Struct("<I")
_AXES_MAX: Final = 32


class BadTensors(TransportError):
    """References that contradict themselves or their region; the message names the request and the tensor."""


@dataclass(slots=True)
class OpenCall:
    """One call's tensors, mapped. ``memory`` is the whole region."""

    request_id: str
    tensors: Tensors
    memory: memoryview
    buffers: CallBuffers


class Calls:
    """Opens calls, and describes their outputs. Opening is for one thread, the rest for any."""

    def __init__(self, regions: RegionMap) -> None:
        self._regions = regions
        self._decoder = msgspec.msgpack.Decoder(Tensors)

    def open(self, action: Infer) -> list[OpenCall]:
        """Map the tensors of all calls. Raises :class:`RegionGone` or :class:`BadTensors`."""
        memories: dict[str, memoryview] = {}  # asking a region whether it is still there costs a system call
        return [self._open(call, memories) for call in action.calls]

    def _open(self, call: Call, memories: dict[str, memoryview]) -> OpenCall:
        try:
            tensors = self._decoder.decode(call.tensors)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise BadTensors(f"request {call.request_id}: tensors can not be decoded: {error}") from None
        memory = memories.get(tensors.region)
        if memory is None:
            memory = memories[tensors.region] = self._regions.view(tensors.region)
        end = len(memory)
        if not 0 <= tensors.header_offset <= end - HEADER_BYTES:
            raise _outside(call.request_id, "header", tensors.header_offset, HEADER_BYTES, end)
        _check_epoch(call.request_id, tensors, memory)
        first, room = tensors.output_offset, tensors.output_bytes
        if first < 0 or room < 0 or first + room > end:
            raise _outside(call.request_id, "output", first, room, end)
        shared = memory.toreadonly()
        inputs = {ref.name: _array(call.request_id, ref, shared) for ref in tensors.refs}
        if len(inputs) != len(tensors.refs):
            raise BadTensors(f"request {call.request_id}: inputs: expected each name once, found one twice")
        return OpenCall(call.request_id, tensors, memory, CallBuffers(inputs, memory[first : first + room]))


def check_epochs(calls: Sequence[OpenCall]) -> None:
    """Raise :class:`RegionGone` if a slot was given to another request."""
    for call in calls:
        _check_epoch(call.request_id, call.tensors, call.memory)


def encode_outputs(calls: Sequence[OpenCall]) -> tuple[bytes, ...]:
    """One encoded :class:`Tensors` per call, its references absolute; DeviceError if one is out of bounds."""
    return tuple(msgspec.msgpack.encode(_outputs(call)) for call in calls)


def _outputs(call: OpenCall) -> Tensors:
    tensors, room = call.tensors, len(call.buffers.output)
    refs = []
    for ref in call.buffers.outputs:
        if ref.offset < 0 or ref.nbytes < 0 or ref.offset + ref.nbytes > room:
            raise DeviceError(
                f"output {ref.name}: the device wrote {ref.nbytes} bytes at {ref.offset}, room is {room}"
            )
        refs.append(
            TensorRef(
                name=ref.name, datatype=ref.datatype, shape=ref.shape,
                offset=tensors.output_offset + ref.offset, nbytes=ref.nbytes,
            )
        )  # fmt: skip
    return Tensors(
        region=tensors.region, epoch=tensors.epoch, header_offset=tensors.header_offset, refs=tuple(refs),
        output_offset=tensors.output_offset, output_bytes=tensors.output_bytes,
    )  # fmt: skip


def _check_epoch(request_id: str, tensors: Tensors, memory: memoryview) -> None:
    found = read_epoch(memory, tensors.header_offset)
    if found != tensors.epoch:
        raise RegionGone(
            f"request {request_id}: its tensors were taken back: the slot at {tensors.header_offset} of "
            f"region {tensors.region} has epoch {found}, expected {tensors.epoch}"
        )


def _array(request_id: str, ref: TensorRef, memory: memoryview) -> npt.NDArray[Any]:
    """A read-only view of one input; BYTES are copied out of it."""
    offset, nbytes, shape = ref.offset, ref.nbytes, ref.shape
    if offset < 0 or nbytes < 0 or offset + nbytes > len(memory):
        raise _outside(request_id, f"input {ref.name}", offset, nbytes, len(memory))
    dtype = NUMPY_DTYPES.get(ref.datatype)
    if dtype is None or len(shape) > _AXES_MAX or any(dim < 0 for dim in shape):
        raise BadTensors(
            f"request {request_id}: input {ref.name}: no tensor is {ref.datatype} of shape {shape}"
        )
    count = math.prod(shape)
    if ref.datatype == "BYTES":
        return _strings(request_id, ref, memory[offset : offset + nbytes], count)
    if nbytes != count * dtype.itemsize or offset % dtype.itemsize:
        raise BadTensors(
            f"request {request_id}: input {ref.name}: {ref.datatype} of shape {shape} takes "
            f"{count * dtype.itemsize} bytes at a multiple of {dtype.itemsize}, found {nbytes} at {offset}"
        )
    return np.ndarray(shape, dtype, buffer=memory, offset=offset)


def _strings(request_id: str, ref: TensorRef, memory: memoryview, count: int) -> npt.NDArray[Any]:
    """Elements in wire form: a 4-byte little-endian length each, then its bytes."""
    elements: list[bytes] = []
    at, end = 0, len(memory)
    if count * _LENGTH.size <= end:
        while len(elements) < count and at + _LENGTH.size <= end:
            start = at + _LENGTH.size
            at = start + _LENGTH.unpack_from(memory, at)[0]
            elements.append(bytes(memory[start:at]))
    if len(elements) != count or at != end:
        raise BadTensors(
            f"request {request_id}: input {ref.name}: expected {count} elements, each its length and its "
            f"bytes, found {end} bytes that are not"
        )
    array = np.empty(count, dtype=object)
    array[:] = elements
    return array.reshape(ref.shape)


def _outside(request_id: str, what: str, offset: int, nbytes: int, end: int) -> BadTensors:
    return BadTensors(f"request {request_id}: {what}: {nbytes} bytes at {offset} are outside 0..{end}")
