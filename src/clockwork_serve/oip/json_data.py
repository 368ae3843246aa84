"""The ``data`` of JSON tensors, to wire form and back; it checks counts and ranges, and knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final

import msgspec
import numpy as np

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.datatypes import BINARY_ONLY, DTYPES, STRINGS_MAX, decode_strings, encode_strings
from clockwork_serve.oip.records import Buffer

DEPTH_MAX: Final = 32
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
    flat = _flat(name, datatype, raw)
    count = math.prod(shape)
    if len(flat) != count:
        raise InvalidRequest(
            f"inference input '{name}': expected {count} elements in 'data' for shape {list(shape)}, "
            f"found {len(flat)}"
        )
    if datatype == "BYTES":
        if count > STRINGS_MAX:
            raise InvalidRequest(
                f"inference input '{name}': expected at most {STRINGS_MAX} elements of BYTES, found {count}"
            )
        return encode_strings([text.encode() for text in flat])
    return _packed(name, datatype, flat)


def to_json(datatype: str, data: Buffer) -> list[Any]:
    """Wire form as a flat list for JSON; not a number becomes null, for JSON has no other word."""
    if datatype == "BYTES":
        return [element.decode(errors="replace") for element in decode_strings(data)]
    found: list[Any] = np.frombuffer(data, DTYPES[datatype]).tolist()
    return found


def _flat(name: str, datatype: str, raw: memoryview) -> list[Any]:
    depth = 0
    for byte in raw[: 4 * DEPTH_MAX]:
        if byte == 0x5B:  # [
            depth += 1
        elif byte not in b" \t\r\n":
            break
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
