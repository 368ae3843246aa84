"""Where each operator leaves the rows of a batch; without a rule it is not known to be row-independent.

A rule returns for every output which axis holds its rows, or raises ``Mixes``. It is called only if an input
has rows; for ``MAKERS`` always. No rule reads a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from clockwork_serve.store.onnx.row_values import (
    Label,
    Mixes,
    Operation,
    RowAxis,
    Shape,
    Value,
    aligned,
    axis_of,
    flags_of,
    labelled,
    regrouped,
)

Rule = Callable[[Operation], list[RowAxis | None]]
Found = list[RowAxis | None]

ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd",
    "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Celu", "Cos", "Cosh", "Div", "Elu",
    "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish",
    "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min",
    "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "RegexFullMatch", "Relu",
    "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt",
    "StringConcat", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor", "Binarizer",
    "LabelEncoder", "CategoryMapper", "Clip",
)  # fmt: skip
ELEMENTWISE_MICROSOFT = ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")
REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Random operators: a result depends on the requests before."""
MAKERS = frozenset({"ConstantOfShape", "Expand", "Tile"})
"""Operators that may create rows from the number of rows."""
SIZES_AT: dict[str, frozenset[int]] = {
    "AffineGrid": frozenset({1}), "CenterCropPad": frozenset({1}), "ConstantOfShape": frozenset({0}),
    "Expand": frozenset({1}), "Reshape": frozenset({1}), "Slice": frozenset({1, 2, 3, 4}),
    "Tile": frozenset({1}), "Resize": frozenset({1, 2, 3}),
}  # fmt: skip
"""Inputs that may depend on the number of rows: they are shapes, and the rules check them."""


def elementwise(call: Operation) -> Found:
    """One element out for one element of each input, with broadcasting."""
    if call.version < 7 and "axis" in call.attributes:
        raise Mixes("uses the broadcasting of old opsets")
    rank = len(call.output())
    pairs = [(v, aligned(len(v.sizes), rank)) for v in call.inputs if v is not None]
    return labelled(pairs, [aligned(rank, rank)] * len(call.outputs))


def _first_only(call: Operation) -> Found:
    """Elementwise in input 0; the others are settings."""
    call.fixed(*range(1, len(call.inputs)))
    return [call.value(0).rows] * len(call.outputs)


def _cast_like(call: Operation) -> Found:
    return [call.value(0).rows]


def _batch_first(*others: int) -> Rule:
    """Rows on axis 0 of input 0, of the inputs in ``others`` and of all outputs; the rest are settings."""

    def rule(call: Operation) -> Found:
        pairs: list[tuple[Value | None, list[Label]]] = []
        for number, value in enumerate(call.inputs):
            if number and number not in others:
                call.fixed(number)
            elif value is not None:
                pairs.append((value, _leading(value, "n")))
        if len(call.value(0).sizes) < 2:
            raise Mixes("operates on a single row")
        for shape in call.outputs:
            if shape is not None and (not shape or shape[0] != call.count):
                raise Mixes("has an output without rows")
        return labelled(pairs, [["n"]] * len(call.outputs))

    return rule


def _leading(value: Value, *labels: Label) -> list[Label]:
    return [*labels, *[None] * max(0, len(value.sizes) - len(labels))]


def matmul(call: Operation) -> Found:
    """Numpy's matrix product."""
    return _product(call, call.value(0), call.value(1))


def _product(call: Operation, a: Value, b: Value, transposed: tuple[bool, bool] = (False, False)) -> Found:
    ranks = len(a.sizes), len(b.sizes)
    rank = max(*ranks, 2)
    ends: list[list[Label]] = [["m", None], [None, "k"]]
    ends = [list(reversed(end)) if flip else end for end, flip in zip(ends, transposed, strict=True)]
    first: list[Label] = [*_batches(ranks[0], rank), *ends[0]] if ranks[0] > 1 else [None]
    second: list[Label] = [*_batches(ranks[1], rank), *ends[1]] if ranks[1] > 1 else [None]
    out: list[Label] = [*_batches(rank, rank)]
    out += ["m"] if ranks[0] > 1 else []
    out += ["k"] if ranks[1] > 1 else []
    return labelled([(a, first), (b, second)], [out] * len(call.outputs))


def _batches(rank: int, to: int) -> list[Label]:
    return [f"b{axis + to - rank}" for axis in range(rank - 2)]


def _gemm(call: Operation) -> Found:
    a, b = bool(call.attributes.get("transA", 0)), bool(call.attributes.get("transB", 0))
    first: list[Label] = [None, "m"] if a else ["m", None]
    second: list[Label] = ["k", None] if b else [None, "k"]
    pairs: list[tuple[Value | None, list[Label]]] = [(call.value(0), first), (call.value(1), second)]
    bias = call.given(2)
    if bias is not None:
        labels: list[Label] = ["m", "k"]
        pairs.append((bias, labels[2 - len(bias.sizes) :]))
    return labelled(pairs, [["m", "k"]])


def _fused_matmul(call: Operation) -> Found:
    if call.attributes.get("transBatchA", 0) or call.attributes.get("transBatchB", 0):
        raise Mixes("transposes batches")
    flips = bool(call.attributes.get("transA", 0)), bool(call.attributes.get("transB", 0))
    return _product(call, call.value(0), call.value(1), flips)


def _matmul_integer(call: Operation) -> Found:
    call.fixed(2, 3)
    zero = call.given(2)
    if zero is not None and math.prod(zero.sizes) != 1:
        raise Mixes("has a zero point for every row")
    return matmul(call)


def _qlinear_matmul(call: Operation) -> Found:
    call.fixed(1, 2, 4, 5, 6, 7)
    for number in (1, 2, 6, 7):
        if math.prod(call.value(number).sizes) != 1:
            raise Mixes("has a scale for every row")
    return _product(call, call.value(0), call.value(3))


def _matmul_integer_to_float(call: Operation) -> Found:
    call.fixed(*range(2, len(call.inputs)))
    for number in (2, 4):
        value = call.given(number)
        if value is not None and math.prod(value.sizes) != 1:
            raise Mixes("has a scale for every row")
    return _product(call, call.value(0), call.value(1))


def _qlinear_pair(call: Operation) -> Found:
    call.fixed(1, 2, 4, 5, 6, 7)
    rank = len(call.output())
    pairs = [(value, aligned(len(value.sizes), rank)) for value in (call.value(0), call.value(3))]
    return labelled(pairs, [aligned(rank, rank)])


def _pool(call: Operation) -> Found:
    rank = len(call.value(0).sizes)
    labels: list[Label] = ["n", "c", *[None] * (rank - 2)]
    call.fixed(*range(1, len(call.inputs)))
    if call.op == "MaxPool" and len(call.outputs) > 1:
        call.drop.append((1, "returns indices into the whole tensor"))
    return labelled([(call.value(0), labels)], [labels] * len(call.outputs))


def _batch_normalisation(call: Operation) -> Found:
    if call.version < 7 or call.attributes.get("training_mode", 0):
        raise Mixes("normalises over the rows")
    if call.version < 14 and len(call.outputs) > 1:
        raise Mixes("normalises over the rows")
    labels = aligned(len(call.value(0).sizes), len(call.value(0).sizes))
    pairs: list[tuple[Value | None, list[Label]]] = [(call.value(0), labels)]
    pairs += [(call.value(number), [1]) for number in range(1, 5)]
    return labelled(pairs, [labels])


def _instance_normalisation(call: Operation) -> Found:
    labels: list[Label] = ["n", "c", *[None] * (len(call.value(0).sizes) - 2)]
    return labelled([(call.value(0), labels), (call.value(1), ["c"]), (call.value(2), ["c"])], [labels])


def _layer_normalisation(call: Operation) -> Found:
    rank = len(call.value(0).sizes)
    axis = axis_of(int(call.attributes.get("axis", -1)), rank)
    labels = [each if number < axis else None for number, each in enumerate(aligned(rank, rank))]
    pairs = [(call.value(0), labels)]
    pairs += [(v, labels[rank - len(v.sizes) :]) for v in call.inputs[1:] if v is not None]
    return labelled(pairs, [labels] * len(call.outputs))


def _skip_layer_normalisation(call: Operation) -> Found:
    """A residual sum (inputs 0, 1 and a bias) normalised over the last axis."""
    rank = len(call.value(0).sizes)
    labels: list[Label] = [*range(rank - 1), None]
    pairs = [(v, labels[rank - len(v.sizes) :]) for v in call.inputs if v is not None]
    return labelled(pairs, [labels if len(shape or labels) == rank else [] for shape in call.outputs])


def _along(default: int, *, keeps: bool = True) -> Rule:
    """Computes along one axis, attribute ``axis``; ``keeps`` it in the output unless keepdims is 0."""

    def rule(call: Operation) -> Found:
        rank = len(call.value(0).sizes)
        call.fixed(*range(1, len(call.inputs)))
        axis = axis_of(int(call.attributes.get("axis", default)), rank)
        return _without(call, {axis}, kept=keeps or bool(call.attributes.get("keepdims", 1)))

    return rule


def _without(call: Operation, axes: set[int], *, kept: bool) -> Found:
    rank = len(call.value(0).sizes)
    labels: list[Label] = [None if axis in axes else axis for axis in range(rank)]
    out = labels if kept else [label for label in labels if label is not None]
    return labelled([(call.value(0), labels)], [out] * len(call.outputs))


def _softmax(call: Operation) -> Found:
    rank = len(call.value(0).sizes)
    if call.version >= 13:
        return _without(call, {axis_of(int(call.attributes.get("axis", -1)), rank)}, kept=True)
    axis = axis_of(int(call.attributes.get("axis", 1)), rank)
    return _without(call, set(range(axis, rank)), kept=True)


def _reduce(call: Operation) -> Found:
    axes = call.setting("axes", 1)
    if not axes:
        if axes is None and call.version >= 13 and call.attributes.get("noop_with_empty_axes", 0):
            return [call.value(0).rows]
        if axes is not None and call.attributes.get("noop_with_empty_axes", 0):
            return [call.value(0).rows]
        raise Mixes("reduces the whole tensor")
    call.fixed(1)
    rank = len(call.value(0).sizes)
    return _without(
        call, {axis_of(axis, rank) for axis in axes}, kept=bool(call.attributes.get("keepdims", 1))
    )


def _mean_variance(call: Operation) -> Found:
    rank = len(call.value(0).sizes)
    return _without(call, {axis_of(a, rank) for a in call.attributes.get("axes", [0, 2, 3])}, kept=True)


def _cumulative(call: Operation) -> Found:
    axis = call.known(1)
    call.fixed(1)
    if not axis:
        raise Mixes("has no axis")
    return _without(call, {axis_of(int(axis[0]), len(call.value(0).sizes))}, kept=True)


def _lrn(call: Operation) -> Found:
    return _without(call, {1}, kept=True)


def _last_axes(count: int, *, kept: bool = True) -> Rule:
    def rule(call: Operation) -> Found:
        rank = len(call.value(0).sizes)
        call.fixed(*range(1, len(call.inputs)))
        return _without(call, set(range(rank - count, rank)), kept=kept)

    return rule


def _transpose(call: Operation) -> Found:
    rank = len(call.value(0).sizes)
    labels = aligned(rank, rank)
    perm = call.attributes.get("perm", list(reversed(range(rank))))
    return labelled([(call.value(0), labels)], [[labels[axis] for axis in perm]])


def _reshape(call: Operation) -> Found:
    call_shape = call.given(1)
    if call_shape is not None and call_shape.rows is not None:
        raise Mixes("reshapes by values of requests")
    found = regrouped(call.value(0), call.output(), call.count)
    if call_shape is not None and call_shape.is_sized:
        _only_sized(call_shape, found.axis, len(call.output()))
    return [found]


def _only_sized(shape: Value, axis: int, rank: int) -> None:
    """Raise ``Mixes`` if sizes other than that of the rows follow from the number of rows."""
    if shape.known is None:
        raise Mixes("has a shape that is not constant")
    flags = [False] * (rank - shape.known.size) + list(flags_of(shape).flat)
    if any(flag and each != axis for each, flag in enumerate(flags)):
        raise Mixes("makes the size of a row depend on the number of rows")


def _expand(call: Operation) -> Found:
    value, shape = call.value(0), call.value(1)
    out = call.output()
    if shape.rows is not None:
        raise Mixes("expands by values of requests")
    if value.rows is not None:
        found = value.rows.at(value.rows.axis + len(out) - len(value.sizes))
        if shape.is_sized:
            _only_sized(shape, found.axis, len(out))
        return [found]
    if not shape.is_sized:
        return [None]
    if value.is_sized:
        raise Mixes("broadcasts the number of rows to all rows")
    sizes = [1] * (len(out) - len(value.sizes)) + list(value.sizes)
    return [_made(shape, out, call.count, len(out), [size == 1 for size in sizes])]


def _made(shape: Value, out: Shape, count: int, rank: int, free: list[bool]) -> RowAxis:
    """Rows created by a shape, one of whose sizes is the number of rows: all rows are equal."""
    if shape.known is None:
        raise Mixes("has a shape that is not constant")
    flags = [False] * (rank - shape.known.size) + list(flags_of(shape).flat)
    sized = [axis for axis, flag in enumerate(flags) if flag]
    if len(sized) != 1 or out[sized[0]] % count or not free[sized[0]]:
        raise Mixes("has a shape in which the number of rows is not exactly one size")
    return RowAxis(sized[0], 1, out[sized[0]] // count)


def _constant_of_shape(call: Operation) -> Found:
    shape = call.value(0)
    if shape.rows is not None:
        raise Mixes("makes a tensor whose size depends on values of requests")
    if not shape.is_sized:
        return [None]
    out = call.output()
    return [_made(shape, out, call.count, len(out), [True] * len(out))]


def _tile(call: Operation) -> Found:
    value = call.value(0)
    if call.version < 6:
        raise Mixes("is of an old version")
    repeats = call.value(1)
    if repeats.rows is not None:
        raise Mixes("repeats by values of requests")
    times = call.known(1)
    assert times is not None
    if value.rows is not None:
        call.fixed(1)
        rows = value.rows
        return [RowAxis(rows.axis, rows.outer * int(times[rows.axis]), rows.inner)]
    if not repeats.is_sized:
        return [None]
    sized = [axis for axis, flag in enumerate(flags_of(repeats)) if flag]
    if len(sized) != 1 or times[sized[0]] != call.count or value.is_sized:
        raise Mixes("repeats by the number of rows")
    return [RowAxis(sized[0], 1, value.sizes[sized[0]])]


def _concat(call: Operation) -> Found:
    values = [value for value in call.inputs if value is not None]
    return [joined(values, axis_of(int(call.attributes.get("axis", 1)), len(values[0].sizes)))]


def joined(values: list[Value], axis: int) -> RowAxis | None:
    """Where the rows are after concatenating values along ``axis``."""
    if any(value.is_sized for value in values):
        raise Mixes("computes with the number of rows")
    rows = [value.rows for value in values]
    first = next(each for each in rows if each is not None)
    if any(each is None or (each.axis, each.inner) != (first.axis, first.inner) for each in rows):
        raise Mixes("joins rows with values that are not rows")
    if first.axis == axis:
        return RowAxis(axis, sum(each.outer for each in rows if each is not None), first.inner)
    if any(each != first for each in rows):
        raise Mixes("combines different rows")
    return first


def _split(call: Operation) -> Found:
    call.fixed(1)
    value = call.value(0)
    assert value.rows is not None
    axis = axis_of(int(call.attributes.get("axis", 0)), len(value.sizes))
    if value.rows.axis != axis:
        return [value.rows] * len(call.outputs)
    parts = len(call.outputs)
    if value.rows.outer % parts or len({shape and shape[axis] for shape in call.outputs}) != 1:
        raise Mixes("splits the rows")
    return [RowAxis(axis, value.rows.outer // parts, value.rows.inner)] * parts


def _slice(call: Operation) -> Found:
    value = call.value(0)
    if value.rows is None:
        raise Mixes("slices by values of requests")
    for number in range(1, len(call.inputs)):
        each = call.given(number)
        if each is not None and each.rows is not None:
            raise Mixes("slices by values of requests")
    rank = len(value.sizes)
    starts = call.setting("starts", 1)
    given = call.setting("axes", 3)
    axes = [axis_of(int(axis), rank) for axis in (given if given is not None else range(len(starts or [])))]
    if value.rows.axis in axes:
        place = axes.index(value.rows.axis)
        steps = call.known(4) if call.version >= 10 else None
        begin = (starts or [])[place]
        whole = call.output()[value.rows.axis] == value.sizes[value.rows.axis]
        if not whole or begin > 0 or (steps is not None and steps[place] != 1):
            raise Mixes("selects some of the rows")
    for number in (1, 2):
        each = call.given(number)
        if each is not None and each.is_sized:
            flags = flags_of(each) if each.known is not None else [True] * len(axes)
            if any(flag and axis != value.rows.axis for axis, flag in zip(axes, flags, strict=True)):
                raise Mixes("slices by the number of rows")
    return [value.rows]


def _gather(call: Operation) -> Found:
    data, indices = call.value(0), call.value(1)
    axis = axis_of(int(call.attributes.get("axis", 0)), len(data.sizes))
    if data.is_sized or indices.is_sized:
        raise Mixes("indexes by the number of rows")
    if data.rows is not None and indices.rows is not None:
        raise Mixes("indexes rows by values of requests")
    if indices.rows is not None:
        return [indices.rows.at(axis + indices.rows.axis)]
    assert data.rows is not None
    if data.rows.axis == axis:
        raise Mixes("selects rows by their position in the batch")
    behind = data.rows.axis > axis
    return [data.rows.at(data.rows.axis + len(indices.sizes) - 1) if behind else data.rows]


def _all_rows(*numbers: int) -> Rule:
    """Indexing along attribute ``axis``: all of these inputs have the rows on the same other axis."""

    def rule(call: Operation) -> Found:
        values = [call.value(number) for number in numbers]
        rank = len(values[0].sizes)
        axis = axis_of(int(call.attributes.get("axis", 0)), rank)
        rows = values[0].rows
        if rows is None or any(value.rows != rows for value in values):
            raise Mixes("indexes by the position in the batch")
        if rows.axis == axis:
            raise Mixes("selects rows by indices")
        return [rows]

    return rule


def _gather_nd(call: Operation) -> Found:
    data, indices = call.value(0), call.value(1)
    shared = int(call.attributes.get("batch_dims", 0))
    depth = indices.sizes[-1]
    if data.is_sized or indices.is_sized:
        raise Mixes("indexes by the number of rows")
    if data.rows is None:
        assert indices.rows is not None
        if indices.rows.axis == len(indices.sizes) - 1 or shared > indices.rows.axis:
            raise Mixes("indexes by the position in the batch")
        return [indices.rows]
    if data.rows.axis < shared:
        if indices.rows != data.rows:
            raise Mixes("indexes by the position in the batch")
        return [data.rows]
    if indices.rows is not None or data.rows.axis < shared + depth:
        raise Mixes("selects rows by indices")
    return [data.rows.at(len(indices.sizes) - 1 + data.rows.axis - shared - depth)]


def _scatter_nd(call: Operation) -> Found:
    data, indices, updates = call.value(0), call.value(1), call.value(2)
    depth = indices.sizes[-1]
    if data.rows is None or indices.rows is not None or indices.is_sized or data.rows.axis < depth:
        raise Mixes("writes to rows by indices")
    if updates.rows != data.rows.at(data.rows.axis - depth + len(indices.sizes) - 1):
        raise Mixes("writes to rows values that belong to none")
    return [data.rows]


def _pad(call: Operation) -> Found:
    value = call.value(0)
    rank = len(value.sizes)
    name = "paddings" if "paddings" in call.attributes else "pads"
    pads = call.setting(name, 1)
    call.fixed(1, 2, 3)
    given = call.known(3) if call.version >= 18 else None
    axes = [axis_of(int(axis), rank) for axis in (given if given is not None else range(rank))]
    assert value.rows is not None
    if value.rows.axis in axes and pads is not None:
        place = axes.index(value.rows.axis)
        if pads[place] or pads[place + len(axes)]:
            raise Mixes("pads the rows")
    return [value.rows]


def _one_hot(call: Operation) -> Found:
    call.fixed(1, 2)
    value = call.value(0)
    assert value.rows is not None
    axis = axis_of(int(call.attributes.get("axis", -1)), len(value.sizes) + 1)
    return [value.rows.at(value.rows.axis + (value.rows.axis >= axis))]


def _bit_cast(call: Operation) -> Found:
    if call.output() != call.value(0).sizes:
        raise Mixes("casts to elements of another size")
    return [call.value(0).rows]


def _loss(call: Operation) -> Found:
    if call.attributes.get("reduction", "mean") != "none":
        raise Mixes("is a loss over the whole tensor")
    return _batch_first(1)(call)


def _tensor_scatter(call: Operation) -> Found:
    rank = len(call.value(0).sizes)
    if axis_of(int(call.attributes.get("axis", -2)), rank) == 0:
        raise Mixes("writes to rows by indices")
    return _batch_first(1, 2)(call)


def _one_hot_encoder(call: Operation) -> Found:
    return [call.value(0).rows]


def _eye_like(call: Operation) -> Found:
    raise Mixes("depends on the position in the batch")


def _resize(call: Operation) -> Found:
    value = call.value(0)
    if value.rows is None:
        raise Mixes("resizes by values of requests")
    axis = value.rows.axis
    if call.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Mixes("crops the rows")
    axes = call.attributes.get("axes")
    place = list(axes).index(axis) if axes is not None and axis in axes else axis
    for number in range(1, len(call.inputs)):
        each = call.given(number)
        if each is not None and each.rows is not None:
            raise Mixes("resizes by values of requests")
        if each is not None and each.is_sized:
            _only_sized(each, axis, len(value.sizes))
    scales = call.given(1 if call.op == "Upsample" or call.version < 11 else 2)
    attribute = call.attributes.get("scales")
    if axes is None or axis in axes:
        if attribute is not None and attribute[place] != 1:
            raise Mixes("resizes the rows")
        if scales is not None and 0 not in scales.sizes:
            if scales.known is None:
                raise Mixes("has scales that are not constant")
            if scales.known.reshape(-1)[place] != 1:
                raise Mixes("resizes the rows")
        if call.output()[axis] != value.sizes[axis]:
            raise Mixes("resizes the rows")
    return [value.rows]


def _recurrent(call: Operation) -> Found:
    call.fixed(1, 2, 3, 7)
    first = bool(call.attributes.get("layout", 0))
    x: list[Label] = ["n", None, None] if first else [None, "n", None]
    out: list[list[Label]] = [["n", None, None, None] if first else [None, None, "n", None], x, x]
    pairs: list[tuple[Value | None, list[Label]]] = [(call.value(0), x), (call.given(4), ["n"])]
    pairs += [(call.given(number), x) for number in (5, 6)]
    return labelled(pairs, out[: len(call.outputs)])


def _attention(call: Operation) -> Found:
    """ai.onnx Attention: all inputs have the batch first; a mask may omit it."""
    pairs: list[tuple[Value | None, list[Label]]] = []
    for number, value in enumerate(call.inputs):
        if value is not None and number == 3:
            labels: list[Label] = ["n", None, None, None]
            pairs.append((value, labels[4 - len(value.sizes) :]))
        elif value is not None:
            pairs.append((value, _leading(value, "n")))
    for number in (0, 1, 2, 4, 5):
        value = call.given(number)
        if value is not None and value.rows is None:
            raise Mixes("has queries, keys or values without rows")
    return labelled(pairs, [["n"]] * len(call.outputs))


def _rotary(call: Operation) -> Found:
    """ai.onnx RotaryEmbedding: tables are indexed by positions, or given for every row."""
    positions = call.given(3)
    pairs: list[tuple[Value | None, list[Label]]] = [(call.value(0), _leading(call.value(0), "n"))]
    if positions is not None:
        call.fixed(1, 2)
        pairs.append((positions, _leading(positions, "n")))
    else:
        pairs += [(call.value(number), _leading(call.value(number), "n")) for number in (1, 2)]
    return labelled(pairs, [["n"]])


def _einsum(call: Operation) -> Found:
    equation = str(call.attributes.get("equation", "")).replace(" ", "")
    if "->" not in equation:
        raise Mixes("has an equation without '->'")
    left, right = equation.split("->")
    terms = left.split(",")
    values = [value for value in call.inputs if value is not None]
    if len(terms) != len(values):
        raise Mixes("has an equation of other inputs")
    out = _subscripts(right, len(call.output()))
    pairs: list[tuple[Value | None, list[Label]]] = []
    for term, value in zip(terms, values, strict=True):
        labels = _subscripts(term, len(value.sizes))
        pairs.append((value, [label if label in out else None for label in labels]))
    return labelled(pairs, [out])


def _subscripts(term: str, rank: int) -> list[Label]:
    before, dots, after = term.partition("...")
    if not dots:
        return list(before)
    room = rank - len(before) - len(after)
    return [*before, *[f"...{room - place}" for place in range(room)], *after]


def _quantise(call: Operation) -> Found:
    """Quantise or dequantise, by one scale, one for each element of an axis, or one for each block."""
    value = call.value(0)
    rank = len(value.sizes)
    axis = axis_of(int(call.attributes.get("axis", 1)), rank) if rank else 0
    labels = aligned(rank, rank)
    pairs: list[tuple[Value | None, list[Label]]] = [(value, labels)]
    for each in call.inputs[1:]:
        if each is None:
            continue
        if math.prod(each.sizes) == 1:
            pairs.append((each, [None] * len(each.sizes)))
        elif len(each.sizes) == 1:
            pairs.append((each, [labels[axis]]))
        else:
            pairs.append((each, [None if place == axis else label for place, label in enumerate(labels)]))
    return labelled(pairs, [labels])


def _dropout(call: Operation) -> Found:
    if call.version < 7 and not call.attributes.get("is_test", 0):
        raise Mixes("is random")
    training = call.given(2) if call.version >= 12 else None
    if training is not None and (training.known is None or bool(training.known.any())):
        raise Mixes("is random in training mode")
    call.fixed(1)
    return [call.value(0).rows] * len(call.outputs)


def _reverse_sequence(call: Operation) -> Found:
    value, lengths = call.value(0), call.value(1)
    batch = int(call.attributes.get("batch_axis", 1))
    steps = int(call.attributes.get("time_axis", 0))
    if value.rows is None or value.rows.axis == steps:
        raise Mixes("reverses the rows")
    if value.rows.axis == batch and lengths.rows != value.rows.at(0):
        raise Mixes("treats rows differently by position in the batch")
    if value.rows.axis != batch and (lengths.rows is not None or lengths.is_sized):
        raise Mixes("combines different rows")
    return [value.rows]


def _dft(call: Operation) -> Found:
    rank = len(call.value(0).sizes)
    call.fixed(*range(1, len(call.inputs)))
    if call.version >= 20:
        given = call.known(2)
        axis = -2 if given is None else int(given[0])
    else:
        axis = int(call.attributes.get("axis", 1))
    labels: list[Label] = [*aligned(rank - 1, rank - 1), None]
    labels[axis_of(axis, rank)] = None
    return labelled([(call.value(0), labels)], [labels])


def _crop(call: Operation) -> Found:
    value = call.value(0)
    if value.rows is None:
        raise Mixes("crops by values of requests")
    rank = len(value.sizes)
    axes = [axis_of(int(axis), rank) for axis in call.attributes.get("axes", range(rank))]
    if call.value(1).rows is not None or call.value(1).is_sized or value.rows.axis in axes:
        raise Mixes("crops the rows")
    return [value.rows]


def _grid(call: Operation) -> Found:
    size = call.value(1)
    if size.rows is not None or (size.is_sized and any(flags_of(size)[1:])):
        raise Mixes("makes a grid whose size depends on values of requests")
    return labelled([(call.value(0), ["n", None, None])], [["n"]])


def _space(call: Operation) -> Found:
    return labelled([(call.value(0), ["n", None, None, None])], [["n"]])


def _qlinear_concat(call: Operation) -> Found:
    values = [call.value(number) for number in range(2, len(call.inputs), 3)]
    call.fixed(0, 1, *[n for n in range(2, len(call.inputs)) if (n - 2) % 3])
    return [joined(values, axis_of(int(call.attributes.get("axis", 1)), len(values[0].sizes)))]


_ONNX: dict[str, Rule] = dict.fromkeys(ELEMENTWISE, elementwise) | dict.fromkeys(REDUCTIONS, _reduce) | {
    "AffineGrid": _grid, "ArgMax": _along(0, keeps=False), "ArgMin": _along(0, keeps=False),
    "ArrayFeatureExtractor": _last_axes(1), "Attention": _attention, "AveragePool": _pool,
    "BatchNormalization": _batch_normalisation, "BitCast": _bit_cast, "CastLike": _cast_like,
    "CenterCropPad": _crop, "Col2Im": _batch_first(), "Concat": _concat,
    "ConstantOfShape": _constant_of_shape, "Conv": _batch_first(), "ConvInteger": _batch_first(),
    "ConvTranspose": _batch_first(), "CumProd": _cumulative, "CumSum": _cumulative,
    "DeformConv": _batch_first(2, 4), "DepthToSpace": _space, "DequantizeLinear": _quantise,
    "Det": _last_axes(2, kept=False), "DFT": _dft, "Dropout": _dropout, "Einsum": _einsum,
    "Expand": _expand, "EyeLike": _eye_like, "FeatureVectorizer": _batch_first(*range(1, 100)),
    "Flatten": _reshape, "Gather": _gather, "GatherElements": _all_rows(0, 1), "GatherND": _gather_nd,
    "Gemm": _gemm, "GlobalAveragePool": _pool, "GlobalLpPool": _pool, "GlobalMaxPool": _pool,
    "GridSample": _batch_first(1), "GroupNormalization": _batch_first(), "GRU": _recurrent,
    "Hardmax": _softmax, "Imputer": _last_axes(1), "InstanceNormalization": _instance_normalisation,
    "LayerNormalization": _layer_normalisation, "LinearAttention": _batch_first(1, 2, 3, 4, 5),
    "LinearClassifier": _batch_first(), "LinearRegressor": _batch_first(), "LogSoftmax": _softmax,
    "LpNormalization": _along(-1), "LpPool": _pool, "LRN": _lrn, "LSTM": _recurrent, "MatMul": matmul,
    "MatMulInteger": _matmul_integer, "MaxPool": _pool, "MeanVarianceNormalization": _mean_variance,
    "NegativeLogLikelihoodLoss": _loss, "Normalizer": _batch_first(), "OneHot": _one_hot,
    "OneHotEncoder": _one_hot_encoder, "Pad": _pad, "QLinearConv": _batch_first(),
    "QLinearMatMul": _qlinear_matmul, "QuantizeLinear": _quantise, "Reshape": _reshape,
    "Resize": _resize, "ReverseSequence": _reverse_sequence, "RMSNormalization": _layer_normalisation,
    "RNN": _recurrent, "RotaryEmbedding": _rotary, "Scaler": _last_axes(1),
    "Scatter": _all_rows(0, 1, 2), "ScatterElements": _all_rows(0, 1, 2), "ScatterND": _scatter_nd,
    "SimplifiedLayerNormalization": _layer_normalisation, "Slice": _slice, "Softmax": _softmax,
    "SoftmaxCrossEntropyLoss": _loss, "SpaceToDepth": _space, "Split": _split, "Squeeze": _reshape,
    "STFT": _batch_first(), "SVMClassifier": _batch_first(), "SVMRegressor": _batch_first(),
    "TensorScatter": _tensor_scatter, "TfIdfVectorizer": _batch_first(), "Tile": _tile,
    "TopK": _along(-1), "Transpose": _transpose, "TreeEnsemble": _batch_first(),
    "TreeEnsembleClassifier": _batch_first(), "TreeEnsembleRegressor": _batch_first(),
    "Trilu": _last_axes(2), "Unsqueeze": _reshape, "Upsample": _resize,
}  # fmt: skip
_MICROSOFT: dict[str, Rule] = dict.fromkeys(ELEMENTWISE_MICROSOFT, elementwise) | {
    "DequantizeLinear": _quantise, "FusedConv": _batch_first(3), "FusedGemm": _gemm,
    "FusedMatMul": _fused_matmul, "MatMulIntegerToFloat": _matmul_integer_to_float,
    "QLinearAdd": _qlinear_pair, "QLinearConcat": _qlinear_concat, "QLinearLeakyRelu": _first_only,
    "QLinearMul": _qlinear_pair, "QLinearSigmoid": _first_only, "QuantizeLinear": _quantise,
    "SkipLayerNormalization": _skip_layer_normalisation,
    "SkipSimplifiedLayerNormalization": _skip_layer_normalisation,
}  # fmt: skip
RULES: dict[tuple[str, str], Rule] = {("", op): rule for op, rule in _ONNX.items()}
RULES |= {("com.microsoft", op): rule for op, rule in _MICROSOFT.items()}
