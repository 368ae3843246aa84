"""An inference request and its answer as both protocols see them, without sockets and without a model.

Tensor data is in *wire form*: little-endian, row-major, no padding; BOOL is one byte of 0 or 1; BYTES is, for
each element, a 4-byte little-endian length and that many bytes.
"""

from __future__ import annotations

from msgspec import Struct

Parameter = bool | int | float | str
Buffer = bytes | bytearray | memoryview


class InputTensor(Struct):
    """An input as sent: full ``shape`` (batch axis included), ``data`` in wire form."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer


class OutputWish(Struct):
    """An output that the client asked for; ``classes`` > 0 asks for that many best classes instead."""

    name: str
    binary: bool = False
    classes: int = 0


class InferCall(Struct):
    """One inference request. ``outputs`` is None where the client named none: all, ``binary`` or not."""

    inputs: list[InputTensor]
    outputs: list[OutputWish] | None = None
    id: str = ""
    parameters: dict[str, Parameter] = {}
    binary: bool = False


class OutputTensor(Struct):
    """An output to send: full ``shape``, ``data`` in wire form, valid until the call that got it returns."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer
