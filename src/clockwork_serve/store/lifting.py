"""Turns the weights of an optimised graph into graph inputs and one aligned blob; never changes a value.

What is a weight is said in ``liftable``; all others stay in the code.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from msgspec import Struct

from clockwork_serve.store.canonical import all_graphs, all_nodes, make_canonical, reads, subgraphs
from clockwork_serve.store.liftable import FLOAT_BYTES, is_weight
from clockwork_serve.units import align

RECURRENT_OPS = frozenset({"LSTM", "GRU", "RNN", "Scan", "Loop", "DynamicQuantizeLSTM", "AttnLSTM"})
"""Operators that feed their own results back, so that rounding differences grow."""


class IndexedTensor(Struct, frozen=True, kw_only=True):
    """Where one lifted tensor is in the blob: ``nbytes`` from ``offset``. ``dtype`` is numpy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class Index(Struct, frozen=True, kw_only=True):
    """The file ``index.json`` of a code: how a blob is laid out, in the order of the graph's inputs."""

    tensors: tuple[IndexedTensor, ...]
    blob_bytes: int

    def views(self, blob: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """The tensors of a blob as arrays that share its memory."""
        return {
            tensor.name: blob[tensor.offset : tensor.offset + tensor.nbytes]
            .view(np.dtype(tensor.dtype))
            .reshape(tensor.shape)
            for tensor in self.tensors
        }


class Lifted(Struct, frozen=True):
    """A weightless graph, its index, and one model's blob. ``baked_bytes`` of weights stayed in the graph."""

    graph: bytes
    index: Index
    blob: npt.NDArray[np.uint8]
    baked_bytes: int
    operators: frozenset[str]

    @property
    def digest(self) -> str:
        """A hash of graph and index: equal for models that can share a code."""
        return hashlib.sha256(self.graph + msgspec.json.encode(self.index)).hexdigest()


def lift(model: onnx.ModelProto, *, branches: bool = True) -> Lifted:
    """Lift the weights out of an optimised model, which is taken apart on the way.

    ``branches`` tells whether those that If, Loop and Scan bodies hold or read are lifted too.
    """
    graph = model.graph
    if branches:
        _hoist(graph)
    make_canonical(model)
    readers: dict[str, list[str]] = {}
    for node in all_nodes(graph):
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    fixed = {output.name for output in graph.output}
    if not branches:
        fixed |= {name for node in graph.node for inner in subgraphs(node) for name in reads(inner)}
    chosen: list[onnx.TensorProto] = []
    kept: list[onnx.TensorProto] = []
    for tensor in graph.initializer:
        good = _is_weight(tensor, readers) and tensor.name not in fixed
        (chosen if good else kept).append(tensor)
    first_use = {name: order for order, name in enumerate(readers)}
    chosen.sort(key=lambda tensor: first_use[tensor.name])
    index, blob = _packed(chosen)
    kept_copies = [_copy(tensor) for tensor in sorted(kept, key=lambda tensor: tensor.name)]
    del graph.initializer[:]
    graph.initializer.extend(kept_copies)
    for entry in index.tensors:
        graph.input.append(
            onnx.helper.make_tensor_value_info(entry.name, onnx.TensorProto.FLOAT, list(entry.shape))
        )
    return Lifted(
        graph=model.SerializeToString(deterministic=True),
        index=index,
        blob=blob,
        baked_bytes=sum(tensor.ByteSize() for each in all_graphs(graph) for tensor in each.initializer),
        operators=frozenset(node.op_type for node in all_nodes(graph)),
    )


def _is_weight(tensor: onnx.TensorProto, readers: dict[str, list[str]]) -> bool:
    if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name not in readers:
        return False
    return is_weight(math.prod(tensor.dims), len(tensor.dims), readers[tensor.name])


def _hoist(graph: onnx.GraphProto) -> None:
    """Move the weights of branches and loop bodies out to the graph, whose values they may read.

    Only those whose name nothing else has, so that it means the same outside.
    """
    inner = [each for each in all_graphs(graph) if each is not graph]
    made = Counter(name for each in all_graphs(graph) for name in _makes(each))
    readers: dict[str, list[str]] = {}
    for node in all_nodes(graph):
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    for each in inner:
        moved = [
            tensor for tensor in each.initializer if made[tensor.name] == 1 and _is_weight(tensor, readers)
        ]
        for tensor in moved:
            graph.initializer.append(tensor)
            each.initializer.remove(tensor)


def _makes(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (name for node in graph.node for name in node.output if name)


def _packed(tensors: list[onnx.TensorProto]) -> tuple[Index, npt.NDArray[np.uint8]]:
    entries = []
    offset = 0
    for tensor in tensors:
        nbytes = math.prod(tensor.dims) * FLOAT_BYTES
        entries.append(
            IndexedTensor(
                name=tensor.name, shape=tuple(tensor.dims), dtype="float32", offset=offset, nbytes=nbytes
            )
        )
        offset += align(nbytes)
    blob = np.zeros(offset, np.uint8)
    for entry, tensor in zip(entries, tensors, strict=True):
        blob[entry.offset : entry.offset + entry.nbytes] = _element_bytes(tensor)
    return Index(tensors=tuple(entries), blob_bytes=offset), blob


def _element_bytes(tensor: onnx.TensorProto) -> npt.NDArray[np.uint8]:
    if tensor.HasField("raw_data"):
        return np.frombuffer(tensor.raw_data, np.uint8)
    return np.asarray(tensor.float_data, "<f4").view(np.uint8)


def _copy(tensor: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.doc_string = ""
    if not copy.HasField("raw_data") and copy.data_type != onnx.TensorProto.STRING:
        # The same values can be written in two ways; equal graphs must be equal bytes.
        copy.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    return copy
