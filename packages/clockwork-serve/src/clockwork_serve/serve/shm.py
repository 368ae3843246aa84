"""Shared memory for tensors: regions that gateways own and workers map, and the arrays in them."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import re
import stat
import struct
from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from clockwork_serve.devices.base import NUMPY_DTYPES, CallBuffers
from clockwork_serve.errors import DeviceError, ModelError, TransportError
from clockwork_serve.messages import Call, Infer, TensorRef, Tensors
from clockwork_serve.units import KIB, MIB, TENSOR_ALIGN, align, scratch_for

# ------------------------------------------------------------
# A region of shared memory: a gateway owns it and allocates from it, workers map it.
#
# A region is a memfd whose size is sealed, so that access to a mapping of it can never fault. It is named
# ``PID:FD:BYTES``; a process of the same user maps it through ``/proc/PID/fd/FD`` and needs no connection.
# The memory exists as long as any process maps it: a worker may safely finish writing after its gateway died.


HEADER_BYTES: Final = 8
"""Size of a slot's header: its epoch, a little-endian unsigned integer, written and read in one piece."""
NO_EPOCH: Final = 0  # the epoch in the header of a free slot; no request has it

SPARE_PIECE_MAX: Final = 16 * KIB
SPARE_BYTES_MAX: Final = 4 * MIB
"""Small requests allocate and free ten thousands of pieces a second, in a few sizes. Up to these limits freed
pieces are kept as they are for the next allocation of that size, and joined only when memory runs out."""

_EPOCH: Final = struct.Struct("<Q")
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_LINK_PREFIX: Final = "/memfd:"
_NAME: Final = re.compile(r"[0-9]{1,18}:[0-9]{1,18}:[0-9]{1,18}", re.ASCII)


class RegionGone(TransportError):
    """The region's owner died or closed it, or the name does not fit what is there."""


def read_epoch(buffer: memoryview, header_offset: int) -> int:
    """The epoch in the 8 bytes at ``header_offset``."""
    epoch: int = _EPOCH.unpack_from(buffer, header_offset)[0]
    return epoch


def write_epoch(buffer: memoryview, header_offset: int, epoch: int) -> None:
    """Set the epoch in the 8 bytes at ``header_offset``."""
    _EPOCH.pack_into(buffer, header_offset, epoch)


class Region:
    """Memory that this process owns, and allocates in pieces. For one thread."""

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self.size = len(mapping)
        self.name = f"{os.getpid()}:{fd}:{self.size}"
        self.buffer = memoryview(mapping)
        self._fd = fd
        self._mapping = mapping
        self._sizes: dict[int, int] = {}  # all and only the allocated pieces: offset -> bytes
        self._free = _FreeList(self.size)
        self._spare: dict[int, list[int]] = {}  # free pieces by size, kept for the next of that size
        self._spare_bytes = 0

    @classmethod
    def create(cls, size: int) -> Region:
        """A region of at least ``size`` bytes (whole pages), all zero. OSError without memory."""
        assert size > 0, f"a region of {size} bytes"
        size = align(size, mmap.PAGESIZE)
        fd = os.memfd_create("clockwork-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            return cls(fd, mmap.mmap(fd, size))
        except BaseException:
            os.close(fd)
            raise

    @property
    def free_bytes(self) -> int:
        """Bytes not allocated (perhaps not in one piece)."""
        return self._free.total + self._spare_bytes

    def allocate(self, nbytes: int) -> int | None:
        """Allocate ``nbytes``, not cleared; returns the offset, a multiple of 64, or None without room."""
        assert nbytes >= 0, f"cannot allocate {nbytes} bytes"
        size = -(-nbytes // TENSOR_ALIGN) * TENSOR_ALIGN or TENSOR_ALIGN
        if spare := self._spare.get(size):
            found = spare.pop()
            self._spare_bytes -= size
            self._sizes[found] = size
            return found
        offset = self._free.allocate(size)
        if offset is None and self._spare_bytes:
            self._join_spare()
            offset = self._free.allocate(size)
        if offset is not None:
            self._sizes[offset] = size
        return offset

    def free(self, offset: int) -> None:
        """Free a piece by the offset that ``allocate`` returned; exactly once."""
        size = self._sizes.pop(offset, None)
        assert size is not None, f"offset {offset} is not allocated: freed twice, or never allocated"
        if size <= SPARE_PIECE_MAX and self._spare_bytes < SPARE_BYTES_MAX:
            self._spare.setdefault(size, []).append(offset)
            self._spare_bytes += size
        else:
            self._free.release(offset, size)

    def _join_spare(self) -> None:
        for size, offsets in self._spare.items():
            for offset in offsets:
                self._free.release(offset, size)
        self._spare.clear()
        self._spare_bytes = 0

    def close(self) -> None:
        """Close the region: workers cannot map it any more. Remaining views of ``buffer`` keep the memory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.buffer.release()
            with suppress(BufferError):  # A view remains; the memory is freed with it.
                self._mapping.close()

    def check(self) -> None:
        """Assert that free and allocated pieces together cover the region without gap or overlap."""
        spare = [(offset, size) for size, offsets in self._spare.items() for offset in offsets]
        assert sum(size for _, size in spare) == self._spare_bytes
        pieces = sorted([*self._sizes.items(), *self._free.pieces(), *spare])
        end = 0
        for offset, size in pieces:
            assert offset == end and size > 0, f"piece at {offset}, expected at {end}"
            end = offset + size
        assert end == self.size
        self._free.check()


class _FreeList:
    """Free pieces by size. Best fit, at the lowest offset, so that the same memory is reused, and cached."""

    def __init__(self, size: int) -> None:
        self.total = size
        # All and only the free pieces, as (bytes, offset), sorted.
        self._by_size: list[tuple[int, int]] = [(size, 0)]
        self._size_at: dict[int, int] = {0: size}  # the same, by start
        self._start_at: dict[int, int] = {size: 0}  # the same, by end

    def allocate(self, size: int) -> int | None:
        at = bisect_left(self._by_size, (size, 0))
        if at == len(self._by_size):
            return None
        found, offset = self._by_size[at]
        self._remove(offset, found)
        if found > size:
            self._add(offset + size, found - size)
        return offset

    def release(self, offset: int, size: int) -> None:
        before = self._start_at.get(offset)
        if before is not None:
            self._remove(before, offset - before)
            offset, size = before, size + offset - before
        after = self._size_at.get(offset + size)
        if after is not None:
            self._remove(offset + size, after)
            size += after
        self._add(offset, size)

    def pieces(self) -> list[tuple[int, int]]:
        return list(self._size_at.items())

    def check(self) -> None:
        assert self._by_size == sorted((size, offset) for offset, size in self._size_at.items())
        assert self._start_at == {offset + size: offset for offset, size in self._size_at.items()}
        assert self.total == sum(self._size_at.values())
        assert not self._start_at.keys() & self._size_at.keys(), "neighbours are not joined"

    def _add(self, offset: int, size: int) -> None:
        insort(self._by_size, (size, offset))
        self._size_at[offset] = size
        self._start_at[offset + size] = offset
        self.total += size

    def _remove(self, offset: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        del self._size_at[offset]
        del self._start_at[offset + size]
        self.total -= size


@dataclass(slots=True, frozen=True)
class _Mapped:
    """A mapping, with ``st_dev`` and ``st_ino`` of the memfd that it maps."""

    dev: int
    ino: int
    view: memoryview


class RegionMap:
    """Regions of other processes, mapped when first used. For one thread."""

    def __init__(self) -> None:
        self._mapped: dict[str, _Mapped] = {}

    def view(self, name: str) -> memoryview:
        """All bytes of the region, writable. Raises :class:`RegionGone`.

        A region that is mapped already costs one ``stat``: it shows whether the owner still lives, and that
        the name does not mean another region by now.
        """
        path, size = _parse(name)
        known = self._mapped.get(name)
        try:
            there = os.stat(path)
        except OSError as error:
            self.forget(name)
            raise RegionGone(
                f"region {name} is gone: {error.strerror}; its owner died or closed it"
            ) from None
        if known is not None and known.ino == there.st_ino and known.dev == there.st_dev:
            return known.view
        self.prune()
        mapped = self._mapped[name] = _map(name, path, size, there)
        return mapped.view

    def forget(self, name: str) -> None:
        """Drop the mapping; the memory is freed once no view of it is left."""
        self._mapped.pop(name, None)

    def prune(self) -> None:
        """Drop the mappings of regions that were closed, or whose owner has died."""
        for name, mapped in list(self._mapped.items()):
            if _identity(name) != (mapped.dev, mapped.ino):
                self.forget(name)

    def __len__(self) -> int:
        return len(self._mapped)


def _parse(name: str) -> tuple[str, int]:
    if not _NAME.fullmatch(name):
        raise RegionGone(f"region name {name[:80]!r}: expected PID:FD:BYTES in decimal digits")
    parts = name.split(":")
    return f"/proc/{parts[0]}/fd/{parts[1]}", int(parts[2])


def _identity(name: str) -> tuple[int, int] | None:
    """``st_dev`` and ``st_ino`` of what a region's name means now; None if that is nothing."""
    try:
        there = os.stat(_parse(name)[0])
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _map(name: str, path: str, size: int, there: os.stat_result) -> _Mapped:
    # Checked before it is opened: opening a pipe or a device of that number could block, or do more.
    if not stat.S_ISREG(there.st_mode) or there.st_uid != os.geteuid() or there.st_size != size:
        mode = stat.filemode(there.st_mode)
        raise RegionGone(
            f"region {name}: found {mode}, {there.st_size} bytes, user {there.st_uid}; "
            f"expected a file of {size} bytes, user {os.geteuid()}"
        )
    try:
        target = os.readlink(path)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RegionGone(f"region {name} cannot be opened: {error.strerror}") from None
    try:
        opened = os.fstat(fd)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not target.startswith(_LINK_PREFIX) or seals & _SEALS != _SEALS or opened.st_size != size:
            raise RegionGone(
                f"region {name}: found {target!r} of {opened.st_size} bytes with seals {seals:#x}, "
                f"expected a memfd of {size} bytes that can neither shrink nor grow"
            )
        return _Mapped(opened.st_dev, opened.st_ino, memoryview(mmap.mmap(fd, size)))
    except OSError as error:
        raise RegionGone(f"region {name} cannot be mapped: {error.strerror}") from None
    finally:
        os.close(fd)


# ------------------------------------------------------------
# Outputs that are larger than the room in their request's slot: how large they are is known only after the
# run, and the worker cannot allocate in the gateway's region.
#
# They are in a region of the worker, which the gateway maps to read them. It is freed once the slot is: its
# header tells, so no message is needed for that.


@dataclass(slots=True, frozen=True)
class _Spilled:
    """Outputs in ``region``, of the request whose slot's header is in ``memory`` of the gateway ``owner``."""

    region: Region
    memory: memoryview
    epoch: int
    owner: tuple[int, int] | None


class SpilledOutputs:
    """Outputs in memory of this process, ``limit`` bytes at most. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = Lock()
        self._held: dict[tuple[str, int], _Spilled] = {}  # by region and header of the slot
        self.used_bytes = 0

    def take(self, tensors: Tensors, memory: memoryview, nbytes: int) -> Region:
        """Memory for the outputs of a request whose slot is in ``memory``. Raises :class:`ModelError`."""
        place, owner = (tensors.region, tensors.header_offset), _identity(tensors.region)
        with self._lock:
            self._free(place)  # of an earlier run of the request
            self._free_unused()
            left = self._limit - self.used_bytes
            if nbytes > left:
                enough = scratch_for(self.used_bytes + nbytes)
                raise ModelError(
                    f"outputs: expected at most {left} bytes, as are left of {self._limit}; found {nbytes}; "
                    f"ask for less at once, or set scratch_memory to at least {enough}"
                )
            try:
                region = Region.create(nbytes)
            except OSError as error:
                raise ModelError(f"outputs: no memory for {nbytes} bytes: {error.strerror}") from None
            self._held[place] = _Spilled(region, memory, tensors.epoch, owner)
            self.used_bytes += region.size
        return region

    def free_unused(self) -> bool:
        """Free what gateways have read, or never will; returns whether something is left."""
        if self._held:
            with self._lock:
                self._free_unused()
        return bool(self._held)

    def close(self) -> None:
        """Free everything."""
        with self._lock:
            for place in list(self._held):
                self._free(place)

    def _free_unused(self) -> None:
        for place, spilled in list(self._held.items()):
            reused = read_epoch(spilled.memory, place[1]) != spilled.epoch
            if reused or spilled.owner is None or _identity(place[0]) != spilled.owner:
                self._free(place)

    def _free(self, place: tuple[str, int]) -> None:
        spilled = self._held.pop(place, None)
        if spilled is not None:
            self.used_bytes -= spilled.region.size
            spilled.region.close()


def memory_of(outputs: Tensors, own: Region) -> memoryview:
    """The memory that a result's references count from: the slot's region ``own``, or their worker's.

    Raises :class:`RegionGone` if the worker died.
    """
    return own.buffer if outputs.region == own.name else RegionMap().view(outputs.region)


# ------------------------------------------------------------
# The tensors of an INFER's calls: references into shared memory become arrays without a copy, and outputs
# become references.
#
# References are not trusted: every byte that they name must lie inside the region, and every slot is checked
# to belong to the request still.


_LENGTH: Final = struct.Struct("<I")
_AXES_MAX: Final = 32
_encoder: Final = msgspec.msgpack.Encoder()


class BadTensors(TransportError):
    """References that contradict themselves or their region; the message names the request and the tensor."""


@dataclass(slots=True, kw_only=True)
class OpenCall(CallBuffers):
    """The mapped tensors of one call. ``memory`` is the whole region; ``spill`` is for what outgrows it."""

    request_id: str
    tensors: Tensors
    memory: memoryview
    spill: SpilledOutputs
    spilled: Region | None = None

    def grow(self, nbytes: int) -> None:
        """Have outputs written to memory of this process, instead of their slot. Raises ModelError."""
        self.spilled = self.spill.take(self.tensors, self.memory, nbytes)
        self.output = self.spilled.buffer[:nbytes]


class Calls:
    """Opens the calls of INFERs, whose outputs may ``spill``. For one thread.

    Without ``inputs`` those are left alone, for devices that do not read them.
    """

    def __init__(self, regions: RegionMap, spill: SpilledOutputs, *, inputs: bool = True) -> None:
        self._regions = regions
        self._reads_inputs = inputs
        self._spill = spill
        self._decoder = msgspec.msgpack.Decoder(Tensors)

    def open(self, action: Infer, memories: dict[str, memoryview] | None = None) -> list[OpenCall]:
        """Map the tensors of all calls. Raises :class:`RegionGone` or :class:`BadTensors`.

        ``memories`` are the regions that were found to be there at this instant, one system call for each.
        """
        self._spill.free_unused()
        found: dict[str, memoryview] = {} if memories is None else memories
        return [self._open(call, found) for call in action.calls]

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
        if _EPOCH.unpack_from(memory, tensors.header_offset)[0] != tensors.epoch:
            raise _withdrawn(call.request_id, tensors, memory)
        first, room = tensors.output_offset, tensors.output_bytes
        if first < 0 or room < 0 or first + room > end:
            raise _outside(call.request_id, "output", first, room, end)
        return OpenCall(
            inputs=_inputs(call.request_id, tensors.refs, memory) if self._reads_inputs else {},
            output=memory[first : first + room], request_id=call.request_id, tensors=tensors, memory=memory,
            spill=self._spill,
        )  # fmt: skip


def _inputs(request_id: str, refs: tuple[TensorRef, ...], memory: memoryview) -> dict[str, npt.NDArray[Any]]:
    inputs = {ref.name: _array(request_id, ref, memory.toreadonly()) for ref in refs}
    if len(inputs) != len(refs):
        raise BadTensors(f"request {request_id}: inputs: expected each name once, found one twice")
    return inputs


def check_epochs(calls: Sequence[OpenCall]) -> None:
    """Raise :class:`RegionGone` if a slot was reused for another request."""
    for call in calls:
        tensors = call.tensors
        if _EPOCH.unpack_from(call.memory, tensors.header_offset)[0] != tensors.epoch:
            raise _withdrawn(call.request_id, tensors, call.memory)


def encode_outputs(calls: Sequence[OpenCall]) -> tuple[bytes, ...]:
    """One encoded :class:`Tensors` per call, with offsets from the region's start.

    Raises :class:`DeviceError` if an output is out of bounds.
    """
    encode = _encoder.encode
    return tuple([encode(_outputs(call)) for call in calls])


def _outputs(call: OpenCall) -> Tensors:
    tensors, room = call.tensors, len(call.output)
    region, start = tensors.region, tensors.output_offset
    if call.spilled is not None:
        region, start = call.spilled.name, 0
    refs = []
    for ref in call.outputs:
        if ref.offset < 0 or ref.nbytes < 0 or ref.offset + ref.nbytes > room:
            raise DeviceError(
                f"output {ref.name}: the device wrote {ref.nbytes} bytes at {ref.offset}, room is {room}"
            )
        refs.append(
            TensorRef(
                name=ref.name, datatype=ref.datatype, shape=ref.shape,
                offset=start + ref.offset, nbytes=ref.nbytes,
            )
        )  # fmt: skip
    return Tensors(
        region=region, epoch=tensors.epoch, header_offset=tensors.header_offset, refs=tuple(refs),
        output_offset=start, output_bytes=room,
    )  # fmt: skip


def _withdrawn(request_id: str, tensors: Tensors, memory: memoryview) -> RegionGone:
    found = read_epoch(memory, tensors.header_offset)
    return RegionGone(
        f"request {request_id}: its tensors were withdrawn: the slot at {tensors.header_offset} of "
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
