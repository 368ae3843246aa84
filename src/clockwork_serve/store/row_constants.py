"""Small values that follow from shapes, computed as the graph would: sizes, axes, indices; never weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from clockwork_serve.store.row_values import Array, Value

MOST_ELEMENTS = 1024
"""Of values that are known: shapes have a few, tables of indices are no settings."""

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
"""What moves elements and changes none of them."""
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
    """The elements of the outputs, and which follow from the number of rows; None if they are not known."""
    inputs = inputs[:1] if op == "CastLike" else inputs  # the other one only has a type
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
