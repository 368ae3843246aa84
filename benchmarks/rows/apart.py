"""Operators that keep rows apart, whatever the rows are: elementwise, along other axes, shapes and copies.

Each function adds nodes behind a value and gives the new value, or None where it does not apply. None of them
may read another row, on any input; what is only apart most of the time belongs into ``mixing``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import numpy as np
from onnx import helper

from benchmarks.rows.graph import FLOATS, INTEGERS, ROWS, TEXT, Scope, Value

Step = Callable[[Scope, Value], Value | None]
STEPS: list[tuple[Step, float]] = []
LARGEST_ROW = 512


class Needs(TypedDict, total=False):
    """What a value and its graph must be for a step to apply; what is not said is free.

    ``axis``: where its rows are; ``since``: the least opset; ``others``: it has axes beside the batch.
    """

    axis: int
    ranks: tuple[int, ...]
    least_rank: int
    dtypes: tuple[str, ...]
    since: int
    exact: bool
    others: bool


def where(needs: Needs, function: Step) -> Step:
    """The step, where a value is what it needs; None elsewhere."""

    @functools.wraps(function)
    def applied(g: Scope, x: Value) -> Value | None:
        applies = (
            x.axis == needs.get("axis", x.axis)
            and x.rank in needs.get("ranks", (x.rank,))
            and x.rank >= needs.get("least_rank", 0)
            and x.dtype in needs.get("dtypes", (x.dtype,))
            and g.opset >= needs.get("since", 0)
            and (x.exact or not needs.get("exact"))
            and (bool(x.others) or not needs.get("others"))
        )
        return function(g, x) if applies else None

    return applied


def step(weight: float = 1.0, **needs: Unpack[Needs]) -> Callable[[Step], Step]:
    """Puts a function into the table, to be chosen as often as its weight says."""

    def enter(function: Step) -> Step:
        STEPS.append((where(needs, function), weight))
        return STEPS[-1][0]

    return enter


def inexact(x: Value, name: str, shape: tuple[int, ...] | None = None) -> Value:
    """Computed with rounding."""
    return replace(x, name=name, shape=x.shape if shape is None else shape, exact=False)


def beside(g: Scope, x: Value, *, dtype: str = "") -> Value | None:
    """Another value of the same shape, if there is one."""
    found = [v for v in g.values if v.shape == x.shape and v.dtype == (dtype or x.dtype) and v.name != x.name]
    return g.random.choice(found) if found else None


def small(g: Scope, dtype: str, x: Value) -> str:
    """A constant that broadcasts to ``x``: a scalar, or a size per axis, one where the rows are."""
    kind = g.random.randrange(3)
    if kind == 0 or not x.rank:
        shape: tuple[int, ...] = ()
    elif kind == 1 and x.shape[-1] != ROWS:
        shape = x.shape[-1:]
    else:
        shape = tuple(1 if size == ROWS or g.chance(0.5) else size for size in x.shape)
    dice = np.random.default_rng(g.random.getrandbits(32))
    if dtype in FLOATS:
        return g.constant(dice.standard_normal(shape), dtype)
    if dtype == "?":
        return g.constant(dice.integers(0, 2, shape), dtype)
    return g.constant(dice.integers(1, 6, shape), dtype)


# Elementwise

UNARY = {
    "Abs": 1, "Neg": 1, "Sigmoid": 1, "Tanh": 1, "Relu": 1, "Erf": 9, "Sin": 7, "Cos": 7, "Atan": 7, "Elu": 6,
    "LeakyRelu": 6, "Selu": 6, "Softplus": 1, "Softsign": 1, "HardSigmoid": 6, "HardSwish": 14, "Mish": 18,
    "Gelu": 20, "Celu": 12, "ThresholdedRelu": 10, "Identity": 1, "Sinh": 9, "Asinh": 9, "Dropout": 12,
    "Shrink": 9,
}  # fmt: skip
NARROW = ("Abs", "Neg", "Sigmoid", "Tanh", "Relu", "Identity", "Dropout", "Sin")
"""Those that ONNX Runtime has for other floats than float32."""
KEEPS_EXACT = {"Abs", "Neg", "Relu", "Identity", "Dropout"}


@step(5, dtypes=FLOATS)
def _unary(g: Scope, x: Value) -> Value | None:
    known = [
        name for name, since in UNARY.items() if since <= g.opset and (x.dtype == "f4" or name in NARROW)
    ]
    kind = g.random.choice(known)
    return replace(x, name=g.op(kind, x), exact=x.exact and kind in KEEPS_EXACT)


@step(2, dtypes=FLOATS)
def _guarded(g: Scope, x: Value) -> Value | None:
    kind = g.random.choice(["Sqrt", "Log", "Reciprocal", "Exp", "Pow"])
    if kind == "Exp":
        return inexact(x, g.op("Exp", g.op("Clip", x, g.constant(-9, x.dtype), g.constant(4, x.dtype))))
    if kind == "Pow":
        return inexact(x, g.op("Pow", x, g.constant(g.random.choice([2, 3]), x.dtype)))
    base = g.op("Add", g.op("Abs", x), g.constant(1, x.dtype))
    return inexact(x, g.op(kind, base))


@step(5)
def _with_constant(g: Scope, x: Value) -> Value | None:
    if not (x.is_float or x.dtype in INTEGERS):
        return None
    kind = g.random.choice(["Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu", "Mod"])
    if kind == "Mod" and x.is_float:
        kind = "Mul"
    if (kind == "PRelu" and x.dtype != "f4") or (g.opset < 12 and kind in ("Max", "Min")):
        kind = "Add"
    if kind == "Div" and x.is_float:
        return inexact(x, g.op("Div", x, g.constant(g.random.choice([0.5, 2, 3.7]), x.dtype)))
    other = small(g, x.dtype, x)
    pair = (other, x) if kind in ("Add", "Sub", "Mul") and g.chance(0.3) else (x, other)
    return replace(x, name=g.op(kind, *pair), exact=x.exact and not x.is_float)


@step(4)
def _with_another(g: Scope, x: Value) -> Value | None:
    other = beside(g, x)
    if other is None or not (x.is_float or x.dtype in INTEGERS):
        return None
    more = ["Sum", "Mean"] if x.dtype == "f4" else []
    kind = g.random.choice(["Add", "Sub", "Mul", *(["Max", "Min"] if g.opset >= 12 else []), *more])
    exact = x.exact and other.exact and not x.is_float
    return replace(x, name=g.op(kind, x, other), mixed=x.mixed or other.mixed, exact=exact)


@step(2)
def _chosen(g: Scope, x: Value) -> Value | None:
    other = beside(g, x)
    exact = [v for v in g.values if v.shape == x.shape and v.exact and v.dtype in (*FLOATS, *INTEGERS)]
    if not exact or x.dtype == "?":
        return None
    judge = g.random.choice(exact)
    test = g.op(g.random.choice(["Greater", "Less"]), judge, g.constant(g.random.choice([0, 1]), judge.dtype))
    if other is None and x.dtype == TEXT:
        return None
    rival = other.name if other is not None else small(g, x.dtype, x)
    mixed = x.mixed or judge.mixed or (other is not None and other.mixed)
    exact_all = x.exact and (other is None or other.exact)
    return replace(x, name=g.op("Where", test, x, rival), mixed=mixed, exact=exact_all)


@step(1, exact=True)
def _truths(g: Scope, x: Value) -> Value | None:
    if x.dtype == TEXT:
        return None
    if x.dtype == "?":
        other = beside(g, x)
        if other is None or g.chance(0.4):
            return replace(x, name=g.op("Not", x))
        name = g.op(g.random.choice(["And", "Or", "Xor"]), x, other)
        return replace(x, name=name, mixed=x.mixed or other.mixed)
    if x.is_float and g.chance(0.3) and x.dtype != "f2":
        return replace(x, name=g.op(g.random.choice(["IsNaN", "IsInf"]), x), dtype="?")
    kind = g.random.choice(["Greater", "Less", "Equal", *(["GreaterOrEqual"] if g.opset >= 12 else [])])
    return replace(x, name=g.op(kind, x, g.constant(1, x.dtype)), dtype="?")


@step(1)
def _cast(g: Scope, x: Value) -> Value | None:
    if x.dtype == TEXT:
        return None
    targets = ["f4", "f4", "f8"] + (["i8", "i4", "?"] if x.exact and not x.is_float else [])
    return g.cast(x, g.random.choice(targets))


@step(1, dtypes=FLOATS, exact=True)
def _rounded(g: Scope, x: Value) -> Value | None:
    return replace(x, name=g.op(g.random.choice(["Floor", "Ceil", "Round", "Sign"]), x))


@step(1, dtypes=FLOATS)
def _clipped(g: Scope, x: Value) -> Value | None:
    return replace(x, name=g.op("Clip", x, g.constant(-3, x.dtype), g.constant(3, x.dtype)))


@step(0.7, dtypes=("f4",), exact=True)
def _fake_quantised(g: Scope, x: Value) -> Value | None:
    scale, zero = g.constant(0.05, "f4"), g.constant(g.random.randrange(120, 130), "u1")
    return replace(x, name=g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero))


# Along other axes


def some_axes(g: Scope, x: Value) -> list[int]:
    """One or more axes that are not the batch."""
    others = x.others
    return sorted(g.random.sample(others, g.random.randint(1, len(others)))) if others else []


def either_sign(g: Scope, axis: int, rank: int) -> int:
    """The axis, or the same counted from behind."""
    return axis - rank if g.chance(0.4) else axis


REDUCTIONS = (
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSumExp", "ReduceProd",
)  # fmt: skip


def reduce_over(g: Scope, x: Value, axes: list[int], *, keepdims: bool, kind: str = "") -> Value:
    """Any reduction over these axes; the batch may be among them."""
    kind = kind or g.random.choice(REDUCTIONS)
    name = g.reduced(kind, x, [either_sign(g, axis, x.rank) for axis in axes], keepdims=int(keepdims))
    kept = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    bare = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    exact = x.exact and kind in ("ReduceMax", "ReduceMin")
    return replace(x, name=name, shape=kept if keepdims else bare, exact=exact)


@step(4)
def _reduced(g: Scope, x: Value) -> Value | None:
    axes = some_axes(g, x)
    if not axes or not x.is_float:
        return None
    return reduce_over(g, x, axes, keepdims=g.chance(0.5))


@step(3, dtypes=FLOATS, others=True)
def _normalised(g: Scope, x: Value) -> Value | None:
    if x.dtype == "f2" and g.opset < 13:
        return None
    axis = g.random.choice(x.others)
    if g.opset < 13 and (axis != x.rank - 1 or x.axis == x.rank - 1 or x.axis != 0):
        return None  # before opset 13 all axes from this one on are one
    kind = g.random.choice(["Softmax", "Softmax", "LogSoftmax", "LpNormalization"])
    if kind == "LpNormalization" and x.dtype == "f2":
        kind = "Softmax"
    return inexact(x, g.op(kind, x, axis=either_sign(g, axis, x.rank)))


@step(2, dtypes=("f4", "f8"), since=17)
def _layer_normalised(g: Scope, x: Value) -> Value | None:
    if x.axis is None or x.axis == x.rank - 1:
        return None
    axis = g.random.randint(x.axis + 1, x.rank - 1)
    scale = g.weights(x.dtype, *x.shape[axis:])
    name = g.op("LayerNormalization", x, scale, axis=either_sign(g, axis, x.rank), epsilon=1e-2)
    return inexact(x, name)


@step(1.5, dtypes=("f4", "i4"), exact=True, others=True)
def _arg(g: Scope, x: Value) -> Value | None:
    axis = g.random.choice(x.others)
    name = g.op(g.random.choice(["ArgMax", "ArgMin"]), x, axis=axis, keepdims=1)
    return replace(x, name=name, dtype="i8", shape=x.sized(axis, 1))


@step(1, dtypes=("f4", "i8"), exact=True, others=True)
def _top(g: Scope, x: Value) -> Value | None:
    axis = g.random.choice(x.others)
    count = g.random.randint(1, x.shape[axis])
    values, _ = g.ops("TopK", x, g.constant([count]), outputs=2, axis=either_sign(g, axis, x.rank))
    return replace(x, name=values, shape=x.sized(axis, count))


@step(1, dtypes=("f4", "f8", "i8"), others=True)
def _cumulative(g: Scope, x: Value) -> Value | None:
    axis = either_sign(g, g.random.choice(x.others), x.rank)
    more: dict[str, Any] = {"reverse": 1} if g.chance(0.3) else {}
    return inexact(x, g.op("CumSum", x, g.constant(axis, "i4"), **more))


@step(2.5, others=True)
def _cut(g: Scope, x: Value) -> Value | None:
    if x.dtype == "i1":
        return None
    axis = g.random.choice(x.others)
    size = x.shape[axis]
    if g.chance(0.3) and size > 1 and x.dtype != TEXT:
        name = g.slice(x, -1, -size - 1, axis, step=-1)
        return replace(x, name=name)
    count = g.random.randint(1, size)
    start = g.random.randint(0, size - count)
    end = start + count if start + count < size or g.chance(0.5) else (1 << 31) - 1
    name = g.slice(x, start, end, either_sign(g, axis, x.rank))
    return replace(x, name=name, shape=x.sized(axis, count))


@step(2, others=True)
def _gathered(g: Scope, x: Value) -> Value | None:
    axis = g.random.choice(x.others)
    size = x.shape[axis]
    if g.chance(0.4):
        name = g.op("Gather", x, g.constant(g.random.randrange(-size, size)), axis=axis)
        return replace(x, name=name, shape=x.sized(axis))
    count = g.random.randint(1, 4)
    chosen = [g.random.randrange(size) for _ in range(count)]
    name = g.op("Gather", x, g.constant(chosen), axis=axis)
    return replace(x, name=name, shape=x.sized(axis, count))


@step(2, others=True)
def _joined(g: Scope, x: Value) -> Value | None:
    axis = g.random.choice(x.others)
    found = [
        v
        for v in g.values
        if v.dtype == x.dtype
        and v.rank == x.rank
        and all(a == b for place, (a, b) in enumerate(zip(v.shape, x.shape, strict=True)) if place != axis)
    ]
    other = g.random.choice(found) if found else x
    if other.shape[axis] == ROWS:
        return None
    name = g.op("Concat", x, other, axis=either_sign(g, axis, x.rank))
    shape = x.sized(axis, x.shape[axis] + other.shape[axis])
    return replace(x, name=name, shape=shape, mixed=x.mixed or other.mixed, exact=x.exact and other.exact)


@step(1)
def _split(g: Scope, x: Value) -> Value | None:
    axes = [axis for axis in x.others if x.shape[axis] >= 2]
    if not axes:
        return None
    axis = g.random.choice(axes)
    first = g.random.randint(1, x.shape[axis] - 1)
    sizes = [first, x.shape[axis] - first]
    if g.opset >= 13:
        parts = g.ops("Split", x, g.constant(sizes), outputs=2, axis=axis)
    else:
        parts = g.ops("Split", x, outputs=2, axis=axis, split=sizes)
    made = [replace(x, name=part, shape=x.sized(axis, size)) for part, size in zip(parts, sizes, strict=True)]
    g.values.append(made[1])
    return made[0]


@step(1, dtypes=FLOATS, others=True)
def _padded(g: Scope, x: Value) -> Value | None:
    if x.row_size > LARGEST_ROW // 4:
        return None
    axis = g.random.choice(x.others)
    before, after = [0] * x.rank, [0] * x.rank
    before[axis], after[axis] = g.random.randint(0, 2), g.random.randint(0, 2)
    mode = g.random.choice(["constant", "edge"])
    name = g.op("Pad", x, g.constant(before + after), mode=mode)
    size = x.shape[axis] + before[axis] + after[axis]
    return replace(x, name=name, shape=x.sized(axis, size))


@step(0.7, others=True)
def _tiled(g: Scope, x: Value) -> Value | None:
    if x.row_size > LARGEST_ROW // 4 or x.dtype == TEXT:
        return None
    axis = g.random.choice(x.others)
    times = [2 if place == axis else 1 for place in range(x.rank)]
    name = g.op("Tile", x, g.constant(times))
    return replace(x, name=name, shape=x.sized(axis, 2 * x.shape[axis]))


@step(0.7, axis=0, ranks=(2,), dtypes=("f4", "i8"))
def _gathered_elements(g: Scope, x: Value) -> Value | None:
    ids = [v for v in g.values if v.dtype == "i8" and v.axis == 0 and v.rank == 2 and v.exact]
    if not ids:
        return None
    index = g.random.choice(ids)
    low, high = g.constant(0), g.constant(x.shape[1] - 1)
    within = g.op("Min", g.op("Max", index, low), high)
    name = g.op("GatherElements", x, within, axis=1)
    return replace(x, name=name, shape=index.shape, mixed=x.mixed or index.mixed)


@step(0.5, axis=0, ranks=(2,), dtypes=("f4",), exact=True)
def _scattered(g: Scope, x: Value) -> Value | None:
    if x.shape[1] < 2:
        return None
    first = g.op("ArgMax", x, axis=1, keepdims=1)
    name = g.op("ScatterElements", x, first, g.slice(x, 0, 1, 1), axis=1)
    return replace(x, name=name)


# Shapes


@step(4, least_rank=2)
def _transposed(g: Scope, x: Value) -> Value | None:
    if x.dtype == TEXT:
        return None
    order = list(range(x.rank))
    g.random.shuffle(order)
    return g.transposed(x, order)


@step(1.5)
def _new_axis(g: Scope, x: Value) -> Value | None:
    if x.rank >= 5:
        return None
    axis = g.random.randint(0, x.rank)
    name = g.unsqueeze(x, either_sign(g, axis, x.rank + 1))
    return replace(x, name=name, shape=(*x.shape[:axis], 1, *x.shape[axis:]))


@step(1.5)
def _lost_axis(g: Scope, x: Value) -> Value | None:
    ones = [axis for axis, size in enumerate(x.shape) if size == 1]
    if not ones:
        return None
    axis = g.random.choice(ones)
    name = g.squeeze(x, either_sign(g, axis, x.rank))
    return replace(x, name=name, shape=x.sized(axis))


def factors(g: Scope, size: int) -> list[int]:
    """Up to three sizes whose product it is."""
    sizes: list[int] = []
    while size > 1 and len(sizes) < 2 and g.chance(0.7):
        divisor = g.random.choice([each for each in range(1, size + 1) if size % each == 0])
        sizes.append(divisor)
        size //= divisor
    return [*sizes, size]


@step(5, axis=0)
def _reshaped(g: Scope, x: Value) -> Value | None:
    target = factors(g, x.row_size)
    return replace(x, name=reshape_rows(g, x, target), shape=(ROWS, *target))


def reshape_rows(g: Scope, x: Value, target: list[int]) -> str:
    """Rows in another shape, in one of the ways that exporters have."""
    way = g.random.randrange(6)
    if way == 0:
        return g.op("Reshape", x, g.constant([0, *target]))
    if way == 1:
        return g.op("Reshape", x, g.constant([-1, *target]))
    if way == 2 and len(target) == 1:
        return g.op("Flatten", x, axis=1)
    if way == 3:
        free = g.random.randrange(len(target))
        sizes = [-1 if place == free else size for place, size in enumerate(target)]
        return g.op("Reshape", x, g.constant([0, *sizes]))
    if way == 4:
        like = [v for v in g.values if v.axis is not None and not v.mixed] or [x]
        return g.op("Reshape", x, g.shape_with_rows(g.random.choice(like), [ROWS, *target]))
    return g.op("Reshape", x, g.shape_with_rows(x, [ROWS, *target]))


@step(1)
def _reshaped_away_from_the_batch(g: Scope, x: Value) -> Value | None:
    axis = x.axis
    if not axis or x.dtype == TEXT:
        return None
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    target = [int(np.prod(before, dtype=np.int64)), ROWS, int(np.prod(after, dtype=np.int64))]
    shape = g.constant(target) if g.chance(0.5) else g.shape_with_rows(x, target)
    return replace(x, name=g.op("Reshape", x, shape), shape=tuple(target))


@step(1, dtypes=("f4", "f8"))
def _expanded(g: Scope, x: Value) -> Value | None:
    if x.axis is None:
        return None
    plain = tuple(1 if size == ROWS else size for size in x.shape)
    if g.chance(0.5):
        more = g.op("Expand", g.weights(x.dtype, *plain), g.op("Shape", x))
    else:
        whole = g.op("ConstantOfShape", g.shape_with_rows(x, x.shape))
        more = g.op("Cast", whole, to=1 if x.dtype == "f4" else 11)
    return inexact(x, g.op("Add", x, more))


@step(1, axis=0, dtypes=("f4", "f8"))
def _expanded_as_torch_does(g: Scope, x: Value) -> Value | None:
    """A size of -1 in the shape stands for that of the value itself."""
    rest = [g.constant([-1] * (x.rank - 1))] if x.rank > 1 else []
    wanted = g.op("Concat", g.rows(x), *rest, axis=0)
    ones = g.op("ConstantOfShape", g.constant([x.rank]), value=helper.make_tensor("one", 7, [1], [1]))
    minus = g.op("Mul", ones, g.constant(-1))
    shape = g.op("Where", g.op("Equal", wanted, minus), ones, wanted)
    more = g.weights(x.dtype, 1, *x.shape[1:])
    return inexact(x, g.op("Add", x, g.op("Expand", more, shape)))


@step(1, axis=0, ranks=(3,), dtypes=("f4", "f8"))
def _class_token(g: Scope, x: Value) -> Value | None:
    token = g.op("Expand", g.weights(x.dtype, 1, 1, x.shape[2]), g.shape_with_rows(x, [ROWS, 1, x.shape[2]]))
    name = g.op("Concat", token, x, axis=1)
    return replace(x, name=name, shape=(ROWS, x.shape[1] + 1, x.shape[2]))


@step(1, axis=0, ranks=(3,), dtypes=("f4",))
def _positions(g: Scope, x: Value) -> Value | None:
    length = g.op("Gather", g.op("Shape", x), g.constant(1), axis=0)
    places = g.op("Range", g.constant(0), length, g.constant(1))
    return inexact(x, g.op("Add", x, g.op("Gather", g.weights("f4", 16, x.shape[2]), places, axis=0)))


@step(0.7, dtypes=("f4", "f8"), since=14)
def _causal_along_another_axis(g: Scope, x: Value) -> Value | None:
    if x.axis is None or x.axis >= x.rank - 2:
        return None
    return replace(x, name=g.op("Trilu", x, upper=g.random.randrange(2)))


# Words and numbers


@step(2, dtypes=INTEGERS, exact=True)
def _embedded(g: Scope, x: Value) -> Value | None:
    if x.row_size > 64:
        return None
    size, width = 7, g.random.randint(1, 5)
    if g.chance(0.3):
        rest = g.op("Mod", g.op("Abs", x), g.constant(size, x.dtype))
        name = g.op("OneHot", rest, g.constant(size), g.constant([0, 1], "f4"), axis=-1)
        return replace(x, name=name, dtype="f4", shape=(*x.shape, size))
    rest = (
        g.op("Mod", x, g.constant(size, x.dtype))
        if g.chance(0.7)
        else g.op("Clip", x, g.constant(0, x.dtype), g.constant(size - 1, x.dtype))
    )
    if g.opset < 12:
        rest = g.op("Mod", x, g.constant(size, x.dtype))
    name = g.op("Gather", g.weights("f4", size, width), rest, axis=0)
    return replace(x, name=name, dtype="f4", shape=(*x.shape, width))


@step(0.5, dtypes=("i8",))
def _numbered_from_on_high(g: Scope, x: Value) -> Value | None:
    """Numbers of words that begin late: what is made up at random is out of range."""
    if x.name[0] != "x" or x.name in g.lows or g.depth or x.row_size > 64:
        return None
    if any(x.name in node.input for node in g.nodes):
        return None
    low, size, width = g.random.choice([100, 1000]), 6, g.random.randint(1, 5)
    g.lows[x.name] = low
    index = g.op("Sub", x, g.constant(low))
    name = g.op("Gather", g.weights("f4", size, width), index, axis=0)
    return replace(x, name=name, dtype="f4", shape=(*x.shape, width))


@step(3, axis=0, dtypes=(TEXT,))
def _words(g: Scope, x: Value) -> Value | None:
    if g.chance(0.2) and g.opset >= 20:
        return replace(x, name=g.op("StringConcat", x, g.constant("!", TEXT)))
    more: dict[str, Any] = {"keys_strings": ["a", "b", "word"], "domain": "ai.onnx.ml"}
    if g.chance(0.5):
        name = g.op("LabelEncoder", x, values_int64s=[1, 2, 3], default_int64=0, **more)
        return replace(x, name=name, dtype="i8")
    name = g.op("LabelEncoder", x, values_floats=[0.5, -1.0, 2.0], default_float=0.0, **more)
    return replace(x, name=name, dtype="f4")
