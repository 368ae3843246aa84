"""Builds three known architectures as ONNX graphs from their published weights."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8


class Graph:
    """An ONNX graph that grows node by node; every method returns the name of its one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._count = 0

    def constant(self, values: npt.ArrayLike, dtype: str = "f4") -> str:
        """An initialiser."""
        name = self._fresh("c")
        array = np.ascontiguousarray(np.asarray(values, dtype))
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node; ``output`` names its result if the name matters."""
        result = output or self._fresh("t")
        self._nodes.append(helper.make_node(operator, list(inputs), [result], **attributes))
        return result

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """The finished and checked model."""
        graph = helper.make_graph(self._nodes, self.name, inputs, outputs, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        model.producer_name = "clockwork-serve"
        onnx.checker.check_model(model)
        return model

    def _fresh(self, letter: str) -> str:
        self._count += 1
        return f"{letter}{self._count}"


@dataclass(frozen=True, slots=True)
class _Convolutions:
    """Adds convolutions with their batch normalisation folded in to ``graph``."""

    graph: Graph
    state: Arrays
    epsilon: float

    def __call__(
        self, x: str, weight: str, norm: str, *, stride: int = 1, same: bool = False, relu6: bool = True
    ) -> str:
        """One convolution, padded as torch does (k // 2) or, if ``same``, as TensorFlow does."""
        graph, state = self.graph, self.state
        kernel = state[f"{weight}.weight"].astype(np.float64)
        spread = np.sqrt(state[f"{norm}.running_var"].astype(np.float64) + self.epsilon)
        scale = state[f"{norm}.weight"] / spread
        bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        size = kernel.shape[2]
        padding: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if same else {"pads": [size // 2] * 4}
        y = graph.node(
            "Conv", x, graph.constant(kernel * scale[:, None, None, None]), graph.constant(bias),
            kernel_shape=[size, size], strides=[stride, stride],
            group=kernel.shape[0] if kernel.shape[1] == 1 else 1, **padding,
        )  # fmt: skip
        return graph.node("Clip", y, graph.constant(0.0), graph.constant(6.0)) if relu6 else y


def _image_input() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 224, 224])


EFFICIENTNET_STAGES = (
    (1, 1, 1, 16), (2, 2, 6, 24), (2, 2, 6, 40), (3, 2, 6, 80), (3, 1, 6, 112), (4, 2, 6, 192),
    (1, 1, 6, 320),
)  # fmt: skip
MOBILENET_STAGES = (
    (1, 1, 1, 16), (2, 2, 6, 24), (3, 2, 6, 32), (4, 2, 6, 64), (3, 1, 6, 96), (3, 2, 6, 160), (1, 1, 6, 320),
)  # fmt: skip
"""Stages of inverted bottlenecks: blocks, stride of the first, expansion, channels out."""


def efficientnet_lite0(state: Arrays) -> onnx.ModelProto:
    """EfficientNet-Lite0: ``image`` f32 [batch, 3, 224, 224] to ``logits`` f32 [batch, 1000].

    Lite means no squeeze-and-excitation and ReLU6 instead of Swish.
    """
    graph = Graph("efficientnet_lite0")
    conv = _Convolutions(graph, state, 1e-3)
    x = conv("image", "_conv_stem", "_bn0", stride=2, same=True)
    channels, block = 32, 0
    for repeats, stride, expansion, out in EFFICIENTNET_STAGES:
        for index in range(repeats):
            name, step, skip = f"_blocks.{block}", stride if index == 0 else 1, x
            if expansion > 1:
                x = conv(x, f"{name}._expand_conv", f"{name}._bn0")
            x = conv(x, f"{name}._depthwise_conv", f"{name}._bn1", stride=step, same=True)
            x = conv(x, f"{name}._project_conv", f"{name}._bn2", relu6=False)
            if step == 1 and channels == out:
                x = graph.node("Add", x, skip)
            channels, block = out, block + 1
    x = conv(x, "_conv_head", "_bn1")
    pooled = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    weight, bias = graph.constant(state["_fc.weight"]), graph.constant(state["_fc.bias"])
    graph.node("Gemm", pooled, weight, bias, transB=1, output="logits")
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])
    return graph.model([_image_input()], [logits])


def mobilenet_v2(state: Arrays) -> onnx.ModelProto:
    """MobileNetV2 without classifier: ``image`` f32 [batch, 3, 224, 224] to ``feature`` f32 [batch, 1280]."""
    graph = Graph("mobilenet_v2")
    conv = _Convolutions(graph, state, 1e-5)
    x = conv("image", "features.0.0", "features.0.1", stride=2)
    channels, block = 32, 1
    for repeats, stride, expansion, out in MOBILENET_STAGES:
        for index in range(repeats):
            name, step, skip = f"features.{block}.conv", stride if index == 0 else 1, x
            at = 0
            if expansion > 1:
                x, at = conv(x, f"{name}.0", f"{name}.1"), 3
            x = conv(x, f"{name}.{at}", f"{name}.{at + 1}", stride=step)
            x = conv(x, f"{name}.{at + 3}", f"{name}.{at + 4}", relu6=False)
            if step == 1 and channels == out:
                x = graph.node("Add", x, skip)
            channels, block = out, block + 1
    x = conv(x, "features.18.0", "features.18.1")
    graph.node("Flatten", graph.node("GlobalAveragePool", x), output="feature")
    feature = helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["batch", 1280])
    return graph.model([_image_input()], [feature])


HIDDEN, HEADS, LAYERS = 384, 12, 6  # the shape of all-MiniLM-L6


def _linear(graph: Graph, x: str, state: Arrays, name: str) -> str:
    product = graph.node("MatMul", x, graph.constant(state[f"{name}.weight"].T))
    return graph.node("Add", product, graph.constant(state[f"{name}.bias"]))


def _layer_norm(graph: Graph, x: str, state: Arrays, name: str) -> str:
    scale, bias = graph.constant(state[f"{name}.weight"]), graph.constant(state[f"{name}.bias"])
    return graph.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-12)


def _attention(graph: Graph, x: str, mask: str, state: Arrays, name: str) -> str:
    """Self-attention of one layer, with its output projection."""
    split = graph.constant([0, 0, HEADS, HIDDEN // HEADS], "i8")

    def heads(part: str, order: list[int]) -> str:
        rows = graph.node("Reshape", _linear(graph, x, state, f"{name}.self.{part}"), split)
        return graph.node("Transpose", rows, perm=order)

    query, keys = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1])
    values = heads("value", [0, 2, 1, 3])
    scale = graph.constant((HIDDEN / HEADS) ** -0.5)
    scores = graph.node("Add", graph.node("Mul", graph.node("MatMul", query, keys), scale), mask)
    context = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), values)
    joined = graph.node("Transpose", context, perm=[0, 2, 1, 3])
    merged = graph.node("Reshape", joined, graph.constant([0, 0, HIDDEN], "i8"))
    return _linear(graph, merged, state, f"{name}.output.dense")


def _gelu(graph: Graph, x: str) -> str:
    inner = graph.node("Erf", graph.node("Div", x, graph.constant(2.0**0.5)))
    doubled = graph.node("Mul", x, graph.node("Add", inner, graph.constant(1.0)))
    return graph.node("Mul", doubled, graph.constant(0.5))


def _embedded(graph: Graph, state: Arrays) -> str:
    """Word, position and type-0 embeddings of ``input_ids``, normalised."""
    position = state["embeddings.position_embeddings.weight"]
    position = position + state["embeddings.token_type_embeddings.weight"][0]
    length = graph.node("Shape", "input_ids", start=1, end=2)
    places = graph.node(
        "Slice", graph.constant(position), graph.constant([0], "i8"), length, graph.constant([0], "i8")
    )
    words = graph.node(
        "Gather", graph.constant(state["embeddings.word_embeddings.weight"]), "input_ids", axis=0
    )
    return _layer_norm(graph, graph.node("Add", words, places), state, "embeddings.LayerNorm")


def _pooled(graph: Graph, x: str, present: str) -> str:
    """The mean over the tokens that are there, of length 1."""
    weight = graph.node("Unsqueeze", present, graph.constant([2], "i8"))
    axis = graph.constant([1], "i8")
    total = graph.node("ReduceSum", graph.node("Mul", x, weight), axis, keepdims=0)
    mean = graph.node("Div", total, graph.node("ReduceSum", weight, axis, keepdims=0))
    square = graph.node("ReduceSum", graph.node("Mul", mean, mean), axis, keepdims=1)
    return graph.node("Div", mean, graph.node("Sqrt", square), output="sentence_embedding")


def minilm_l6(state: Arrays) -> onnx.ModelProto:
    """all-MiniLM-L6-v2: ``input_ids`` and ``attention_mask`` to ``sentence_embedding`` of length 1.

    Inputs i64 [batch, seq], seq at most 512; output f32 [batch, 384].
    """
    graph = Graph("all_minilm_l6_v2")
    present = graph.node("Cast", "attention_mask", to=TensorProto.FLOAT)
    absent = graph.node("Mul", graph.node("Sub", graph.constant(1.0), present), graph.constant(-1e4))
    mask = graph.node("Unsqueeze", absent, graph.constant([1, 2], "i8"))
    x = _embedded(graph, state)
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        attended = graph.node("Add", x, _attention(graph, x, mask, state, f"{name}.attention"))
        x = _layer_norm(graph, attended, state, f"{name}.attention.output.LayerNorm")
        wide = _gelu(graph, _linear(graph, x, state, f"{name}.intermediate.dense"))
        narrow = _linear(graph, wide, state, f"{name}.output.dense")
        x = _layer_norm(graph, graph.node("Add", x, narrow), state, f"{name}.output.LayerNorm")
    _pooled(graph, x, present)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"])
        for name in ("input_ids", "attention_mask")
    ]
    embedding = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", HIDDEN])
    return graph.model(inputs, [embedding])


# ------------------------------------------------------------
# Reads weights from .safetensors and old .pt/.pth files without running code that a file contains.


Arrays = dict[str, npt.NDArray[Any]]

_SAFETENSORS = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
_STORAGES = {"FloatStorage": "<f4", "LongStorage": "<i8", "HalfStorage": "<f2", "DoubleStorage": "<f8"}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C


def read_safetensors(content: bytes) -> Arrays:
    """The tensors of a .safetensors file by name. ValueError if it is not one."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("not a safetensors file: its header does not fit into it")
    header = json.loads(content[8 : 8 + length])
    arrays: Arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(content[first:last], _SAFETENSORS[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


class _Storage:
    """A storage that the pickle refers to before its bytes follow."""

    def __init__(self, dtype: str, elements: int) -> None:
        self.dtype, self.elements = np.dtype(dtype), elements
        self.values: npt.NDArray[Any] | None = None


class _Tensor:
    """A view of a storage."""

    def __init__(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> npt.NDArray[Any]:
        values = self.storage.values
        reach = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
        if values is None or not 0 < reach <= len(values):
            raise ValueError(f"tensor of shape {self.shape} reaches outside its storage")
        steps = tuple(s * values.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, steps).copy()


def _rebuild(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Builds tensors, ordered dicts and plain data; any other name in the file is an error."""

    def __init__(self, stream: BytesIO, storages: dict[str, _Storage]) -> None:
        super().__init__(stream)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        }
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in allowed:
            return allowed[module, name]
        raise pickle.UnpicklingError(f"refused: the file asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, elements, view = pid
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError(f"refused: persistent id {pid!r}")
        return self._storages.setdefault(str(key), _Storage(dtype, int(elements)))


def read_torch(content: bytes) -> Arrays:
    """The state dict in a file that ``torch.save`` wrote before version 1.6 (a stream of pickles).

    ValueError if it is another format, ``pickle.UnpicklingError`` if it asks for anything but tensors.
    """
    stream, storages = BytesIO(content), dict[str, _Storage]()
    if not content.startswith(b"\x80") or _Unpickler(stream, storages).load() != _TORCH_MAGIC:
        raise ValueError("not a torch file of the stream format")
    _version, _system = (_Unpickler(stream, storages).load() for _ in range(2))
    state = _Unpickler(stream, storages).load()
    for key in _Unpickler(stream, storages).load():
        storage = storages[str(key)]
        elements = int.from_bytes(stream.read(8), "little")
        raw = stream.read(elements * storage.dtype.itemsize)
        if elements != storage.elements or len(raw) != elements * storage.dtype.itemsize:
            raise ValueError(f"torch file: storage {key} is cut short")
        storage.values = np.frombuffer(raw, storage.dtype)
    return {name: tensor.array() for name, tensor in state.items() if isinstance(tensor, _Tensor)}
