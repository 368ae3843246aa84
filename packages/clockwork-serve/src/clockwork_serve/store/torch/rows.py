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

from clockwork_serve.store.onnx.row_rules import (
    Found,
    Pairs,
    by_channel,
    by_row,
    elementwise,
    gathered,
    joined,
    leading,
    matmul,
    normalised,
    permuted,
    pool,
    product,
    same,
    without,
)
from clockwork_serve.store.onnx.row_values import (
    Label,
    Mixes,
    Operation,
    RowAxis,
    Shape,
    Value,
    aligned,
    axis_of,
    labelled,
    regrouped,
)

_VERSION = 1 << 30  # what ONNX's rules take for the version of an operator: the newest
COUNTS = (2, 3, 5)  # numbers of rows that are analysed: programs are specialised for each that is served


@dataclass(slots=True, kw_only=True)
class _Call(Operation):
    """A call in a program. ``inputs`` has None for an argument that is no tensor; ``abstract`` has it."""

    args: Sequence[Any]
    abstract: Sequence[Any]
    options: dict[str, Any]

    def given_as(self, number: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[number] if len(self.args) > number else self.options.get(name, default)

    def tensors(self) -> list[Value]:
        """The abstract values of all tensors, including those in lists."""
        return [each for each in _flat(self.abstract) if isinstance(each, Value)]

    def axis(self, number: int, *, fresh: bool = False) -> int:
        """An argument that is an axis of the first tensor, or of one with a ``fresh`` axis."""
        return axis_of(self.given_as(number, "dim", default=0), len(self.tensors()[0].sizes) + fresh)


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
        shapes: list[Shape] = [
            tuple(each.shape) if isinstance(each, torch.Tensor) else () for each in results
        ]
        name = _name(n)
        tensors = [each for each in _flat((known, self._looked_up(n.kwargs))) if isinstance(each, Value)]
        mixed = next((each.mixed for each in tensors if each.mixed), "")
        try:
            if mixed:
                values = [Value(0, shape, mixed=mixed) for shape in shapes]
            else:
                args, options = self.fetch_args_kwargs_from_env(n)
                known = (*known, *self._looked_up(tuple(n.kwargs.values())))
                call = _Call(
                    op=name, version=_VERSION, attributes={}, count=self._count, outputs=shapes,
                    inputs=[each if isinstance(each, Value) else None for each in known],
                    args=args, abstract=known, options=dict(options),
                )  # fmt: skip
                values = self._found(call, shapes)
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

    def _found(self, call: _Call, shapes: list[Shape]) -> list[Value]:
        tensors = call.tensors()
        has_rows = any(each.rows is not None for each in tensors)
        sized = any(each.is_sized for each in tensors) or any(map(_is_sized, _flat(call.abstract)))
        if call.op in _MAKERS:
            return [Value(0, shapes[0], _made(call), sized=sized and call.op == "arange")]
        if call.op in _RANDOM:
            raise Mixes("is random")
        rule = _RULES.get(call.op)
        if not has_rows:
            if not sized:
                return [Value(0, shape) for shape in shapes]
            found = [_made(call)] if call.op in ("expand", "repeat") else [None]
            return [Value(0, s, found[0], sized=found[0] is None) for s in shapes]
        if rule is None:
            raise Mixes("is an operator that is not known to keep rows apart")
        if sized and call.op not in _SIZES:
            raise Mixes("computes with the number of rows")
        found = rule(call)
        for shape, rows in zip(shapes, found, strict=True):
            if rows is not None and shape[rows.axis] != rows.outer * call.count * rows.inner:
                raise Mixes("has an output with a different number of rows")
        return [Value(0, shape, rows) for shape, rows in zip(shapes, found, strict=True)]


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


def _made(call: _Call) -> RowAxis | None:
    """Rows of a tensor one of whose sizes is the number of rows; all rows are equal."""
    sizes = (
        call.abstract[1]
        if call.op in ("expand", "repeat", "new_zeros", "new_ones", "new_full")
        else call.abstract[0]
    )
    if call.op.endswith("_like"):
        return call.value(0).rows
    if call.op == "arange" or not isinstance(sizes, (tuple, list)):
        return None
    sized = [axis for axis, size in enumerate(sizes) if _is_sized(size)]
    if not sized:
        return None
    shape = call.output()
    if len(sized) != 1 or shape[sized[0]] % call.count:
        raise Mixes("has a shape in which the number of rows is not exactly one size")
    return RowAxis(sized[0], 1, shape[sized[0]] // call.count)


# Rules: those of ``row_rules``, where a torch operator computes as one of ONNX does.


_Rule = Callable[[_Call], Found]


def _along(place: int, default: int | None = None) -> _Rule:
    """Computes along the axes of one argument."""

    def rule(call: _Call) -> Found:
        if call.given(1) is not None:
            return elementwise(call)
        axes = call.given_as(place, "dim", default)
        if axes is None or axes == []:
            raise Mixes("computes with the whole tensor")
        return without(call, axes, kept=len(call.output()) == len(call.value(0).sizes))

    return rule


def _first(call: _Call) -> Found:
    """Rows on axis 0 of the first argument and of the outputs; other tensors are weights."""
    call.fixed(*range(1, len(call.inputs)))
    return labelled([(call.value(0), leading(call.value(0), "n"))], [["n"]] * len(call.outputs))


def _convolution(call: _Call) -> Found:
    if len(call.value(0).sizes) != len(call.value(1).sizes):
        raise Mixes("operates on a single row")
    return _first(call)


def _linear(call: _Call) -> Found:
    value = call.value(0)
    rank = len(value.sizes)
    labels: list[Label] = [*range(rank - 1), None]
    weights: Pairs = [(each, [None] * len(each.sizes)) for each in call.tensors()[1:]]
    return labelled([(value, labels), *weights], [[*range(rank - 1), "out"]])


def _added_product(call: _Call) -> Found:
    bias, shape = call.value(0), call.output()
    (found,) = product(call, call.value(1), call.value(2))
    labels = aligned(len(shape), len(shape))
    return labelled(
        [(bias, aligned(len(bias.sizes), len(shape))), (Value(0, shape, found), labels)], [labels]
    )


def _batch_norm(call: _Call) -> Found:
    if call.op == "batch_norm" and call.given_as(5, "training", default=False):
        raise Mixes("normalises over the rows")
    return by_channel(call) + [None] * (len(call.outputs) - 1)


def _layer_norm(call: _Call) -> Found:
    return normalised(call, len(call.value(0).sizes) - len(call.args[1]))


def _dropout(call: _Call) -> Found:
    if call.given_as(2, "train", default=False):
        raise Mixes("is random in training mode")
    return same(call)


def _regroup(call: _Call) -> Found:
    return [regrouped(call.value(0), shape, call.count) for shape in call.outputs if shape is not None]


def _permute(call: _Call) -> Found:
    rank = len(call.value(0).sizes)
    if call.op == "permute":
        return permuted(call, [axis_of(axis, rank) for axis in call.args[1]])
    order = list(range(rank))
    a, b = (0, 1) if call.op in ("t", "numpy_T") else (axis_of(axis, rank) for axis in call.args[1:3])
    if rank > 1:
        order[a], order[b] = order[b], order[a]
    return permuted(call, order)


def _expand(call: _Call) -> Found:
    value = call.value(0)
    if value.rows is None:
        raise Mixes("expands by values of requests")
    rows = value.rows.at(value.rows.axis + len(call.output()) - len(value.sizes))
    sizes = call.abstract[1] if isinstance(call.abstract[1], (tuple, list)) else ()
    if any(_is_sized(size) and axis != rows.axis for axis, size in enumerate(sizes)):
        raise Mixes("makes the size of a row depend on the number of rows")
    return [rows]


def _slice(call: _Call) -> Found:
    value = call.value(0)
    assert value.rows is not None
    if call.axis(1) == value.rows.axis:
        if call.outputs[0] != value.sizes or call.given_as(4, "step", default=1) != 1:
            raise Mixes("selects some of the rows")
    elif any(_is_sized(each) for each in call.abstract):
        raise Mixes("slices by the number of rows")
    return [value.rows]


def _cat(call: _Call) -> Found:
    return [joined(call.tensors(), call.axis(1))]


def _stack(call: _Call) -> Found:
    axis = call.axis(1, fresh=True)
    rows = joined(call.tensors(), -1)
    assert rows is not None
    return [rows.at(rows.axis + (rows.axis >= axis))]


def _pad(call: _Call) -> Found:
    value, pads = call.value(0), call.args[1]
    assert value.rows is not None
    if value.rows.axis >= len(value.sizes) - len(pads) // 2:
        raise Mixes("pads the rows")
    return [value.rows]


def _embedding(call: _Call) -> Found:
    if call.value(0).rows is not None:
        raise Mixes("has a table that depends on requests")
    return gathered(call.value(0), call.value(1), 0)


def _gather(call: _Call) -> Found:
    return by_row([call.value(0), call.value(2)], call.args[1])


def _index_select(call: _Call) -> Found:
    return gathered(call.value(0), call.value(2), call.axis(1))


def _index(call: _Call) -> Found:
    """One index for one axis: a table lookup, or some positions of every row."""
    given = [(axis, each) for axis, each in enumerate(call.abstract[1]) if each is not None]
    if len(given) != 1 or not isinstance(given[0][1], Value):
        raise Mixes("selects elements by several indices")
    axis, indices = given[0]
    return gathered(call.value(0), indices, axis)


def _attention(call: _Call) -> Found:
    """softmax(q k') v with the sequence on the axis before the last."""
    rank = len(call.value(0).sizes)
    labels: list[Label] = [*range(rank - 2), None, None]
    pairs: Pairs = [(call.value(n), labels) for n in range(3)]
    pairs += [(mask, labels[rank - len(mask.sizes) :]) for mask in call.tensors()[3:]]
    if call.given_as(4, "dropout_p", default=0.0):
        raise Mixes("is random in training mode")
    return labelled(pairs, [labels] * len(call.outputs))


def _recurrent(call: _Call) -> Found:
    """lstm(x, (h, c), weights, biases, layers, dropout, train, bidirectional, batch_first); gru alike."""
    if call.args[6]:
        raise Mixes("is random in training mode")
    value = call.value(0)
    if len(value.sizes) != 3:
        raise Mixes("operates on a single row")
    x: list[Label] = ["n", None, None] if call.args[8] else [None, "n", None]
    state: list[Label] = [None, "n", None]
    pairs: Pairs = [(value, x)]
    pairs += [(each, state) for each in _flat(call.abstract[1]) if isinstance(each, Value)]
    pairs += [(each, [None] * len(each.sizes)) for each in _flat(call.abstract[2]) if isinstance(each, Value)]
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
    **dict.fromkeys(_ELEMENTWISE, elementwise), **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_REDUCE, _along(1)), **dict.fromkeys((*_POOLS, *_RESIZES), pool),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d"), _convolution),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _regroup),
    **dict.fromkeys(("squeeze", "unsqueeze"), _regroup),
    **dict.fromkeys(("permute", "transpose", "t", "numpy_T", "swapaxes"), _permute),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _along(2, 0)),
    "_native_batch_norm_legit_no_training": _batch_norm, "addmm": _added_product, "baddbmm": _added_product,
    "batch_norm": _batch_norm, "bmm": matmul, "cat": _cat, "constant_pad_nd": _pad, "dropout": _dropout,
    "embedding": _embedding, "expand": _expand, "expand_as": elementwise, "feature_dropout": _dropout,
    "gather": _gather, "group_norm": _first, "gru": _recurrent, "index": _index,
    "index_select": _index_select, "layer_norm": _layer_norm, "linear": _linear, "lstm": _recurrent,
    "matmul": matmul, "max_pool2d_with_indices": pool, "mm": matmul, "native_group_norm": _first,
    "native_layer_norm": _layer_norm, "pad": _pad, "pixel_shuffle": _first, "prelu": by_channel,
    "rms_norm": _layer_norm, "scaled_dot_product_attention": _attention, "select": _along(1),
    "slice": _slice, "sort": _along(1, -1), "stack": _stack, "topk": _along(2, -1), "unbind": _along(1, 0),
}  # fmt: skip
