"""Shapes of outputs: which depend on values, which dimensions are known, and whose word is believed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h

from clockwork_serve.store.onnx.output_shapes import resolved_outputs, shaped_by_values
from clockwork_serve.store.settings import ProblemError
from clockwork_serve.store.trial import GraphTensor, Interface, Trial
from tests.store import graphs

HEAD = '<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1, "other": 1]>\n'
BRANCHES = (
    "{ b = Cast <to = 9> (n)  y = If (b) <then_branch = p () => (q) { q = Relu (x) }, "
    "else_branch = r () => (s) { s = Sum (x) }> }"
)


def shaped(body: str) -> frozenset[str]:
    signature = "agraph (float[4, 6] x, int64[1] n, int64[4] ids) => (float y)"
    return shaped_by_values(onnx.parser.parse_model(f"{HEAD}{signature} {body}").graph, ["x", "n", "ids"])


@pytest.mark.parametrize(
    "body",
    [
        "{ y, where = TopK (x, n) }",
        "{ y = ConstantOfShape (n) }",
        "{ y = Tile (x, ids) }",
        "{ two = Constant <value_int = 2> ()  many = Add (n, two)  y = Slice (x, n, many) }",
        "{ y = ReduceSum (x, n) }",
        "{ y = Resize (x, , , ids) }",
        "{ where = NonZero (x)  y = Cast <to = 1> (where) }",
        "{ some = Compress (x, n)  size = Shape (some)  y = ConstantOfShape (size) }",
        "{ y = other.Anything (x) }",
        BRANCHES,
        "{ y = Scan <num_scan_inputs = 1, body = p (float[6] s) => (float[m] t) { t = Expand (s, n) }> (x) }",
    ],
)
def test_a_shape_that_values_decide_is_found(body):
    assert shaped(body) == {"y"}


@pytest.mark.parametrize(
    "body",
    [
        "{ y = Relu (x) }",
        "{ two = Constant <value_ints = [2]> ()  y, where = TopK (x, two) }",
        "{ size = Shape (x)  y = ConstantOfShape (size) }",
        "{ turned = Transpose (x)  size = Shape (turned)  y = Reshape (x, size) }",
        "{ y = Gather (x, ids) }",  # which rows are taken, not how many
        "{ axis = Constant <value_ints = [1]> ()  y = ReduceSum (x, axis) }",
        "{ y = Scan <num_scan_inputs = 1, body = p (float[6] s) => (float[6] t) { t = Relu (s) }> (x) }",
        "{ size = Constant <value_ints = [2, 2]> ()  y = Resize (x, , , size) }",
    ],
)
def test_a_shape_that_follows_from_shapes_is_not(body):
    assert not shaped(body)


FIXED, FREE = GraphTensor("n", "INT64", (1,)), GraphTensor("x", "FP32", ("N", 3))


def resolved(given, declared, inferred, seen, *, stated=False, by_values=False, batched=False):
    """The dims of one output ``y``."""
    interface = Interface((given,), (GraphTensor("y", "FP32", declared),))
    trial = None if seen is None else Trial((), {}, [np.zeros(seen, np.float32)])
    (found,) = resolved_outputs(
        interface, [inferred], trial, batched=batched,
        stated=["y"] if stated else [], by_values=["y"] if by_values else [],
    )  # fmt: skip
    return found.dims


def test_what_follows_from_the_inputs_is_known_whatever_the_graph_says():
    assert resolved(FIXED, (5,), [7], (7,)) == (7,)
    assert resolved(FIXED, (5,), [7], (7,), by_values=True) == (7,)
    assert resolved(FREE, (5,), [7], None) == (7,)


def test_the_graphs_word_counts_unless_values_decide_or_a_trial_shows_otherwise():
    assert resolved(FREE, ("N", 5), [None, None], (2, 5)) == ("", 5)
    assert resolved(FREE, ("N", 5), [None, None], (2, 6)) == ("", "")
    assert resolved(FREE, ("N", 5), [None, None], None) == ("", 5)
    assert resolved(FREE, ("N", 5), [None, None], (2, 5), by_values=True) == ("", "")
    assert resolved(FREE, ("N", 5), [], None, by_values=True) == ("", "")


def test_a_trial_fixes_what_inputs_of_one_size_give_unless_values_decide():
    assert resolved(FIXED, None, [], (7, 2)) == (7, 2)
    assert resolved(FIXED, None, [None, 2], (7, 2), by_values=True) == ("", 2)
    assert resolved(FREE, None, [], (7, 2)) == ("", "")
    assert resolved(GraphTensor("x", "FP32", ("N", 3)), None, [], (1, 2), batched=True) == ("", 2)


def test_settings_overrule_the_graph_but_a_trial_only_where_values_decide():
    assert resolved(FIXED, (8,), [None], (7,), stated=True, by_values=True) == (8,)
    assert resolved(FIXED, ("", 2), [None, None], (7, 2), stated=True, by_values=True) == ("", 2)
    with pytest.raises(
        ProblemError, match=r"output 'y' dims: expected \[7\] as it was in a trial.*found \[8\]"
    ):
        resolved(FIXED, (8,), [None], (7,), stated=True)
    with pytest.raises(ProblemError, match=r"output 'y' dims: expected \[7\]"):
        resolved(FIXED, (7, 1), [None], (7,), stated=True)


# ------------------------------------------------------------
# The same of compiled models.


def filled() -> onnx.ModelProto:
    """As many twos as it is told, where its exporter saw ten."""
    value = h.make_tensor("value", T.FLOAT, [1], [2.0])
    nodes = [h.make_node("ConstantOfShape", ["n"], ["y"], value=value)]
    return graphs.model(nodes, [("n", T.INT64, [1])], [("y", T.FLOAT, [10])])


def best() -> onnx.ModelProto:
    """The largest of each row; how many, a request says."""
    nodes = [h.make_node("TopK", ["x", "k"], ["y", "where"])]
    inputs = [("x", T.FLOAT, [3, 4]), ("k", T.INT64, [1])]
    return graphs.model(nodes, inputs, [("y", T.FLOAT, [3, 3]), ("where", T.INT64, [3, 3])])


def test_a_shape_that_the_graph_has_from_one_run_is_not_bound(shop):
    served = shop.served("m", filled())
    assert served.code.outputs[0].shape == (-1,)
    assert served.model.max_batch_size == 0
    assert any("output 'y' has a shape that depends on the values" in text for text in served.model.warnings)
    for count in (0, 3, 10, 17):
        np.testing.assert_array_equal(shop.run(served, {"n": np.array([count])})[0], [2.0] * count)


def test_a_shape_that_a_trial_contradicts_is_open(shop):
    served = shop.served("m", best())
    assert [spec.shape for spec in served.code.outputs] == [(-1, -1), (-1, -1)]
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    for k in (1, 3, 4):
        y, where = shop.run(served, {"x": x, "k": np.array([k])})
        assert (y.shape, where.shape) == ((3, k), (3, k))


def test_stated_dims_are_believed_and_an_open_one_opens_what_the_graph_has(shop):
    ten = shop.served("ten", filled(), toml='max_batch_size = 0\noutputs = [{name = "y", dims = [10]}]')
    assert ten.code.outputs[0].shape == (10,)  # though the trial asked for another number
    loose = shop.served("loose", filled(), toml='max_batch_size = 0\noutputs = [{name = "y", dims = [-1]}]')
    assert loose.code.outputs[0].shape == (-1,)
    mlp = graphs.mlp()
    sure = shop.served("sure", mlp, toml='outputs = [{name = "y", dims = [-1]}]')
    assert sure.code.outputs[0].shape == (3,)  # for it follows from the inputs


def test_shapes_that_are_those_of_the_trial_by_chance_are_not_believed(shop):
    nodes = [h.make_node("ConstantOfShape", ["n"], ["zeros"]), h.make_node("Relu", ["zeros"], ["y"])]
    model = graphs.model(nodes, [("n", T.INT64, [1])], [("y", T.FLOAT, [16000])])
    model.graph.value_info.append(h.make_tensor_value_info("zeros", T.FLOAT, [16000]))
    assert shop.served("m", model).code.outputs[0].shape == (-1,)
