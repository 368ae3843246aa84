"""The ``data`` of JSON tensors, to wire form and back; it checks counts and ranges, and knows no model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final

import msgspec
import numpy as np

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.datatypes import BINARY_ONLY, DTYPES, STRINGS_MAX, decode_strings, encode_strings
from clockwork_serve.oip.records import Buffer

DEPTH_MAX: Final = 32
PIECE_BYTES: Final = 256 * 1024
"""Numbers are decoded so much at a time: as Python's objects they take ten times the memory."""
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SPACE: Final = b" \t\r\n"
_PYTHON_TYPES: Final[dict[str, type]] = {
    "b": bool, "u": int, "i": int, "f": float, "O": str,
}  # fmt: skip


def from_json(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> bytes:
    """JSON ``data``, flat or nested row-major, in wire form. Raises :class:`InvalidRequest`."""
    if datatype in BINARY_ONLY:
        raise InvalidRequest(
            f"inference input '{name}': {datatype} has no JSON form; "
            "send it with the binary tensor data extension"
        )
    count = math.prod(shape)
    if datatype != "BYTES" and len(raw) > PIECE_BYTES:
        pieces, found = [], 0
        for piece in _pieces(name, datatype, raw):
            pieces.append(_packed(name, datatype, piece))
            found += len(piece)
            if found > count:
                break
        _check_count(name, shape, count, found)
        return b"".join(pieces)
    if datatype == "BYTES":
        if count > STRINGS_MAX:
            raise InvalidRequest(
                f"inference input '{name}': expected at most {STRINGS_MAX} elements of BYTES, found {count}"
            )
        if len(raw) > PIECE_BYTES:
            _check_strings(name, shape, count, bytes(raw))
    flat = _flat(name, datatype, raw)
    _check_count(name, shape, count, len(flat))
    if datatype == "BYTES":
        return encode_strings([text.encode() for text in flat])
    return _packed(name, datatype, flat)


def to_json(datatype: str, data: Buffer) -> list[Any]:
    """Wire form as a flat list for JSON; not a number becomes null, for JSON has no other word."""
    if datatype == "BYTES":
        return [element.decode(errors="replace") for element in decode_strings(data)]
    found: list[Any] = np.frombuffer(data, DTYPES[datatype]).tolist()
    return found


def _check_count(name: str, shape: Sequence[int], expected: int, found: int) -> None:
    if found != expected:
        raise InvalidRequest(
            f"inference input '{name}': expected {expected} elements in 'data' for shape {list(shape)}, "
            f"found {found}{' or more' if found > expected else ''}"
        )


def _check_strings(name: str, shape: Sequence[int], count: int, raw: bytes) -> None:
    """Whether there are so few strings and brackets that they can be built."""
    # A string has two quotes that are not escaped; but the last one of "\\\\" looks as if it were.
    quotes = raw.count(b'"') - raw.count(b'\\"')
    if quotes > 2 * count:
        _check_count(name, shape, count, quotes // 2)
    brackets = _STRING.sub(b"", raw).count(b"[")
    if brackets > DEPTH_MAX * max(count, 1):
        raise InvalidRequest(
            f"inference input '{name}': expected {count} elements in 'data', found {brackets} lists"
        )


def _pieces(name: str, datatype: str, raw: memoryview, piece_bytes: int = PIECE_BYTES) -> Iterator[list[Any]]:
    """Numbers, so many bytes of them at a time: cut at commas, with brackets for those that are cut off."""
    depth = _depth(raw)
    at = level = 0
    while at < len(raw):
        piece = bytes(raw[at : at + piece_bytes])
        last = at + piece_bytes >= len(raw)
        if not last:
            piece = piece[: max(piece.rfind(b","), 0)]
        # What is wrong beside a comma that is cut out, the decoder would not see.
        if (at and piece.lstrip(_SPACE)[:1] in (b"]", b"")) or (
            not last and piece.rstrip(_SPACE)[-1:] in (b"[", b"")
        ):
            raise InvalidRequest(
                f"inference input '{name}': 'data' is not {datatype} in JSON: expected a number on each side "
                f"of a comma near byte {at + len(piece)}"
            )
        before, level = level, level + piece.count(b"[") - piece.count(b"]")
        closing = b"" if last else b"]" * level
        yield _flat(name, datatype, memoryview(b"[" * before + piece + closing), depth)
        at += len(piece) + 1
    if level:
        raise InvalidRequest(f"inference input '{name}': 'data' is not {datatype} in JSON: it is truncated")


def _depth(raw: memoryview) -> int:
    depth = 0
    for byte in raw[: 4 * DEPTH_MAX]:
        if byte == 0x5B:  # [
            depth += 1
        elif byte not in _SPACE:
            break
    return depth


def _flat(name: str, datatype: str, raw: memoryview, depth: int | None = None) -> list[Any]:
    depth = _depth(raw) if depth is None else depth
    kind: str = "O" if datatype == "BYTES" else DTYPES[datatype].kind
    try:
        nested = _decoder(kind, min(max(depth, 1), DEPTH_MAX)).decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"inference input '{name}': 'data' is not {datatype} in JSON: {error}") from None
    for _ in range(depth - 1):
        nested = list(chain.from_iterable(nested))
    return nested


@lru_cache(maxsize=256)
def _decoder(kind: str, depth: int) -> msgspec.json.Decoder[list[Any]]:
    wanted: Any = _PYTHON_TYPES[kind]
    for _ in range(depth):
        wanted = list[wanted]
    return msgspec.json.Decoder(wanted)


def _packed(name: str, datatype: str, flat: list[Any]) -> bytes:
    dtype = DTYPES[datatype]
    try:
        # A float that does not fit becomes infinite; JSON cannot have meant that.
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype)
        fits = dtype.kind != "f" or bool(np.isfinite(array).all())
    except OverflowError:
        fits = False
    if not fits:
        raise InvalidRequest(f"inference input '{name}': a number in 'data' is out of range for {datatype}")
    return array.tobytes()
