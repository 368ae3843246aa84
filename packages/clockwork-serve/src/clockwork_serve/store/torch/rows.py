"""Proves from a torch program's graph that it is row-independent, or names the operator that may mix rows.

The graph is run operator by operator at a few numbers of rows, and the analysis tracks which axis of each
value holds the rows, as ``row_analysis`` does for ONNX, with the shapes of that run. Operators without a rule
are not known to be row-independent. This module imports torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from clockwork_serve.store.onnx.row_rules import joined
from clockwork_serve.store.onnx.row_values import (
    Label,
    Mixes,
    RowAxis,
    Shape,
    Value,
    aligned,
    axis_of,
    labelled,
    regrouped,
)

COUNTS = (2, 3, 5)
"""Numbers of rows that are analysed: programs are specialised for each that is served."""


@dataclass(slots=True)
class _Op:
    """One call: its arguments, and the abstract values of those that are tensors or numbers."""

    name: str
    node: torch.fx.Node
    args: Sequence[Any]
    known: Sequence[Any]
    options: dict[str, Any]
    outputs: list[Shape]
    count: int

    def tensor(self, number: int) -> Value:
        """The abstract value of a tensor argument."""
        value = self.known[number]
        if not isinstance(value, Value):
            raise Mixes(f"has no tensor as argument {number}")
        return value

    def given(self, number: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[number] if len(self.args) > number else self.options.get(name, default)

    def tensors(self) -> list[Value]:
        """The abstract values of all tensors, including those in lists."""
        return [each for each in _flat(self.known) if isinstance(each, Value)]


_Rule = Callable[[_Op], list[RowAxis | None]]
_Found = list[RowAxis | None]


def veto(module: torch.fx.GraphModule, inputs_of: Callable[[int], Sequence[Any]], most: int) -> str:
    """Why this program may not be row-independent; empty if it is.

    ``inputs_of`` makes inputs for a number of rows, at most ``most``.
    """
    for count in sorted({min(count, most) for count in COUNTS}):
        walk = _Walk(module, count)
        with torch.no_grad():
            walk.run(*inputs_of(count))
        if walk.reason:
            return walk.reason
    return ""


class _Walk(torch.fx.Interpreter):  # type: ignore[misc]  # torch is not typed where it is not installed
    """A run that tracks where rows are; ``reason`` says why an output may mix rows."""

    def __init__(self, module: torch.fx.GraphModule, count: int) -> None:
        super().__init__(module)
        self._count = count
        self._known: dict[torch.fx.Node, Any] = {}
        self.reason = ""

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one node, and determine where it leaves the rows."""
        result = super().run_node(n)
        if n.op == "placeholder":
            self._known[n] = Value(0, tuple(result.shape), RowAxis(0))
        elif n.op == "get_attr":
            self._known[n] = Value(0, tuple(result.shape))
        elif n.op == "output":
            self.reason = self.reason or self._judged(n)
        else:
            self._known[n] = self._called(n, result)
            self._written(n)
        return result

    def _written(self, n: torch.fx.Node) -> None:
        """Check that writing into a tensor, of which there may be views, keeps its rows where they were."""
        schema = getattr(n.target, "_schema", None)
        if schema is None or not schema.is_mutable or not n.args:
            return
        before, after = self._looked_up(n.args)[0], self._known[n]
        same = isinstance(before, Value) and isinstance(after, Value) and before.rows == after.rows
        if not same or after.mixed:
            self.reason = self.reason or f"{_name(n)} '{n.name}' writes to a tensor values of other rows"

    def _judged(self, n: torch.fx.Node) -> str:
        for number, value in enumerate(_flat(self._looked_up(n.args))):
            if isinstance(value, Value) and value.mixed:
                return value.mixed
            if not isinstance(value, Value) or value.rows is None or value.rows.axis or not value.rows.plain:
                return f"output {number} does not have the rows on axis 0"
        return ""

    def _looked_up(self, args: Any) -> Any:
        """Arguments with abstract values in place of nodes."""
        return torch.fx.node.map_arg(args, lambda node: self._known[node])

    def _called(self, n: torch.fx.Node, result: Any) -> Any:
        known = self._looked_up(n.args)
        if n.target is operator.getitem and isinstance(known[0], tuple):
            return known[0][known[1]]
        if not isinstance(result, (torch.Tensor, tuple, list)):
            return self._number(n, known, result)
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        shapes = [tuple(each.shape) if isinstance(each, torch.Tensor) else () for each in results]
        name = _name(n)
        tensors = [each for each in _flat((known, self._looked_up(n.kwargs))) if isinstance(each, Value)]
        mixed = next((each.mixed for each in tensors if each.mixed), "")
        try:
            if mixed:
                values = [Value(0, shape, mixed=mixed) for shape in shapes]
            else:
                args, options = self.fetch_args_kwargs_from_env(n)
                known = (*known, *self._looked_up(tuple(n.kwargs.values())))
                call = _Op(name, n, args, known, dict(options), shapes, self._count)
                values = self._found(call)
        except Mixes as error:
            values = [Value(0, shape, mixed=f"{name} '{n.name}' {error}") for shape in shapes]
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError, StopIteration) as error:
            why = f"{name} '{n.name}' cannot be analysed ({type(error).__name__})"
            values = [Value(0, shape, mixed=why) for shape in shapes]
        return values[0] if isinstance(result, torch.Tensor) else tuple(values)

    def _number(self, n: torch.fx.Node, known: Any, result: Any) -> Any:
        """A number, which is sized if it depends on the number of rows."""
        given = list(_flat(known))
        if _name(n) in ("sym_size", "size") and isinstance(given[0], Value):
            value, axis = given[0], axis_of(n.args[1], len(given[0].sizes))
            sized = bool(value.mixed) or (value.rows is not None and value.rows.axis == axis)
            return _Number(result, sized=sized)
        return _Number(result, sized=any(isinstance(each, Value) or _is_sized(each) for each in given))

    def _found(self, call: _Op) -> list[Value]:
        tensors = call.tensors()
        has_rows = any(each.rows is not None for each in tensors)
        sized = any(each.is_sized for each in tensors) or any(_is_sized(each) for each in _flat(call.known))
        if call.name in _MAKERS:
            return [Value(0, call.outputs[0], _made(call), sized=sized and call.name == "arange")]
        if call.name in _RANDOM:
            raise Mixes("is random")
        rule = _RULES.get(call.name)
        if not has_rows:
            if not sized:
                return [Value(0, shape) for shape in call.outputs]
            found = [_made(call)] if call.name in ("expand", "repeat") else [None]
            return [Value(0, s, found[0], sized=found[0] is None) for s in call.outputs]
        if rule is None:
            raise Mixes("is an operator that is not known to keep rows apart")
        if sized and call.name not in _SIZES:
            raise Mixes("computes with the number of rows")
        found = rule(call)
        for shape, rows in zip(call.outputs, found, strict=True):
            if rows is not None and shape[rows.axis] != rows.outer * call.count * rows.inner:
                raise Mixes("has an output with a different number of rows")
        return [Value(0, shape, rows) for shape, rows in zip(call.outputs, found, strict=True)]


@dataclass(frozen=True, slots=True)
class _Number:
    value: Any
    sized: bool


def _is_sized(each: Any) -> bool:
    return isinstance(each, _Number) and each.sized


def _flat(args: Any) -> list[Any]:
    if isinstance(args, (tuple, list)):
        return [each for part in args for each in _flat(part)]
    return [args]


def _name(n: torch.fx.Node) -> str:
    target = n.target
    packet = getattr(target, "overloadpacket", None)
    name = str(getattr(packet, "__name__", getattr(target, "__name__", target)))
    return name.rstrip("_") if not name.startswith("_") else name


def _made(call: _Op) -> RowAxis | None:
    """Rows of a tensor one of whose sizes is the number of rows; all rows are equal."""
    sizes = (
        call.known[1]
        if call.name in ("expand", "repeat", "new_zeros", "new_ones", "new_full")
        else call.known[0]
    )
    if call.name.endswith("_like"):
        return call.tensor(0).rows
    if call.name == "arange" or not isinstance(sizes, (tuple, list)):
        return None
    sized = [axis for axis, size in enumerate(sizes) if _is_sized(size)]
    if not sized:
        return None
    if len(sized) != 1 or call.outputs[0][sized[0]] % call.count:
        raise Mixes("has a shape in which the number of rows is not exactly one size")
    return RowAxis(sized[0], 1, call.outputs[0][sized[0]] // call.count)


# Rules


def _elementwise(call: _Op) -> _Found:
    rank = len(call.outputs[0])
    pairs = [(value, aligned(len(value.sizes), rank)) for value in call.tensors()]
    return labelled(pairs, [aligned(rank, rank)] * len(call.outputs))


def _without(value: Value, axes: set[int], outputs: Sequence[Shape]) -> _Found:
    rank = len(value.sizes)
    labels: list[Label] = [None if axis in axes else axis for axis in range(rank)]
    kept = [label for label in labels if label is not None]
    return labelled([(value, labels)], [labels if len(shape) == rank else kept for shape in outputs])


def _along(place: int, default: int | None = None, name: str = "dim") -> _Rule:
    """Computes along the axes of one argument."""

    def rule(call: _Op) -> _Found:
        if len(call.known) > 1 and isinstance(call.known[1], Value):
            return _elementwise(call)
        axes = call.given(place, name, default)
        if axes is None or axes == []:
            raise Mixes("computes with the whole tensor")
        rank = len(call.tensor(0).sizes)
        chosen = {axis_of(axis, rank) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])}
        return _without(call.tensor(0), chosen, call.outputs)

    return rule


def _first(*others: int) -> _Rule:
    """Rows on axis 0 of the first argument and of ``others``; other arguments are weights."""

    def rule(call: _Op) -> _Found:
        pairs: list[tuple[Value | None, list[Label]]] = []
        for number, value in enumerate(call.known):
            if isinstance(value, Value):
                if number and number not in others and value.rows is not None:
                    raise Mixes("has weights that depend on requests")
                labels: list[Label] = ["n", *[None] * (len(value.sizes) - 1)]
                pairs.append((value, labels if not number or number in others else []))
        return labelled(pairs, [["n"]] * len(call.outputs))

    return rule


def _convolution(call: _Op) -> _Found:
    if len(call.tensor(0).sizes) != len(call.tensor(1).sizes):
        raise Mixes("operates on a single row")
    return _first()(call)


def _pool(call: _Op) -> _Found:
    value = call.tensor(0)
    labels: list[Label] = [0, 1, *[None] * (len(value.sizes) - 2)]
    return labelled([(value, labels)], [labels] * len(call.outputs))


def _linear(call: _Op) -> _Found:
    value = call.tensor(0)
    rank = len(value.sizes)
    labels: list[Label] = [*range(rank - 1), None]
    weights: list[tuple[Value | None, list[Label]]] = [
        (each, [None] * len(each.sizes)) for each in call.tensors()[1:]
    ]
    return labelled([(value, labels), *weights], [[*range(rank - 1), "out"]])


def _product(a: Value, b: Value, outputs: int = 1) -> _Found:
    ranks = len(a.sizes), len(b.sizes)
    rank = max(*ranks, 2)

    def batches(own: int) -> list[Label]:
        return [f"b{axis + rank - own}" for axis in range(own - 2)]

    first: list[Label] = [*batches(ranks[0]), "m", None] if ranks[0] > 1 else [None]
    second: list[Label] = [*batches(ranks[1]), None, "k"] if ranks[1] > 1 else [None]
    out = batches(rank) + (["m"] if ranks[0] > 1 else []) + (["k"] if ranks[1] > 1 else [])
    return labelled([(a, first), (b, second)], [out] * outputs)


def _matmul(call: _Op) -> _Found:
    return _product(call.tensor(0), call.tensor(1))


def _added_product(call: _Op) -> _Found:
    found = _product(call.tensor(1), call.tensor(2))
    bias, shape = call.tensor(0), call.outputs[0]
    rank = len(shape)
    return labelled(
        [(bias, aligned(len(bias.sizes), rank)), (Value(0, shape, found[0]), aligned(rank, rank))],
        [aligned(rank, rank)],
    )


def _batch_norm(call: _Op) -> _Found:
    training = call.given(5, "training", default=False) if call.name == "batch_norm" else False
    if training:
        raise Mixes("normalises over the rows")
    labels = aligned(len(call.tensor(0).sizes), len(call.tensor(0).sizes))
    pairs: list[tuple[Value | None, list[Label]]] = [(call.tensor(0), labels)]
    pairs += [(value, [1]) for value in call.tensors()[1:]]
    return labelled(pairs, [labels])[:1] + [None] * (len(call.outputs) - 1)


def _prelu(call: _Op) -> _Found:
    labels = aligned(len(call.tensor(0).sizes), len(call.tensor(0).sizes))
    return labelled([(call.tensor(0), labels), (call.tensor(1), [1])], [labels])


def _layer_norm(call: _Op) -> _Found:
    value = call.tensor(0)
    rank = len(value.sizes)
    behind = rank - len(call.args[1])
    labels: list[Label] = [axis if axis < behind else None for axis in range(rank)]
    weights: list[tuple[Value | None, list[Label]]] = [
        (each, [None] * len(each.sizes)) for each in call.tensors()[1:]
    ]
    return labelled([(value, labels), *weights], [labels] * len(call.outputs))


def _same(call: _Op) -> _Found:
    return [call.tensor(0).rows] * len(call.outputs)


def _dropout(call: _Op) -> _Found:
    if call.given(2, "train", default=False):
        raise Mixes("is random in training mode")
    return _same(call)


def _regroup(call: _Op) -> _Found:
    return [regrouped(call.tensor(0), shape, call.count) for shape in call.outputs]


def _permute(call: _Op) -> _Found:
    value = call.tensor(0)
    rank = len(value.sizes)
    labels = aligned(rank, rank)
    if call.name == "permute":
        order = [axis_of(axis, rank) for axis in call.args[1]]
    else:
        order = list(range(rank))
        a, b = (0, 1) if call.name in ("t", "numpy_T") else (axis_of(axis, rank) for axis in call.args[1:3])
        if rank > 1:
            order[a], order[b] = order[b], order[a]
    return labelled([(value, labels)], [[labels[axis] for axis in order]])


def _expand(call: _Op) -> _Found:
    value = call.tensor(0)
    if value.rows is None:
        raise Mixes("expands by values of requests")
    rank = len(call.outputs[0])
    rows = value.rows.at(value.rows.axis + rank - len(value.sizes))
    sizes = call.known[1] if isinstance(call.known[1], (tuple, list)) else ()
    if any(_is_sized(size) and axis != rows.axis for axis, size in enumerate(sizes)):
        raise Mixes("makes the size of a row depend on the number of rows")
    return [rows]


def _slice(call: _Op) -> _Found:
    value = call.tensor(0)
    assert value.rows is not None
    axis = axis_of(call.given(1, "dim", default=0), len(value.sizes))
    if axis == value.rows.axis:
        if call.outputs[0] != value.sizes or call.given(4, "step", default=1) != 1:
            raise Mixes("selects some of the rows")
    elif any(_is_sized(each) for each in call.known):
        raise Mixes("slices by the number of rows")
    return [value.rows]


def _select(call: _Op) -> _Found:
    return _dropped(call, call.args[1])


def _unbind(call: _Op) -> _Found:
    return _dropped(call, call.given(1, "dim", default=0))


def _dropped(call: _Op, axis: int) -> _Found:
    return _without(call.tensor(0), {axis_of(axis, len(call.tensor(0).sizes))}, call.outputs)


def _split(call: _Op) -> _Found:
    return _without(
        call.tensor(0), {axis_of(call.given(2, "dim", default=0), len(call.tensor(0).sizes))}, call.outputs
    )


def _cat(call: _Op) -> _Found:
    values = [each for each in _flat(call.known[0]) if isinstance(each, Value)]
    return [joined(values, axis_of(call.given(1, "dim", default=0), len(values[0].sizes)))]


def _stack(call: _Op) -> _Found:
    values = [each for each in _flat(call.known[0]) if isinstance(each, Value)]
    axis = axis_of(call.given(1, "dim", default=0), len(values[0].sizes) + 1)
    rows = joined(values, -1)
    assert rows is not None
    return [rows.at(rows.axis + (rows.axis >= axis))]


def _pad(call: _Op) -> _Found:
    value, pads = call.tensor(0), call.args[1]
    assert value.rows is not None
    if value.rows.axis >= len(value.sizes) - len(pads) // 2:
        raise Mixes("pads the rows")
    return [value.rows]


def _embedding(call: _Op) -> _Found:
    if call.tensor(0).rows is not None:
        raise Mixes("has a table that depends on requests")
    return [call.tensor(1).rows]


def _gather(call: _Op) -> _Found:
    value, indices = call.tensor(0), call.tensor(2)
    if value.rows is None or indices.rows != value.rows:
        raise Mixes("indexes by the position in the batch")
    if axis_of(call.args[1], len(value.sizes)) == value.rows.axis:
        raise Mixes("selects rows by indices")
    return [value.rows]


def _index_select(call: _Op) -> _Found:
    value, indices = call.tensor(0), call.tensor(2)
    axis = axis_of(call.args[1], len(value.sizes))
    if value.rows is None or indices.rows is not None or value.rows.axis == axis:
        raise Mixes("selects rows by indices")
    return [value.rows]


def _index(call: _Op) -> _Found:
    """One index for one axis: a table lookup, or some positions of every row."""
    given = [(axis, each) for axis, each in enumerate(call.known[1]) if each is not None]
    if len(given) != 1 or not isinstance(given[0][1], Value):
        raise Mixes("selects elements by several indices")
    axis, indices = given[0]
    value = call.tensor(0)
    if value.rows is not None and indices.rows is not None:
        raise Mixes("selects rows by indices")
    if value.rows is None:
        assert indices.rows is not None
        return [indices.rows.at(axis + indices.rows.axis)]
    if value.rows.axis == axis:
        raise Mixes("selects rows by indices")
    behind = value.rows.axis > axis
    return [value.rows.at(value.rows.axis + len(indices.sizes) - 1) if behind else value.rows]


def _attention(call: _Op) -> _Found:
    """softmax(q k') v with the sequence on the axis before the last."""
    rank = len(call.tensor(0).sizes)
    labels: list[Label] = [*range(rank - 2), None, None]
    pairs: list[tuple[Value | None, list[Label]]] = [(call.tensor(n), labels) for n in range(3)]
    pairs += [(mask, labels[rank - len(mask.sizes) :]) for mask in call.tensors()[3:]]
    if call.given(4, "dropout_p", default=0.0):
        raise Mixes("is random in training mode")
    return labelled(pairs, [labels] * len(call.outputs))


def _recurrent(call: _Op) -> _Found:
    """lstm(x, (h, c), weights, biases, layers, dropout, train, bidirectional, batch_first); gru alike."""
    if call.args[6]:
        raise Mixes("is random in training mode")
    first = bool(call.args[8])
    value = call.tensor(0)
    if len(value.sizes) != 3:
        raise Mixes("operates on a single row")
    x: list[Label] = ["n", None, None] if first else [None, "n", None]
    state: list[Label] = [None, "n", None]
    pairs: list[tuple[Value | None, list[Label]]] = [(value, x)]
    pairs += [(each, state) for each in _flat(call.known[1]) if isinstance(each, Value)]
    pairs += [(each, [None] * len(each.sizes)) for each in _flat(call.known[2]) if isinstance(each, Value)]
    return labelled(pairs, [x, *[state] * (len(call.outputs) - 1)])


_ELEMENTWISE = (
    "abs", "add", "addcdiv", "addcmul", "atan", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor",
    "ceil", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos", "div", "elu", "eq", "erf", "exp",
    "expm1", "floor", "floor_divide", "fmod", "ge", "gelu", "gt", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "isinf", "isnan", "le", "leaky_relu", "lerp", "log", "log1p", "log2", "log_sigmoid",
    "logical_and",
    "logical_not", "logical_or", "logical_xor", "lt", "masked_fill", "maximum", "minimum", "mish", "mul",
    "nan_to_num", "ne", "neg", "pow", "reciprocal", "relu", "relu6", "remainder", "round", "rsqrt", "rsub",
    "selu", "sigmoid", "sign", "silu", "sin", "softplus", "softshrink", "sqrt", "square", "sub", "tan",
    "tanh", "threshold", "true_divide", "trunc", "where",
)  # fmt: skip
_SAME = (
    "_to_copy", "alias", "clone", "contiguous", "detach", "lift_fresh_copy", "positive", "to", "type_as",
)  # fmt: skip
_REDUCE = (
    "all", "amax", "amin", "any", "argmax", "argmin", "argsort", "cummax", "cumprod", "cumsum", "flip",
    "log_softmax", "logsumexp", "max", "mean", "median", "min", "prod", "softmax", "std", "sum", "var",
    "_softmax", "_log_softmax",
)  # fmt: skip
_POOLS = tuple(
    f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3)
)
_RESIZES = tuple(
    f"upsample_{kind}"
    for kind in ("nearest1d", "nearest2d", "bilinear2d", "linear1d", "bicubic2d", "nearest3d")
)
_MAKERS = frozenset(
    {"arange", "empty", "full", "full_like", "new_full", "new_ones", "new_zeros", "ones", "ones_like",
     "scalar_tensor", "zeros", "zeros_like"}
)  # fmt: skip
_RANDOM = frozenset(
    {"bernoulli", "multinomial", "normal", "rand", "rand_like", "randint", "randn", "randn_like"}
)
_SIZES = frozenset({"expand", "reshape", "view", "_unsafe_view", "slice", "unflatten"})
"""Operators whose number arguments may depend on the number of rows: they are shapes."""
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise), **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_REDUCE, _along(1)), **dict.fromkeys((*_POOLS, *_RESIZES), _pool),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d"), _convolution),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _regroup),
    **dict.fromkeys(("squeeze", "unsqueeze"), _regroup),
    **dict.fromkeys(("permute", "transpose", "t", "numpy_T", "swapaxes"), _permute),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "_native_batch_norm_legit_no_training": _batch_norm, "addmm": _added_product, "baddbmm": _added_product,
    "batch_norm": _batch_norm, "bmm": _matmul, "cat": _cat, "constant_pad_nd": _pad, "dropout": _dropout,
    "embedding": _embedding, "expand": _expand, "expand_as": _elementwise, "feature_dropout": _dropout,
    "gather": _gather, "group_norm": _first(), "gru": _recurrent, "index": _index,
    "index_select": _index_select, "layer_norm": _layer_norm, "linear": _linear, "lstm": _recurrent,
    "matmul": _matmul, "max_pool2d_with_indices": _pool, "mm": _matmul, "native_group_norm": _first(),
    "native_layer_norm": _layer_norm, "pad": _pad, "pixel_shuffle": _first(), "prelu": _prelu,
    "rms_norm": _layer_norm, "scaled_dot_product_attention": _attention, "select": _select,
    "slice": _slice, "sort": _along(1, -1), "stack": _stack, "topk": _along(2, -1), "unbind": _unbind,
}  # fmt: skip
