"""Lifts the weights out of small ONNX graphs by hand, and makes the records that name them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from msgspec import structs
from onnx import TensorProto, helper, numpy_helper

from clockwork_serve.devices import CallBuffers
from clockwork_serve.errors import ModelError
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import (
    Call,
    Code,
    CodeFile,
    Extent,
    Infer,
    Load,
    TensorSpec,
    Unload,
    Weights,
    Window,
)
from clockwork_serve.units import align

WINDOW = Window(0, 1 << 62)
BAD_INPUTS = [
    ({}, "input x: expected by code"),
    ({"x": np.zeros((1, 64))}, "input x: expected FP32, found an array of float64"),
    ({"x": np.zeros((1, 63), np.float32)}, r"input x: expected shape \(1, 64\), found \(1, 63\)"),
    ({"x": np.zeros((2, 64), np.float32)}, r"input x: expected shape \(1, 64\), found \(2, 64\)"),
]
"""For a code of 64 inputs, and what is said of them."""


def mlp(seed: int, width: int = 64, layers: int = 2) -> onnx.ModelProto:
    """x[batch, width] -> relu(x @ w + b) ... -> y[batch, width]."""
    random = np.random.default_rng(seed)
    nodes, weights, name = [], [], "x"
    for layer in range(layers):
        w = (random.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
        b = random.standard_normal(width).astype(np.float32)
        weights += [numpy_helper.from_array(w, f"w{layer}"), numpy_helper.from_array(b, f"b{layer}")]
        out = "y" if layer == layers - 1 else f"h{layer}"
        nodes += [
            helper.make_node("Gemm", [name, f"w{layer}", f"b{layer}"], [f"g{layer}"]),
            helper.make_node("Tanh", [f"g{layer}"], [out]),
        ]
        name = out
    return model(nodes, {"x": ["batch", width]}, {"y": ["batch", width]}, weights)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, list[Any]],
    outputs: Mapping[str, list[Any]],
    weights: Sequence[onnx.TensorProto] = (),
    kinds: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A model; element types are float but for the names in ``kinds``."""
    kinds = kinds or {}

    def infos(shapes: Mapping[str, list[Any]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)
            for name, shape in shapes.items()
        ]

    graph = helper.make_graph(list(nodes), "graph", infos(inputs), infos(outputs), list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def plain_session(proto: onnx.ModelProto) -> ort.InferenceSession:
    """What a user would run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def optimised(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph as ONNX Runtime would run it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def lift(proto: onnx.ModelProto, folder: Path, *, optimise: bool = True) -> bytes:
    """Write ``model.onnx`` and ``index.json`` to ``folder``; the blob is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = optimised(proto, folder) if optimise else proto
    graph, kept, tensors, blob = proto.graph, [], [], bytearray()
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or array.size < 16:
            kept.append(tensor)
            continue
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, array.shape))
        entry = {"name": tensor.name, "shape": array.shape, "dtype": "float32"}
        tensors.append({**entry, "offset": len(blob), "nbytes": array.nbytes})
        blob += array.tobytes()
        blob += bytes(align(len(blob)) - len(blob))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    (folder / "index.json").write_text(json.dumps({"tensors": tensors, "blob_bytes": len(blob)}))
    return bytes(blob)


def code_of(
    folder: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], **settings: Any
) -> Code:
    """A code record of the folder's current content; batched and lifted by default."""
    defaults = {"backend": "onnx", "batched": True, "batch_sizes": (1, 2, 4), "lifted": True}
    fields = {**defaults, **settings}
    code = Code(
        code_id=f"{folder.name}-{zlib.crc32(str(folder).encode()):08x}",
        path=str(folder),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        **fields,
    )
    return vouched(code)


def vouched(code: Code) -> Code:
    """The code of what is in its folder by now."""
    files = sorted(Path(code.path).iterdir())
    return structs.replace(
        code, files=tuple(CodeFile(file.name, hash_of(file.read_bytes())) for file in files)
    )


def spec(name: str, *shape: int, datatype: str = "FP32", optional: bool = False) -> TensorSpec:
    """A tensor record."""
    return TensorSpec(name=name, datatype=datatype, shape=shape, optional=optional)


def weights_file(path: Path, blob: bytes) -> Weights:
    """Write a blob and name it."""
    path.write_bytes(blob)
    return Weights(weights_id=hash_of(blob), path=str(path), size=len(blob))


def load(code: Code, weights: Weights, first: int = 0, count: int = 1) -> Load:
    """A LOAD to ``count`` pages from ``first``."""
    return Load(
        action_id=1, device="cpu:0", model=weights.weights_id, code_id=code.code_id, weights=weights,
        extent=Extent(first, count), version=1, window=WINDOW, expected_ns=0,
    )  # fmt: skip


def unload(first: int = 0, count: int = 1) -> Unload:
    """An UNLOAD of the same."""
    return Unload(
        action_id=2, device="cpu:0", model="m", extent=Extent(first, count), version=1, window=WINDOW
    )  # fmt: skip


def infer(code: Code, rows: Sequence[int], batch: int | None = None, first: int = 0, count: int = 1) -> Infer:
    """An INFER of calls with that many rows."""
    return Infer(
        action_id=3, device="cpu:0", model="m", code_id=code.code_id, extent=Extent(first, count), version=1,
        batch=batch or sum(rows), window=WINDOW, expected_ns=0,
        calls=tuple(Call(request_id=str(i), rows=n, tensors=b"") for i, n in enumerate(rows)),
    )  # fmt: skip


def call(inputs: Mapping[str, Any], room: int = 1 << 16) -> CallBuffers:
    """One call's buffers, with ``room`` bytes for outputs, filled with something else than zeros."""
    return CallBuffers(inputs=inputs, output=memoryview(bytearray(b"\xaa" * room)))


class FullBuffers(CallBuffers):
    """A call whose room cannot grow."""

    def grow(self, nbytes: int) -> None:
        raise ModelError(f"{nbytes} bytes for {len(self.output)}")


def full(inputs: Mapping[str, Any], room: int) -> FullBuffers:
    return FullBuffers(inputs=inputs, output=memoryview(bytearray(room)))


def output(buffers: CallBuffers, name: str) -> np.ndarray:
    """An output of a call as an array."""
    from clockwork_serve.devices.base import NUMPY_DTYPES

    ref = next(ref for ref in buffers.outputs if ref.name == name)
    return np.ndarray(ref.shape, NUMPY_DTYPES[ref.datatype], buffer=buffers.output, offset=ref.offset)


def dense(folder, seed=1, **settings):
    """A served model: (plain session, code, weights)."""
    proto = mlp(seed)
    blob = lift(proto, folder / "dense")
    code = code_of(folder / "dense", [spec("x", 64)], [spec("y", 64)], **settings)
    return plain_session(proto), code, weights_file(folder / f"weights{seed}", blob)


def numbers(rows, width=64, seed=0):
    return np.random.default_rng(seed + rows).standard_normal((rows, width)).astype(np.float32)


def close(got, wanted):
    return float(np.abs(got - wanted).max() / np.abs(wanted).max()) < 1e-5
