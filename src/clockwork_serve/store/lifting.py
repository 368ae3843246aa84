"""Turns the weights of an optimised graph into graph inputs and one aligned blob; never changes a value.

What is a weight is said in ``liftable``; those that a subgraph (If, Loop, Scan) reads stay in the code too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from msgspec import Struct

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


def lift(model: onnx.ModelProto) -> Lifted:
    """Lift the weights out of an optimised model, which is taken apart on the way."""
    graph = model.graph
    _canonical(model)
    used_inside = {name for node in graph.node for inner in _subgraphs(node) for name in _reads(inner)}
    kept_whole = used_inside | {output.name for output in graph.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    first_use = {name: order for order, name in enumerate(readers)}
    lifted: list[onnx.TensorProto] = []
    kept: list[onnx.TensorProto] = []
    for tensor in graph.initializer:
        good = (
            tensor.data_type == onnx.TensorProto.FLOAT
            and tensor.name not in kept_whole
            and tensor.name in readers
            and is_weight(math.prod(tensor.dims), len(tensor.dims), readers[tensor.name])
        )
        (lifted if good else kept).append(tensor)
    lifted.sort(key=lambda tensor: first_use[tensor.name])
    kept.sort(key=lambda tensor: tensor.name)
    index, blob = _packed(lifted)
    kept_copies = [_copy(tensor) for tensor in kept]
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
        baked_bytes=sum(tensor.ByteSize() for tensor in kept_copies) + _baked_inside(graph),
        operators=frozenset(node.op_type for node in _all_nodes(graph)),
    )


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
    return copy


def _canonical(model: onnx.ModelProto) -> None:
    """Take out what does not compute, and rename what has no meaning outside, so that equal graphs are equal."""
    for field in ("producer_name", "producer_version", "domain", "doc_string", "model_version"):
        model.ClearField(field)
    del model.metadata_props[:]
    outside = {value.name for value in (*model.graph.input, *model.graph.output)}
    prefix = "v"
    while any(name.startswith(prefix) for name in outside):
        prefix = "_" + prefix
    names = {name: name for name in outside} | {"": ""}
    for graph in _all_graphs(model.graph):
        graph.name = "graph"
        graph.doc_string = ""
        del graph.value_info[:]
        del graph.metadata_props[:]
        for value in (*graph.input, *graph.output):
            value.doc_string = ""
    for order, node in enumerate(_all_nodes(model.graph)):
        node.name = f"{node.op_type}_{order}"
        node.doc_string = ""
        del node.metadata_props[:]
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        copies = [onnx.AttributeProto.FromString(attribute.SerializeToString()) for attribute in attributes]
        del node.attribute[:]
        node.attribute.extend(copies)
        node.input[:] = [names.setdefault(name, f"{prefix}{len(names)}") for name in node.input]
        node.output[:] = [names.setdefault(name, f"{prefix}{len(names)}") for name in node.output]
    for graph in _all_graphs(model.graph):
        for tensor in graph.initializer:
            tensor.name = names.setdefault(tensor.name, f"{prefix}{len(names)}")
        for value in (*graph.input, *graph.output):
            value.name = names.setdefault(value.name, f"{prefix}{len(names)}")
        for sparse in graph.sparse_initializer:
            sparse.values.name = names.setdefault(sparse.values.name, f"{prefix}{len(names)}")


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in _subgraphs(node):
            yield from _all_graphs(inner)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for each in _all_graphs(graph):
        yield from each.node


def _reads(graph: onnx.GraphProto) -> Iterator[str]:
    for each in _all_graphs(graph):
        for node in each.node:
            yield from node.input
        yield from (output.name for output in each.output)


def _baked_inside(graph: onnx.GraphProto) -> int:
    """Bytes of weights inside subgraphs."""
    return sum(
        tensor.ByteSize()
        for inner in _all_graphs(graph)
        if inner is not graph
        for tensor in inner.initializer
    )
