"""Graphs that compute the same in the same way have one form."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest

from clockwork_serve.store.onnx.weights import all_nodes, make_canonical
from clockwork_serve.store.trial import difference
from tests.store import graphs

WIDE = "N", 8


def parallel(order: list[int]) -> onnx.ModelProto:
    """Five layers side by side whose order in the file is open, and their sum."""
    h = onnx.helper
    weights = {f"w{n}": graphs.floats(np.random.default_rng(n), 8, 4) for n in range(5)}
    layers = [h.make_node("MatMul", ["x", f"w{n}"], [f"m{n}"]) for n in range(5)]
    total = h.make_node("Sum", [f"m{n}" for n in range(5)], ["y"])
    nodes = [*(layers[n] for n in order), total]
    return graphs.model(
        nodes, [("x", onnx.TensorProto.FLOAT, ["N", 8])], [("y", onnx.TensorProto.FLOAT, ["N", 4])], weights
    )


def form(model: onnx.ModelProto) -> bytes:
    make_canonical(model)
    model.graph.ClearField("initializer")
    return model.SerializeToString(deterministic=True)


def test_the_order_of_nodes_in_the_file_does_not_matter():
    wanted = form(parallel([0, 1, 2, 3, 4]))
    for seed in range(5):
        order = list(range(5))
        random.Random(seed).shuffle(order)
        assert form(parallel(order)) == wanted


def test_names_and_remarks_do_not_matter_but_names_of_inputs_and_outputs_do():
    first, second, third = graphs.mlp(), graphs.mlp(prefix="else/", batch="rows"), graphs.mlp()
    second.graph.doc_string, second.producer_name = "words", "someone"
    second.graph.node[0].doc_string = "more words"
    third.graph.input[0].name = third.graph.node[0].input[0] = "z"
    wanted = form(first)
    assert form(second) == wanted
    assert form(third) != wanted


def test_other_attributes_are_another_form():
    other = graphs.mlp()
    other.graph.node[3].attribute.append(onnx.helper.make_attribute("alpha", 0.5))
    assert form(other) != form(graphs.mlp())


@pytest.mark.parametrize("make", [graphs.mlp, graphs.convnet, graphs.scalar_input, graphs.recurrent])
def test_the_canonical_graph_computes_the_same(make):
    model = make()
    inputs = {}
    for value in model.graph.input:
        shape = [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
        integer = value.type.tensor_type.elem_type == onnx.TensorProto.INT64
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        inputs[value.name] = np.array(16000, np.int64) if integer else values
    wanted = graphs.answers(model, inputs)
    make_canonical(model)
    onnx.checker.check_model(model)
    assert difference(graphs.answers(model, inputs), wanted) == 0


def test_names_made_up_never_meet_those_of_inputs():
    model = graphs.mlp()
    model.graph.input[0].name = model.graph.node[0].input[0] = "v3"
    make_canonical(model)
    names = [name for node in all_nodes(model.graph) for name in node.output]
    assert "v3" not in names
    onnx.checker.check_model(model)
