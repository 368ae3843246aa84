"""Memory of a device: anonymous mappings of fixed size, touched before use."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from clockwork_serve.errors import DeviceError
from clockwork_serve.messages import Extent
from clockwork_serve.units import KIB, MIB

Bytes = npt.NDArray[np.uint8]

POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE (Linux 5.14): the kernel touches the pages, 1 GiB in 0.25-0.35 s (filling: 0.9 s)."""
STEP: Final = 16 * MIB
"""Bytes touched at a time, in the background. A LOAD into pages that are not touched yet is correct, but
slower: a virtual machine that gets memory from its host for the first time took up to 3 s for 1 GiB."""
ROUND: Final = 4 * MIB  # what is touched ends at a multiple of this


class Arena:
    """``pages`` pages of ``page_bytes``, all reserved; an extent of them is a numpy view.

    Resident are the first ones, as many as :meth:`touch` was asked for: the controller gives the lowest
    pages away first.
    """

    def __init__(self, memory_bytes: int, page_bytes: int) -> None:
        """Map the memory; DeviceError if the sizes are invalid or the host lacks memory."""
        check_page_size(page_bytes, 256 * KIB)
        if memory_bytes < page_bytes:
            raise DeviceError(
                f"device_memory: expected at least one page of {page_bytes} bytes, found {memory_bytes};"
                " raise it"
            )
        self.page_bytes = page_bytes
        self.pages = memory_bytes // page_bytes
        self._mapping = reserve(self.pages * page_bytes, "device_memory")
        self._bytes: Bytes = np.frombuffer(self._mapping, dtype=np.uint8)
        self._closing = threading.Event()
        self._lock = threading.Lock()  # of what follows
        self._touched = self._wanted = 0
        self._touching: threading.Thread | None = None
        if not populate(self._bytes[: mmap.PAGESIZE]):  # an old kernel cannot while others write
            populate(self._bytes)
            self._touched = self._wanted = len(self._bytes)

    def touch(self, nbytes: int) -> None:
        """Make the first ``nbytes`` resident, in the background. For any thread."""
        end = min(len(self._bytes), -(-nbytes // ROUND) * ROUND)
        with self._lock:
            if end <= self._wanted:
                return
            self._wanted = end
            if self._touching is None:
                self._touching = threading.Thread(target=self._touch, name="touch-arena", daemon=True)
                self._touching.start()

    def view(self, extent: Extent, nbytes: int) -> Bytes:
        """The first ``nbytes`` of an extent, writable; DeviceError if they are not all inside it."""
        return self._bytes[span(extent, nbytes, self.pages, self.page_bytes)]

    def resident_bytes(self) -> int:
        """How much of it is resident."""
        return _resident_of(self._bytes)

    def bytes_at(self, page: int, nbytes: int) -> Bytes:
        """``nbytes`` from the start of a page; DeviceError if the arena ends before."""
        return self.view(Extent(page, max(1, -(-nbytes // self.page_bytes))), nbytes)

    def wait_resident(self) -> None:
        """Wait until all that was asked for is resident: for measurements."""
        touching = self._touching
        if touching is not None:
            touching.join()

    def close(self) -> None:
        """Free the memory, now or when its last view is deleted."""
        self._closing.set()
        self.wait_resident()
        self._bytes = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def _touch(self) -> None:
        while True:
            with self._lock:
                start, end = self._touched, min(self._touched + STEP, self._wanted)
                if start == end or self._closing.is_set():
                    self._touching = None
                    return
            populate(self._bytes[start:end])
            self._touched = end


class Scratch:
    """The I/O area of a device's exec lane: one mapping that every (code, batch) uses in turn.

    Its pages are touched as codes claim them; that does not change their content, which an INFER may be
    using.
    """

    def __init__(self, nbytes: int) -> None:
        self._mapping = reserve(max(nbytes, mmap.PAGESIZE), "scratch_memory")
        self._bytes: Bytes = np.frombuffer(self._mapping, dtype=np.uint8)
        self._touched = 0
        self._lock = threading.Lock()  # both lanes claim; only the exec lane writes
        self.nbytes = nbytes

    def claim(self, nbytes: int) -> bool:
        """Make the first ``nbytes`` resident; False if the area is smaller than that."""
        if nbytes > self.nbytes:
            return False
        end = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if end > self._touched:
            with self._lock:
                if end > self._touched:
                    populate(self._bytes[self._touched : end])
                    self._touched = end
        return True

    def resident_bytes(self) -> int:
        """How much of it is resident."""
        return _resident_of(self._bytes)

    def bytes(self) -> Bytes:
        """The whole area; only what was claimed is sure to be resident."""
        return self._bytes

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> npt.NDArray[Any]:
        """A view at ``offset``; the bytes must have been claimed."""
        return np.ndarray(shape, dtype, buffer=self._mapping, offset=offset)

    def close(self) -> None:
        """Free the memory, now or when its last view is deleted."""
        self._bytes = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):
            self._mapping.close()


def span(extent: Extent, nbytes: int, pages: int, page_bytes: int) -> slice:
    """The first ``nbytes`` of an extent of an arena; DeviceError if they are not all inside it."""
    first, end = extent.first, extent.first + extent.count
    if first < 0 or extent.count < 1 or end > pages:
        raise DeviceError(f"extent: expected pages within 0..{pages - 1}, found {first}..{end - 1}")
    if not 0 <= nbytes <= extent.count * page_bytes:
        raise DeviceError(
            f"extent: {nbytes} bytes do not fit into {extent.count} pages of {page_bytes} bytes"
        )
    return slice(first * page_bytes, first * page_bytes + nbytes)


def check_page_size(page_bytes: int, example: int) -> None:
    """DeviceError unless pages are whole pages of the host; ``example`` is a size that is."""
    if page_bytes < mmap.PAGESIZE or page_bytes % mmap.PAGESIZE:
        raise DeviceError(
            f"page_size: expected a multiple of {mmap.PAGESIZE}, found {page_bytes};"
            f" choose for example {example}"
        )


def reserve(nbytes: int, setting: str) -> mmap.mmap:
    """An anonymous private mapping; DeviceError naming ``setting`` if the host has too little memory."""
    available = available_bytes()
    if available is not None and nbytes > available:
        raise DeviceError(
            f"{setting}: {nbytes} bytes asked, {available} bytes available on this host; lower it"
        )
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise DeviceError(f"{setting}: cannot map {nbytes} bytes ({error}); lower it") from error
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def populate(memory: Bytes) -> bool:
    """Make pages resident for writing, keeping what they hold; ``memory`` starts and ends with a page.

    False on an older kernel, where each page's first byte was written back as it was: others must not write
    at the same time there. Releases the GIL.
    """
    if not len(memory) or _libc().madvise(memory.ctypes.data, len(memory), POPULATE_WRITE) == 0:
        return True
    first_bytes = memory[:: mmap.PAGESIZE]
    first_bytes |= 0
    return False


def used_bytes(*areas: Arena | Scratch) -> int:
    """Memory of this process that is resident, but for the pages of files and what is in ``areas``."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    sizes = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("Rss"))
    resident = sum(int(sizes[name].split()[0]) * KIB for name in ("RssAnon", "RssShmem"))
    return resident - sum(area.resident_bytes() for area in areas)


def _resident_of(memory: Bytes) -> int:
    pages = np.zeros(-(-len(memory) // mmap.PAGESIZE), np.uint8)
    if len(memory) and _libc().mincore(memory.ctypes.data, len(memory), pages.ctypes.data):
        return 0
    return int((pages & 1).sum()) * mmap.PAGESIZE


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return libc


def available_bytes() -> int | None:
    """Memory available without swapping; None if the system does not report it."""
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
