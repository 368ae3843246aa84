"""Conversion between numpy arrays and tensors in wire form.

BF16 is ``ml_dtypes.bfloat16``, recognised by its name. Without ``ml_dtypes``, an output is the 16 bits as
``uint16``, and an input of ``uint16`` becomes BF16 if the caller declares that by ``datatypes``.
"""

from __future__ import annotations

import importlib
import math
import struct
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from clockwork_client.datatypes import Buffer, decode_strings, encode_strings
from clockwork_client.errors import Failed, Invalid

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
        "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
        "FP16": "<f2", "BF16": "<u2", "FP32": "<f4", "FP64": "<f8",
    }.items()
}  # fmt: skip
"""All element types of fixed size; BF16 as its 16 bits."""

COPIED_BYTES: Final = 64 * 1024
"""Up to this many bytes, a copy is cheaper than a view."""

_BY_DTYPE: Final = {
    **{dtype.name: datatype for datatype, dtype in DTYPES.items() if datatype != "BF16"},
    "bfloat16": "BF16",
}
_STRINGS: Final = "OSUT"
_AXES_MAX: Final = 32


def encode(name: str, array: npt.NDArray[Any], wanted: str = "") -> tuple[str, Buffer]:
    """The datatype of an array and its content in wire form. ``wanted``, if given, is the required datatype.

    The content of a large array is a view of it. Raises :class:`Invalid`.
    """
    if not isinstance(array, np.ndarray):
        raise Invalid(
            f"input '{name}': expected a numpy array, found {type(array).__name__}; use numpy.asarray"
        )
    if array.dtype.kind in _STRINGS:
        _check_wanted(name, array, "BYTES", wanted)
        return "BYTES", encode_strings(_elements(name, array))
    datatype = _BY_DTYPE.get(array.dtype.name)
    if datatype is None:
        raise Invalid(
            f"input '{name}': dtype: expected one of {', '.join(_BY_DTYPE)} or strings, "
            f"found {array.dtype}; convert it with astype"
        )
    if datatype == "UINT16" and wanted == "BF16":
        datatype = "BF16"
    _check_wanted(name, array, datatype, wanted)
    if datatype == "BF16":
        array = array.view(np.uint16)
    array = array.astype(DTYPES[datatype], copy=False)
    if array.nbytes <= COPIED_BYTES:
        return datatype, array.tobytes()
    return datatype, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def decode(name: str, datatype: str, shape: tuple[int, ...], data: Buffer) -> npt.NDArray[Any]:
    """A new array from wire form. Raises :class:`Failed` if shape, datatype and length do not match."""
    if len(shape) > _AXES_MAX or not all(0 <= size < 1 << 63 for size in shape):
        raise Failed(f"output '{name}': shape: expected up to {_AXES_MAX} sizes, found {str(shape)[:80]}")
    count = math.prod(shape)
    if datatype == "BYTES":
        return _strings(name, shape, count, data)
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise Failed(f"output '{name}': datatype: expected one of {', '.join(DTYPES)}, found '{datatype}'")
    if len(data) != count * dtype.itemsize:
        raise Failed(
            f"output '{name}': expected {count * dtype.itemsize} bytes for shape {list(shape)} of "
            f"{datatype}, found {len(data)}"
        )
    found: npt.NDArray[Any] = np.frombuffer(data, dtype).reshape(shape).copy()
    if datatype == "BF16" and (bfloat16 := _bfloat16()) is not None:
        return found.view(bfloat16)
    return found


def _check_wanted(name: str, array: npt.NDArray[Any], datatype: str, wanted: str) -> None:
    if wanted not in ("", datatype):
        raise Invalid(f"input '{name}': expected {wanted}, found {array.dtype}, which is {datatype}")


def _elements(name: str, array: npt.NDArray[Any]) -> list[bytes]:
    found = []
    for index, element in enumerate(array.reshape(-1).tolist()):
        if isinstance(element, str):
            try:
                found.append(element.encode())
            except UnicodeEncodeError as error:
                raise Invalid(f"input '{name}': element {index}: expected Unicode: {error}") from None
        elif isinstance(element, bytes):
            found.append(element)
        else:
            raise Invalid(
                f"input '{name}': element {index}: expected bytes or str, found {type(element).__name__}"
            )
    return found


def _strings(name: str, shape: tuple[int, ...], count: int, data: Buffer) -> npt.NDArray[Any]:
    try:
        elements = list(decode_strings(data))
    except struct.error:
        elements = []
    if len(elements) != count or encode_strings(elements) != data:
        raise Failed(f"output '{name}': expected {count} elements of BYTES, found {len(data)} other bytes")
    array = np.empty(count, object)
    array[:] = elements
    return array.reshape(shape)


@cache
def _bfloat16() -> np.dtype[Any] | None:
    try:
        found: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        return None
    return found
