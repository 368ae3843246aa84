"""Where each operator leaves the rows of a batch; without a rule it is not known to be row-independent.

A rule returns for every output which axis holds its rows, or raises ``Mixes``. It is called only if an input
has rows; for ``MAKERS`` always. No rule reads a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

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
Pairs = list[tuple[Value | None, Sequence[Label]]]  # values, and labels of their axes

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
    return _broadcast(call, [value for value in call.inputs if value is not None])


def _broadcast(call: Operation, values: Sequence[Value]) -> Found:
    rank = len(call.output())
    pairs = [(value, aligned(len(value.sizes), rank)) for value in values]
    return labelled(pairs, [aligned(rank, rank)] * len(call.outputs))


def _first_only(call: Operation) -> Found:
    """Elementwise in input 0; the others are settings."""
    call.fixed(*range(1, len(call.inputs)))
    return same(call)


def same(call: Operation) -> Found:
    """One element out for one element of input 0."""
    return [call.value(0).rows] * len(call.outputs)


def batch_first(*others: int) -> Rule:
    """Rows on axis 0 of input 0, of the inputs in ``others`` and of all outputs; the rest are settings."""

    def rule(call: Operation) -> Found:
        call.fixed(*(number for number in range(1, len(call.inputs)) if number not in others))
        if len(call.value(0).sizes) < 2:
            raise Mixes("operates on a single row")
        for shape in call.outputs:
            if shape is not None and (not shape or shape[0] != call.count):
                raise Mixes("has an output without rows")
        given = [call.value(0), *(call.given(number) for number in others)]
        return labelled([(value, leading(value, "n")) for value in given], [["n"]] * len(call.outputs))

    return rule


def leading(value: Value | None, names: str) -> Sequence[Label]:
    """Labels that name the first axes; ``_`` and the axes behind are combined."""
    rank = 0 if value is None else len(value.sizes)
    return [None if name == "_" else name for name in names] + [None] * max(0, rank - len(names))


def matmul(call: Operation) -> Found:
    """Numpy's matrix product."""
    return product(call, call.value(0), call.value(1))


def product(call: Operation, a: Value, b: Value, transposed: tuple[bool, bool] = (False, False)) -> Found:
    """Numpy's matrix product of two values."""
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
    first = ["m", None] if not call.attributes.get("transA", 0) else [None, "m"]
    second = [None, "k"] if not call.attributes.get("transB", 0) else ["k", None]
    bias = call.given(2)
    names = ["m", "k"][2 - len(bias.sizes) :] if bias is not None else []
    return labelled([(call.value(0), first), (call.value(1), second), (bias, names)], [["m", "k"]])


def _fused_matmul(call: Operation) -> Found:
    if call.attributes.get("transBatchA", 0) or call.attributes.get("transBatchB", 0):
        raise Mixes("transposes batches")
    flips = bool(call.attributes.get("transA", 0)), bool(call.attributes.get("transB", 0))
    return product(call, call.value(0), call.value(1), flips)


def _quantised_matmul(first: int, second: int, *scalars: int) -> Rule:
    """The product of two inputs; the others are settings, of which some must be one for all rows."""

    def rule(call: Operation) -> Found:
        call.fixed(*(number for number in range(len(call.inputs)) if number not in (first, second)))
        for number in scalars:
            value = call.given(number)
            if value is not None and math.prod(value.sizes) != 1:
                raise Mixes("has a scale or a zero point for every row")
        return product(call, call.value(first), call.value(second))

    return rule


def _qlinear_pair(call: Operation) -> Found:
    call.fixed(1, 2, 4, 5, 6, 7)
    return _broadcast(call, [call.value(0), call.value(3)])


def pool(call: Operation) -> Found:
    """Computes along all axes behind the first two."""
    call.fixed(*range(1, len(call.inputs)))
    if call.op == "MaxPool" and len(call.outputs) > 1:
        call.drop.append((1, "returns indices into the whole tensor"))
    return labelled([(call.value(0), leading(call.value(0), "nc"))], [["n", "c"]] * len(call.outputs))


def _batch_normalisation(call: Operation) -> Found:
    if call.version < 7 or call.attributes.get("training_mode", 0):
        raise Mixes("normalises over the rows")
    if call.version < 14 and len(call.outputs) > 1:
        raise Mixes("normalises over the rows")
    return by_channel(call)


def by_channel(call: Operation) -> Found:
    """One element out for one of input 0; the other inputs have one for each element of its axis 1."""
    labels = aligned(len(call.value(0).sizes), len(call.value(0).sizes))
    others: Pairs = [(value, [1]) for value in call.inputs[1:]]
    return labelled([(call.value(0), labels), *others], [labels])


def _instance_normalisation(call: Operation) -> Found:
    value = call.value(0)
    return labelled(
        [(value, leading(value, "nc")), (call.value(1), ["c"]), (call.value(2), ["c"])], [["n", "c"]]
    )


def _layer_normalisation(call: Operation) -> Found:
    return normalised(call, axis_of(int(call.attributes.get("axis", -1)), len(call.value(0).sizes)))


def normalised(call: Operation, axis: int) -> Found:
    """Computes along ``axis`` and all behind it; other inputs are broadcast."""
    rank = len(call.value(0).sizes)
    labels = [each if number < axis else None for number, each in enumerate(aligned(rank, rank))]
    pairs = [(v, labels[rank - len(v.sizes) :]) for v in call.inputs if v is not None]
    return labelled(pairs, [labels] * len(call.outputs))


def _skip_layer_normalisation(call: Operation) -> Found:
    """A residual sum (inputs 0, 1 and a bias) normalised over the last axis."""
    rank = len(call.value(0).sizes)
    labels: list[Label] = [*range(rank - 1), None]
    pairs = [(v, labels[rank - len(v.sizes) :]) for v in call.inputs if v is not None]
    return labelled(pairs, [labels if len(shape or labels) == rank else [] for shape in call.outputs])


def _along(default: int | list[int], name: str = "axis", *, keeps: bool = True) -> Rule:
    """Computes along the axes of an attribute; ``keeps`` them in the output unless keepdims is 0."""

    def rule(call: Operation) -> Found:
        call.fixed(*range(1, len(call.inputs)))
        kept = keeps or bool(call.attributes.get("keepdims", 1))
        return without(call, call.attributes.get(name, default), kept=kept)

    return rule


def without(call: Operation, axes: int | Iterable[int], *, kept: bool) -> Found:
    """Computes along some axes of input 0, which are ``kept`` in the output or not."""
    rank = len(call.value(0).sizes)
    combined = {axis_of(int(axis), rank) for axis in (axes if isinstance(axes, Iterable) else [axes])}
    labels: list[Label] = [None if axis in combined else axis for axis in range(rank)]
    out = labels if kept else [label for label in labels if label is not None]
    return labelled([(call.value(0), labels)], [out] * len(call.outputs))


def _softmax(call: Operation) -> Found:
    rank = len(call.value(0).sizes)
    if call.version >= 13:
        return without(call, call.attributes.get("axis", -1), kept=True)
    return without(call, range(axis_of(int(call.attributes.get("axis", 1)), rank), rank), kept=True)


def _reduce(call: Operation) -> Found:
    axes = call.setting("axes", 1)
    if not axes:
        optional = axes is not None or call.version >= 13
        if optional and call.attributes.get("noop_with_empty_axes", 0):
            return same(call)
        raise Mixes("reduces the whole tensor")
    call.fixed(1)
    return without(call, axes, kept=bool(call.attributes.get("keepdims", 1)))


def _cumulative(call: Operation) -> Found:
    axis = call.known(1)
    call.fixed(1)
    if not axis:
        raise Mixes("has no axis")
    return without(call, axis[:1], kept=True)


def _last_axes(count: int, *, kept: bool = True) -> Rule:
    def rule(call: Operation) -> Found:
        call.fixed(*range(1, len(call.inputs)))
        return without(call, range(-count, 0), kept=kept)

    return rule


def _transpose(call: Operation) -> Found:
    return permuted(call, call.attributes.get("perm", list(reversed(range(len(call.value(0).sizes))))))


def permuted(call: Operation, order: Sequence[int]) -> Found:
    """Axes in another order."""
    return labelled([(call.value(0), aligned(len(order), len(order)))], [list(order)])


def _reshape(call: Operation) -> Found:
    shape = call.shape_input(1, "reshapes by")
    found = regrouped(call.value(0), call.output(), call.count)
    if shape is not None and shape.is_sized:
        _only_sized(shape, found.axis, len(call.output()))
    return [found]


def _only_sized(shape: Value, axis: int, rank: int) -> None:
    """Raise ``Mixes`` if sizes other than that of the rows follow from the number of rows."""
    if any(each != axis for each in _sized_axes(shape, rank)):
        raise Mixes("makes the size of a row depend on the number of rows")


def _sized_axes(shape: Value, rank: int) -> list[int]:
    """The axes whose sizes follow from the number of rows; a shape is aligned at the end."""
    if shape.known is None:
        raise Mixes("has a shape that is not constant")
    before = rank - shape.known.size
    return [before + axis for axis, flag in enumerate(flags_of(shape).flat) if flag]


def _expand(call: Operation) -> Found:
    value, out = call.value(0), call.output()
    shape = call.shape_input(1, "expands by")
    sized = shape is not None and shape.is_sized
    if value.rows is not None:
        found = value.rows.at(value.rows.axis + len(out) - len(value.sizes))
        if shape is not None and sized:
            _only_sized(shape, found.axis, len(out))
        return [found]
    if shape is None or not sized:
        return [None]
    if value.is_sized:
        raise Mixes("broadcasts the number of rows to all rows")
    sizes = [1] * (len(out) - len(value.sizes)) + list(value.sizes)
    return [_made(shape, out, call.count, [size == 1 for size in sizes])]


def _made(shape: Value, out: Shape, count: int, free: list[bool]) -> RowAxis:
    """Rows created by a shape, one of whose sizes is the number of rows: all rows are equal."""
    sized = _sized_axes(shape, len(out))
    if len(sized) != 1 or out[sized[0]] % count or not free[sized[0]]:
        raise Mixes("has a shape in which the number of rows is not exactly one size")
    return RowAxis(sized[0], 1, out[sized[0]] // count)


def _constant_of_shape(call: Operation) -> Found:
    shape = call.shape_input(0, "makes a tensor whose size depends on")
    if shape is None or not shape.is_sized:
        return [None]
    return [_made(shape, call.output(), call.count, [True] * len(call.output()))]


def _tile(call: Operation) -> Found:
    value = call.value(0)
    if call.version < 6:
        raise Mixes("is of an old version")
    repeats, times = call.shape_input(1, "repeats by"), call.known(1)
    assert repeats is not None and times is not None
    if value.rows is not None:
        call.fixed(1)
        rows = value.rows
        return [RowAxis(rows.axis, rows.outer * int(times[rows.axis]), rows.inner)]
    if not repeats.is_sized:
        return [None]
    sized = _sized_axes(repeats, len(times))
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
        call.shape_input(number, "slices by")
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
    axis = axis_of(int(call.attributes.get("axis", 0)), len(call.value(0).sizes))
    return gathered(call.value(0), call.value(1), axis)


def gathered(data: Value, indices: Value, axis: int) -> Found:
    """Elements of one axis by indices: of a table by a request's, or of every row by the same."""
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
        return by_row([call.value(number) for number in numbers], int(call.attributes.get("axis", 0)))

    return rule


def by_row(values: Sequence[Value], axis: int) -> Found:
    """Indexing along an axis of values that have the rows on the same other axis."""
    rows = values[0].rows
    if rows is None or any(value.rows != rows for value in values):
        raise Mixes("indexes by the position in the batch")
    if rows.axis == axis_of(axis, len(values[0].sizes)):
        raise Mixes("selects rows by indices")
    return [rows]


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
    return batch_first(1)(call)


def _tensor_scatter(call: Operation) -> Found:
    if axis_of(int(call.attributes.get("axis", -2)), len(call.value(0).sizes)) == 0:
        raise Mixes("writes to rows by indices")
    return batch_first(1, 2)(call)


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
        each = call.shape_input(number, "resizes by")
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
    x: Sequence[Label]
    x, out = (
        (["n", None, None], ["n"])
        if call.attributes.get("layout", 0)
        else ([None, "n", None], [None, None, "n"])
    )
    states: Pairs = [(call.given(number), x) for number in (5, 6)]
    return labelled([(call.value(0), x), (call.given(4), ["n"]), *states], [out, x, x][: len(call.outputs)])


def _attention(call: Operation) -> Found:
    """ai.onnx Attention: all inputs have the batch first; a mask may omit it."""
    pairs: Pairs = []
    for number, value in enumerate(call.inputs):
        if value is not None and number == 3:
            pairs.append((value, ["n", None, None, None][4 - len(value.sizes) :]))
        elif value is not None:
            pairs.append((value, leading(value, "n")))
            if value.rows is None and number in (0, 1, 2, 4, 5):
                raise Mixes("has queries, keys or values without rows")
    return labelled(pairs, [["n"]] * len(call.outputs))


def _rotary(call: Operation) -> Found:
    """ai.onnx RotaryEmbedding: tables are indexed by positions, or given for every row."""
    by_rows = [0, 1, 2] if call.given(3) is None else [0, 3]
    call.fixed(*{1, 2}.difference(by_rows))
    return labelled([(call.given(n), leading(call.given(n), "n")) for n in by_rows], [["n"]])


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
    pairs: Pairs = []
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
    pairs: Pairs = [(value, labels)]
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
    return same(call)


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
    call.fixed(*range(1, len(call.inputs)))
    if call.version >= 20:
        given = call.known(2)
        axis = -2 if given is None else int(given[0])
    else:
        axis = int(call.attributes.get("axis", 1))
    return without(call, [axis, -1], kept=True)


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
    return labelled([(call.value(0), leading(call.value(0), "n"))], [["n"]])


def _qlinear_concat(call: Operation) -> Found:
    values = [call.value(number) for number in range(2, len(call.inputs), 3)]
    call.fixed(0, 1, *[n for n in range(2, len(call.inputs)) if (n - 2) % 3])
    return [joined(values, axis_of(int(call.attributes.get("axis", 1)), len(values[0].sizes)))]


_ONNX: dict[str, Rule] = dict.fromkeys(ELEMENTWISE, elementwise) | dict.fromkeys(REDUCTIONS, _reduce) | {
    "AffineGrid": _grid, "ArgMax": _along(0, keeps=False), "ArgMin": _along(0, keeps=False),
    "ArrayFeatureExtractor": _last_axes(1), "Attention": _attention, "AveragePool": pool,
    "BatchNormalization": _batch_normalisation, "BitCast": _bit_cast, "CastLike": same,
    "CenterCropPad": _crop, "Col2Im": batch_first(), "Concat": _concat,
    "ConstantOfShape": _constant_of_shape, "Conv": batch_first(), "ConvInteger": batch_first(),
    "ConvTranspose": batch_first(), "CumProd": _cumulative, "CumSum": _cumulative,
    "DeformConv": batch_first(2, 4), "DepthToSpace": _space, "DequantizeLinear": _quantise,
    "Det": _last_axes(2, kept=False), "DFT": _dft, "Dropout": _dropout, "Einsum": _einsum,
    "Expand": _expand, "EyeLike": _eye_like, "FeatureVectorizer": batch_first(*range(1, 100)),
    "Flatten": _reshape, "Gather": _gather, "GatherElements": _all_rows(0, 1), "GatherND": _gather_nd,
    "Gemm": _gemm, "GlobalAveragePool": pool, "GlobalLpPool": pool, "GlobalMaxPool": pool,
    "GridSample": batch_first(1), "GroupNormalization": batch_first(), "GRU": _recurrent,
    "Hardmax": _softmax, "Imputer": _last_axes(1), "InstanceNormalization": _instance_normalisation,
    "LayerNormalization": _layer_normalisation, "LinearAttention": batch_first(1, 2, 3, 4, 5),
    "LinearClassifier": batch_first(), "LinearRegressor": batch_first(), "LogSoftmax": _softmax,
    "LpNormalization": _along(-1), "LpPool": pool, "LRN": _along(1, ""), "LSTM": _recurrent, "MatMul": matmul,
    "MatMulInteger": _quantised_matmul(0, 1, 2), "MaxPool": pool,
    "MeanVarianceNormalization": _along([0, 2, 3], "axes"),
    "NegativeLogLikelihoodLoss": _loss, "Normalizer": batch_first(), "OneHot": _one_hot,
    "OneHotEncoder": same, "Pad": _pad, "QLinearConv": batch_first(),
    "QLinearMatMul": _quantised_matmul(0, 3, 1, 2, 6, 7), "QuantizeLinear": _quantise, "Reshape": _reshape,
    "Resize": _resize, "ReverseSequence": _reverse_sequence, "RMSNormalization": _layer_normalisation,
    "RNN": _recurrent, "RotaryEmbedding": _rotary, "Scaler": _last_axes(1),
    "Scatter": _all_rows(0, 1, 2), "ScatterElements": _all_rows(0, 1, 2), "ScatterND": _scatter_nd,
    "SimplifiedLayerNormalization": _layer_normalisation, "Slice": _slice, "Softmax": _softmax,
    "SoftmaxCrossEntropyLoss": _loss, "SpaceToDepth": _space, "Split": _split, "Squeeze": _reshape,
    "STFT": batch_first(), "SVMClassifier": batch_first(), "SVMRegressor": batch_first(),
    "TensorScatter": _tensor_scatter, "TfIdfVectorizer": batch_first(), "Tile": _tile,
    "TopK": _along(-1), "Transpose": _transpose, "TreeEnsemble": batch_first(),
    "TreeEnsembleClassifier": batch_first(), "TreeEnsembleRegressor": batch_first(),
    "Trilu": _last_axes(2), "Unsqueeze": _reshape, "Upsample": _resize,
}  # fmt: skip
_MICROSOFT: dict[str, Rule] = dict.fromkeys(ELEMENTWISE_MICROSOFT, elementwise) | {
    "DequantizeLinear": _quantise, "FusedConv": batch_first(3), "FusedGemm": _gemm,
    "FusedMatMul": _fused_matmul, "MatMulIntegerToFloat": _quantised_matmul(0, 1, 2, 4),
    "QLinearAdd": _qlinear_pair, "QLinearConcat": _qlinear_concat, "QLinearLeakyRelu": _first_only,
    "QLinearMul": _qlinear_pair, "QLinearSigmoid": _first_only, "QuantizeLinear": _quantise,
    "SkipLayerNormalization": _skip_layer_normalisation,
    "SkipSimplifiedLayerNormalization": _skip_layer_normalisation,
}  # fmt: skip
RULES: dict[tuple[str, str], Rule] = {("", op): rule for op, rule in _ONNX.items()}
RULES |= {("com.microsoft", op): rule for op, rule in _MICROSOFT.items()}
