"""A step inside a branch, a loop, a scan or a local function: what it does to rows, it does there too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
from onnx import helper

from benchmarks.rows.apart import Step, step
from benchmarks.rows.graph import ROWS, Scope, Value

LOCAL = "local"
DEEPEST = 2


def nested(g: Scope, x: Value, inside: Step) -> Value | None:
    """The step in one of these, or None where it does not go."""
    if g.depth >= DEEPEST:
        return None
    if g.constants_as_nodes:
        return in_branch(g, x, inside)
    return g.random.choice([in_branch, in_loop, in_function, in_function])(g, x, inside)


def in_branch(g: Scope, x: Value, inside: Step) -> Value | None:
    """In the branches of an If whose condition no request decides."""
    dice, count = g.random.getstate(), g.count[0]
    made = []
    graphs = []
    for number in range(2):
        g.random.setstate(dice)
        g.count[0] = count  # siblings may have the same names
        inner = g.inner()
        value = inside(inner, x)
        if value is None or value.name == x.name or not inner.nodes:
            return None
        name = inner.op("Identity", value)
        graphs.append(inner.graph(f"side_{number}", [], [inner.info(replace(value, name=name))]))
        made.append(value)
    if x.axis is not None and g.chance(0.3) and len(x.others) > 0:
        size = g.op("Gather", g.op("Shape", x), g.constant(x.others[0]), axis=0)
        test = g.op("Equal", size, g.constant(x.shape[x.others[0]]))
    else:
        test = g.constant(g.random.randrange(2), "?")
    name = g.op("If", test, then_branch=graphs[0], else_branch=graphs[1])
    return replace(made[0], name=name, exact=False)


def in_loop(g: Scope, x: Value, inside: Step) -> Value | None:
    """In a loop of a fixed number of turns."""
    inner = g.inner()
    number, going, carried = (inner.fresh() for _ in range(3))
    still = inner.op("Identity", going)
    value = inside(inner, replace(x, name=carried))
    if value is None or value.shape != x.shape or value.dtype != x.dtype or value.name == carried:
        return None
    inputs = [
        inner.info(Value(number, "i8", ())), inner.info(Value(going, "?", ())),
        inner.info(replace(x, name=carried)),
    ]  # fmt: skip
    body = inner.graph("body", inputs, [inner.info(Value(still, "?", ())), inner.info(value)])
    name = g.op("Loop", g.constant(g.random.randint(1, 3)), g.constant(1, "?"), x, body=body)
    return replace(value, name=name, exact=False)


def in_function(g: Scope, x: Value, inside: Step) -> Value | None:
    """In a local function."""
    inner = g.inner(function=True)
    inner.count = [0]  # a function's names are its own
    formal = inner.fresh()
    inner.values = [replace(x, name=formal)]
    value = inside(inner, replace(x, name=formal))
    if value is None or value.name == formal or not inner.nodes:
        return None
    name = _function_name(g)
    domains = [LOCAL, *sorted(g.domains - {LOCAL})]
    imports = [
        helper.make_opsetid("", g.opset),
        *[helper.make_opsetid(each, _version(each)) for each in domains],
    ]
    g.functions.append(helper.make_function(LOCAL, name, [formal], [value.name], inner.nodes, imports))
    return replace(value, name=g.op(name, x, domain=LOCAL))


def _function_name(g: Scope) -> str:
    """Of its own, or that of a standard operator, which its domain tells apart.

    Not all: ONNX Runtime ends the process over an ``Add`` that is none.
    """
    taken = {function.name for function in g.functions}
    name = g.random.choice(["Relu", "Identity", "MatMul", "Shape", "Sigmoid"])
    return name if g.chance(0.4) and name not in taken else f"Function{len(g.functions)}"


def told_axis(g: Scope, x: Value, axis: int) -> Value | None:
    """A softmax in a local function that takes its axis as an attribute."""
    if g.constants_as_nodes:
        return None
    node = helper.make_node("Softmax", ["x"], ["y"])
    attribute = node.attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = "axis", "axis", onnx.AttributeProto.INT
    name = f"Function{len(g.functions)}"
    imports = [helper.make_opsetid("", g.opset)]
    g.functions.append(helper.make_function(LOCAL, name, ["x"], ["y"], [node], imports, ["axis"]))
    return replace(x, name=g.op(name, x, domain=LOCAL, axis=axis), exact=False)


@step(0.7)
def _told(g: Scope, x: Value) -> Value | None:
    if not x.is_float or not x.others or g.opset < 13:
        return None
    return told_axis(g, x, g.random.choice(x.others))


@step(1)
def _loop_over_time(g: Scope, x: Value) -> Value | None:
    """A recurrent network written as a loop: turn by turn one token of each row."""
    if x.axis != 0 or x.rank != 3 or x.dtype != "f4" or g.depth:
        return None
    width, length = x.shape[2], x.shape[1]
    inner = g.inner()
    number, going, state = (inner.fresh() for _ in range(3))
    still = inner.op("Identity", going)
    token = inner.op("Gather", x, number, axis=1)
    fed = inner.op("Add", token, inner.op("MatMul", state, inner.weights("f4", width, width)))
    after = inner.op("Tanh", fed)
    held = Value(state, "f4", (ROWS, width))
    inputs = [inner.info(Value(number, "i8", ())), inner.info(Value(going, "?", ())), inner.info(held)]
    outputs = [inner.info(Value(still, "?", ())), inner.info(replace(held, name=after))]
    body = inner.graph("body", inputs, outputs)
    turns = g.constant(length) if g.chance(0.5) else g.op("Gather", g.op("Shape", x), g.constant(1), axis=0)
    start = g.op("ConstantOfShape", g.shape_with_rows(x, [ROWS, width]))
    name = g.op("Loop", turns, g.constant(1, "?"), start, body=body)
    return replace(x, name=name, shape=(ROWS, width), exact=False)


@step(1)
def _scan_over_time(g: Scope, x: Value) -> Value | None:
    """The same as a scan along axis 1."""
    if x.axis != 0 or x.rank != 3 or x.dtype != "f4" or g.depth:
        return None
    width = x.shape[2]
    inner = g.inner()
    state, token = inner.fresh(), inner.fresh()
    after = inner.op("Add", inner.op("Tanh", state), token)
    made = inner.op("Identity", after)
    held = Value(state, "f4", (ROWS, width))
    inputs = [inner.info(held), inner.info(replace(held, name=token))]
    outputs = [inner.info(replace(held, name=after)), inner.info(replace(held, name=made))]
    body = inner.graph("body", inputs, outputs)
    start = g.op("ConstantOfShape", g.shape_with_rows(x, [ROWS, width]))
    more: dict[str, Any] = {"num_scan_inputs": 1, "scan_input_axes": [1], "scan_output_axes": [1]}
    last, whole = g.ops("Scan", start, x, outputs=2, body=body, **more)
    if g.chance(0.5):
        return replace(x, name=last, shape=(ROWS, width), exact=False)
    return replace(x, name=whole, exact=False)


def _version(domain: str) -> int:
    return 3 if domain == "ai.onnx.ml" else 1
