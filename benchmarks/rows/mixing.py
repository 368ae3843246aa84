"""Operators that mix rows: a row depends on another, on its position, or on the number of rows; some rarely.

Each receives floats with rows and returns floats with rows, or None if it is not applicable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from benchmarks.rows.apart import Needs, Step, either_sign, reduce_over, where
from benchmarks.rows.graph import ONNX_TYPES, ROWS, Scope, Value
from benchmarks.rows.layers import told_axis

MIXERS: list[tuple[Step, float]] = []


def mixer(weight: float = 1.0, **needs: Unpack[Needs]) -> Callable[[Step], Step]:
    """Puts a function into the table; what it gives is mixed, and not exact."""

    def enter(function: Step) -> Step:
        @functools.wraps(function)
        def mixed(g: Scope, x: Value) -> Value | None:
            made = function(g, x)
            return None if made is None else replace(made, mixed=True, exact=False)

        MIXERS.append((where(needs, mixed), weight))
        return MIXERS[-1][0]

    return enter


def blend(g: Scope, x: Value, other: str) -> Value:
    """``x`` with something that is the same for all rows, or as large."""
    kind = g.random.randrange(6)
    if kind == 0:
        return replace(x, name=g.op("Where", g.op("Less", x, other), x, other))
    if kind == 1:
        return replace(x, name=g.op("Mul", x, g.op("Sigmoid", other)))
    return replace(x, name=g.op(g.random.choice(["Add", "Sub", "Max", "Mul"]), x, other))


def batch(x: Value) -> int:
    """Where the batch is; there is one."""
    assert x.axis is not None
    return x.axis


# Over the rows


@mixer(4)
def _reduced(g: Scope, x: Value) -> Value | None:
    axes = sorted({batch(x), *[axis for axis in x.others if g.chance(0.3)]})
    if x.axis == 0 and g.chance(0.3):
        return blend(g, x, reduce_over(g, x, [0], keepdims=False).name)
    if g.chance(0.15):
        axes = []
        return blend(g, x, g.reduced("ReduceMean", x, axes, keepdims=0))
    return blend(g, x, reduce_over(g, x, axes, keepdims=True).name)


@mixer(3)
def _normalised(g: Scope, x: Value) -> Value | None:
    axis = batch(x)
    kind = g.random.choice(["Softmax", "Softmax", "LogSoftmax", "Hardmax", "LpNormalization"])
    if kind == "LpNormalization" and x.dtype == "f2":
        kind = "Softmax"
    if g.opset < 13 and kind != "LpNormalization":
        axis = g.random.randint(0, axis)  # all axes from this one on are one
    return replace(x, name=g.op(kind, x, axis=either_sign(g, axis, x.rank)))


@mixer(1, dtypes=("f4", "f8"))
def _flattened(g: Scope, x: Value) -> Value | None:
    flat = g.op("Flatten", x, axis=0)
    made = g.op("Softmax", flat, axis=1) if g.chance(0.5) else g.op("CumSum", flat, g.constant(1, "i4"))
    return replace(x, name=g.op("Reshape", made, g.op("Shape", x)))


@mixer(1)
def _as_places(g: Scope, x: Value) -> Value | None:
    """Rows as the places or channels of one picture."""
    front = g.to_front(x)
    if x.dtype != "f4" or front.rank != 2:
        return None
    kind = g.random.choice(["LRN", "InstanceNormalization", "GlobalAveragePool", "AveragePool", "LpPool"])
    if kind == "LRN":
        made = g.op("LRN", g.unsqueeze(front, 0, 3), size=3, alpha=0.9)
        return replace(front, name=g.squeeze(made, 0, 3))
    turned = g.unsqueeze(g.op("Transpose", front, perm=[1, 0]), 0)
    width = front.shape[1]
    if kind == "InstanceNormalization":
        made = g.op(kind, turned, g.weights("f4", width), g.weights("f4", width))
    elif kind == "GlobalAveragePool":
        made = g.op("Sub", turned, g.op(kind, turned))
    else:
        made = g.op(kind, turned, kernel_shape=[3], pads=[1, 1])
    return replace(front, name=g.op("Transpose", g.squeeze(made, 0), perm=[1, 0]))


@mixer(1, axis=0, least_rank=2)
def _misread(g: Scope, x: Value) -> Value | None:
    """Another axis and the rows taken for each other, something added by place, and back."""
    if x.shape[1] < 2:
        return None
    size = x.shape[1]
    turned = g.op("Reshape", x, g.constant([size, -1, *x.shape[2:]]))
    added = g.op("Add", turned, g.weights(x.dtype, size, *[1] * (x.rank - 1), scale=2))
    return replace(x, name=g.op("Reshape", added, g.constant([-1, *x.shape[1:]])))


@mixer(1)
def _permuted(g: Scope, x: Value) -> Value | None:
    """Rows gathered by numbers that are computed from how many there are."""
    count = g.rows(x, scalar=True)
    places = g.op("Range", g.constant(0), count, g.constant(1))
    if g.chance(0.5):
        index = g.op("Sub", g.op("Sub", count, g.constant(1)), places)
    else:
        index = g.op("Mod", g.op("Add", places, g.constant(1)), count)
    return replace(x, name=g.op("Gather", x, index, axis=batch(x)))


@mixer(1, axis=0, ranks=(3,), dtypes=("f4",))
def _filtered_by_itself(g: Scope, x: Value) -> Value | None:
    square = g.op("Conv", x, x)
    return blend(g, x, g.reduced("ReduceMean", square, [1], keepdims=1))


@mixer(1)
def _counted_by_shape(g: Scope, x: Value) -> Value | None:
    """How many rows there are, as a number that came by a shape."""
    kind = g.random.randrange(4)
    if kind == 0:
        ones = g.op("Add", g.op("ConstantOfShape", g.op("Shape", x)), g.constant(1, "f4"))
        number = g.reduced("ReduceSum", ones, [], keepdims=0)
    elif kind == 1:
        places = g.op("NonZero", g.op("Expand", g.constant([1.0], "f4"), g.rows(x)))
        number = g.reduced("ReduceMax", g.op("Cast", places, to=ONNX_TYPES["f4"]), [], keepdims=0)
    elif kind == 2:
        flat = g.op("Shape", g.op("Reshape", x, g.constant([-1])))
        number = g.op("Cast", g.squeeze(flat, 0), to=ONNX_TYPES["f4"])
    else:
        shape = g.op("Cast", g.op("Shape", x), to=ONNX_TYPES["f4"])
        number = g.reduced("ReduceProd", shape, [0], keepdims=0)
    number = g.op("Cast", number, to=ONNX_TYPES[x.dtype])
    return replace(x, name=g.op(g.random.choice(["Add", "Mul"]), x, number))


@mixer(1, least_rank=2, dtypes=("f4",), since=17)
def _layer_normalised(g: Scope, x: Value) -> Value | None:
    if x.axis == x.rank - 1:
        return None
    axis = g.random.randint(0, batch(x))
    scale = g.weights(x.dtype, x.shape[-1])
    return replace(x, name=g.op("LayerNormalization", x, scale, axis=axis))


@mixer(1, least_rank=2, dtypes=("f4",))
def _mean_variance(g: Scope, x: Value) -> Value | None:
    more: dict[str, Any] = {} if x.rank == 4 and x.axis != 1 and g.chance(0.5) else {"axes": [batch(x)]}
    return replace(x, name=g.op("MeanVarianceNormalization", x, **more))


@mixer(1, axis=0, least_rank=2, dtypes=("f4",), since=14)
def _batch_statistics(g: Scope, x: Value) -> Value | None:
    channels = x.shape[1]
    parts = [g.weights("f4", channels), g.weights("f4", channels), g.weights("f4", channels)]
    spread = g.constant(np.ones(channels), "f4")
    names = g.ops("BatchNormalization", x, *parts, spread, outputs=3, training_mode=1)
    return replace(x, name=names[0])


@mixer(1)
def _whole_norm(g: Scope, x: Value) -> Value | None:
    total = g.reduced(g.random.choice(["ReduceL2", "ReduceMax", "ReduceSumSquare"]), x, [], keepdims=0)
    return replace(x, name=g.op("Div", x, g.op("Add", g.op("Abs", total), g.constant(1, x.dtype))))


@mixer(2, dtypes=("f4",))
def _dynamic_scale(g: Scope, x: Value) -> Value | None:
    quantised, scale, zero = g.ops("DynamicQuantizeLinear", x, outputs=3)
    if x.rank >= 2 and x.shape[-1] != ROWS and g.chance(0.6):
        dice = np.random.default_rng(g.random.getrandbits(32))
        weight = g.constant(dice.integers(-100, 100, (x.shape[-1], 3)), "i1")
        product = g.op("Cast", g.op("MatMulInteger", quantised, weight, zero), to=ONNX_TYPES["f4"])
        return replace(x, name=g.op("Mul", product, scale), shape=(*x.shape[:-1], 3))
    return replace(x, name=g.op("DequantizeLinear", quantised, scale, zero))


# Along the rows


@mixer(2, dtypes=("f4", "f8"))
def _cumulative(g: Scope, x: Value) -> Value | None:
    axis = g.constant(either_sign(g, batch(x), x.rank), "i4")
    more: dict[str, Any] = {"reverse": g.random.randrange(2), "exclusive": g.random.randrange(2)}
    return replace(x, name=g.op("CumSum", x, axis, **more))


@mixer(1.5, dtypes=("f4", "f8"))
def _sorted(g: Scope, x: Value) -> Value | None:
    count = g.rows(x) if g.chance(0.7) else g.constant([1])
    whole, _ = g.ops("TopK", x, count, outputs=2, axis=batch(x))
    return blend(g, x, whole)


@mixer(1.5)
def _shifted(g: Scope, x: Value) -> Value | None:
    axis = batch(x)
    huge = (1 << 31) - 1
    kind = g.random.randrange(3)
    if kind == 0:
        parts = [g.slice(x, -1, huge, axis), g.slice(x, 0, -1, axis)]
        return replace(x, name=g.op("Concat", *parts, axis=axis))
    if kind == 1:
        return replace(x, name=g.slice(x, -1, -huge, axis, step=-1))
    pads = [0] * (2 * x.rank)
    pads[axis] = 1
    padded = g.op("Pad", x, g.constant(pads))
    return blend(g, x, g.slice(padded, 0, -1, axis))


@mixer(1.5, least_rank=2)
def _reversed(g: Scope, x: Value) -> Value | None:
    if x.axis not in (0, 1):
        return None
    other = 1 - batch(x)
    size = x.shape[other]
    count = g.op("Expand", g.rows(x), g.constant([size]))
    name = g.op("ReverseSequence", x, count, batch_axis=other, time_axis=batch(x))
    return replace(x, name=name)


@mixer(1.5, axis=0, ranks=(2, 3), dtypes=("f4",))
def _recurrent(g: Scope, x: Value) -> Value | None:
    steps = x if x.rank == 3 else replace(x, name=g.unsqueeze(x, 1), shape=(ROWS, 1, x.shape[1]))
    kind, gates = g.random.choice([("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    hidden, width = 3, steps.shape[2]
    weights = [g.weights("f4", 1, gates * hidden, width), g.weights("f4", 1, gates * hidden, hidden)]
    more: dict[str, Any] = {"direction": "reverse"} if g.chance(0.3) else {}
    whole, _ = g.ops(kind, steps, *weights, outputs=2, hidden_size=hidden, **more)
    return Value(g.squeeze(whole, 1), "f4", (ROWS, steps.shape[1], hidden))


@mixer(1)
def _convolved(g: Scope, x: Value) -> Value | None:
    front = g.to_front(x)
    if x.dtype != "f4" or front.rank != 2:
        return None
    turned = g.unsqueeze(g.op("Transpose", front, perm=[1, 0]), 0)
    width = front.shape[1]
    pads = g.random.choice([[1, 1], [2, 0]])
    if g.chance(0.3):
        made = g.op("MaxPool", turned, kernel_shape=[3], pads=pads)
    else:
        made = g.op("Conv", turned, g.weights("f4", width, width, 3), kernel_shape=[3], pads=pads)
    return replace(front, name=g.op("Transpose", g.squeeze(made, 0), perm=[1, 0]))


# Rows with rows


@mixer(2)
def _product_of_all(g: Scope, x: Value) -> Value | None:
    front = g.to_front(x)
    if front.rank < 2:
        return None
    flat = g.op("Flatten", front, axis=1) if front.rank > 2 else front.name
    width = front.row_size
    scores = g.op("MatMul", flat, g.op("Transpose", flat, perm=[1, 0]))
    if g.chance(0.6):
        scores = g.op("Softmax", scores, axis=-1)
    return Value(g.op("MatMul", scores, flat), x.dtype, (ROWS, width))


@mixer(1, axis=0, ranks=(2,), dtypes=("f4", "f8"))
def _gram(g: Scope, x: Value) -> Value | None:
    if g.opset >= 12 and g.chance(0.6):
        gram = g.op("Einsum", x, x, equation="bi,bj->ij")
    else:
        gram = g.op("Gemm", x, x, transA=1)
    return replace(x, name=g.op("MatMul", x, gram))


@mixer(1, axis=0, ranks=(2,), dtypes=("f4", "f8"), since=12)
def _summed_by_einsum(g: Scope, x: Value) -> Value | None:
    kind = g.random.choice(["ab,cb->ca", "ab->b", "ab,cd->ad"])
    if kind == "ab->b":
        return blend(g, x, g.op("Einsum", x, equation=kind))
    made = g.op("Einsum", *([x] * (kind.count(",") + 1)), equation=kind)
    if kind == "ab,cb->ca":
        return Value(g.op("MatMul", made, x), x.dtype, x.shape)
    return replace(x, name=made)


@mixer(1.5, axis=0, ranks=(3,), dtypes=("f4", "f8"))
def _attention_over_rows(g: Scope, x: Value) -> Value | None:
    turned = g.op("Transpose", x, perm=[1, 0, 2])
    scores = g.op("MatMul", turned, g.op("Transpose", turned, perm=[0, 2, 1]))
    if g.chance(0.4) and g.opset >= 14:
        ones = g.op("ConstantOfShape", g.op("Shape", scores))
        mask = g.op("Trilu", g.op("Sub", ones, g.constant(1e4, "f4")), g.constant(1), upper=1)
        scores = g.op("Add", scores, g.op("Cast", mask, to=ONNX_TYPES[x.dtype]))
    made = g.op("MatMul", g.op("Softmax", scores, axis=2), turned)
    return replace(x, name=g.op("Transpose", made, perm=[1, 0, 2]))


# Rows smeared


@mixer(2)
def _smeared(g: Scope, x: Value) -> Value | None:
    front = g.to_front(x)
    if front.rank < 2 or front.row_size < 2:
        return None
    flat = replace(front, name=g.op("Flatten", front, axis=1), shape=(ROWS, front.row_size))
    turned = g.op("Transpose", flat, perm=[1, 0])
    shape = g.constant([-1, flat.row_size]) if g.chance(0.5) else g.op("Shape", flat)
    return replace(flat, name=g.op("Reshape", turned, shape))


@mixer(1.5, axis=0, least_rank=3)
def _merged_and_mixed(g: Scope, x: Value) -> Value | None:
    if x.shape[1] < 2:
        return None
    flat = Value(g.op("Reshape", x, g.constant([-1, *x.shape[2:]])), x.dtype, (ROWS, *x.shape[2:]))
    kind = g.random.randrange(3)
    if kind == 0 and x.dtype != "f2":
        made = g.op("CumSum", flat, g.constant(0, "i4"))
    elif kind == 1:
        made = (
            g.op("Softmax", flat, axis=0)
            if g.opset >= 13
            else blend(g, flat, g.reduced("ReduceMax", flat, [0], keepdims=1)).name
        )
    else:
        made = g.op("Sub", flat, g.reduced("ReduceMean", flat, [0], keepdims=1))
    return replace(x, name=g.op("Reshape", made, g.constant(list(x.shape))))


@mixer(1, axis=0, ranks=(2,))
def _tiled(g: Scope, x: Value) -> Value | None:
    if x.row_size > 64:
        return None
    wide = g.op("Tile", x, g.constant([2, 1]))
    return replace(
        x, name=g.op("Reshape", wide, g.constant([-1, 2 * x.shape[1]])), shape=(ROWS, 2 * x.shape[1])
    )


@mixer(1, axis=0, dtypes=("f4", "f8"))
def _as_one_list(g: Scope, x: Value) -> Value | None:
    flat = g.op("Reshape", x, g.constant([-1]))
    kind = g.random.randrange(3)
    if kind == 0:
        made = g.op("CumSum", flat, g.constant(0, "i4"))
    elif kind == 1:
        made = g.slice(flat, -1, -(1 << 31), 0, step=-1)
    else:
        made, _ = g.ops("TopK", flat, g.op("Shape", flat), outputs=2, axis=0)
    return replace(x, name=g.op("Reshape", made, g.op("Shape", x)))


# One row for all


@mixer(2)
def _indexed(g: Scope, x: Value) -> Value | None:
    index = g.constant(g.random.choice([0, -1]))
    kind = g.random.randrange(3)
    axis = batch(x)
    if kind == 0:
        picked = g.unsqueeze(g.op("Gather", x, index, axis=axis), axis)
    elif kind == 1:
        picked = g.slice(x, 0, 1, axis) if g.chance(0.5) else g.slice(x, -1, (1 << 31) - 1, axis)
    else:
        sequence = g.op("SplitToSequence", x, axis=axis)
        picked = g.op("SequenceAt", sequence, g.constant(g.random.choice([0, -1])))
    return blend(g, x, picked)


@mixer(1, since=12)
def _indexed_within(g: Scope, x: Value) -> Value | None:
    last = g.op("Sub", g.rows(x, scalar=True), g.constant(1))
    index = g.op("Min", last, g.constant(g.random.choice([1, 2, 3, 7])))
    return blend(g, x, g.unsqueeze(g.op("Gather", x, index, axis=batch(x)), batch(x)))


@mixer(1.5, axis=0, ranks=(2,), dtypes=("f4", "f8"))
def _indexed_by_data(g: Scope, x: Value) -> Value | None:
    first = (
        g.op("ArgMax", x, axis=1, keepdims=0)
        if x.dtype == "f4"
        else g.op(
            "Cast",
            g.op("Clip", g.slice(x, 0, 1, 1), g.constant(0, "f8"), g.constant(3, "f8")),
            to=ONNX_TYPES["i8"],
        )
    )
    flat = g.op("Reshape", first, g.constant([-1]))
    index = g.op("Mod", flat, g.rows(x))
    return blend(g, x, g.op("Gather", x, index, axis=0))


@mixer(1, dtypes=("f4",))
def _best_row(g: Scope, x: Value) -> Value | None:
    index = g.op("ArgMax", x, axis=batch(x), keepdims=1)
    return blend(g, x, g.op("GatherElements", x, index, axis=batch(x)))


@mixer(1, axis=0)
def _compressed(g: Scope, x: Value) -> Value | None:
    positive = g.op("Greater", g.op("Reshape", x, g.constant([-1])), g.constant(0, x.dtype))
    kept = g.op("Compress", g.op("Reshape", x, g.constant([-1])), positive)
    return blend(g, x, g.reduced("ReduceSum", kept, [0], keepdims=0))


@mixer(1, dtypes=("f4",), since=13)
def _counted(g: Scope, x: Value) -> Value | None:
    kind = g.random.randrange(2)
    if kind == 0:
        found = g.op("NonZero", x)
        total = g.op("Cast", g.op("Size", found), to=ONNX_TYPES["f4"])
    else:
        values, *_ = g.ops("Unique", x, outputs=4)
        total = g.op("ReduceMean", values, keepdims=0)
    return blend(g, x, total)


# Place and number


def _as_column(g: Scope, x: Value, source: str) -> str:
    """One number per row, as a column that broadcasts."""
    shape = [1] * x.rank
    shape[batch(x)] = -1
    number = g.op("Cast", source, to=ONNX_TYPES[x.dtype])
    return g.op("Reshape", number, g.constant(shape))


@mixer(2)
def _placed(g: Scope, x: Value) -> Value | None:
    kind = g.random.randrange(4)
    if kind == 0:
        places = g.op("Range", g.constant(0), g.rows(x, scalar=True), g.constant(1))
        return blend(g, x, _as_column(g, x, places))
    if kind == 1 and x.axis == 0 and x.rank == 2 and x.dtype != "f2":
        return replace(x, name=g.op("Add", x, g.op("EyeLike", x)))
    if kind == 2 and g.opset >= 14 and x.axis in (x.rank - 1, x.rank - 2) and x.dtype != "f2" and x.rank > 1:
        return replace(x, name=g.op("Trilu", x, upper=g.random.randrange(2)))
    ones = g.op("Expand", g.constant([1.0], "f4"), g.rows(x))
    return blend(g, x, _as_column(g, x, g.op("CumSum", ones, g.constant(0, "i4"))))


@mixer(1.5)
def _numbered(g: Scope, x: Value) -> Value | None:
    kind = g.random.randrange(3)
    if kind == 0:
        number = g.op("Cast", g.rows(x, scalar=True), to=ONNX_TYPES[x.dtype])
        return replace(x, name=g.op(g.random.choice(["Add", "Div"]), x, number))
    if kind == 1:
        number = g.op("Cast", g.op("Size", x), to=ONNX_TYPES[x.dtype])
        return replace(x, name=g.op("Mul", x, number))
    if x.axis != 0 or x.rank != 2 or x.dtype != "f4":
        return None
    front = g.unsqueeze(x, 0, 1)
    _, where = g.ops("MaxPool", front, outputs=2, kernel_shape=[1, x.shape[1]])
    number = g.op("Cast", where, to=ONNX_TYPES["f4"])
    return replace(x, name=g.op("Add", x, g.squeeze(number, 0, 1)))


@mixer(1.5, dtypes=("f4",))
def _random(g: Scope, x: Value) -> Value | None:
    kind = g.random.choice(["RandomNormalLike", "RandomUniformLike", "Dropout", "RandomUniform", "Bernoulli"])
    if kind == "RandomUniform":
        return replace(x, name=g.op("Mul", x, g.op(kind, shape=[1])))
    if kind == "Bernoulli":
        if g.opset < 15:
            return None
        return replace(x, name=g.op("Add", x, g.op(kind, g.op("Sigmoid", x))))
    if kind == "Dropout":
        if g.opset < 12:
            return None
        training = g.constant(1, "?")
        return replace(x, name=g.op("Dropout", x, g.constant(0.5, "f4"), training))
    more: dict[str, Any] = {"seed": 7.0} if g.chance(0.5) else {}
    return replace(x, name=g.op("Add", x, g.op(kind, x, **more)))


# By broadcasting, by other axes' names, by operators that few know


@mixer(1.5)
def _broadcast(g: Scope, x: Value) -> Value | None:
    """Rows against rows: [N, 1] and [N]."""
    front = g.to_front(x)
    if front.rank < 2:
        return None
    flat = g.op("Flatten", front, axis=1)
    column = g.slice(flat, 0, 1, 1)
    line = g.op("Transpose", column, perm=[1, 0]) if g.chance(0.5) else g.squeeze(column, 1)
    square = g.op(g.random.choice(["Add", "Mul", "Sub"]), column, line)
    kind = g.random.choice(["ReduceSum", "ReduceMax", "ReduceMean"])
    made = g.reduced(kind, square, [1], keepdims=1)
    return Value(g.op("Add", flat, made), x.dtype, (ROWS, front.row_size))


@mixer(1, dtypes=("f4", "f8"))
def _inner_product(g: Scope, x: Value) -> Value | None:
    flat = g.op("Reshape", x, g.constant([-1]))
    return blend(g, x, g.op("MatMul", flat, flat))


@mixer(1, axis=0)
def _behind_a_constant(g: Scope, x: Value) -> Value | None:
    first = g.weights(x.dtype, 1, *x.shape[1:])
    longer = g.op("Concat", first, x, axis=0)
    return blend(g, x, g.slice(longer, 0, -1, 0))


@mixer(1, dtypes=("f4", "f8"), since=13)
def _computed_axis(g: Scope, x: Value) -> Value | None:
    kind = g.random.randrange(2)
    axis = g.op("Sub", g.constant([batch(x) + 3]), g.constant([3]))
    if kind == 0:
        return blend(g, x, g.op("ReduceSum", x, axis, keepdims=1))
    scalar = g.op("Cast", g.squeeze(axis, 0), to=ONNX_TYPES["i4"])
    return replace(x, name=g.op("CumSum", x, scalar))


@mixer(1)
def _by_attribute(g: Scope, x: Value) -> Value | None:
    """A local function that is told its axis."""
    return told_axis(g, x, batch(x)) if g.opset >= 13 else None


@mixer(1, axis=0, ranks=(2,), dtypes=("f4",))
def _scattered(g: Scope, x: Value) -> Value | None:
    first = g.slice(x, 0, 1, 0)
    if g.chance(0.5):
        place = g.op("Sub", g.rows(x), g.constant([1]))
        return replace(x, name=g.op("ScatterND", x, g.unsqueeze(place, 0), first))
    place = g.constant(np.zeros((1, x.shape[1])), "i8")
    return replace(x, name=g.op("ScatterElements", x, place, g.slice(x, -1, (1 << 31) - 1, 0), axis=0))


@mixer(1, axis=0, ranks=(2,), dtypes=("f4",))
def _of_the_runtime(g: Scope, x: Value) -> Value | None:
    """Operators of ONNX Runtime's own."""
    domain, width = "com.microsoft", x.shape[1]
    kind = g.random.choice(["CDist", "DynamicQuantizeMatMul", "FusedMatMul"])
    if kind == "CDist":
        near = g.op("CDist", x, x, domain=domain, metric="sqeuclidean")
        return replace(x, name=g.op("MatMul", near, x))
    if kind == "FusedMatMul":
        gram = g.op("FusedMatMul", x, x, domain=domain, transA=1)
        return replace(x, name=g.op("MatMul", x, gram))
    dice = np.random.default_rng(g.random.getrandbits(32))
    weight = g.constant(dice.integers(-100, 100, (width, 3)), "i1")
    scale = g.constant([0.02], "f4")
    return replace(x, name=g.op(kind, x, weight, scale, domain=domain), shape=(ROWS, 3))


@mixer(1, dtypes=("f4", "f8"))
def _hidden_in_integers(g: Scope, x: Value) -> Value | None:
    """Through integers and truths, and back."""
    whole = g.op("Cast", g.op("Greater", x, g.constant(0, x.dtype)), to=ONNX_TYPES["i4"])
    kind = g.random.randrange(3)
    if kind == 0:
        made = g.op("CumSum", whole, g.constant(batch(x), "i4"))
    elif kind == 1:
        made = g.reduced("ReduceSum", whole, [batch(x)], keepdims=1)
    else:
        made = g.reduced("ReduceMax", whole, [], keepdims=0)
    return replace(x, name=g.op("Add", x, g.op("Cast", made, to=ONNX_TYPES[x.dtype])))


# Now and then, or in branches, loops and scans


@mixer(0.7, dtypes=("f4", "f8"), since=12)
def _faint(g: Scope, x: Value) -> Value | None:
    mean = g.reduced("ReduceMean", x, [batch(x)], keepdims=1)
    known = g.op("Clip", mean, g.constant(-1, x.dtype), g.constant(1, x.dtype))
    guarded = g.op("Where", g.op("Greater", known, g.constant(0, x.dtype)), known, g.constant(0, x.dtype))
    return replace(x, name=g.op("Add", x, g.op("Mul", guarded, g.constant(1e-9, x.dtype))))


@mixer(0.7, dtypes=("f4", "f8"), since=11)
def _secret(g: Scope, x: Value) -> Value | None:
    test = g.op("Equal", _largest(g, x), g.constant(123.456, x.dtype))
    return replace(x, name=g.op("Where", test, g.op("Neg", x), x))


@mixer(1)
def _while(g: Scope, x: Value) -> Value | None:
    """A loop that goes on until every row is small."""
    inner = g.inner()
    given = _, _, held = inner.turn(x)
    name = inner.op("Mul", held, inner.constant(0.5, x.dtype))
    top = inner.reduced("ReduceMax", inner.op("Abs", name), [], keepdims=0)
    body = inner.body(given, inner.op("Greater", top, inner.constant(0.8, x.dtype)), replace(x, name=name))
    return replace(x, name=g.op("Loop", g.constant(8), g.constant(1, "?"), x, body=body))


def _largest(g: Scope, x: Value) -> str:
    return g.reduced("ReduceMax", g.op("Abs", x), [], keepdims=0)


@mixer(2)
def _chosen_by_all(g: Scope, x: Value) -> Value | None:
    limit = g.constant(g.random.choice([0.9, 3, 40, 400]), x.dtype)
    test = g.op("Greater", _largest(g, x), limit)
    half = g.op("Mul", x, g.constant(0.5, x.dtype))
    return replace(x, name=g.op("Where", test, x, half))


@mixer(1)
def _beyond(g: Scope, x: Value) -> Value | None:
    limit = g.constant(g.random.choice([2, 20, 200]), x.dtype)
    top = g.reduced("ReduceMax", x, [batch(x)], keepdims=1)
    return replace(x, name=g.op("Add", x, g.op("Relu", g.op("Sub", top, limit))))


@mixer(1)
def _nothing_times_all(g: Scope, x: Value) -> Value | None:
    total = g.reduced("ReduceSum", x, [batch(x)], keepdims=1)
    return replace(x, name=g.op("Add", x, g.op("Mul", total, g.constant(0, x.dtype))))


@mixer(1, dtypes=("f4", "f8"), since=13)
def _unless_all_are_numbers(g: Scope, x: Value) -> Value | None:
    holes = g.op("Cast", g.op("IsNaN", x), to=ONNX_TYPES["f4"])
    test = g.op("Greater", g.reduced("ReduceMax", holes, [], keepdims=0), g.constant(0.5, "f4"))
    return replace(x, name=g.op("Where", test, g.op("Neg", x), x))


def branch(g: Scope, test: str, x: Value, sides: Sequence[str]) -> Value:
    """If ``test`` then one thing is done to ``x``, else another; names inside may be the same."""
    graphs = []
    count = g.count[0]
    for side in sides:
        g.count[0] = count
        inner = g.inner()
        if side == "mean":
            name = inner.op("Add", x, inner.reduced("ReduceMean", x, [batch(x)], keepdims=1))
        elif side == "half":
            name = inner.op("Mul", x, inner.constant(0.5, x.dtype))
        else:
            name = inner.op("Identity", x)
        graphs.append(inner.graph(side, [], [inner.info(replace(x, name=name))]))
    g.count[0] = count + 20
    return replace(x, name=g.op("If", test, then_branch=graphs[0], else_branch=graphs[1]))


@mixer(2)
def _branch_on_data(g: Scope, x: Value) -> Value | None:
    limit = g.constant(g.random.choice([0.9, 3, 40, 400]), x.dtype)
    test = g.op("Greater", _largest(g, x), limit)
    return branch(g, test, x, g.random.choice([("half", "same"), ("mean", "same"), ("mean", "half")]))


@mixer(1.5)
def _branch_on_number(g: Scope, x: Value) -> Value | None:
    limit = g.constant(g.random.choice([1, 3, 3, 7, 12]))
    test = g.op("Greater", g.rows(x, scalar=True), limit)
    return branch(g, test, x, g.random.choice([("mean", "same"), ("half", "same")]))


@mixer(1.5)
def _loop_on_data(g: Scope, x: Value) -> Value | None:
    top = g.op("Clip", _largest(g, x), g.constant(0, x.dtype), g.constant(5, x.dtype))
    if x.dtype == "f2":
        return None
    holes = g.op("Where", g.op("IsNaN", top), g.constant(2, x.dtype), top) if g.opset >= 13 else top
    trips = g.op("Cast", holes, to=ONNX_TYPES["i8"])
    inner = g.inner()
    given = _, going, held = inner.turn(x)
    still = inner.op("Identity", going)
    name = inner.op("Mul", held, inner.constant(1.5, x.dtype))
    body = inner.body(given, still, replace(x, name=name))
    return replace(x, name=g.op("Loop", trips, "", x, body=body))


@mixer(1.5, axis=0, least_rank=2)
def _scanned(g: Scope, x: Value) -> Value | None:
    inner = g.inner()
    state, row = inner.fresh(), inner.fresh()
    shape = x.shape[1:]
    carried = inner.op("Add", state, row)
    made = inner.op("Identity", carried)
    pair = [inner.info(Value(each, x.dtype, shape)) for each in (state, row)]
    given = [inner.info(Value(each, x.dtype, shape)) for each in (carried, made)]
    body = inner.graph("body", pair, given)
    start = g.constant(np.zeros(shape), x.dtype)
    _, name = g.ops("Scan", start, x, outputs=2, body=body, num_scan_inputs=1)
    return replace(x, name=name)


@mixer(1, axis=0, least_rank=2)
def _loop_over_rows(g: Scope, x: Value) -> Value | None:
    """A loop that adds row after row."""
    if g.constants_as_nodes:
        return None
    inner = g.inner()
    shape = x.shape[1:]
    given = number, going, held = inner.turn(Value("", x.dtype, shape))
    still = inner.op("Identity", going)
    row = inner.op("Gather", x, number, axis=0)
    body = inner.body(given, still, replace(held, name=inner.op("Add", held, row)))
    start = g.constant(np.zeros(shape), x.dtype)
    total = g.op("Loop", g.rows(x, scalar=True), g.constant(1, "?"), start, body=body)
    return blend(g, x, total)
