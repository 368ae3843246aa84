"""Element types of the protocol as numpy's, and strings in wire form; it knows no model."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.records import Buffer

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
        "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
        "FP16": "<f2", "BF16": "<u2", "FP32": "<f4", "FP64": "<f8",
    }.items()
}  # fmt: skip
"""All element types of one size; BF16 as its 16 bits."""

BINARY_ONLY: Final = frozenset({"FP16", "BF16"})
"""Types that have no form but the binary one."""

STRINGS_MAX: Final = 1 << 14
"""Elements of one BYTES tensor: they are walked one by one, 0.16 us each, while all others wait."""

_LENGTH: Final = struct.Struct("<I")


def encode_strings(elements: Iterable[bytes]) -> bytes:
    """BYTES elements in wire form."""
    pack = _LENGTH.pack
    return b"".join([part for element in elements for part in (pack(len(element)), element)])


def decode_strings(data: Buffer) -> Iterator[bytes]:
    """The elements of a BYTES tensor in wire form that was checked."""
    view, at = memoryview(data), 0
    while at < len(view):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(view, at)[0]
        yield bytes(view[start:at])


def check_strings(name: str, data: Buffer, count: int) -> None:
    """Raise :class:`InvalidRequest` unless ``data`` is exactly ``count`` BYTES elements in wire form."""
    if count > STRINGS_MAX:
        raise InvalidRequest(
            f"inference input '{name}': expected at most {STRINGS_MAX} elements of BYTES, found {count}; "
            "send fewer in one request"
        )
    size, at, found = len(data), 0, 0
    unpack = _LENGTH.unpack_from
    while at + _LENGTH.size <= size and found < count:
        at += _LENGTH.size + unpack(data, at)[0]
        found += 1
    if found != count or at != size:
        raise InvalidRequest(
            f"inference input '{name}': expected {count} elements of BYTES, each a 4-byte little-endian "
            f"length and that many bytes; found {size} bytes that hold "
            f"{'more' if found == count and at < size else 'fewer'}"
        )
