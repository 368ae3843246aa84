"""Products rewritten as convolutions give the same answers; those that do not qualify are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from clockwork_serve.store.pixels import rows_as_pixels

RANDOM = np.random.default_rng(7)


def block_of_this_cpu() -> int:
    with open("/proc/cpuinfo") as lines:
        return 16 if "avx512f" in lines.read() else 8


def matrix(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def product(op: str, weights: np.ndarray, rank: int, bias: np.ndarray | None = None, **attributes: object):
    """y = op(x, w[, b]) with rows of x as long as the weights want them."""
    tensors = [numpy_helper.from_array(weights, "w")]
    inputs = ["x", "w"]
    if bias is not None:
        tensors.append(numpy_helper.from_array(bias, "b"))
        inputs.append("b")
    domain = "com.microsoft" if op == "FusedMatMul" else ""
    rows = weights.shape[1 if attributes.get("transB") else 0]
    dims = [*"abc"[: rank - 1], rows]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], domain=domain, **attributes)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        tensors,
    )
    imports = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8), rows


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


CASES = {
    "matmul": ("MatMul", (192, 256), None, {}),
    "rows and columns that fill no block": ("MatMul", (180, 250), None, {}),
    "gemm": ("Gemm", (192, 256), 256, {}),
    "gemm transposed": ("Gemm", (256, 192), 256, {"transB": 1}),
    "gemm without bias": ("Gemm", (180, 250), None, {"alpha": 0.5}),
    "with a factor": ("FusedMatMul", (192, 256), None, {"alpha": 0.25}),
}


@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_answers_stay_the_same(case, lead):
    op, shape, bias, attributes = CASES[case]
    if op == "Gemm" and len(lead) > 1:
        pytest.skip("Gemm takes rank 2")
    model, rows = product(op, matrix(*shape), len(lead) + 1, None if bias is None else matrix(bias), **attributes)
    x = matrix(*lead, rows)
    wanted = run(model, x)
    assert rows_as_pixels(model, block_of_this_cpu()) == 1
    assert {node.op_type for node in model.graph.node} >= {"Conv", "ReorderInput", "ReorderOutput"}
    got = run(model, x)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < 2e-6


LEFT_ALONE = {
    "too small": ("MatMul", (100, 100), None, {}),
    "rows of odd length": ("MatMul", (182, 256), None, {}),
    "a factor of the bias": ("Gemm", (192, 256), 256, {"beta": 0.5}),
    "a bias that fills no block": ("Gemm", (192, 250), 250, {}),
    "a left-hand side to transpose": ("Gemm", (192, 256), None, {"transA": 1}),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_does_not_qualify_is_left_alone(case):
    op, shape, bias, attributes = LEFT_ALONE[case]
    model, _ = product(op, matrix(*shape), 2, None if bias is None else matrix(bias), **attributes)
    before = model.SerializeToString(deterministic=True)
    assert rows_as_pixels(model, 16) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_products_of_the_same_rows_share_their_picture():
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "v"], ["p"]),
            helper.make_node("MatMul", ["x", "w"], ["q"]),
            helper.make_node("Add", ["p", "q"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", 192])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", 256])],
        [numpy_helper.from_array(matrix(192, 256), name) for name in "vw"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = matrix(3, 192)
    wanted = run(model, x)
    assert rows_as_pixels(model, block_of_this_cpu()) == 2
    assert [node.op_type for node in model.graph.node].count("ReorderInput") == 1
    assert np.abs(run(model, x) - wanted).max() / np.abs(wanted).max() < 2e-6


def test_weights_read_twice_are_left_alone():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", 192])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", 192])],
        [numpy_helper.from_array(matrix(192, 192), "w")],
    )
    assert rows_as_pixels(helper.make_model(graph), 16) == 0
