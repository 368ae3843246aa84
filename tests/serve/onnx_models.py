"""Tiny ONNX models and a repository of them, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def affine(seed: int, width: int = 64, layers: int = 1) -> bytes:
    """``y = x @ W + b`` of shape [n, width], with weights of its own; more ``layers`` make another graph."""
    random = np.random.default_rng(seed)
    graph = helper.make_graph(
        [
            *[
                helper.make_node("MatMul", [f"h{at}" if at else "x", "w"], [f"h{at + 1}"])
                for at in range(layers - 1)
            ],
            helper.make_node("MatMul", [f"h{layers - 1}" if layers > 1 else "x", "w"], ["a"]),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
        "affine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [
            numpy_helper.from_array(random.standard_normal((width, width), dtype=np.float32), "w"),
            numpy_helper.from_array(random.standard_normal(width, dtype=np.float32), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    assert onnx.load_model_from_string(data).graph.name == "affine"
    return data


def put(root: Path, name: str, data: bytes, version: int = 1) -> Path:
    """Write a model into a repository; its file."""
    path = root / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
