"""Small ONNX models of every kind that the store must distinguish, with weights from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper


def model(nodes, inputs, outputs, weights=None, *, opset=17, ir_version=9, **attributes) -> onnx.ModelProto:
    """A checked model; ``inputs`` and ``outputs`` are (name, type, dims), ``weights`` arrays by name."""
    graph = h.make_graph(
        nodes,
        attributes.pop("graph_name", "graph"),
        [h.make_tensor_value_info(*each) for each in inputs],
        [h.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], **attributes)
    made.ir_version = ir_version
    onnx.checker.check_model(made)
    return made


def floats(random: np.random.Generator, *shape: int, scale: float = 0.3) -> np.ndarray:
    return (random.standard_normal(shape) * scale).astype(np.float32)


def convnet(seed: int = 0, *, classes: int = 10, side: int | str = 8, **attributes) -> onnx.ModelProto:
    """Two convolutions and a classifier: optimising only moves its weights about."""
    random = np.random.default_rng(seed)
    weights = {
        "w0": floats(random, 20, 3, 3, 3), "b0": floats(random, 20), "w1": floats(random, 24, 20, 3, 3),
        "b1": floats(random, 24), "fw": floats(random, classes, 24), "fb": floats(random, classes),
    }  # fmt: skip
    nodes = [
        h.make_node("Conv", ["x", "w0", "b0"], ["c0"], kernel_shape=[3, 3], pads=[1] * 4),
        h.make_node("Relu", ["c0"], ["r0"]),
        h.make_node("Conv", ["r0", "w1", "b1"], ["c1"], kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]),
        h.make_node("Relu", ["c1"], ["r1"]),
        h.make_node("GlobalAveragePool", ["r1"], ["g"]),
        h.make_node("Flatten", ["g"], ["f"]),
        h.make_node("Gemm", ["f", "fw", "fb"], ["y"], transB=1),
    ]
    return model(
        nodes, [("x", T.FLOAT, ["N", 3, side, side])], [("y", T.FLOAT, ["N", classes])], weights, **attributes
    )


def normalised(seed: int = 0) -> onnx.ModelProto:
    """A convolution with a batch normalisation, which optimising computes into its weights."""
    random = np.random.default_rng(seed)
    weights = {
        "w": floats(random, 16, 3, 3, 3), "scale": floats(random, 16) + 1, "bias": floats(random, 16),
        "mean": floats(random, 16), "var": np.abs(floats(random, 16)) + 1,
    }  # fmt: skip
    nodes = [
        h.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1] * 4),
        h.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["n"]),
        h.make_node("Relu", ["n"], ["y"]),
    ]
    return model(nodes, [("x", T.FLOAT, ["N", 3, 8, 8])], [("y", T.FLOAT, ["N", 16, 8, 8])], weights)


def mlp(seed: int = 0, *, width: int = 32, batch: str | int = "N", prefix: str = "") -> onnx.ModelProto:
    """Two matrix products; ``prefix`` changes every name that does not matter."""
    random = np.random.default_rng(seed)
    w0, b0, w1, b1 = (prefix + name for name in ("w0", "b0", "w1", "b1"))
    weights = {w0: floats(random, 8, width), b0: floats(random, width), w1: floats(random, width, 3)}
    weights[b1] = floats(random, 3)
    nodes = [
        h.make_node("MatMul", ["x", w0], [prefix + "m"], name=prefix + "first"),
        h.make_node("Add", [prefix + "m", b0], [prefix + "a"]),
        h.make_node("Relu", [prefix + "a"], [prefix + "r"]),
        h.make_node("Gemm", [prefix + "r", w1, b1], ["y"]),
    ]
    return model(nodes, [("x", T.FLOAT, [batch, 8])], [("y", T.FLOAT, [batch, 3])], weights)


def dense(seed: int = 0) -> onnx.ModelProto:
    """Two products wide enough to be rewritten as convolutions."""
    random = np.random.default_rng(seed)
    weights = {"v": floats(random, 400, 192), "w": floats(random, 192, 256), "b": floats(random, 256)}
    nodes = [
        h.make_node("MatMul", ["x", "v"], ["m"]),
        h.make_node("Tanh", ["m"], ["t"]),
        h.make_node("Gemm", ["t", "w", "b"], ["y"]),
    ]
    return model(nodes, [("x", T.FLOAT, ["N", 400])], [("y", T.FLOAT, ["N", 256])], weights)


def rectified_weights(seed: int = 0) -> onnx.ModelProto:
    """Weights that the graph itself rectifies: folding keeps the positive ones and no others."""
    random = np.random.default_rng(seed)
    weights = {"w": floats(random, 16, 4)}
    nodes = [h.make_node("Relu", ["w"], ["p"]), h.make_node("MatMul", ["x", "p"], ["y"])]
    return model(nodes, [("x", T.FLOAT, ["N", 16])], [("y", T.FLOAT, ["N", 4])], weights)


def clamped_weights(seed: int = 0) -> onnx.ModelProto:
    """Weights that the graph itself clamps to -5..5."""
    nodes = [h.make_node("Clip", ["w", "low", "high"], ["c"]), h.make_node("MatMul", ["x", "c"], ["y"])]
    weights = {"w": floats(np.random.default_rng(seed), 16, 4, scale=1.0)}
    return _of_computed(
        nodes, weights | {"low": np.float32(-5).reshape(()), "high": np.float32(5).reshape(())}
    )


def pruned_weights(seed: int = 0) -> onnx.ModelProto:
    """Weights of which the graph itself keeps those whose magnitude is less than 5."""
    nodes = [
        h.make_node("Abs", ["w"], ["a"]),
        h.make_node("Less", ["a", "most"], ["small"]),
        h.make_node("Where", ["small", "w", "zero"], ["p"]),
        h.make_node("MatMul", ["x", "p"], ["y"]),
    ]
    weights = {"w": floats(np.random.default_rng(seed), 16, 4, scale=1.0)}
    return _of_computed(
        nodes, weights | {"most": np.float32(5).reshape(()), "zero": np.float32(0).reshape(())}
    )


def bounded_factors(seed: int = 0) -> onnx.ModelProto:
    """Inputs times factors that the graph itself bounds."""
    nodes = [
        h.make_node("Clip", ["w", "low", "high"], ["c"]),
        h.make_node("Mul", ["x", "c"], ["m"]),
        h.make_node("MatMul", ["m", "v"], ["y"]),
    ]
    random = np.random.default_rng(seed)
    weights = {"w": floats(random, 16, scale=1.0), "v": floats(random, 16, 4)}
    return _of_computed(
        nodes, weights | {"low": np.float32(-5).reshape(()), "high": np.float32(5).reshape(())}
    )


def _of_computed(nodes, weights) -> onnx.ModelProto:
    return model(nodes, [("x", T.FLOAT, ["N", 16])], [("y", T.FLOAT, ["N", 4])], weights)


def scaled(**settings) -> onnx.ModelProto:
    """``x * k + w``; ``k`` and ``w`` are inputs and initialisers both."""
    nodes = [h.make_node("Mul", ["x", "k"], ["z"]), h.make_node("Add", ["z", "w"], ["y"])]
    weights = {"k": np.full(32, 3, np.float32), "w": np.full(32, 5, np.float32)}
    inputs = [(name, T.FLOAT, [32]) for name in ("x", "k", "w")]
    return model(nodes, inputs, [("y", T.FLOAT, [32])], weights, **settings)


def recurrent(seed: int = 0) -> onnx.ModelProto:
    """An LSTM over a sequence, batch first."""
    random = np.random.default_rng(seed)
    hidden, features = 8, 6
    weights = {
        "w": floats(random, 1, 4 * hidden, features), "r": floats(random, 1, 4 * hidden, hidden),
        "b": floats(random, 1, 8 * hidden), "axes": np.array([0], np.int64),
    }  # fmt: skip
    nodes = [
        h.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        h.make_node("LSTM", ["t", "w", "r", "b"], ["", "last"], hidden_size=hidden),
        h.make_node("Squeeze", ["last", "axes"], ["y"]),
    ]
    return model(nodes, [("x", T.FLOAT, ["N", 5, features])], [("y", T.FLOAT, ["N", hidden])], weights)


def quantised(
    seed: int = 0, weights_seed: int = 0, *, inputs: int = 8, dynamic: bool = False
) -> onnx.ModelProto:
    """A matrix product with int8 weights (from ``weights_seed``) and a float bias (from ``seed``).

    ``dynamic``: the scale of the inputs is that of the largest in the whole batch, so that rows mix.
    """
    random = np.random.default_rng(weights_seed)
    weights = {
        "w": random.integers(-127, 127, (inputs, 32)).astype(np.int8),
        "w_scale": np.float32(0.01).reshape(()),
        "w_zero": np.int8(0).reshape(()),
        "b": floats(np.random.default_rng(seed), 32),
    }
    if dynamic:
        first = h.make_node("DynamicQuantizeLinear", ["x"], ["q", "q_scale", "q_zero"])
    else:
        first = h.make_node("QuantizeLinear", ["x", "q_scale", "q_zero"], ["q"])
        weights |= {"q_scale": np.float32(0.02).reshape(()), "q_zero": np.uint8(128).reshape(())}
    nodes = [
        first,
        h.make_node("MatMulInteger", ["q", "w", "q_zero", "w_zero"], ["i"]),
        h.make_node("Cast", ["i"], ["f"], to=T.FLOAT),
        h.make_node("Mul", ["q_scale", "w_scale"], ["s"]),
        h.make_node("Mul", ["f", "s"], ["d"]),
        h.make_node("Add", ["d", "b"], ["y"]),
    ]
    return model(nodes, [("x", T.FLOAT, ["N", inputs])], [("y", T.FLOAT, ["N", 32])], weights)


def image_to_image(seed: int = 0) -> onnx.ModelProto:
    """A convolution over pictures of any size: dimensions besides the batch are free."""
    random = np.random.default_rng(seed)
    nodes = [h.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], pads=[1] * 4)]
    weights = {"w": floats(random, 2, 3, 3, 3)}
    inputs = [("x", T.FLOAT, ["N", 3, "H", "W"])]
    return model(nodes, inputs, [("y", T.FLOAT, ["N", 2, "H", "W"])], weights)


def batch_on_axis_one() -> onnx.ModelProto:
    """A state whose batch is axis 1, as in recurrent models that hand their state out."""
    random = np.random.default_rng(0)
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["m"]),
        h.make_node("Add", ["m", "state"], ["new_state"]),
        h.make_node("ReduceSum", ["new_state", "axes"], ["y"], keepdims=0),
    ]
    weights = {"w": floats(random, 8, 16), "axes": np.array([0], np.int64)}
    return model(
        nodes,
        [("x", T.FLOAT, ["N", 8]), ("state", T.FLOAT, [2, "N", 16])],
        [("y", T.FLOAT, ["N", 16]), ("new_state", T.FLOAT, [2, "N", 16])],
        weights,
    )


def scalar_input() -> onnx.ModelProto:
    """A sampling rate beside the samples; it selects a branch whose weights are its own."""
    random = np.random.default_rng(0)

    def branch(name: str) -> onnx.GraphProto:
        weight = numpy_helper.from_array(floats(random, 8, 16), f"{name}_w")
        output = h.make_tensor_value_info(f"{name}_y", T.FLOAT, ["N", 16])
        return h.make_graph(
            [h.make_node("MatMul", ["x", f"{name}_w"], [f"{name}_y"])], name, [], [output], [weight]
        )

    nodes = [
        h.make_node("Equal", ["rate", "high"], ["is_high"]),
        h.make_node("If", ["is_high"], ["y"], then_branch=branch("fast"), else_branch=branch("slow")),
    ]
    return model(
        nodes,
        [("x", T.FLOAT, ["N", 8]), ("rate", T.INT64, [])],
        [("y", T.FLOAT, ["N", 16])],
        {"high": np.array(16000, np.int64)},
    )


def squeezed() -> onnx.ModelProto:
    """An output that loses its batch axis at batch 1, and is declared without one."""
    weights = {"w": floats(np.random.default_rng(0), 8, 1)}
    nodes = [h.make_node("MatMul", ["x", "w"], ["m"]), h.make_node("Squeeze", ["m"], ["y"])]
    return model(nodes, [("x", T.FLOAT, ["N", 8])], [("y", T.FLOAT, [])], weights)


def mixing_rows() -> onnx.ModelProto:
    """Axis 0 looks like a batch, but each row is compared with the mean of all."""
    weights = {"w": floats(np.random.default_rng(0), 8, 4)}
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["m"]),
        h.make_node("ReduceMean", ["m"], ["mean"], axes=[0], keepdims=1),
        h.make_node("Sub", ["m", "mean"], ["y"]),
    ]
    return model(nodes, [("x", T.FLOAT, ["N", 8])], [("y", T.FLOAT, ["N", 4])], weights)


def sharp_rounding() -> onnx.ModelProto:
    """Rows are independent, but the answer magnifies rounding: a difference of sums times a large number."""
    random = np.random.default_rng(0)
    weights = {"w": floats(random, 512, 64, scale=1.0), "big": np.float32(3e5).reshape(())}
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["m"]),
        h.make_node("Mul", ["m", "big"], ["b"]),
        h.make_node("Sin", ["b"], ["y"]),
    ]
    return model(nodes, [("x", T.FLOAT, ["N", 512])], [("y", T.FLOAT, ["N", 64])], weights)


def unknown_output_shape() -> onnx.ModelProto:
    """The output's rank is not declared; only a run shows it."""
    made = mlp()
    made.graph.output[0].type.tensor_type.ClearField("shape")
    return made


def constants_as_nodes(seed: int = 0) -> onnx.ModelProto:
    """Weights in Constant nodes, as some exporters write them."""
    made = mlp(seed)
    constants = [
        h.make_node("Constant", [], [tensor.name], value=tensor) for tensor in made.graph.initializer
    ]
    nodes = [*constants, *made.graph.node]
    del made.graph.initializer[:]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def selecting() -> onnx.ModelProto:
    """An output whose size depends on values."""
    nodes = [h.make_node("NonZero", ["x"], ["y"])]
    return model(nodes, [("x", T.FLOAT, [4])], [("y", T.INT64, [1, "found"])])


def answers(session_input: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
    """What an ordinary session answers."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        session_input.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)
