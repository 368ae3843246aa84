"""Abstract values of the row analysis: which axis holds the rows, and small constants from shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
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
Label = Hashable | None
"""A name for an axis, as in einsum; None: elements along it are combined."""


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
    names: Sequence[str]
    outputs: Sequence[Shape | None]
    count: int
    """The number of rows."""
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
# Constant folding of small values that follow from shapes: sizes, axes, indices; never weights.


MOST_ELEMENTS = 1024
"""The largest value that is known: shapes are small, and tables of indices are not settings."""

_Compute = Callable[[Sequence[Array | None], Mapping[str, Any], int], list[Array]]


def _one(function: Callable[..., Any]) -> _Compute:
    return lambda inputs, _, __: [np.asarray(function(*inputs))]


def _divided(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.abs(b)  # ONNX truncates
    return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)


def _cast(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
    assert inputs[0] is not None
    return [inputs[0].astype(onnx.helper.tensor_dtype_to_np_dtype(attributes["to"]))]


def _axes(inputs: Sequence[Array | None], attributes: Mapping[str, Any]) -> tuple[int, ...] | None:
    if "axes" in attributes:
        return tuple(attributes["axes"])
    given = inputs[1] if len(inputs) > 1 else None
    return None if given is None else tuple(given.reshape(-1).tolist())


def _squeeze(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
    assert inputs[0] is not None
    return [np.squeeze(inputs[0], _axes(inputs, attributes))]


def _unsqueeze(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
    assert inputs[0] is not None
    return [np.expand_dims(inputs[0], _axes(inputs, attributes) or ())]


def _gather(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
    assert inputs[0] is not None and inputs[1] is not None
    return [np.take(inputs[0], inputs[1], axis=attributes.get("axis", 0))]


def _concat(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
    return [np.concatenate([each for each in inputs if each is not None], axis=attributes["axis"])]


def _slice(inputs: Sequence[Array | None], attributes: Mapping[str, Any], version: int) -> list[Array]:
    data = inputs[0]
    assert data is not None
    if version < 10:
        starts, ends = list(attributes["starts"]), list(attributes["ends"])
        axes, steps = list(attributes.get("axes", range(len(starts)))), [1] * len(starts)
    else:
        given = [None if each is None else each.reshape(-1).tolist() for each in inputs[1:]] + [None] * 4
        starts, ends = given[0] or [], given[1] or []
        axes, steps = given[2] or list(range(len(starts))), given[3] or [1] * len(starts)
    index = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        low = None if step < 0 and end <= -data.shape[axis] - 1 else end
        index[axis] = slice(start, low, step)
    return [data[tuple(index)]]


def _reshape(inputs: Sequence[Array | None], _: Mapping[str, Any], __: int) -> list[Array]:
    data, shape = inputs[0], inputs[1]
    assert data is not None and shape is not None
    sizes = [data.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())]
    return [data.reshape(sizes)]


def _reduced(function: Callable[..., Any]) -> _Compute:
    def compute(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
        assert inputs[0] is not None
        keeps = bool(attributes.get("keepdims", 1))
        return [np.asarray(function(inputs[0], axis=_axes(inputs, attributes), keepdims=keeps))]

    return compute


def _range(inputs: Sequence[Array | None], _: Mapping[str, Any], __: int) -> list[Array]:
    start, limit, step = (each.item() for each in inputs if each is not None)
    assert inputs[0] is not None
    count = max(math.ceil((limit - start) / step), 0)
    if count > MOST_ELEMENTS:
        raise ValueError("too long to be known")
    return [(start + np.arange(count) * step).astype(inputs[0].dtype)]


def _filled(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
    assert inputs[0] is not None
    value = attributes.get("value", np.zeros(1, np.float32))
    shape = tuple(inputs[0].tolist())
    if math.prod(shape) > MOST_ELEMENTS:
        raise ValueError("too large to be known")
    return [np.full(shape, value.reshape(-1)[0], value.dtype)]


def _modulo(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
    a, b = inputs
    assert a is not None and b is not None
    return [np.fmod(a, b) if attributes.get("fmod", 0) else np.mod(a, b)]


def _expand(inputs: Sequence[Array | None], _: Mapping[str, Any], __: int) -> list[Array]:
    data, shape = inputs
    assert data is not None and shape is not None
    out = np.broadcast_shapes(data.shape, tuple(shape.tolist()))
    if math.prod(out) > MOST_ELEMENTS:
        raise ValueError("too large to be known")
    return [np.broadcast_to(data, out)]


def _tile(inputs: Sequence[Array | None], _: Mapping[str, Any], __: int) -> list[Array]:
    data, repeats = inputs
    assert data is not None and repeats is not None
    if data.size * math.prod(repeats.tolist()) > MOST_ELEMENTS:
        raise ValueError("too large to be known")
    return [np.tile(data, repeats.tolist())]


def _split(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
    data = inputs[0]
    assert data is not None
    axis = attributes.get("axis", 0)
    given = inputs[1].tolist() if len(inputs) > 1 and inputs[1] is not None else attributes.get("split")
    if given is None:
        raise ValueError("sizes that are not given")
    return np.split(data, np.cumsum(given)[:-1], axis=axis)


def _transpose(inputs: Sequence[Array | None], attributes: Mapping[str, Any], _: int) -> list[Array]:
    assert inputs[0] is not None
    return [np.transpose(inputs[0], attributes.get("perm"))]


_MOVES: dict[str, _Compute] = {
    "Cast": _cast, "CastLike": _one(np.asarray), "Concat": _concat, "Expand": _expand, "Gather": _gather,
    "Identity": _one(np.asarray), "Reshape": _reshape, "Slice": _slice, "Split": _split,
    "Squeeze": _squeeze, "Tile": _tile, "Transpose": _transpose, "Unsqueeze": _unsqueeze,
}  # fmt: skip
"""Operators that move elements without changing them."""
_COMPUTES: dict[str, _Compute] = {
    "Abs": _one(np.abs), "Add": _one(np.add), "And": _one(np.logical_and), "Ceil": _one(np.ceil),
    "ConstantOfShape": _filled, "Div": _one(_divided), "Equal": _one(np.equal), "Floor": _one(np.floor),
    "Greater": _one(np.greater), "GreaterOrEqual": _one(np.greater_equal), "Less": _one(np.less),
    "LessOrEqual": _one(np.less_equal),
    "Max": _one(lambda *each: np.maximum.reduce(np.broadcast_arrays(*each))),
    "Min": _one(lambda *each: np.minimum.reduce(np.broadcast_arrays(*each))), "Mod": _modulo,
    "Mul": _one(np.multiply), "Neg": _one(np.negative), "Not": _one(np.logical_not),
    "Or": _one(np.logical_or), "Pow": _one(np.power), "Range": _range, "Reciprocal": _one(np.reciprocal),
    "ReduceMax": _reduced(np.max), "ReduceMin": _reduced(np.min), "ReduceProd": _reduced(np.prod),
    "ReduceSum": _reduced(np.sum), "Round": _one(np.round), "Sqrt": _one(np.sqrt),
    "Sub": _one(np.subtract), "Where": _one(np.where),
}  # fmt: skip


def computed(
    op: str, version: int, attributes: Mapping[str, Any], inputs: Sequence[Value | None]
) -> tuple[list[Array], list[Array]] | None:
    """The elements of the outputs, and which depend on the number of rows; None if they are not known."""
    inputs = inputs[:1] if op == "CastLike" else inputs  # only the type of the other one matters
    compute = _MOVES.get(op) or _COMPUTES.get(op)
    if compute is None or any(each is not None and each.known is None for each in inputs):
        return None
    arrays = [None if each is None else each.known for each in inputs]
    try:
        with np.errstate(all="ignore"):
            found = [np.asarray(array) for array in compute(arrays, attributes, version)]
            sized = _sized(op, version, attributes, inputs, found)
    except (ValueError, IndexError, TypeError, KeyError, OverflowError, MemoryError, ZeroDivisionError):
        return None
    return None if any(array.size > MOST_ELEMENTS for array in found) else (found, sized)


def _sized(
    op: str, version: int, attributes: Mapping[str, Any], inputs: Sequence[Value | None], found: list[Array]
) -> list[Array]:
    flags = [None if each is None else _flags(each) for each in inputs]
    given = [each for each in flags if each is not None]
    if not any(each.any() for each in given):
        return [np.zeros(array.shape, bool) for array in found]
    settings = [] if op == "Concat" else given[1:]
    if op in _MOVES and any(each.any() for each in settings):
        return [np.ones(array.shape, bool) for array in found]
    if op in _MOVES:
        if op in ("Cast", "CastLike"):
            return [given[0]]
        data = flags if op == "Concat" else [flags[0], *[None if v is None else v.known for v in inputs[1:]]]
        return [np.asarray(array) for array in _MOVES[op](data, attributes, version)]
    try:
        together = np.logical_or.reduce(np.broadcast_arrays(*given))
    except ValueError:
        together = np.ones(1, bool)
    return [together if together.shape == array.shape else np.ones(array.shape, bool) for array in found]


def _flags(value: Value) -> Array:
    assert value.known is not None
    return np.broadcast_to(np.asarray(value.sized, bool), value.known.shape)
