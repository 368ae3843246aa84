"""Weights files in host memory from which a device copies at full speed; the files are behind it.

Bounded, taken once, cut into chunks: a file takes any of them, and the least recently loaded files make room.
A file that is not in it is read (from the system's page cache, if it is there) chunk by chunk while the chunk
before is copied. Files are read, not mapped: one that was cut short is an error, not the end of the process.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from clockwork_serve.devices.accelerator import Accelerator, Mark, Tensor
from clockwork_serve.devices.blobs import Blobs, Reading
from clockwork_serve.messages import Weights
from clockwork_serve.units import MIB

CHUNK: Final = 2 * MIB
"""Copied at once: about 0.1 ms on PCIe, which is how long a request's own copy may have to wait for it."""
STAGING: Final = 2
"""Chunks that are always there, to be filled and copied by turns."""


class HostPool:
    """Used by the load lane only, within it (``Accelerator.lane``), and each load is waited for."""

    def __init__(self, accelerator: Accelerator, nbytes: int) -> None:
        self._accelerator = accelerator
        self._blobs = Blobs()
        self._direct = accelerator.shares_memory and nbytes == 0
        count = 0 if self._direct else max(STAGING, nbytes // CHUNK)
        self._memory = accelerator.pinned(count * CHUNK, "pool_bytes")
        self._staging = list(range(min(STAGING, count)))
        self._free = list(range(STAGING, count))
        self._chunks_by_path: OrderedDict[str, list[int]] = OrderedDict()
        self.chunks = len(self._free)
        """How many may keep files."""
        self.hits = 0
        self.misses = 0

    def copy(self, weights: Weights, target: Tensor) -> int:
        """Fill ``target`` with a file of its very length, or DeviceError; it is there at the next mark.

        How long it took to verify what was read (ns); what is kept was verified when it came.
        """
        if self._direct:
            return self._blobs.read_into(weights, target.numpy())
        path = weights.path
        kept = self._chunks_by_path.get(path)
        if kept is not None:
            self.hits += 1
            self._chunks_by_path.move_to_end(path)
            for at, chunk in enumerate(kept):
                self._send(chunk, at, target)
            return 0
        self.misses += 1
        chunks = self._room(-(-len(target) // CHUNK))
        if chunks is None:
            return self._stream(weights, target)
        try:
            with self._blobs.reading(weights, len(target)) as reading:
                for at, chunk in enumerate(chunks):
                    self._read(reading, chunk, at, target)
                    self._send(chunk, at, target)
        except BaseException:
            self._free += chunks
            raise
        self._chunks_by_path[path] = chunks
        return reading.once_ns

    def verify(self, weights: Weights) -> None:
        """Look whether a file is what its name says, before it is wanted; for any thread."""
        self._blobs.verify(weights)

    def close(self) -> None:
        """Forget all."""
        self._blobs.close()
        self._chunks_by_path.clear()
        self._memory = None

    def _room(self, count: int) -> list[int] | None:
        """Chunks for a file, whoever must go for it; None if it is larger than the pool."""
        if count > self.chunks:
            return None
        while len(self._free) < count:
            self._free += self._chunks_by_path.popitem(last=False)[1]
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _stream(self, weights: Weights, target: Tensor) -> int:
        """Through the staging chunks, each read anew once its last copy is over."""
        marks: list[Mark] = [None] * len(self._staging)
        with self._blobs.reading(weights, len(target)) as reading:
            for at in range(-(-len(target) // CHUNK)):
                turn = at % len(self._staging)
                if marks[turn] is not None:
                    self._accelerator.wait(marks[turn])
                self._read(reading, self._staging[turn], at, target)
                self._send(self._staging[turn], at, target)
                marks[turn] = self._accelerator.mark("load")
        return reading.once_ns

    def _read(self, reading: Reading, chunk: int, at: int, target: Tensor) -> None:
        memory: Any = self._chunk(chunk, at, target).numpy()
        reading.part(memory, at * CHUNK)

    def _send(self, chunk: int, at: int, target: Tensor) -> None:
        start = at * CHUNK
        target[start : start + CHUNK].copy_(self._chunk(chunk, at, target), non_blocking=True)

    def _chunk(self, chunk: int, at: int, target: Tensor) -> Tensor:
        """As much of a chunk as the file's part takes."""
        return self._memory[chunk * CHUNK : chunk * CHUNK + min(CHUNK, len(target) - at * CHUNK)]
