"""Writes the model repositories that benchmarks serve; nothing in them is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent, indent

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Floats = npt.NDArray[np.float32]

TENSORS = """
inputs = [{name = "x", dims = [4], datatype = "FP32"}]
outputs = [{name = "y", dims = [4], datatype = "FP32"}]
"""

_ECHO = """
class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
FIRST        return {"y": inputs["x"]}

    def unload(self):
        pass
"""


def emulated(
    root: Path,
    name: str,
    infer_ms: Mapping[int, float],
    *,
    load_ms: float = 1.0,
    width: int = 4,
    weights_mb: float = 1.0,
) -> None:
    """A model that occupies its lane as long as it is told, by batch size, and uses no core.

    ``width`` is of its input: so many FP32 a row. ``weights_mb``: MiB that it has on a device.
    """
    curve = ", ".join(f"{batch} = {duration}" for batch, duration in infer_ms.items())
    batches = max(infer_ms)
    (root / name / "1").mkdir(parents=True)
    (root / name / "clockwork.toml").write_text(
        f'backend = "emulated"\nmax_batch_size = {batches}\n'
        f"{TENSORS.replace('dims = [4]', f'dims = [{width}]', 1)}\n"
        f"[emulated]\ninfer_ms = {{{curve}}}\nload_ms = {load_ms}\nweights_mb = {weights_mb}\n"
    )


def sleeper(root: Path, name: str, seconds: float) -> None:
    """A user's class that sleeps and echoes ``x`` as ``y``."""
    python_model(root, name, echoing("import time", f"time.sleep({seconds})"))


def echoing(head: str = "", first: str = "") -> str:
    """A user's class that echoes ``x`` as ``y``, below ``head``.

    ``first`` is what its ``infer`` does before that, where ``mood`` is the first number.
    """
    if first:
        first = f'mood = float(inputs["x"].reshape(-1)[0])\n{dedent(first).strip()}\n'
    return dedent(head) + _ECHO.replace("FIRST", indent(first, " " * 8))


def python_model(root: Path, name: str, source: str, *, max_batch_size: int = 1) -> None:
    """A user's class, as source."""
    (root / name / "1").mkdir(parents=True)
    (root / name / "clockwork.toml").write_text(
        f'backend = "python"\nmax_batch_size = {max_batch_size}\nmemory_bytes = 65536\n{TENSORS}'
    )
    (root / name / "1" / "model.py").write_text(source)


def layers(root: Path, name: str, *, width: int, depth: int, seed: int = 0) -> None:
    """``depth`` dense layers of ``width`` with ReLU between: ``x[n,width] -> y[n,width]``."""
    rng = np.random.default_rng(seed)
    nodes, weights, last = [], [], "x"
    for layer in range(depth):
        matrix = rng.standard_normal((width, width), dtype=np.float32) / np.float32(np.sqrt(width))
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        out = "y" if layer == depth - 1 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [out if out == "y" else f"m{layer}"]))
        if out != "y":
            nodes.append(helper.make_node("Relu", [f"m{layer}"], [out]))
        last = out
    _save(root, name, nodes, weights, (width,), width)


def convolutions(
    root: Path, name: str, *, side: int, channels: int, depth: int, seed: int = 0, mean: bool = False
) -> None:
    """``depth`` 3x3 convolutions with ReLU and a dense head: ``x[n,3,side,side] -> y[n,16]``.

    It computes much and weighs little, as vision models do: batches save it no time on a CPU. ``mean``: no
    head, but the mean of each channel, and no picture is made smaller.
    """
    rng = np.random.default_rng(seed)
    nodes, weights, last, wide = [], [], "x", 3
    for layer in range(depth):
        kernel = rng.standard_normal((channels, wide, 3, 3), dtype=np.float32) / np.float32(np.sqrt(9 * wide))
        weights.append(numpy_helper.from_array(kernel, f"w{layer}"))
        step = 2 if layer == 0 and not mean else 1
        inputs, out = [last, f"w{layer}"], f"c{layer}"
        nodes.append(helper.make_node("Conv", inputs, [out], pads=[1, 1, 1, 1], strides=[step, step]))
        nodes.append(helper.make_node("Relu", [out], [f"r{layer}"]))
        last, wide = f"r{layer}", channels
    if mean:
        nodes.append(helper.make_node("GlobalAveragePool", [last], ["mean"]))
        nodes.append(helper.make_node("Flatten", ["mean"], ["y"]))
    else:
        nodes.append(helper.make_node("Flatten", [last], ["flat"]))
        flat = channels * (side // 2) ** 2
        head = rng.standard_normal((flat, 16), dtype=np.float32) / np.float32(np.sqrt(flat))
        weights.append(numpy_helper.from_array(head, "head"))
        nodes.append(helper.make_node("MatMul", ["flat", "head"], ["y"]))
    _save(root, name, nodes, weights, (3, side, side), channels if mean else 16)


def self_attention(root: Path, name: str, *, scratch: int = 0) -> None:
    """One unbatched sequence ``x[seq, 8] -> y[seq, 8]`` that attends to itself, in memory of seq x seq.

    With ``scratch`` it needs a square matrix of that side on top, whatever its input is.
    """
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"]),
        helper.make_node("MatMul", ["x", "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        helper.make_node("Sigmoid", ["x"], ["gates"]),
        helper.make_node("Mul", ["x", "gates"], ["values"]),
        helper.make_node("MatMul", ["shares", "values"], ["mixed"]),
    ]
    weights = []
    if scratch:
        weights.append(numpy_helper.from_array(np.array([scratch, scratch], np.int64), "sides"))
        nodes += [
            helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
            helper.make_node("Expand", ["largest", "sides"], ["square"]),
            helper.make_node("Softmax", ["square"], ["parts"]),
            helper.make_node("ReduceSum", ["parts"], ["sum"], keepdims=0),
            helper.make_node("Add", ["mixed", "sum"], ["y"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["mixed"], ["y"]))
    _save(root, name, nodes, weights, (8,), 8, axis="seq")


def one_matrix(root: Path, name: str, matrix: Floats) -> None:
    """``y = x @ matrix``: a model whose answers tell whose weights were used."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    rows, columns = matrix.shape
    _save(root, name, nodes, [numpy_helper.from_array(matrix, "w")], (rows,), columns)


def matrix_of(seed: int, rows: int, columns: int) -> Floats:
    """The weights of the ``seed``-th model: made again whenever they are needed."""
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def _save(
    root: Path,
    name: str,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    shape_in: tuple[int, ...],
    wide_out: int,
    *,
    axis: str = "n",
) -> None:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [axis, *shape_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [axis, wide_out])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder = root / name / "1"
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
