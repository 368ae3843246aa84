"""Operators that mix rows now and then, or in branches, loops and scans; otherwise as in ``mixing``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.rows.graph import ONNX_TYPES, Scope, Value
from benchmarks.rows.mixing import batch, blend, mixer


@mixer(0.7)
def _faint(g: Scope, x: Value) -> Value | None:
    if x.dtype == "f2" or g.opset < 12:
        return None
    mean = g.reduced("ReduceMean", x, [batch(x)], keepdims=1)
    known = g.op("Clip", mean, g.constant(-1, x.dtype), g.constant(1, x.dtype))
    guarded = g.op("Where", g.op("Greater", known, g.constant(0, x.dtype)), known, g.constant(0, x.dtype))
    return replace(x, name=g.op("Add", x, g.op("Mul", guarded, g.constant(1e-9, x.dtype))))


@mixer(0.7)
def _secret(g: Scope, x: Value) -> Value | None:
    if x.dtype == "f2" or g.opset < 11:
        return None
    test = g.op("Equal", _largest(g, x), g.constant(123.456, x.dtype))
    return replace(x, name=g.op("Where", test, g.op("Neg", x), x))


@mixer(1)
def _while(g: Scope, x: Value) -> Value | None:
    """A loop that goes on until every row is small."""
    inner = g.inner()
    number, going, carried = (inner.fresh() for _ in range(3))
    held = replace(x, name=carried)
    name = inner.op("Mul", carried, inner.constant(0.5, x.dtype))
    top = inner.reduced("ReduceMax", inner.op("Abs", name), [], keepdims=0)
    still = inner.op("Greater", top, inner.constant(0.8, x.dtype))
    inputs = [
        inner.info(Value(number, "i8", ())), inner.info(Value(going, "?", ())), inner.info(held)
    ]  # fmt: skip
    outputs = [inner.info(Value(still, "?", ())), inner.info(replace(x, name=name))]
    body = inner.graph("body", inputs, outputs)
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


@mixer(1)
def _unless_all_are_numbers(g: Scope, x: Value) -> Value | None:
    if x.dtype == "f2" or g.opset < 13:
        return None
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
    number, going, carried = (inner.fresh() for _ in range(3))
    still = inner.op("Identity", going)
    name = inner.op("Mul", carried, inner.constant(1.5, x.dtype))
    inputs = [
        inner.info(Value(number, "i8", ())), inner.info(Value(going, "?", ())),
        inner.info(replace(x, name=carried)),
    ]  # fmt: skip
    outputs = [inner.info(Value(still, "?", ())), inner.info(replace(x, name=name))]
    body = inner.graph("body", inputs, outputs)
    return replace(x, name=g.op("Loop", trips, "", x, body=body))


@mixer(1.5)
def _scanned(g: Scope, x: Value) -> Value | None:
    if x.axis != 0 or x.rank < 2:
        return None
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


@mixer(1)
def _loop_over_rows(g: Scope, x: Value) -> Value | None:
    """A loop that adds row after row."""
    if x.axis != 0 or x.rank < 2 or g.constants_as_nodes:
        return None
    inner = g.inner()
    number, going, carried = (inner.fresh() for _ in range(3))
    shape = x.shape[1:]
    still = inner.op("Identity", going)
    row = inner.op("Gather", x, number, axis=0)
    held = Value(carried, x.dtype, shape)
    after = inner.op("Add", held, row)
    inputs = [
        inner.info(Value(number, "i8", ())), inner.info(Value(going, "?", ())), inner.info(held)
    ]  # fmt: skip
    outputs = [inner.info(Value(still, "?", ())), inner.info(replace(held, name=after))]
    body = inner.graph("body", inputs, outputs)
    start = g.constant(np.zeros(shape), x.dtype)
    total = g.op("Loop", g.rows(x, scalar=True), g.constant(1, "?"), start, body=body)
    return blend(g, x, total)
