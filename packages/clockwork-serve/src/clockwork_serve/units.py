"""Units of time and memory.

Time is an ``int`` of nanoseconds everywhere inside the system; floats of milliseconds appear only at its
interfaces (configuration, screens, HTTP).
"""

from __future__ import annotations

from typing import Final

NS_PER_US: Final = 1_000
NS_PER_MS: Final = 1_000_000
NS_PER_S: Final = 1_000_000_000

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

TENSOR_ALIGN: Final = 64
"""Alignment of every tensor's start in bytes: one cache line, and what vector loads need."""


def ms(milliseconds: float) -> int:
    """Milliseconds as nanoseconds."""
    return round(milliseconds * NS_PER_MS)


def us(microseconds: float) -> int:
    """Microseconds as nanoseconds."""
    return round(microseconds * NS_PER_US)


def to_ms(nanoseconds: int) -> float:
    """Nanoseconds as milliseconds."""
    return nanoseconds / NS_PER_MS


def align(size: int, step: int = TENSOR_ALIGN) -> int:
    """The least multiple of ``step`` that is not below ``size``."""
    return -(-size // step) * step


def split_scratch(nbytes: int) -> tuple[int, int]:
    """How ``scratch_memory`` is split: bytes for inputs and outputs, and for what a batch computes with."""
    io_bytes = nbytes // 5
    return io_bytes, nbytes - io_bytes


def scratch_for(io_bytes: int, workspace_bytes: int = 0) -> str:
    """The least ``scratch_memory``, in MiB, whose two parts have room for these."""
    return f"{max(5, -(-max(5 * io_bytes, -(-5 * workspace_bytes // 4)) // MIB))}MiB"


def counted(number: int, what: str) -> str:
    """``1 model``, ``2,000 models``, ``2 processes``."""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def plain(number: float) -> str:
    """A number as people write it: ``3600000``, ``0.000001``; never with an exponent."""
    return f"{number:.9f}".rstrip("0").rstrip(".")
