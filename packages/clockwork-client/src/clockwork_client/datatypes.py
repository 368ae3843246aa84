"""Element types of the Open Inference Protocol and their wire form, shared by client and server.

Tensor data is in *wire form*: little-endian, row-major, no padding; BOOL is one byte of 0 or 1; BYTES is,
for each element, a 4-byte little-endian length and that many bytes. Every process of the server imports this
module too, so it imports neither numpy nor the rest of the client.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

Parameter = bool | int | float | str
"""The value of a request's or a response's parameter."""
Buffer = bytes | bytearray | memoryview

DATATYPES: Final[dict[str, int]] = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8,
    "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8, "BYTES": 0,
}  # fmt: skip
"""Open Inference Protocol element types and their size in bytes (0: of variable size)."""

SLO_MAX_MS: Final = 24 * 3600 * 1000
"""The largest SLO, one day: a larger one is a mistaken unit."""

_LENGTH: Final = struct.Struct("<I")


def encode_strings(elements: Iterable[bytes]) -> bytes:
    """BYTES elements in wire form."""
    pack = _LENGTH.pack
    return b"".join([part for element in elements for part in (pack(len(element)), element)])


def decode_strings(data: Buffer) -> Iterator[bytes]:
    """The elements of a BYTES tensor in wire form, which must be valid."""
    view, at = memoryview(data), 0
    while at < len(view):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(view, at)[0]
        yield bytes(view[start:at])
