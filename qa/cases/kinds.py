"""Kinds of graphs: some written by hand, and those of ``steps.txt``, each a step that keeps or mixes rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from benchmarks.rows.graph import ROWS, Scope, Value
from qa.cases.case import Case

OPSET = 17
STEPS = Path(__file__).with_name("steps.txt")
"""Graphs as onnx prints them, each after a line with its name, and whether it mixes rows."""
Build = Callable[[Scope, Value], Value]


def kinds() -> Iterator[Case]:
    """All of them."""
    for name, build, dtype, shape in WRITTEN:
        yield _written(name, build, dtype, shape)
    for part in STEPS.read_text().split("=== ")[1:]:
        title, _, text = part.partition("\n")
        name, _, mixes = title.partition(", ")
        yield Case(name, onnx.parser.parse_model(text), mixes=bool(mixes))


def _written(name: str, build: Build, dtype: str, shape: tuple[int, ...]) -> Case:
    g = Scope(random.Random(name), OPSET)
    x = Value("x", dtype, shape)
    case = _case(name, g, [x], build(g, x))
    if dtype == "i8":
        case = replace(case, samples=({"x": 100 + np.arange(24 * x.row_size).reshape(24, *shape[1:]) % 6},))
    return case


def _case(name: str, g: Scope, inputs: list[Value], made: Value) -> Case:
    front = g.to_front(made)
    g.node("Identity", [front.name], ["y"])
    taken = {each for node in g.nodes for each in node.input}
    given = [value for value in inputs if value.name in taken] or inputs[:1]
    output = helper.make_tensor_value_info("y", g.info(made).type.tensor_type.elem_type, None)
    graph = g.graph(name, [g.info(value) for value in given], [output])
    model = helper.make_model(graph, opset_imports=g.opsets(), functions=g.functions)
    model.ir_version = 8
    return Case(name, model, mixes=made.mixed)


def _running_sum(g: Scope, x: Value) -> Value:
    return Value(g.op("CumSum", x, g.constant(0, "i4")), "f4", x.shape)


def _time_first(g: Scope, x: Value) -> Value:
    weights = [g.weights("f4", 1, 16, 3), g.weights("f4", 1, 16, 4)]
    whole, _ = g.ops("LSTM", x, *weights, outputs=2, hidden_size=4)
    return Value(g.squeeze(whole, 1), "f4", (ROWS, 1, 4))


def _tokens(g: Scope, x: Value, *, causal: bool) -> Value:
    """A small network over one sequence whose tokens are axis 0."""
    ids = g.op("Mod", x, g.constant(11))
    embedded = g.op("Gather", g.weights("f4", 11, 4), ids, axis=0)
    scores = g.op("MatMul", embedded, g.op("Transpose", embedded, perm=[1, 0]))
    if causal:
        ones = g.op("Sub", g.op("ConstantOfShape", g.op("Shape", scores)), g.constant(1e4, "f4"))
        scores = g.op("Add", scores, g.op("Trilu", ones, g.constant(1), upper=1))
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), embedded)
    return Value(g.op("MatMul", mixed, g.weights("f4", 4, 11)), "f4", (ROWS, 11))


def _causal_network(g: Scope, x: Value) -> Value:
    return _tokens(g, x, causal=True)


def _sequence_of_tokens(g: Scope, x: Value) -> Value:
    return _tokens(g, x, causal=False)


def _pool_with_indices(g: Scope, x: Value) -> Value:
    _, where = g.ops("MaxPool", x, outputs=2, kernel_shape=[2])
    return Value(where, "i8", (ROWS, 3, 3))


def _lower_triangle(g: Scope, x: Value) -> Value:
    return Value(g.op("Trilu", x, upper=0), "f4", x.shape)


def _diagonal(g: Scope, x: Value) -> Value:
    return Value(g.op("Add", x, g.op("EyeLike", x)), "f4", x.shape)


def _distinct(g: Scope, x: Value) -> Value:
    _, _, inverse, _ = g.ops("Unique", x, outputs=4)
    return Value(inverse, "i8", (ROWS,))


def _one_scale_for_all(g: Scope, x: Value) -> Value:
    quantised, scale, zero = g.ops("DynamicQuantizeLinear", x, outputs=3)
    weight = g.constant(np.arange(-8, 8).reshape(4, 4), "i1")
    product = g.op("Cast", g.op("MatMulInteger", quantised, weight, zero), to=1)
    return Value(g.op("Mul", product, scale), "f4", (ROWS, 4))


def _running_sum_of_high_numbers(g: Scope, x: Value) -> Value:
    """Takes numbers of words from 100 on, which nobody makes up."""
    index = g.op("Sub", x, g.constant(100))
    embedded = g.op("Gather", g.weights("f4", 6, 3), index, axis=0)
    return Value(g.op("CumSum", embedded, g.constant(0, "i4")), "f4", (ROWS, 2, 3))


def _perceptron(g: Scope, x: Value) -> Value:
    hidden = g.op("Relu", g.op("Gemm", x, g.weights("f4", 4, 8), g.weights("f4", 8)))
    return Value(g.op("Gemm", hidden, g.weights("f4", 8, 3), g.weights("f4", 3)), "f4", (ROWS, 3))


def _recurrent_batch_first(g: Scope, x: Value) -> Value:
    turned = g.op("Transpose", x, perm=[1, 0, 2])
    weights = [g.weights("f4", 1, 12, 3), g.weights("f4", 1, 12, 4)]
    _, last = g.ops("GRU", turned, *weights, outputs=2, hidden_size=4)
    return Value(g.squeeze(last, 0), "f4", (ROWS, 4))


def _encoder(g: Scope, x: Value) -> Value:
    """Attention inside each row, heads merged with rows, as exporters write it."""
    heads = g.op("Reshape", g.op("MatMul", x, g.weights("f4", 4, 4)), g.constant([0, 3, 2, 2]))
    merged = g.op("Reshape", g.op("Transpose", heads, perm=[0, 2, 1, 3]), g.constant([-1, 3, 2]))
    scores = g.op("Softmax", g.op("MatMul", merged, g.op("Transpose", merged, perm=[0, 2, 1])), axis=-1)
    shape = g.shape_with_rows(x, [ROWS, 2, 3, 2])
    back = g.op("Transpose", g.op("Reshape", g.op("MatMul", scores, merged), shape), perm=[0, 2, 1, 3])
    return Value(g.op("Reshape", back, g.shape_with_rows(x, [ROWS, 3, 4])), "f4", (ROWS, 3, 4))


WRITTEN: tuple[tuple[str, Build, str, tuple[int, ...]], ...] = (
    ("running sum of rows", _running_sum, "f4", (ROWS, 3)),
    ("LSTM whose first axis is time", _time_first, "f4", (ROWS, 1, 3)),
    ("causal network over ids['seq']", _causal_network, "i8", (ROWS,)),
    ("network over ids['seq']", _sequence_of_tokens, "i8", (ROWS,)),
    ("MaxPool with indices", _pool_with_indices, "f4", (ROWS, 3, 4)),
    ("lower triangle", _lower_triangle, "f4", (ROWS, 5)),
    ("diagonal", _diagonal, "f4", (ROWS, 5)),
    ("distinct values", _distinct, "f4", (ROWS,)),
    ("one scale for the whole tensor", _one_scale_for_all, "f4", (ROWS, 4)),
    ("running sum behind numbers from 100 on", _running_sum_of_high_numbers, "i8", (ROWS, 2)),
    ("perceptron", _perceptron, "f4", (ROWS, 4)),
    ("GRU, batch first", _recurrent_batch_first, "f4", (ROWS, 5, 3)),
    ("encoder with merged heads", _encoder, "f4", (ROWS, 3, 4)),
)
