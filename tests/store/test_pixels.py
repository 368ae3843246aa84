"""Products rewritten as convolutions give the same answers; those that do not qualify are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from clockwork_serve.store.onnx.pixels import matmuls_to_convolutions

RANDOM = np.random.default_rng(7)


def block_of_this_cpu() -> int:
    with open("/proc/cpuinfo") as lines:
        return 16 if "avx512f" in lines.read() else 8


def matrix(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def product(op: str, weights: np.ndarray, rank: int, bias: np.ndarray | None = None, **attributes: object):
    """One node ``y = op(x, w[, b])`` with rows of x as long as the weights want them."""
    tensors = [numpy_helper.from_array(weights, "w")]
    inputs = ["x", "w"]
    if bias is not None:
        tensors.append(numpy_helper.from_array(bias, "b"))
        inputs.append("b")
    domain = "com.microsoft" if op.startswith("Fused") else ""
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
    return run_all(model, x)[0]


def run_all(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})


CASES = {
    "matmul": ("MatMul", (192, 256), None, {}),
    "rows and columns that fill no block": ("MatMul", (180, 250), None, {}),
    "gemm": ("Gemm", (192, 256), 256, {}),
    "gemm transposed": ("Gemm", (256, 192), 256, {"transB": 1}),
    "gemm without bias": ("Gemm", (180, 250), None, {"alpha": 0.5}),
    "gemm and relu": ("FusedGemm", (192, 256), 256, {"activation": "Relu"}),
    "gemm and tanh": ("FusedGemm", (256, 192), 256, {"activation": "Tanh", "transB": 1}),
    "with a factor": ("FusedMatMul", (192, 256), None, {"alpha": 0.25}),
}


LEADS = [(1,), (5,), (2, 3), (2, 1, 4)]


@pytest.mark.parametrize(
    ("case", "lead"),
    # Gemm takes rank 2 alone.
    [(name, lead) for name in CASES for lead in LEADS if len(lead) == 1 or "MatMul" in CASES[name][0]],
)
def test_answers_stay_the_same(case, lead):
    op, shape, bias, attributes = CASES[case]
    model, rows = product(
        op, matrix(*shape), len(lead) + 1, None if bias is None else matrix(bias), **attributes
    )
    x = matrix(*lead, rows)
    wanted = run(model, x)
    assert matmuls_to_convolutions(model, block_of_this_cpu()) == 1
    assert {node.op_type for node in model.graph.node} >= {"Conv", "ReorderInput", "ReorderOutput"}
    got = run(model, x)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() / np.abs(wanted).max() <= 1e-5


LEFT_ALONE = {
    "too small": ("MatMul", (100, 100), None, {}),
    "too narrow": ("MatMul", (1024, 64), None, {}),
    "an activation with a parameter": ("FusedGemm", (192, 256), 256, {"activation": "LeakyRelu"}),
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
    assert matmuls_to_convolutions(model, 16) == 0
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
    assert matmuls_to_convolutions(model, block_of_this_cpu()) == 2
    assert [node.op_type for node in model.graph.node].count("ReorderInput") == 1
    assert np.abs(run(model, x) - wanted).max() / np.abs(wanted).max() <= 1e-5


def chain(middle: list[onnx.NodeProto], *, also: tuple[str, ...] = ()) -> onnx.ModelProto:
    """``y = (x @ v, then middle from p to q) @ w`` with 180 and 250 columns; ``also`` are outputs too."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "v"], ["p"]),
            *middle,
            helper.make_node("MatMul", ["q", "w"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", 192])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", *also)],
        [numpy_helper.from_array(matrix(192, 180), "v"), numpy_helper.from_array(matrix(180, 250), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(op: str, *names: str) -> onnx.NodeProto:
    return helper.make_node(op, names[:-1], names[-1:])


CHAINS = {
    "relu": ([node("Relu", "p", "q")], (), 1),
    "sigmoid": ([node("Sigmoid", "p", "q")], (), 1),
    "two activations": ([node("Relu", "p", "r"), node("Tanh", "r", "q")], (), 2),
    "another operator": ([node("Exp", "p", "r"), node("Tanh", "r", "q")], (), 2),
    "an output before the activation": ([node("Relu", "p", "q")], ("p",), 2),
    "an output after the activation": ([node("Relu", "p", "q")], ("q",), 2),
    "another reader": ([node("Relu", "p", "q"), node("Neg", "q", "n")], ("n",), 2),
}


@pytest.mark.parametrize("case", CHAINS)
def test_a_chain_of_products_stays_a_picture_as_long_as_nothing_else_reads_it(case):
    middle, also, pictures = CHAINS[case]
    model = chain(middle, also=also)
    x = matrix(5, 192) / 30
    wanted = run_all(model, x)
    assert matmuls_to_convolutions(model, block_of_this_cpu()) == 2
    assert [each.op_type for each in model.graph.node].count("ReorderInput") == pictures
    for got, right in zip(run_all(model, x), wanted, strict=True):
        assert got.shape == right.shape
        assert np.abs(got - right).max() / np.abs(right).max() <= 1e-5


def test_an_activation_after_one_that_the_product_has_already_is_kept():
    model = chain([node("Tanh", "p", "q")])
    first = model.graph.node[0]
    first.op_type, first.domain = "FusedGemm", "com.microsoft"
    first.attribute.append(helper.make_attribute("activation", "Relu"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = matrix(5, 192) / 30
    wanted = run(model, x)
    assert matmuls_to_convolutions(model, block_of_this_cpu()) == 2
    assert np.abs(run(model, x) - wanted).max() / np.abs(wanted).max() <= 1e-5


def test_products_of_the_same_rows_with_other_factors_have_pictures_of_their_own():
    model = chain([node("Relu", "p", "q")])
    del model.graph.node[:]
    fused = {name: helper.make_node("FusedMatMul", ["x", "v"], [name]) for name in "pq"}
    model.graph.initializer.append(numpy_helper.from_array(matrix(192, 180), "u"))
    fused["q"].input[1] = "u"
    for name, factor in (("p", 1.0), ("q", 0.25)):
        fused[name].domain = "com.microsoft"
        fused[name].attribute.append(helper.make_attribute("alpha", factor))
    model.graph.node.extend([*fused.values(), node("Add", "p", "q", "y")])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = matrix(5, 192)
    wanted = run(model, x)
    assert matmuls_to_convolutions(model, block_of_this_cpu()) == 2
    assert np.abs(run(model, x) - wanted).max() / np.abs(wanted).max() <= 1e-5


def test_weights_that_a_branch_reads_too_are_left_alone():
    model, _ = product("MatMul", matrix(192, 256), 2)
    out = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
    branches = [helper.make_graph([node("Identity", "w", "o")], "b", [], out) for _ in range(2)]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    model.graph.node.append(
        helper.make_node("If", ["c"], ["z"], then_branch=branches[0], else_branch=branches[1])
    )
    assert matmuls_to_convolutions(model, 16) == 0


def test_weights_read_twice_are_left_alone():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", 192])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", 192])],
        [numpy_helper.from_array(matrix(192, 192), "w")],
    )
    assert matmuls_to_convolutions(helper.make_model(graph), 16) == 0
