"""A generated convolutional network, compiled like any user's model: what runs on the real device."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clockwork_serve.devices import CallBuffers, Device
from clockwork_serve.messages import Call, Extent, Infer, Load, Window
from clockwork_serve.store import Cache, Compiler, Repository, ServedVersion, StoreConfig

SIDE: Final = 32
INPUT_SHAPE: Final = (3, SIDE, SIDE)
CLASSES: Final = 128
_CHANNELS, _DEPTH = 32, 8
_WHENEVER: Final = Window(0, 1 << 62)
_SETTINGS: Final = "max_batch_size = 8\n"


def write_model(root: Path, name: str, seed: int) -> Path:
    """Write a model of eight convolutions and one wide layer (about 4 MB); the graph's path.

    All seeds give one architecture, so one code, with weights of their own.
    """
    rng = np.random.default_rng(seed)
    nodes, weights, last, width = [], [], "x", INPUT_SHAPE[0]
    for layer in range(_DEPTH):
        kernel = rng.standard_normal((_CHANNELS, width, 3, 3), dtype=np.float32) / np.float32(3 * width**0.5)
        weights.append(numpy_helper.from_array(kernel, f"k{layer}"))
        strides = [2, 2] if layer == _DEPTH - 1 else [1, 1]
        nodes.append(
            helper.make_node("Conv", [last, f"k{layer}"], [f"c{layer}"], pads=[1] * 4, strides=strides)
        )
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last, width = f"r{layer}", _CHANNELS
    wide = _CHANNELS * (SIDE // 2) ** 2
    matrix = rng.standard_normal((wide, CLASSES), dtype=np.float32) / np.float32(wide**0.5)
    weights.append(numpy_helper.from_array(matrix, "w"))
    nodes.append(helper.make_node("Flatten", [last], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "w"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *INPUT_SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        weights,
    )
    folder = root / name / "1"
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    (root / name / "clockwork.toml").write_text(_SETTINGS)
    return path


def compile_models(root: Path, cache_dir: Path) -> list[ServedVersion]:
    """All models of a repository, compiled."""
    config = StoreConfig(cache_dir=str(cache_dir))
    compiler = Compiler(Cache(cache_dir), config)
    entries = Repository(root, config).scan()
    return [compiler.compile(entry, version) for entry in entries for version in entry.versions]


class Lane:
    """One model on a device of this process, run by the caller: isolated if there is one thread."""

    def __init__(self, device: Device, served: ServedVersion) -> None:
        self._device = device
        self._served = served
        name = device.spec.device
        extent = Extent(0, device.spec.pages_of(served.model.weights.size))
        device.prepare(served.code)
        device.load(
            Load(
                action_id=1, device=name, model=served.model.key, code_id=served.code.code_id,
                weights=served.model.weights, extent=extent, version=1, window=_WHENEVER, expected_ns=0,
            )
        )  # fmt: skip
        self._action = Infer(
            action_id=2, device=name, model=served.model.key, code_id=served.code.code_id, extent=extent,
            version=1, batch=1, window=_WHENEVER, expected_ns=0,
            calls=(Call(request_id="0", rows=1, tensors=b""),),
        )  # fmt: skip
        room = memoryview(bytearray(served.model.output_bytes + 64))
        picture = np.zeros((1, *INPUT_SHAPE), np.float32)
        self._calls = [CallBuffers(inputs={"x": picture}, output=room)]

    def infer(self) -> None:
        """One request, alone."""
        self._calls[0].outputs.clear()
        self._device.infer(self._action, self._calls)
