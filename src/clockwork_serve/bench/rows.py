"""What is asked and what became of it, one row a request, in memory that a sender and its parent share.

The parent writes what is due before the run; the sender writes the rest while it runs, and logs each row that
has ended. So the parent can count at any time without a word from the sender.
"""

from __future__ import annotations

import mmap
import os
from typing import Any, Final

import numpy as np
import numpy.typing as npt

WIDE: Final = ("scheduled_ns", "slo_ns", "sent_ns", "first_ns", "last_ns")
NARROW: Final = ("model", "load", "message", "status", "nbytes", "ended")
"""``message``: which of the prepared requests; ``ended`` is no column but the log of rows that have ended."""
_HEAD_BYTES: Final = 64
_WIDE_BYTES: Final = 8
_ROW_BYTES: Final = 8 * len(WIDE) + 4 * len(NARROW)

Ints = npt.NDArray[np.int64]


class Rows:
    """So many rows. Instants are of CLOCK_MONOTONIC less the start of the run; 0 is "not yet"."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, _HEAD_BYTES + max(1, size) * _ROW_BYTES)

    @classmethod
    def make(cls, size: int) -> Rows:
        """New ones, all zero; memory is taken as they are written."""
        fd = os.memfd_create("clockwork-bench", os.MFD_CLOEXEC)
        os.ftruncate(fd, _HEAD_BYTES + max(1, size) * _ROW_BYTES)
        return cls(fd, size)

    def view(self, name: str) -> memoryview[int]:
        """A column, for one value at a time."""
        at, _, width = self._place(name)
        column = memoryview(self._map)[at : at + width * self.size]
        return column.cast("q") if width == _WIDE_BYTES else column.cast("i")

    def array(self, name: str) -> npt.NDArray[Any]:
        """A column, for all values at once; it lives as long as these rows."""
        at, code, _ = self._place(name)
        return np.frombuffer(self._map, dtype=np.dtype(code), count=self.size, offset=at)

    @property
    def counts(self) -> memoryview[int]:
        """How many rows have ended, and how many of open and of closed loads were due."""
        return memoryview(self._map)[:24].cast("q")

    def _place(self, name: str) -> tuple[int, str, int]:
        if name in WIDE:
            return _HEAD_BYTES + WIDE.index(name) * 8 * self.size, "q", 8
        first = _HEAD_BYTES + len(WIDE) * 8 * self.size
        return first + NARROW.index(name) * 4 * self.size, "i", 4
