"""A step inside a branch, a loop, a scan or a local function: what it does to rows, it does there too."""

from __future__ import annotations

from dataclasses import replace

from onnx import helper

from benchmarks.rows.apart import Step
from benchmarks.rows.graph import Scope, Value

LOCAL = "local"
DEEPEST = 2


def nested(g: Scope, x: Value, step: Step) -> Value | None:
    """The step in one of these, or None where it does not go."""
    if g.depth >= DEEPEST:
        return None
    if g.constants_as_nodes:
        return in_branch(g, x, step)
    return g.random.choice([in_branch, in_loop, in_function, in_function])(g, x, step)


def in_branch(g: Scope, x: Value, step: Step) -> Value | None:
    """In the branches of an If whose condition no request decides."""
    dice = g.random.getstate()
    made = []
    graphs = []
    for number in range(2):
        g.random.setstate(dice)
        inner = g.inner()
        value = step(inner, x)
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


def in_loop(g: Scope, x: Value, step: Step) -> Value | None:
    """In a loop of a fixed number of turns."""
    inner = g.inner()
    number, going, carried = (inner.fresh() for _ in range(3))
    still = inner.op("Identity", going)
    value = step(inner, replace(x, name=carried))
    if value is None or value.shape != x.shape or value.dtype != x.dtype or value.name == carried:
        return None
    inputs = [
        inner.info(Value(number, "i8", ())), inner.info(Value(going, "?", ())),
        inner.info(replace(x, name=carried)),
    ]  # fmt: skip
    body = inner.graph("body", inputs, [inner.info(Value(still, "?", ())), inner.info(value)])
    name = g.op("Loop", g.constant(g.random.randint(1, 3)), g.constant(1, "?"), x, body=body)
    return replace(value, name=name, exact=False)


def in_function(g: Scope, x: Value, step: Step) -> Value | None:
    """In a local function."""
    inner = g.inner(function=True)
    formal = inner.fresh()
    inner.values = [replace(x, name=formal)]
    value = step(inner, replace(x, name=formal))
    if value is None or value.name == formal or not inner.nodes:
        return None
    name = f"Function{len(g.functions)}"
    domains = [LOCAL, *sorted(g.domains - {LOCAL})]
    imports = [
        helper.make_opsetid("", g.opset),
        *[helper.make_opsetid(each, _version(each)) for each in domains],
    ]
    g.functions.append(helper.make_function(LOCAL, name, [formal], [value.name], inner.nodes, imports))
    return replace(value, name=g.op(name, x, domain=LOCAL))


def _version(domain: str) -> int:
    return 3 if domain == "ai.onnx.ml" else 1
