"""Architectures that compute with their weights, in copies whose weights differ by magnitudes."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.unseen_graphs.draft import Array, Draft

WIDTH = 6
MAGNITUDES = (0.0, 1e-30, 1e-4, 1.0, 1e4, 1e30)
COPIES = 5
Change = Callable[[Draft, str, str], str]
"""From two ``[W, W]`` weights to one."""


def quantised(d: Draft, v: str) -> str:
    """Quantised by a fixed scale, and back."""
    both = [d.number(0.05), d.constant(np.array(0, np.int8))]
    return d.op("DequantizeLinear", d.op("QuantizeLinear", v, *both), *both)


JUMPS: dict[str, Change] = {
    "Where below": lambda d, v, u: d.op(
        "Where", d.op("Less", d.op("Abs", v), d.number(1e-3)), d.number(0.0), v
    ),
    "Where of two": lambda d, v, u: d.op("Where", d.op("Greater", v, u), v, u),
    "Sign": lambda d, v, u: d.op("Sign", v),
    "Round": lambda d, v, u: d.op("Round", v),
    "Floor": lambda d, v, u: d.op("Floor", v),
    "Cast whole": lambda d, v, u: d.cast(
        d.cast(d.op("Clip", v, d.number(-9.0), d.number(9.0)), TensorProto.INT32)
    ),
    "Cast half": lambda d, v, u: d.cast(d.cast(v, TensorProto.FLOAT16)),
    "quantised": lambda d, v, u: quantised(d, v),
    "ArgMax": lambda d, v, u: d.op("Add", v, d.cast(d.op("ArgMax", v, axis=1))),
    "order": lambda d, v, u: d.cast(d.top(v, d.ints(WIDTH), 1)[1]),
    "Not": lambda d, v, u: d.cast(d.op("Not", d.cast(v, TensorProto.BOOL))),
    "If": lambda d, v, u: d.branch(
        d.op("Greater", d.reduce("ReduceMax", v, [0, 1], keepdims=0), d.number(2.0)),
        lambda e: e.op("Neg", v), lambda e: e.op("Abs", v),
    ),
}  # fmt: skip
"""Changes that jump: only of weights as they are in the file."""
CHANGES: dict[str, Change] = {
    "Clip": lambda d, v, u: d.op("Clip", v, d.number(-1.0), d.number(1.0)),
    "Pow": lambda d, v, u: d.op("Pow", v, d.number(2.0)),
    "Mul": lambda d, v, u: d.op("Mul", v, u),
    "Div": lambda d, v, u: d.op("Div", v, u),
    "Max": lambda d, v, u: d.op("Max", v, u),
    "Add": lambda d, v, u: d.op("Add", v, u),
    "gate": lambda d, v, u: d.op("Mul", v, d.op("Sigmoid", u)),
    "normalised": lambda d, v, u: d.op("Div", v, d.reduce("ReduceL2", v, [0])),
    "normalised, safely": lambda d, v, u: d.op(
        "Div", v, d.op("Add", d.reduce("ReduceMax", d.op("Abs", v), [0, 1]), d.number(1e-6))
    ),
    "ReduceMax": lambda d, v, u: d.op("Sub", v, d.reduce("ReduceMax", v, [1])),
    "Softmax": lambda d, v, u: d.op("Softmax", v, axis=1),
    "Transpose": lambda d, v, u: d.op("Transpose", v, perm=[1, 0]),
    "Pad": lambda d, v, u: d.slice(d.op("Pad", v, d.ints(1, 0, 0, 0)), 0, -1),
    "Slice": lambda d, v, u: d.op("Concat", d.slice(v, 2, WIDTH), d.slice(u, 0, 2), axis=0),
    "Concat": lambda d, v, u: d.slice(d.op("Concat", v, u, axis=1), 1, WIDTH + 1, 1),
    "Gather": lambda d, v, u: d.op("Gather", v, d.ints(*d.dice.sample(range(WIDTH), WIDTH)), axis=0),
    "Reshape": lambda d, v, u: d.op("Reshape", d.op("Reshape", v, d.ints(-1)), d.ints(WIDTH, WIDTH)),
    "MatMul": lambda d, v, u: d.op("MatMul", v, u),
}


def unary(kind: str, d: Draft, v: str, u: str) -> str:
    """An operator of one input."""
    return d.op(kind, v)


for _kind in ("Abs", "Neg", "Relu", "Exp", "Sqrt", "Reciprocal", "Tanh", "Sigmoid", "Identity"):
    CHANGES[_kind] = partial(unary, _kind)


def weights(rng: np.random.Generator, copy: int) -> Array:
    """Of one magnitude, or of several, with both signs."""
    values = rng.uniform(0.5, 2.0, (WIDTH, WIDTH)) * rng.choice((-1.0, 1.0), (WIDTH, WIDTH))
    if copy:
        values = values * rng.choice(MAGNITUDES, (WIDTH, WIDTH) if copy % 2 else (1, 1))
    return np.asarray(values, np.float32)


def architecture(seed: int, number: int) -> tuple[list[onnx.ModelProto], str]:
    """Copies of one, and which changes it makes to its weights."""
    dice = random.Random(f"{seed}/copies/{number}")
    d = Draft(dice, dice.randrange(13, 22))
    changed, said = [], []
    for first, second in (("w0", "w1"), ("w1", "w2")):
        v = first
        for step in range(dice.randrange(1, 4)):
            table = JUMPS if step == 0 and dice.random() < 0.6 else CHANGES
            kind = dice.choice(sorted(table))
            v = table[kind](d, v, second)
            said.append(kind)
        changed.append(v)
    h = d.op("MatMul", "x", changed[0])
    if dice.random() < 0.5:
        h = d.op("Tanh", h)
    match dice.randrange(4):
        case 0:
            h = d.op("Gemm", h, changed[1], d.op("Gather", "w2", d.whole(0), axis=0), transB=1)
        case 1:
            h = d.op("Add", h, d.op("Gather", changed[1], d.whole(1), axis=0))
        case 2:
            h = d.op("Mul", h, d.reduce("ReduceMean", changed[1], [0]))
        case _:
            h = d.op("MatMul", h, changed[1])
    d.nodes.append(helper.make_node("Identity", [h], ["y"]))
    # The shape is known to whoever exports such a model.
    shape = (TensorProto.FLOAT, ("N", WIDTH))
    made = d.model({"x": shape}, {"y": TensorProto.FLOAT})
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", *shape))
    return [_copy(made, seed, number, copy) for copy in range(COPIES)], ", ".join(said)


def _copy(made: onnx.ModelProto, seed: int, number: int, copy: int) -> onnx.ModelProto:
    rng = np.random.default_rng([seed, number, copy])
    one = onnx.ModelProto()
    one.CopyFrom(made)
    one.graph.initializer.extend(numpy_helper.from_array(weights(rng, copy), f"w{each}") for each in range(3))
    return one
