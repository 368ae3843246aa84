"""Finds the float weights inside a serialised ONNX model without parsing it completely.

A *hole* is the byte range of one liftable tensor's elements. Everything else is the *skeleton*: two models of
equal skeleton are copies of one architecture. Field numbers are those of the public onnx.proto.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_serve.store.graph_walks import AXES_MAX, NAMES_MAX, NESTING_MAX, NODES_MAX
from clockwork_serve.store.onnx.weights import FLOAT_BYTES, is_weight

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5  # ModelProto.graph, GraphProto.node, GraphProto.initializer
_OP_TYPE, _ATTRIBUTE = 4, 5  # of NodeProto
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPHS = 5, (6, 11)  # of AttributeProto: t, and g and graphs
_INPUT, _OUTPUT = 1, 2  # of NodeProto
_DIMS, _DATA_TYPE, _FLOAT_DATA, _NAME, _RAW_DATA = 1, 2, 4, 8, 9
_HOLDERS = frozenset({b"Constant", b"If", b"Loop", b"Scan"})
"""Operators whose attributes hold weights or graphs that do."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT = 1  # TensorProto.DataType.FLOAT
_EXTERNAL = (b"location", b"p\x01")
"""Marks of a tensor in another file: the key of its location, or TensorProto.data_location = EXTERNAL."""


class WireError(ValueError):
    """The bytes are not a serialised protobuf message: truncated, or something else."""


class TooMuch(WireError):
    """More than a model may contain; ``expected`` names the limit."""

    def __init__(self, expected: str) -> None:
        super().__init__(f"expected {expected}")
        self.expected = expected


class Hole(Struct, frozen=True, array_like=True):
    """``count`` little-endian float32 elements from byte ``start``."""

    start: int
    count: int


class Skeleton(Struct, frozen=True):
    """The holes of a model in file order, and a hash of all other bytes and of the holes' sizes.

    ``external``: some tensors may be in other files.
    """

    digest: str
    holes: tuple[Hole, ...]
    external: bool

    @property
    def elements(self) -> int:
        """The number of float elements in all holes."""
        return sum(hole.count for hole in self.holes)


Buffer = memoryview


def skeleton(data: Buffer) -> Skeleton:
    """The holes and the hash of the rest. Raises ``WireError``."""
    holes = tuple(sorted(_holes(data), key=lambda hole: hole.start))
    digest = hashlib.sha256()
    position = 0
    external = False
    for hole in (*holes, Hole(len(data), 0)):
        between = bytes(data[position : hole.start])
        external = external or any(mark in between for mark in _EXTERNAL)
        digest.update(between)
        digest.update(b"hole %d;" % hole.count)
        position = hole.start + hole.count * FLOAT_BYTES
    return Skeleton(digest.hexdigest(), holes, external)


def elements(data: Buffer, holes: tuple[Hole, ...]) -> npt.NDArray[np.uint32]:
    """All elements of the holes in order, as bit patterns, and a final zero (for padding)."""
    flat = np.zeros(sum(hole.count for hole in holes) + 1, np.uint32)
    position = 0
    for hole in holes:
        flat[position : position + hole.count] = np.frombuffer(data, "<u4", hole.count, hole.start)
        position += hole.count
    return flat


def filled(data: Buffer, holes: tuple[Hole, ...], flat: npt.NDArray[np.uint32]) -> bytes:
    """A copy of the model with other elements in its holes."""
    copy = bytearray(data)
    position = 0
    for hole in holes:
        np.frombuffer(copy, "<u4", hole.count, hole.start)[:] = flat[position : position + hole.count]
        position += hole.count
    return bytes(copy)


class _Found(Struct):
    """A float tensor in one piece."""

    name: bytes
    rank: int
    hole: Hole


def _holes(data: Buffer) -> Iterator[Hole]:
    walk = _Walk()
    for number, kind, start, end in _fields(data, 0, len(data)):
        if number == _GRAPH and kind == _BYTES:
            _graph(data, start, end, walk, 1)
    for tensor in walk.found:
        if is_weight(tensor.hole.count, tensor.rank, walk.readers.get(tensor.name, ())):
            yield tensor.hole


class _Walk:
    """What was found so far, and counts to limit it."""

    def __init__(self) -> None:
        self.found: list[_Found] = []
        self.readers: dict[bytes, list[str]] = {}
        self.nodes = self.names = 0

    def count(self, *, nodes: int = 0, names: int = 0) -> None:
        """Raise :class:`TooMuch` if that exceeds what a model may contain."""
        self.nodes += nodes
        self.names += names
        if self.nodes > NODES_MAX:
            raise TooMuch(f"at most {NODES_MAX} nodes")
        if self.names > NAMES_MAX:
            raise TooMuch(f"at most {NAMES_MAX} names of values")


def _graph(data: Buffer, start: int, end: int, walk: _Walk, depth: int) -> None:
    if depth > NESTING_MAX:
        raise TooMuch(f"graphs inside of graphs {NESTING_MAX} deep")
    for number, kind, first, last in _fields(data, start, end):
        if number == _NODE and kind == _BYTES:
            walk.count(nodes=1)
            _node(data, first, last, walk, depth)
            continue
        walk.count(names=1)
        if number == _INITIALIZER and kind == _BYTES:
            walk.found.extend(_tensor(data, first, last))


def _node(data: Buffer, start: int, end: int, walk: _Walk, depth: int) -> None:
    """Record what a node reads, and its tensors: exporters write weights into Constant nodes too."""
    inputs, attributes = [], []
    operator = output = b""
    for number, kind, first, last in _fields(data, start, end):
        if kind != _BYTES:
            continue
        if number == _INPUT:
            inputs.append(bytes(data[first:last]))
        elif number == _OUTPUT:
            output = bytes(data[first:last])
        elif number == _OP_TYPE:
            operator = bytes(data[first:last])
        elif number == _ATTRIBUTE:
            attributes.append((first, last))
    walk.count(names=len(inputs))
    for name in inputs:
        walk.readers.setdefault(name, []).append(operator.decode(errors="replace"))
    if operator not in _HOLDERS:
        return
    for first, last in attributes:
        for number, kind, inner, outer in _fields(data, first, last):
            if kind == _BYTES and number in _ATTRIBUTE_GRAPHS:
                _graph(data, inner, outer, walk, depth + 1)
            elif kind == _BYTES and number == _ATTRIBUTE_TENSOR:
                for tensor in _tensor(data, inner, outer):
                    tensor.name = output
                    walk.found.append(tensor)


def _tensor(data: Buffer, start: int, end: int) -> Iterator[_Found]:
    """The float tensor in a message, if its elements are contiguous."""
    count, rank, data_type = 1, 0, 0
    name = b""
    pieces = []
    for number, kind, first, last in _fields(data, start, end):
        if number == _DIMS and kind == _VARINT:
            count, rank = _counted(count, _varint(data, first)[0], rank)
        elif number == _DIMS and kind == _BYTES:
            position = first
            while position < last:
                dim, position = _varint(data, position)
                count, rank = _counted(count, dim, rank)
        elif number == _DATA_TYPE and kind == _VARINT:
            data_type = _varint(data, first)[0]
        elif number == _NAME and kind == _BYTES:
            name = bytes(data[first:last])
        elif number in (_RAW_DATA, _FLOAT_DATA) and kind == _BYTES:
            pieces.append((first, last))
    if data_type == _FLOAT and len(pieces) == 1 and pieces[0][1] - pieces[0][0] == count * FLOAT_BYTES:
        yield _Found(name, rank, Hole(pieces[0][0], count))


def _counted(count: int, dim: int, rank: int) -> tuple[int, int]:
    """Elements and axes with one more axis."""
    if rank >= AXES_MAX:
        raise TooMuch(f"tensors of at most {AXES_MAX} axes")
    return count * dim, rank + 1


def _fields(data: Buffer, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start and end of the value) of each field of a message."""
    while position < end:
        key, position = _varint(data, position)
        kind = key & 7
        if kind == _VARINT:
            start = position
            _, position = _varint(data, position)
        elif kind == _BYTES:
            size, start = _varint(data, position)
            position = start + size
        elif kind in (_FIXED32, _FIXED64):
            start = position
            position += 4 if kind == _FIXED32 else 8
        else:
            raise WireError(f"wire type {kind} at byte {position}")
        if position > end:
            raise WireError(f"a field ends at byte {position}, after the {end} there are")
        yield key >> 3, kind, start, position


def _varint(data: Buffer, position: int) -> tuple[int, int]:
    value = shift = 0
    try:
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
            if shift > 63:
                raise WireError(f"a number too long at byte {position}")
    except IndexError:
        raise WireError(f"the file ends at byte {len(data)}, inside a number") from None
