"""An inference request and its answer as both protocols see them, without sockets and without a model.

Tensor data is in *wire form*: little-endian, row-major, no padding; BOOL is one byte of 0 or 1; BYTES is, for
each element, a 4-byte little-endian length and that many bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from clockwork_serve.oip.shared_memory import SharedRef

if TYPE_CHECKING:
    from clockwork_serve.oip.headers import Known

Parameter = bool | int | float | str
Buffer = bytes | bytearray | memoryview


class InputTensor(Struct):
    """An input as sent: full ``shape`` (batch axis included), ``data`` in wire form.

    ``shared`` is where the data is to be read from first, if the client left it in shared memory.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer
    shared: SharedRef | None = None


class OutputWish(Struct):
    """An output that the client asked for; ``classes`` > 0 asks for that many best classes instead.

    ``shared`` is where its data goes, if the client wants it in shared memory.
    """

    name: str
    binary: bool = False
    classes: int = 0
    shared: SharedRef | None = None


class InferCall(Struct):
    """One inference request. ``outputs`` is None where the client named none: all, ``binary`` or not.

    ``shared``: whether any of its tensors is, or goes, into shared memory. ``known``: what is known of its
    header, if one like it was here before and was good; else ``header`` is that, if it may be remembered.
    """

    inputs: list[InputTensor]
    outputs: list[OutputWish] | None = None
    id: str = ""
    parameters: dict[str, Parameter] = {}
    binary: bool = False
    shared: bool = False
    known: Known | None = None
    header: bytes = b""


class OutputTensor(Struct):
    """An output to send: full ``shape``, ``data`` in wire form, valid until the call that got it returns."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer
