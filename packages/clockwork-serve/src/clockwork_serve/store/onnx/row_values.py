"""Abstract values of the row analysis: which axis holds the rows, and small constants from shapes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

# ------------------------------------------------------------
# What the analysis knows of one value: where its rows are, or that it does not depend on them.
#
# ``RowAxis`` says that an axis is, in row-major order, ``outer`` x the rows of the batch x ``inner``. So the
# rows are tracked where exporters merge the batch axis with heads or steps and split it again. A value
# without rows is *fixed*: the same for all requests. Its elements are *sized* if they depend on the number of
# rows.


Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Label = Hashable | None  # a name for an axis, as in einsum; None: elements along it are combined


class Mixes(Exception):
    """An operator whose result for one row may depend on others; its text says why."""


@dataclass(frozen=True, slots=True)
class RowAxis:
    """Where the rows are: ``axis`` is ``outer`` x rows x ``inner`` long."""

    axis: int
    outer: int = 1
    inner: int = 1

    def at(self, axis: int) -> RowAxis:
        """The same rows on another axis."""
        return replace(self, axis=axis)

    @property
    def plain(self) -> bool:
        """Whether the axis consists of the rows alone."""
        return self.outer == 1 and self.inner == 1


@dataclass(frozen=True, slots=True)
class Value:
    """A value at one number of rows. ``mixed`` says why it is not known to be row-independent.

    ``shape`` is None if it depends on values. ``known`` are the elements, of small fixed values only, and
    ``sized`` which of them depend on the number of rows. ``items``: it is a sequence of these.
    """

    dtype: int
    shape: Shape | None
    rows: RowAxis | None = None
    known: Array | None = None
    sized: Array | bool = False
    mixed: str = ""
    items: tuple[Value, ...] | None = None

    @property
    def is_sized(self) -> bool:
        """Whether any element depends on the number of rows."""
        return bool(np.any(self.sized))

    @property
    def sizes(self) -> Shape:
        """The shape. Raises ``Mixes`` if it depends on values."""
        if self.shape is None:
            raise Mixes("has a shape that depends on values")
        return self.shape

    def unknown(self) -> Value:
        """The value without its elements."""
        return self if self.known is None else replace(self, known=None, sized=self.is_sized)

    def with_mixed(self, reason: str) -> Value:
        """The value, not known to be row-independent."""
        return replace(self, rows=None, known=None, sized=False, mixed=reason, items=None)


@dataclass(slots=True)
class Operation:
    """One operator with its inputs, and the shapes of its outputs."""

    op: str
    version: int
    attributes: Mapping[str, Any]
    inputs: Sequence[Value | None]
    outputs: Sequence[Shape | None]
    count: int  # the number of rows
    drop: list[tuple[int, str]] = field(default_factory=list)
    """Outputs that a rule rejects, although the others are row-independent."""

    def given(self, number: int) -> Value | None:
        """An input, or None if it is omitted."""
        return self.inputs[number] if number < len(self.inputs) else None

    def value(self, number: int) -> Value:
        """A required input."""
        value = self.given(number)
        if value is None:
            raise Mixes(f"has no input {number}")
        return value

    def output(self, number: int = 0) -> Shape:
        """The shape of an output. Raises ``Mixes`` if it depends on values."""
        shape = self.outputs[number]
        if shape is None:
            raise Mixes("has an output whose size depends on values")
        return shape

    def fixed(self, *numbers: int) -> None:
        """Raise ``Mixes`` if one of these inputs depends on rows, or on their number."""
        for number in numbers:
            value = self.given(number)
            if value is not None and (value.rows is not None or value.is_sized):
                dependency = "depends on requests" if value.rows else "depends on the number of rows"
                raise Mixes(f"has a setting (input {number}) that {dependency}")

    def shape_input(self, number: int, use: str) -> Value | None:
        """An input that is a shape: it may depend on the number of rows, but not on them."""
        value = self.given(number)
        if value is not None and value.rows is not None:
            raise Mixes(f"{use} values of requests")
        return value

    def known(self, number: int) -> list[Any] | None:
        """The elements of an input, None if it is omitted. Raises ``Mixes`` if they are not known."""
        value = self.given(number)
        if value is None:
            return None
        if value.known is None:
            raise Mixes(f"has a setting (input {number}) that is not constant")
        found: list[Any] = value.known.reshape(-1).tolist()
        return found

    def setting(self, name: str, number: int) -> list[int] | None:
        """A setting that is an attribute in some versions and an input in others."""
        if name in self.attributes:
            found = self.attributes[name]
            return list(found) if isinstance(found, (list, tuple)) else [int(found)]
        return self.known(number)


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from 0; a negative one counts from the end."""
    return axis + rank if axis < 0 else axis


def labelled(
    pairs: Sequence[tuple[Value | None, Sequence[Label]]], outputs: Sequence[Sequence[Label]]
) -> list[RowAxis | None]:
    """Where rows are in the outputs, given a label for each axis of each input and output."""
    found: tuple[Label, RowAxis] | None = None
    for value, labels in pairs:
        if value is None or value.rows is None:
            continue
        if value.rows.axis >= len(labels):
            raise Mixes("has inputs of an unexpected rank")
        label = labels[value.rows.axis]
        if label is None or labels.count(label) > 1:
            raise Mixes(f"computes along axis {value.rows.axis}, which is the rows")
        if found is not None and found != (label, value.rows.at(0)):
            raise Mixes("combines different rows")
        found = label, value.rows.at(0)
    if found is None:
        return [None] * len(outputs)
    label, rows = found
    for value, labels in pairs:
        if value is None or value.rows is not None:
            continue
        if value.is_sized:
            raise Mixes("computes with the number of rows")
        if label in labels and value.sizes[labels.index(label)] != 1:
            raise Mixes("treats rows differently by position in the batch")
    for labels in outputs:
        if label not in labels:
            raise Mixes("computes along the rows")
    return [rows.at(labels.index(label)) for labels in outputs]


def aligned(rank: int, to: int) -> list[Label]:
    """Labels of a value that is broadcast to rank ``to``: axes are aligned at the end."""
    return [axis + to - rank for axis in range(rank)]


def regrouped(value: Value, shape: Shape, count: int) -> RowAxis:
    """Where rows are after a reshape, which keeps the order of elements."""
    assert value.rows is not None
    rows, sizes = value.rows, value.sizes
    inner = rows.inner * math.prod(sizes[rows.axis + 1 :])
    for axis, size in enumerate(shape):
        behind = math.prod(shape[axis + 1 :])
        if not behind or inner % behind:
            continue
        within = inner // behind
        if size and size % (within * count) == 0:
            return RowAxis(axis, size // (within * count), within)
    raise Mixes(f"reshapes {list(sizes)} to {list(shape)}, which takes rows apart")


# ------------------------------------------------------------
# Constant folding of small values that follow from shapes: sizes, axes, indices; never weights. onnx's own
# reference implementation computes them.


MOST_ELEMENTS = 1024
"""The largest value that is known: shapes are small, and tables of indices are not settings."""

_MOVES = frozenset(
    {
        "Cast", "CastLike", "Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
        "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that move elements without changing them."""
_COMPUTES = frozenset(
    {
        "Abs", "Add", "And", "Ceil", "ConstantOfShape", "Div", "Equal", "Floor", "Greater", "GreaterOrEqual",
        "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range", "Reciprocal",
        "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Round", "Sqrt", "Sub", "Where",
    }
)  # fmt: skip
_GROWS = frozenset({"ConstantOfShape", "Expand", "Range", "Tile"})
"""Operators whose outputs are as large as the values of an input say."""


def computed(
    node: onnx.NodeProto, version: int, inputs: Sequence[Value | None], shapes: Sequence[Shape | None]
) -> tuple[list[Array], list[Array]] | None:
    """The elements of the outputs, and which depend on the number of rows; None if they are not known."""
    op = node.op_type
    inputs = inputs[:1] if op == "CastLike" else inputs  # only the type of the other one matters
    if op not in _MOVES | _COMPUTES or any(each is not None and each.known is None for each in inputs):
        return None
    if op in _GROWS and any(shape is None or math.prod(shape) > MOST_ELEMENTS for shape in shapes):
        return None
    try:
        with np.errstate(all="ignore"):
            found = _run(node, version, [None if each is None else each.known for each in inputs])
            sized = _sized(node, version, inputs, found)
    except Exception:  # noqa: BLE001 - the reference implementation raises anything: then it is not known
        return None
    return None if any(array.size > MOST_ELEMENTS for array in found) else (found, sized)


def _run(node: onnx.NodeProto, version: int, inputs: Sequence[Array | None]) -> list[Array]:
    from onnx.reference.ops import load_op

    if node.op_type in ("Cast", "CastLike", "Identity"):
        return [np.asarray(inputs[0])]  # the caller makes it the type that was inferred
    if node.op_type == "Div" and inputs[0] is not None and inputs[0].dtype.kind != "f":
        a, b = np.asarray(inputs[0]), np.asarray(inputs[1])
        quotient = np.abs(a) // np.abs(b)  # ONNX truncates, which older versions of its reference do not
        return [(quotient * np.sign(a) * np.sign(b)).astype(a.dtype)]
    settings = {"log": lambda *_: None, "opsets": {"": version}, "new_ops": None, "verbose": 0}
    return [np.asarray(array) for array in load_op("", node.op_type, version)(node, settings).run(*inputs)]


def _sized(
    node: onnx.NodeProto, version: int, inputs: Sequence[Value | None], found: list[Array]
) -> list[Array]:
    op = node.op_type
    flags = [None if each is None else flags_of(each) for each in inputs]
    given = [each for each in flags if each is not None]
    if not any(each.any() for each in given):
        return [np.zeros(array.shape, bool) for array in found]
    if op in _MOVES:
        if op != "Concat" and any(each.any() for each in given[1:]):
            return [np.ones(array.shape, bool) for array in found]
        settings = [None if each is None else each.known for each in inputs[1:]]
        return _run(node, version, flags if op == "Concat" else [flags[0], *settings])
    try:
        together = np.logical_or.reduce(np.broadcast_arrays(*given))
    except ValueError:
        together = np.ones(1, bool)
    return [together if together.shape == array.shape else np.ones(array.shape, bool) for array in found]


def flags_of(value: Value) -> Array:
    """For each element of a known value, whether it depends on the number of rows."""
    assert value.known is not None
    return np.broadcast_to(np.asarray(value.sized, bool), value.known.shape)
