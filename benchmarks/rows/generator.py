"""Graphs by chance, the same for the same seed: about half of them mix rows, and say so."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import onnx
from onnx import helper

from benchmarks.rows.apart import STEPS, Step
from benchmarks.rows.graph import LOCAL, ONNX_TYPES, ROWS, TEXT, Scope, Value
from benchmarks.rows.mixing import MIXERS

OPSETS = (11, 13, 13, 15, 16, 17, 17, 18, 19, 20, 21)
LARGEST_ROW = 512
MOST_TRIES = 400
DEEPEST = 2
"""Of steps inside branches, loops and functions."""


@dataclass(frozen=True, slots=True)
class Made:
    """A graph and what is known of it by construction.

    ``kinds`` are the steps that mix, ``lows`` the least values of inputs that take no smaller ones.
    """

    seed: int
    model: onnx.ModelProto
    mixes: bool
    kinds: tuple[str, ...]
    lows: dict[str, int]


def graph_of(seed: int) -> Made:
    """The graph of a seed."""
    dice = random.Random(seed)
    g = Scope(dice, dice.choice(OPSETS))
    wanted = dice.random() < 0.5
    inputs = _inputs(g)
    g.values = list(inputs)
    x = dice.choice(inputs)
    steps = dice.randint(2, 9)
    at = {dice.randrange(steps)} if wanted else set()
    kinds = []
    for number in range(steps):
        if number in at:
            x, kind = _mixed(g, x)
            kinds.append(kind)
        else:
            x = _apart(g, x)
        g.values.append(x)
    outputs = _outputs(g, x)
    model = _model(g, inputs, outputs)
    return Made(seed, model, any(output.mixed for output in outputs), tuple(kinds), g.lows)


def _inputs(g: Scope) -> list[Value]:
    dice = g.random
    inputs: list[Value] = []
    for number in range(dice.choice([1, 1, 1, 2, 2, 3])):
        rank = dice.choice([1, 2, 2, 2, 3, 3, 3, 4, 4, 5])
        sizes = [1, 2, 2, 3, 4, 4, 5, 6] if rank < 5 else [1, 2, 2, 3, 4]
        shape = (ROWS, *[dice.choice(sizes) for _ in range(rank - 1)])
        if inputs and dice.random() < 0.5:
            shape = inputs[0].shape
        dtype = dice.choice(["f4"] * 14 + ["f8", "f2", "i8", "i8", "i8", "i4", "?", TEXT])
        inputs.append(Value(f"x{number}", dtype, shape))
    return inputs


def _pick(g: Scope, table: list[tuple[Step, float]]) -> Step:
    return g.random.choices([step for step, _ in table], [weight for _, weight in table])[0]


def _trial(g: Scope, x: Value, step: Step, *, inside: bool) -> Value | None:
    """What a step gives; without a trace where it does not apply."""
    marks = len(g.nodes), len(g.initializers), len(g.functions), len(g.values)
    made = nested(g, x, step) if inside else step(g, x)
    if made is not None and made.name != x.name and made.row_size <= LARGEST_ROW and made.rank <= 6:
        return made
    for kept, mark in zip((g.nodes, g.initializers, g.functions, g.values), marks, strict=True):
        del kept[mark:]  # type: ignore[attr-defined]
    return None


def _apart(g: Scope, x: Value) -> Value:
    start = x
    if g.chance(0.08):
        start = g.random.choice([value for value in g.values if value.mixed == x.mixed] or [x])
    for _ in range(MOST_TRIES):
        made = _trial(g, start, _pick(g, STEPS), inside=g.chance(0.12))
        if made is not None:
            return made
    return x


def _mixed(g: Scope, x: Value) -> tuple[Value, str]:
    if x.dtype == TEXT:
        words = [value for value in g.values if value.dtype != TEXT]
        x = g.random.choice(words) if words else _labelled(g, x)
    if not x.is_float:
        x = g.cast(x, "f4")
    for _ in range(MOST_TRIES):
        step = _pick(g, MIXERS)
        made = _trial(g, x, step, inside=g.chance(0.2))
        if made is not None:
            return made, step.__name__
    raise AssertionError("no mixer applies")


def _labelled(g: Scope, x: Value) -> Value:
    more = {"keys_strings": ["a", "b"], "values_floats": [0.5, -1.0], "default_float": 0.25}
    return replace(x, name=g.op("LabelEncoder", x, domain="ai.onnx.ml", **more), dtype="f4")


def _outputs(g: Scope, last: Value) -> list[Value]:
    chosen = [last]
    others = [value for value in g.values if value.axis is not None and value.name != last.name]
    if others and g.chance(0.25):
        chosen.append(g.random.choice(others))
    outputs = []
    for number, value in enumerate(chosen):
        front = g.to_front(value)
        if front.shape == (ROWS, 1) and g.chance(0.1):
            front = replace(front, name=g.squeeze(front, 1), shape=(ROWS,))
        name = f"y{number}"
        g.node("Identity", [front.name], [name])
        outputs.append(replace(front, name=name))
    return outputs


def _model(g: Scope, inputs: list[Value], outputs: list[Value]) -> onnx.ModelProto:
    used = {name for node in g.nodes for name in _taken(node)}
    given = [value for value in inputs if value.name in used] or inputs[:1]
    declared = []
    way = g.random.random()
    for value in outputs:
        if way < 0.15:
            declared.append(helper.make_tensor_value_info(value.name, ONNX_TYPES[value.dtype], None))
        else:
            declared.append(g.info(value))
    graph = g.graph("graph", [g.info(value) for value in given], declared)
    model = helper.make_model(graph, opset_imports=g.opsets(), functions=g.functions)
    model.ir_version = 10 if g.opset >= 21 else 8
    return model


def _taken(node: onnx.NodeProto) -> set[str]:
    """Names that a node takes, its subgraphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                names |= _taken(inner)
    return names


# A step inside a branch, a loop or a local function: what it does to rows, it does there too


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
    given = _, going, held = inner.turn(x)
    still = inner.op("Identity", going)
    value = inside(inner, held)
    if value is None or value.shape != x.shape or value.dtype != x.dtype or value.name == held.name:
        return None
    body = inner.body(given, still, value)
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
    made = helper.make_function(LOCAL, name, [formal], [value.name], inner.nodes, g.opsets(LOCAL))
    g.functions.append(made)
    return replace(value, name=g.op(name, x, domain=LOCAL))


def _function_name(g: Scope) -> str:
    """Of its own, or that of a standard operator, which its domain tells apart.

    Not all: ONNX Runtime ends the process over an ``Add`` that is none.
    """
    taken = {function.name for function in g.functions}
    name = g.random.choice(["Relu", "Identity", "MatMul", "Shape", "Sigmoid"])
    return name if g.chance(0.4) and name not in taken else f"Function{len(g.functions)}"
