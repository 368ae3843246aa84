"""Steps that mix rows, and what keeps trials from meeting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import TensorProto

from benchmarks.unseen_graphs.draft import Draft

FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
Step = Callable[[Draft, str, int], str]
"""From ``[N, W]`` floats to ``[N, W]`` or ``[N, 1]`` floats, given W."""


@dataclass(slots=True)
class Hint:
    """Which inputs show that a graph mixes."""

    values: tuple[float, float] | None = None
    length: int = 0
    rows: int = 0
    kind: str = ""
    hidden: str = "plain"


MIXING: dict[str, Step] = {}
SINCE = {
    "LayerNormalization": 17,
    "Trilu": 14,
    "BatchNormalization": 14,
    "Resize": 13,
    "Einsum": 12,
}
"""The first opset that has an operator in the form used here, by how a step's name begins."""


def add(name: str, step: Step) -> None:
    """Name a step."""
    MIXING[name] = step


def add_each(name: str, kinds: Iterable[str], make: Callable[[Draft, str, int, str], str]) -> None:
    """A step for each of several operators."""
    for kind in kinds:
        add(name.replace("*", kind), partial(_of_kind, make, kind))


def _of_kind(make: Callable[[Draft, str, int, str], str], kind: str, d: Draft, h: str, w: int) -> str:
    return make(d, h, w, kind)


def swapped(d: Draft, h: str, inner: Callable[[Draft, str], str]) -> str:
    """A step on the transposed tensor, ``[W, N]``."""
    return d.op("Transpose", inner(d, d.op("Transpose", h, perm=[1, 0])), perm=[1, 0])


def channels(d: Draft, h: str, inner: Callable[[Draft, str], str]) -> str:
    """A step on ``[1, W, N]``."""
    return swapped(d, h, lambda d, t: d.squeeze(inner(d, d.unsqueeze(t, 0)), 0))


def rolled(d: Draft, h: str) -> str:
    """Each row in the next one's place."""
    return d.op("Concat", d.slice(h, 1, 1 << 40), d.slice(h, 0, 1), axis=0)


def positions(d: Draft, h: str) -> str:
    """``[N, 1]``: the place of each row."""
    count = d.squeeze(d.size(h, 0), 0)
    return d.unsqueeze(d.cast(d.op("Range", d.whole(0), count, d.whole(1))), 1)


def ones(d: Draft, h: str) -> str:
    """``[N]`` ones by ConstantOfShape."""
    made = d.op("ConstantOfShape", d.size(h, 0))
    return d.op("Add", made, d.number(1.0))


REDUCTIONS = [
    f"Reduce{kind}" for kind in ("Sum", "Mean", "Max", "Min", "L1", "L2", "LogSumExp", "SumSquare", "Prod")
]
add_each("* 0", REDUCTIONS, lambda d, h, w, kind: d.op("Sub", h, d.reduce(kind, h, [0])))
add_each("* all", REDUCTIONS, lambda d, h, w, kind: d.op("Add", h, d.reduce(kind, h, [0, 1])))
add_each(
    "* transposed", REDUCTIONS,
    lambda d, h, w, kind: d.op(
        "Add", h, d.op("Transpose", d.reduce(kind, d.op("Transpose", h, perm=[1, 0]), [-1]))
    ),
)  # fmt: skip
SOFT = ("Softmax", "LogSoftmax", "Hardmax")
add_each("* 0", SOFT, lambda d, h, w, kind: d.op(kind, h, axis=0))
add_each("* transposed", SOFT, lambda d, h, w, kind: swapped(d, h, lambda d, t: d.op(kind, t, axis=-1)))
add("CumSum 0", lambda d, h, w: d.op("CumSum", h, d.whole(0)))
add_each(
    "CumSum 0 *", ("reverse", "exclusive"), lambda d, h, w, kind: d.op("CumSum", h, d.whole(0), **{kind: 1})
)
add_each("* 0", ("ArgMax", "ArgMin"), lambda d, h, w, kind: d.op("Add", h, d.cast(d.op(kind, h, axis=0))))
add_each("* next row", ("Max", "Min", "Add", "Mul", "Sub"), lambda d, h, w, kind: d.op(kind, h, rolled(d, h)))
add("TopK 0", lambda d, h, w: d.top(h, d.size(h, 0), 0)[0])
add("TopK 0 indices", lambda d, h, w: d.cast(d.top(h, d.size(h, 0), 0)[1]))
add("Concat and cut 0", lambda d, h, w: rolled(d, h))
add("Slice 0 reversed", lambda d, h, w: d.slice(h, -1, -(1 << 40), 0, -1))
add("Slice 0 first", lambda d, h, w: d.op("Sub", h, d.slice(h, 0, 1)))
add("Slice 0 last", lambda d, h, w: d.op("Mul", h, d.slice(h, -1, 1 << 40)))
add("Gather row", lambda d, h, w: d.op("Add", h, d.op("Gather", h, d.whole(0), axis=0)))
add("GatherND row", lambda d, h, w: d.op("Sub", h, d.op("GatherND", h, d.ints(0))))
add(
    "Gather zeros",
    lambda d, h, w: d.op("Gather", h, d.cast(d.op("Sub", ones(d, h), d.number(1.0)), INT64), axis=0),
)
add(
    "GatherElements 0",
    lambda d, h, w: d.op("Add", h, d.op("GatherElements", h, d.op("ArgMax", h, axis=0), axis=0)),
)
add(
    "ScatterElements 0",
    lambda d, h, w: d.op(
        "ScatterElements", h, d.constant(np.zeros((1, w), np.int64)),
        d.constant(np.full((1, w), 7, np.float32)), axis=0,
    ),
)  # fmt: skip
add(
    "ScatterND row",
    lambda d, h, w: d.op("ScatterND", h, d.constant(np.array([[0]], np.int64)), d.random(1, w)),
)
add(
    "Reshape interleaved",
    lambda d, h, w: d.op("Transpose", d.op("Reshape", h, d.shape(d.ints(w), d.ints(-1))), perm=[1, 0]),
)
add(
    "Reshape and sum",
    lambda d, h, w: d.op("Add", h, d.op("ReduceMean", d.op("Reshape", h, d.ints(1, -1)), keepdims=1)),
)
add(
    "LayerNormalization 0",
    lambda d, h, w: swapped(d, h, lambda d, t: d.op("LayerNormalization", t, ones(d, h), axis=-1)),
)
add(
    "BatchNormalization training",
    lambda d, h, w: d.ops(
        "BatchNormalization", h,
        *(d.constant(np.full(w, value, np.float32)) for value in (1, 0, 0, 1)), outputs=3, training_mode=1,
    )[0],
)  # fmt: skip
add(
    "InstanceNormalization rows",
    lambda d, h, w: channels(d, h, lambda d, t: d.op("InstanceNormalization", t, d.random(w), d.random(w))),
)
add("LpNormalization 0", lambda d, h, w: d.op("LpNormalization", h, axis=0, p=2))
add("MeanVariance 0", lambda d, h, w: d.op("MeanVarianceNormalization", h, axes=[0]))
add("LRN rows", lambda d, h, w: d.squeeze(d.op("LRN", d.unsqueeze(h, 0, 3), size=3, alpha=1.0), 0, 3))


def pairwise(d: Draft, h: str, w: int) -> str:
    """``[N, 1]`` against ``[1, N]``."""
    column = d.slice(h, 0, 1, 1)
    differences = d.op("Sub", column, d.op("Transpose", column, perm=[1, 0]))
    return d.op("Add", h, d.reduce("ReduceMean", d.op("Abs", differences), [1]))


def attention(d: Draft, h: str, w: int) -> str:
    """Among rows."""
    scores = d.op("MatMul", h, d.op("Transpose", h, perm=[1, 0]))
    return d.op("MatMul", d.op("Softmax", scores, axis=1), h)


add("pairwise", pairwise)
add("attention", attention)
add(
    "Einsum rows",
    lambda d, h, w: d.op("Einsum", d.op("Einsum", h, h, equation="ij,kj->ik"), h, equation="ik,kj->ij"),
)
add("Einsum sum", lambda d, h, w: d.op("Add", h, d.op("Einsum", h, equation="ij->j")))
add("Gemm rows", lambda d, h, w: d.op("Gemm", h, d.op("Gemm", h, h, transA=1)))
add(
    "dynamic quantisation",
    lambda d, h, w: d.op("DequantizeLinear", *d.ops("DynamicQuantizeLinear", h, outputs=3)),
)


def quantised_product(d: Draft, h: str, w: int) -> str:
    """MatMulInteger, as ``quantize_dynamic`` makes it."""
    q, scale, zero = d.ops("DynamicQuantizeLinear", h, outputs=3)
    weights = d.constant(np.eye(w, dtype=np.int8))
    return d.op("Mul", d.cast(d.op("MatMulInteger", q, weights, zero)), scale)


add("MatMulInteger", quantised_product)
add("Range", lambda d, h, w: d.op("Add", h, positions(d, h)))
add("ConstantOfShape", lambda d, h, w: d.op("Add", h, d.unsqueeze(d.op("CumSum", ones(d, h), d.whole(0)), 1)))
add("number of rows", lambda d, h, w: d.op("Mul", h, d.cast(d.size(h, 0))))
add("Size", lambda d, h, w: d.op("Add", h, d.cast(d.op("Size", h))))
add("Tile and cut", lambda d, h, w: d.op("Tile", d.slice(h, 0, 1), d.shape(d.size(h, 0), d.ints(1))))
add("Expand first", lambda d, h, w: d.op("Expand", d.slice(h, 0, 1), d.op("Shape", h)))
add(
    "EyeLike",
    lambda d, h, w: d.op("Add", h, d.op("EyeLike", h)),
)
add("Trilu", lambda d, h, w: d.op("Trilu", h, upper=0))
add(
    "NonZero",
    lambda d, h, w: d.op("Add", h, d.cast(d.size(d.op("NonZero", d.op("Relu", h)), 1))),
)


def compress(d: Draft, h: str, w: int) -> str:
    """The sum of those rows that begin with a number above 0."""
    chosen = d.squeeze(d.op("Greater", d.slice(h, 0, 1, 1), d.number(0.0)), 1)
    return d.op("Add", h, d.reduce("ReduceSum", d.op("Compress", h, chosen, axis=0), [0]))


add("Compress", compress)
add(
    "Unique",
    lambda d, h, w: d.op("Add", h, d.cast(d.size(d.op("Unique", d.op("Relu", h), sorted=1), 0))),
)
add(
    "Resize 0",
    lambda d, h, w: d.slice(
        d.op("Resize", h, "", d.constant(np.array([2, 1], np.float32)), mode="linear"), 1, 1 << 40, 0, 2
    ),
)
add("Pad 0", lambda d, h, w: d.slice(d.op("Pad", h, d.ints(1, 0, 0, 0)), 0, -1))
add("Pad 0 edge", lambda d, h, w: d.slice(d.op("Pad", h, d.ints(0, 0, 1, 0), mode="edge"), 1, 1 << 40))
add(
    "ReverseSequence",
    lambda d, h, w: d.op(
        "ReverseSequence", h, d.op("Expand", d.size(h, 0), d.ints(w)), time_axis=0, batch_axis=1
    ),
)
add(
    "Conv rows",
    lambda d, h, w: channels(
        d, h, lambda d, t: d.op("Conv", t, d.random(w, w, 3), pads=[1, 1], kernel_shape=[3])
    ),
)
add_each(
    "* rows", ("MaxPool", "AveragePool"),
    lambda d, h, w, kind: channels(
        d, h, lambda d, t: d.op(kind, t, pads=[1, 1], kernel_shape=[3], strides=[1])
    ),
)  # fmt: skip
add(
    "GlobalAveragePool rows",
    lambda d, h, w: d.op(
        "Add", h, d.squeeze(d.op("GlobalAveragePool", d.unsqueeze(d.op("Transpose", h), 0)), 0, 2)
    ),
)


def recurrent_rows(d: Draft, h: str, w: int, kind: str) -> str:
    """Rows as the steps of time."""
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[kind]
    weights = [d.random(1, gates * w, w, scale=0.5) for _ in range(2)]
    return d.squeeze(d.op(kind, d.unsqueeze(h, 1), *weights, hidden_size=w), 1, 2)


add_each("* rows", ("RNN", "GRU", "LSTM"), recurrent_rows)


def sequence(d: Draft, h: str, w: int) -> str:
    """Rows as a sequence, the first of which is put behind the others."""
    parts = d.op("SplitToSequence", h, axis=0)
    first = d.op("SequenceAt", parts, d.whole(0))
    rest = d.op("SequenceErase", d.op("SequenceInsert", parts, first), d.whole(0))
    return d.op("ConcatFromSequence", rest, axis=0)


add("SplitToSequence", sequence)
add(
    "SequenceLength",
    lambda d, h, w: d.op("Mul", h, d.cast(d.op("SequenceLength", d.op("SplitToSequence", h, axis=0)))),
)


def scan_rows(d: Draft, h: str, w: int) -> str:
    """A Scan along the rows that carries a sum."""
    state, row = d.name(), d.name()

    def make(inner: Draft) -> list[tuple[str, int]]:
        total = inner.op("Add", inner.op("Mul", state, inner.number(0.5)), row)
        return [(total, FLOAT), (total, FLOAT)]

    body = d.body(make, [(state, FLOAT, 1), (row, FLOAT, 1)])
    zeros = d.constant(np.zeros(w, np.float32))
    return d.ops("Scan", zeros, h, outputs=2, body=body, num_scan_inputs=1)[1]


def scan_columns(d: Draft, h: str, w: int) -> str:
    """A Scan along the columns whose body reads all rows."""
    state, column = d.name(), d.name()

    def make(inner: Draft) -> list[tuple[str, int]]:
        top = inner.reduce("ReduceMax", column, [0])
        return [(inner.op("Add", state, top), FLOAT), (inner.op("Sub", column, top), FLOAT)]

    body = d.body(make, [(state, FLOAT, 1), (column, FLOAT, 1)])
    axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
    zero = d.constant(np.zeros(1, np.float32))
    return d.ops("Scan", zero, h, outputs=2, body=body, num_scan_inputs=1, **axes)[1]


def loop(d: Draft, h: str, make: Callable[[Draft, str, str], str], trips: str) -> str:
    """A Loop that carries one tensor; ``make`` gets the step's number and the tensor."""
    step, go, state = d.name(), d.name(), d.name()

    def body(inner: Draft) -> list[tuple[str, int]]:
        return [(inner.op("Identity", go), BOOL), (make(inner, step, state), FLOAT)]

    graph = d.body(body, [(step, INT64, 0), (go, BOOL, 0), (state, FLOAT, 2)])
    return d.op("Loop", trips, "", h, body=graph)


def loop_by_data(d: Draft, h: str, w: int) -> str:
    """As many steps as the largest value says."""
    top = d.op("Clip", d.reduce("ReduceMax", h, [0, 1], keepdims=0), d.number(0.0), d.number(9.0))
    return loop(d, h, lambda i, _, s: i.op("Mul", s, i.number(1.5)), d.cast(top, INT64))


def loop_by_rows(d: Draft, h: str, w: int) -> str:
    """As many steps as there are rows."""
    return loop(d, h, lambda i, _, s: i.op("Add", s, i.number(1.0)), d.squeeze(d.size(h, 0), 0))


def loop_over_rows(d: Draft, h: str, w: int) -> str:
    """In each step all rows minus the row of that number."""

    def make(inner: Draft, step: str, state: str) -> str:
        return inner.op("Add", state, inner.op("Mul", inner.number(0.5), inner.op("Gather", h, step, axis=0)))

    return loop(d, h, make, d.squeeze(d.size(h, 0), 0))


def branch_by_data(d: Draft, h: str, w: int) -> str:
    """An If on the largest value."""
    top = d.reduce("ReduceMax", h, [0, 1], keepdims=0)
    return d.branch(d.op("Greater", top, d.number(1.0)), lambda i: i.op("Neg", h), lambda i: i.op("Abs", h))


for _step in (scan_rows, scan_columns, loop_by_data, loop_by_rows, loop_over_rows, branch_by_data):
    add(_step.__name__.replace("_", " "), _step)


# What hides them

VALUES = {"value": [0, 1], "value, where": [0, 1], "value of a row": [1], "value, multiplied": [1]}
"""Ways that depend on values, of all rows or of each: the axes that are looked along."""
LENGTHS = ("length", "length, where")


def inside(d: Draft, h: str, low: float, high: float) -> str:
    """Which values lie between two bounds, as floats 0 and 1."""
    above = d.op("Greater", h, d.number(low))
    return d.cast(d.op("And", above, d.op("Less", h, d.number(high))))


def any_inside(d: Draft, h: str, hint: Hint, axes: list[int], *, signed: bool) -> str:
    """Whether any value lies where the hint says, of all or of each row."""
    low = d.dice.choice((20.0, 31.0, 55.0, -41.0)[: 4 if signed else 3])
    hint.values = (low, low + 1)
    found = d.reduce("ReduceMax", inside(d, h, low - 0.01, low + 1.01), axes, keepdims=int(len(axes) == 1))
    return d.op("Greater", found, d.number(0.5))


def by_length(d: Draft, hint: Hint) -> str:
    """Whether the open length of ``x`` is above a bound."""
    limit = d.dice.choice((17, 50, 63))
    hint.length = limit + d.dice.randrange(1, 9)
    return d.squeeze(d.op("Greater", d.size("x", 1), d.ints(limit)), 0)


def by_rows(d: Draft, h: str, hint: Hint) -> str:
    """Whether there are as many rows as only some batches have."""
    hint.rows = d.dice.choice((6, 7, 9, 12))
    return d.squeeze(d.op("Equal", d.size(h, 0), d.ints(hint.rows)), 0)


def plain(d: Draft, h: str) -> str:
    """What is done if nothing is mixed."""
    return d.op("Mul", h, d.number(0.5))


def in_function(d: Draft, h: str, step: Callable[[Draft, str], str]) -> str:
    """In a local function, in one that this one calls, or in one named as an operator of the standard."""
    name = d.dice.choice(("Relu", "Identity", "Mixer", "LayerNormalization", "Tanh", "Softmax"))
    made = step
    if d.dice.random() < 0.5:
        inner_name = d.dice.choice(("Sigmoid", "Inner", "Gelu"))

        def made(e: Draft, v: str) -> str:
            return e.op("Neg", e.call(step, v, inner_name))

    return d.call(made, h, name)


def hidden(d: Draft, h: str, w: int, hint: Hint, *, gate: str, signed: bool, open_length: bool) -> str:
    """A mixing step, met always or rarely; what it is and how to show it is put in the hint.

    ``gate`` is the input itself, as ``[N, ...]``, on whose values some depend.
    """
    hint.kind = d.dice.choice([name for name in sorted(MIXING) if d.opset >= SINCE.get(name.split()[0], 0)])
    step = MIXING[hint.kind]

    def mix(e: Draft, v: str) -> str:
        return step(e, v, w)

    hint.hidden = d.dice.choice(
        ("plain", "function", "step", *VALUES, "rows", *(LENGTHS * 2 if open_length else ()))
    )
    if hint.hidden in VALUES:
        return by_values(
            d, h, mix, any_inside(d, gate, hint, VALUES[hint.hidden], signed=signed), hint.hidden
        )
    if hint.hidden == "function":
        return in_function(d, h, mix)
    if hint.hidden == "step":
        return in_a_step(d, h, mix)
    if hint.hidden == "plain":
        return mix(d, h)
    condition = by_rows(d, h, hint) if hint.hidden == "rows" else by_length(d, hint)
    if hint.hidden == "length, where":
        return d.op("Where", condition, mix(d, h), plain(d, h))
    return d.branch(condition, lambda e: mix(e, h), lambda e: plain(e, h))


def by_values(d: Draft, h: str, mix: Callable[[Draft, str], str], condition: str, way: str) -> str:
    """Mixed where the condition holds, of all rows or of each."""
    if way == "value":
        return d.branch(condition, lambda e: mix(e, h), lambda e: plain(e, h))
    if way == "value, multiplied":
        return d.op("Add", plain(d, h), d.op("Mul", d.cast(condition), mix(d, h)))
    return d.op("Where", condition, mix(d, h), plain(d, h))


def in_a_step(d: Draft, h: str, mix: Callable[[Draft, str], str]) -> str:
    """In one step of a Loop, the first or a later one."""
    at = d.dice.choice((0, 3))

    def make(e: Draft, number: str, state: str) -> str:
        this = e.op("Equal", number, e.whole(at))
        return e.branch(this, lambda f: mix(f, state), lambda f: plain(f, state))

    return loop(d, h, make, d.whole(4))
