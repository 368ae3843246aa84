"""Ordinary networks, step by step: what they do to a row never depends on another one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from onnx import TensorProto

from benchmarks.unseen_graphs.draft import Draft
from benchmarks.unseen_graphs.mixing import BOOL, FLOAT, INT64, loop

Step = Callable[[Draft, str, int], tuple[str, int]]
"""From ``[N, W]`` and W to the same."""
ROWS: dict[str, Step] = {}
EXACT: dict[str, Step] = {}
"""Steps that jump: only where what comes before them does not round."""
VOCABULARY = 64


def same(name: str, make: Callable[[Draft, str, int], str]) -> None:
    """Add a step that keeps W."""
    ROWS[name] = lambda d, h, w: (make(d, h, w), w)


def unary(kind: str, d: Draft, h: str, w: int) -> str:
    """An operator of one input."""
    return d.op(kind, h)


def with_constant(kind: str, d: Draft, h: str, w: int) -> str:
    """An operator of the rows and a constant."""
    return d.op(kind, h, d.random(*d.dice.choice(((w,), (1, w)))))


for _kind in (
    "Relu", "Tanh", "Sigmoid", "Abs", "Neg", "Softplus", "Erf", "Elu", "LeakyRelu", "HardSigmoid", "Selu",
    "Softsign", "Dropout", "Identity", "Sin", "Atan",
):  # fmt: skip
    same(_kind, partial(unary, _kind))
for _kind in ("Add", "Mul", "Sub", "Max", "Min", "PRelu"):
    same(f"{_kind} of a constant", partial(with_constant, _kind))
# At zero its slope is infinite: without the addend rounding alone would be seen as rows that mix.
same("Sqrt", lambda d, h, w: d.op("Sqrt", d.op("Add", d.op("Abs", h), d.number(0.01))))
same("Log", lambda d, h, w: d.op("Log", d.op("Add", d.op("Abs", h), d.number(1.0))))
same("Exp", lambda d, h, w: d.op("Exp", d.op("Clip", h, d.number(-4.0), d.number(4.0))))
same("Clip", lambda d, h, w: d.op("Clip", h, d.number(-2.5), d.number(30.0)))
same("Div", lambda d, h, w: d.op("Div", h, d.op("Add", d.op("Abs", h), d.number(1.0))))
same("Where", lambda d, h, w: d.op("Where", d.op("Less", h, d.number(0.0)), d.op("Mul", h, d.number(0.1)), h))
same("residual", lambda d, h, w: d.op("Add", h, d.op("Tanh", d.op("MatMul", h, d.random(w, w)))))
same("gate", lambda d, h, w: d.op("Mul", h, d.op("Sigmoid", d.op("MatMul", h, d.random(w, w)))))
same("Softmax", lambda d, h, w: d.op("Softmax", h, axis=d.dice.choice((1, -1))))
same("LogSoftmax", lambda d, h, w: d.op("LogSoftmax", h, axis=1))
same(
    "LpNormalization",
    lambda d, h, w: d.op("LpNormalization", d.op("Add", d.op("Abs", h), d.number(1.0)), axis=1),
)
same("CumSum", lambda d, h, w: d.op("CumSum", h, d.whole(1)))
same("Reshape", lambda d, h, w: d.op("Reshape", h, d.ints(*d.dice.choice(((-1, w), (0, -1), (0, w))))))
same("Unsqueeze", lambda d, h, w: d.squeeze(d.op("Relu", d.unsqueeze(h, 1)), 1))
same("reversed columns", lambda d, h, w: d.slice(h, -1, -(1 << 40), 1, -1))
same("sorted", lambda d, h, w: d.top(h, d.ints(w), 1)[0])
same("Gather columns", lambda d, h, w: d.op("Gather", h, d.ints(*d.dice.sample(range(w), w)), axis=1))
same(
    "to and fro",
    lambda d, h, w: d.op("Transpose", d.op("Tanh", d.op("Transpose", h, perm=[1, 0])), perm=[1, 0]),
)
same(
    "Einsum",
    lambda d, h, w: (
        d.op("Einsum", h, d.random(w, w), equation="ij,jk->ik") if d.opset > 11 else d.op("Neg", h)
    ),
)
same("Sum", lambda d, h, w: d.op("Sum", h, h, d.random(w)))
same("Expand", lambda d, h, w: d.op("Expand", d.reduce("ReduceMax", h, [1]), d.op("Shape", h)))
same(
    "function", lambda d, h, w: d.call(lambda e, v: e.op("Mul", v, e.op("Sigmoid", v)), h, f"Swish{d.name()}")
)
same("If constant", lambda d, h, w: d.branch(
    d.constant(np.array(d.dice.random() < 0.5)), lambda e: e.op("Neg", h), lambda e: e.op("Tanh", h)
))  # fmt: skip
same("Loop constant", lambda d, h, w: loop(d, h, lambda e, _, s: e.op("Tanh", e.op("Add", s, h)), d.whole(3)))
same("centred", lambda d, h, w: d.op("Sub", h, d.reduce("ReduceMean", h, [1])))
same("BatchNormalization", lambda d, h, w: d.op(
    "BatchNormalization", h, d.random(w), d.random(w), d.random(w), d.constant(np.full(w, 2, np.float32))
))  # fmt: skip


def layer_norm(d: Draft, h: str, w: int) -> str:
    """As an operator, or as older exporters write it."""
    if d.opset >= 17:
        return d.op("LayerNormalization", h, d.random(w), d.random(w), axis=-1)
    centred = d.op("Sub", h, d.reduce("ReduceMean", h, [-1]))
    variance = d.reduce("ReduceMean", d.op("Mul", centred, centred), [-1])
    return d.op("Div", centred, d.op("Sqrt", d.op("Add", variance, d.number(1e-5))))


def linear(d: Draft, h: str, w: int) -> tuple[str, int]:
    """A dense layer."""
    wide = d.dice.choice((4, 6, 8))
    return d.op("Add", d.op("MatMul", h, d.random(w, wide, scale=0.5)), d.random(wide)), wide


def gemm(d: Draft, h: str, w: int) -> tuple[str, int]:
    """The same as one operator."""
    wide = d.dice.choice((4, 6, 8))
    return d.op("Gemm", h, d.random(wide, w, scale=0.5), d.random(wide), transB=1), wide


def split(d: Draft, h: str, w: int) -> tuple[str, int]:
    """Halves, multiplied."""
    halves = w // 2
    first, second = d.slice(h, 0, halves, 1), d.slice(h, halves, 2 * halves, 1)
    return d.op("Mul", first, d.op("Sigmoid", second)), halves


def scan(d: Draft, h: str, w: int) -> str:
    """Along the columns, each row for itself."""
    state, column = d.name(), d.name()

    def make(inner: Draft) -> list[tuple[str, int]]:
        total = inner.op("Add", inner.op("Mul", state, inner.number(0.5)), column)
        return [(total, FLOAT), (total, FLOAT)]

    body = d.body(make, [(state, FLOAT, 1), (column, FLOAT, 1)])
    start = d.op("Gather", h, d.whole(0), axis=1)
    axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
    return d.ops("Scan", start, h, outputs=2, body=body, num_scan_inputs=1, **axes)[1]


same("LayerNormalization", layer_norm)
same("Scan columns", scan)
ROWS["linear"], ROWS["gemm"], ROWS["split"] = linear, gemm, split
ROWS["Concat"] = lambda d, h, w: (d.op("Concat", h, d.op("Tanh", h), axis=1), 2 * w)
ROWS["Pad"] = lambda d, h, w: (d.op("Pad", h, d.ints(0, 1, 0, 0)), w + 1)
ROWS["Tile"] = lambda d, h, w: (d.op("Tile", h, d.ints(1, 2)), 2 * w)
ROWS["top"] = lambda d, h, w: (d.top(h, d.ints(2), -1)[0], 2)
ROWS["mean and most"] = lambda d, h, w: (
    d.op("Concat", d.reduce("ReduceMean", h, [1]), d.reduce("ReduceMax", h, [-1]), axis=1), 2
)  # fmt: skip
EXACT["Round"] = lambda d, h, w: (d.op("Round", h), w)
EXACT["Floor"] = lambda d, h, w: (d.op("Floor", h), w)
EXACT["Sign"] = lambda d, h, w: (d.op("Sign", h), w)
EXACT["to half"] = lambda d, h, w: (d.cast(d.cast(h, TensorProto.FLOAT16)), w)
EXACT["to whole"] = lambda d, h, w: (d.cast(d.cast(h, INT64)), w)
EXACT["compared"] = lambda d, h, w: (d.cast(d.op("Greater", h, d.random(w))), w)
EXACT["ArgMax"] = lambda d, h, w: (d.cast(d.op("ArgMax", h, axis=1)), 1)
EXACT["order"] = lambda d, h, w: (d.cast(d.top(h, d.ints(w), 1)[1]), w)
EXACT["quantised"] = lambda d, h, w: (d.op("DequantizeLinear", *(
    [d.op("QuantizeLinear", h, *(both := (d.number(0.05), d.constant(np.array(3, np.int8))))), *both]
)), w)  # fmt: skip
EXACT["bits"] = lambda d, h, w: (d.cast(d.op("Not", d.cast(d.op("Relu", h), BOOL))), w)


def row_steps(d: Draft, h: str, w: int, count: int, *, exact: bool = False) -> tuple[str, int]:
    """Some steps on rows."""
    for _ in range(count):
        if exact and d.dice.random() < 0.4:
            h, w = EXACT[d.dice.choice(sorted(EXACT))](d, h, w)
        else:
            exact = False
            h, w = ROWS[d.dice.choice(sorted(ROWS))](d, h, w)
        if w < 2 or w > 32:
            h, w = d.op("MatMul", h, d.random(w, 4, scale=0.5)), 4
    return h, w


# Pictures and tokens


def picture_step(d: Draft, h: str, c: int) -> str:
    """``[N, C, S, S]`` to the same."""
    match d.dice.randrange(9):
        case 0:
            h = d.op("Conv", h, d.random(c, c, 3, 3, scale=0.3), d.random(c), pads=[1, 1, 1, 1])
        case 1:
            h = d.op("Conv", h, d.random(c, 1, 3, 3), pads=[1, 1, 1, 1], group=c)
        case 2:
            h = d.op("MaxPool", h, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
        case 3:
            h = d.op("AveragePool", h, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
        case 4:
            two = d.constant(np.full(c, 2, np.float32))
            h = d.op("BatchNormalization", h, d.random(c), d.random(c), d.random(c), two)
        case 5:
            h = d.op("InstanceNormalization", h, d.random(c), d.random(c))
        case 6:
            h = d.op("LRN", h, size=3)
        case 7:
            h = d.op("Mul", h, d.op("Sigmoid", d.op("GlobalAveragePool", h)))
        case _:
            h = d.op("DepthToSpace", d.op("SpaceToDepth", h, blocksize=2), blocksize=2)
    return d.op("Relu", h) if d.dice.random() < 0.5 else h


def picture_rows(d: Draft, h: str, c: int, side: int) -> tuple[str, int]:
    """A small convolutional network."""
    for _ in range(d.dice.randrange(1, 4)):
        h = picture_step(d, h, c)
    if d.opset > 12 and d.dice.random() < 0.3:
        scales = d.constant(np.array([1, 1, 2, 2], np.float32))
        h, side = d.op("Resize", h, "", scales, mode=d.dice.choice(("nearest", "linear"))), 2 * side
    if d.dice.random() < 0.5:
        return d.op("Flatten", d.op("GlobalAveragePool", h)), c
    return d.op("MatMul", d.op("Flatten", h), d.random(c * side * side, 6, scale=0.2)), 6


def own_attention(d: Draft, h: str, w: int) -> str:
    """Among the tokens of a row, with two heads."""
    if d.dice.random() < 0.5:
        shape = d.shape(d.size(h, 0), d.size(h, 1), d.ints(2, w // 2))
    else:
        shape = d.ints(0, 0, 2, w // 2)
    parts = [
        d.op("Transpose", d.op("Reshape", d.op("MatMul", h, d.random(w, w, scale=0.4)), shape), perm=perm)
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    ]
    scores = d.op("Softmax", d.op("MatMul", parts[0], parts[1]), axis=3 if d.opset < 13 else -1)
    mixed = d.op("Transpose", d.op("MatMul", scores, parts[2]), perm=[0, 2, 1, 3])
    return d.op("Add", h, d.op("Reshape", mixed, d.ints(0, 0, w)))


def recurrent(d: Draft, h: str, w: int) -> str:
    """Batch first for the user, time first for the operator."""
    kind, gates = d.dice.choice((("RNN", 1), ("GRU", 3), ("LSTM", 4)))
    weights = [d.random(1, gates * w, w, scale=0.4) for _ in range(2)]
    turned = d.op("Transpose", h, perm=[1, 0, 2])
    return d.op("Transpose", d.squeeze(d.op(kind, turned, *weights, hidden_size=w), 1), perm=[1, 0, 2])


def class_token(d: Draft, h: str, w: int) -> str:
    """A token before the others, expanded to as many rows as there are."""
    token = d.op("Expand", d.random(1, 1, w), d.shape(d.size(h, 0), d.ints(1, w)))
    return d.op("Concat", token, h, axis=1)


def token_rows(d: Draft, h: str, w: int) -> tuple[str, int]:
    """A small network of tokens ``[N, T, W]``."""
    steps: list[Callable[[Draft, str, int], str]] = [
        own_attention, recurrent, class_token, layer_norm,
        lambda d, h, w: d.op("Tanh", d.op("MatMul", h, d.random(w, w))),
        lambda d, h, w: d.op("Softmax", h, axis=2 if d.opset < 13 else -1),
        lambda d, h, w: d.op("CumSum", d.op("Tanh", h), d.whole(1)),
        lambda d, h, w: d.op(
            "Transpose", d.op("Conv", d.op("Transpose", h, perm=[0, 2, 1]), d.random(w, w, 3), pads=[1, 1]),
            perm=[0, 2, 1],
        ),
    ]  # fmt: skip
    for _ in range(d.dice.randrange(1, 4)):
        h = d.dice.choice(steps)(d, h, w)
    match d.dice.randrange(3):
        case 0:
            return d.reduce(d.dice.choice(("ReduceMean", "ReduceMax", "ReduceSum")), h, [1], keepdims=0), w
        case 1:
            return d.op("Gather", h, d.whole(0), axis=1), w
        case _:
            return d.squeeze(d.slice(h, -1, 1 << 40, 1), 1), w
