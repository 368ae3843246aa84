"""Graphs by chance, the same for the same seed: about half of them mix rows, and say so."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import onnx
from onnx import helper

from benchmarks.rows import layers, rarely
from benchmarks.rows.apart import STEPS, Step
from benchmarks.rows.graph import ONNX_TYPES, ROWS, TEXT, Scope, Value
from benchmarks.rows.mixing import MIXERS
from benchmarks.rows.nesting import nested

_TABLES = (layers, rarely)
"""Their steps enter the tables when they are imported."""
OPSETS = (11, 13, 13, 15, 16, 17, 17, 18, 19, 20, 21)
LARGEST_ROW = 512
MOST_TRIES = 400


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
    opsets = [helper.make_opsetid("", g.opset)]
    domains = set(g.domains)
    opsets += [helper.make_opsetid(each, 3 if each == "ai.onnx.ml" else 1) for each in sorted(domains)]
    model = helper.make_model(graph, opset_imports=opsets, functions=g.functions)
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
