"""Finds the weights of a graph and lifts them into one blob; brings graphs into canonical form."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from msgspec import Struct

from clockwork_serve.messages import OnnxIndex, OnnxTensor
from clockwork_serve.store.graph_walks import all_graphs, all_nodes, inner_reads, readers_of, subgraphs
from clockwork_serve.store.onnx.output_shapes import shaped_by_values
from clockwork_serve.units import align

# ------------------------------------------------------------
# Which float tensors of a graph are weights, by size and by the operators that read them, not by values.
#
# Lifted are float32 tensors of at least 16 elements, and smaller ones that only layers read as their weights:
# the bias of a classifier with ten classes is a weight too, and copies could not share a code without lifting
# it. Everything else stays in the code: integers (shapes, axes, quantised weights), other float types, and
# the small constants (Clip bounds, epsilons, factors) whose values optimisations depend on.


MIN_LIFTED_ELEMENTS = 16
FLOAT_BYTES = 4

_LAYERS = frozenset(
    {
        "Attention", "BatchNormalization", "BiasGelu", "Conv", "ConvTranspose", "EmbedLayerNormalization",
        "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "GRU", "Gemm", "GroupNormalization",
        "InstanceNormalization", "LSTM", "LayerNormalization", "MatMul", "PRelu", "RNN",
        "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
    }
)  # fmt: skip
"""Operators all of whose float inputs are data or weights, not settings."""
_ELEMENTWISE = frozenset({"Add", "Div", "Mul", "Sub"})
"""Operators that add a bias or apply a scale; a single number may be a constant of a formula instead."""


def is_weight(elements: int, rank: int, readers: Sequence[str]) -> bool:
    """Whether a float32 tensor is lifted; ``readers`` are the types of the operators that read it."""
    if elements >= MIN_LIFTED_ELEMENTS:
        return True
    if not rank or not elements or not readers:
        return False
    return all(reader in _LAYERS or (reader in _ELEMENTWISE and elements > 1) for reader in readers)


# ------------------------------------------------------------
# A canonical form, so that equal graphs have equal hashes; results are unchanged.
#
# ONNX Runtime saves the nodes of an optimised graph in an order that differs between runs where the graph
# leaves it open, and names depend on how the model was exported.


def make_canonical(model: onnx.ModelProto) -> None:
    """Order nodes, rename internal values, and remove what does not affect results."""
    for field in ("producer_name", "producer_version", "domain", "doc_string", "model_version"):
        model.ClearField(field)
    del model.metadata_props[:]
    _order(model.graph)
    _strip(model.graph)
    _rename_values(model.graph)
    _rename_dims(model.graph)


def _order(graph: onnx.GraphProto) -> None:
    """Order nodes as the outputs need them, one output after the other."""
    for node in graph.node:
        for inner in subgraphs(node):
            _order(inner)
    needs = [[*node.input, *inner_reads(node)] for node in graph.node]
    maker = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
    wanted = [maker[output.name] for output in graph.output if output.name in maker]
    # Nodes that no output needs are kept, in their original order.
    order = _needed_first([*wanted, *range(len(needs))], needs, maker)
    if order != sorted(order):
        nodes = [onnx.NodeProto.FromString(graph.node[number].SerializeToString()) for number in order]
        del graph.node[:]
        graph.node.extend(nodes)


def _needed_first(wanted: list[int], needs: list[list[str]], maker: dict[str, int]) -> list[int]:
    order: list[int] = []
    entered = [False] * len(needs)
    for root in wanted:
        if entered[root]:
            continue
        entered[root] = True
        path = [(root, iter(needs[root]))]
        while path:
            number, names = path[-1]
            step = next((maker[name] for name in names if name in maker and not entered[maker[name]]), None)
            if step is None:
                order.append(number)
                path.pop()
            else:
                entered[step] = True
                path.append((step, iter(needs[step])))
    return order


def _strip(graph: onnx.GraphProto) -> None:
    for each in all_graphs(graph):
        each.name = "graph"
        each.doc_string = ""
        for field in (each.value_info, each.metadata_props, each.quantization_annotation):
            del field[:]
        for value in (*each.input, *each.output):
            value.doc_string = ""
            del value.metadata_props[:]
    for order, node in enumerate(all_nodes(graph)):
        node.name = f"{node.op_type}_{order}"
        node.doc_string = ""
        del node.metadata_props[:]
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        copies = [onnx.AttributeProto.FromString(attribute.SerializeToString()) for attribute in attributes]
        for copy in copies:
            copy.doc_string = ""
        del node.attribute[:]
        node.attribute.extend(copies)


def _rename_values(graph: onnx.GraphProto) -> None:
    """Number values by first use. A name means the same in all graphs, so one table suffices."""
    outside = {value.name for value in (*graph.input, *graph.output)}
    prefix = "v"
    while any(name.startswith(prefix) for name in outside):
        prefix = "_" + prefix
    names = {name: name for name in outside} | {"": ""}

    def new(name: str) -> str:
        return names.setdefault(name, f"{prefix}{len(names)}")

    for node in all_nodes(graph):
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    for each in all_graphs(graph):
        for tensor in each.initializer:
            tensor.name = new(tensor.name)
        for value in (*each.input, *each.output):
            value.name = new(value.name)
        for sparse in each.sparse_initializer:
            sparse.values.name = new(sparse.values.name)


def _rename_dims(graph: onnx.GraphProto) -> None:
    names = {"": ""}
    for each in all_graphs(graph):
        for value in (*each.input, *each.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = names.setdefault(dim.dim_param, f"d{len(names)}")


# ------------------------------------------------------------
# Turns the weights of an optimised graph into graph inputs and one aligned blob; values are unchanged.
#
# ``is_weight`` decides what is a weight; all other constants stay in the code.


RECURRENT_OPS = frozenset({"LSTM", "GRU", "RNN", "Scan", "Loop", "DynamicQuantizeLSTM", "AttnLSTM"})
"""Recurrent operators, in which rounding differences grow."""


def views(index: OnnxIndex, blob: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of a blob as arrays that share its memory."""
    return {
        tensor.name: blob[tensor.offset : tensor.offset + tensor.nbytes]
        .view(np.dtype(tensor.dtype))
        .reshape(tensor.shape)
        for tensor in index.tensors
    }


class Lifted(Struct, frozen=True):
    """A weightless graph, its index, and one model's blob. ``baked_bytes`` of weights stayed in the graph.

    ``shaped_by_values``: outputs whose shapes depend on the values of a request.
    """

    graph: bytes
    index: OnnxIndex
    blob: npt.NDArray[np.uint8]
    baked_bytes: int
    operators: frozenset[str]
    shaped_by_values: frozenset[str]

    @property
    def digest(self) -> str:
        """A hash of graph and index: equal for models that can share a code."""
        return hashlib.sha256(self.graph + msgspec.json.encode(self.index)).hexdigest()


def lift(model: onnx.ModelProto, *, branches: bool = True) -> Lifted:
    """Lift the weights out of an optimised model, which is modified.

    ``branches``: also lift those that If, Loop and Scan bodies hold or read.
    """
    graph = model.graph
    if branches:
        _hoist(graph)
    make_canonical(model)
    readers = readers_of(graph)
    inputs = [value.name for value in graph.input]
    fixed = {*inputs, *(output.name for output in graph.output)}
    if not branches:
        fixed |= {name for node in graph.node for name in inner_reads(node)}
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
        graph=model.SerializeToString(deterministic=True), index=index, blob=blob,
        baked_bytes=sum(tensor.ByteSize() for each in all_graphs(graph) for tensor in each.initializer),
        operators=frozenset(node.op_type for node in all_nodes(graph)),
        shaped_by_values=shaped_by_values(graph, inputs),
    )  # fmt: skip


def _is_weight(tensor: onnx.TensorProto, readers: dict[str, list[str]]) -> bool:
    if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name not in readers:
        return False
    return is_weight(math.prod(tensor.dims), len(tensor.dims), readers[tensor.name])


def _hoist(graph: onnx.GraphProto) -> None:
    """Move the weights of branches and loop bodies to the outer graph, whose values they may read.

    Only those with a unique name, so that it means the same outside.
    """
    inner = [each for each in all_graphs(graph) if each is not graph]
    made = Counter(name for each in all_graphs(graph) for name in _makes(each))
    readers = readers_of(graph)
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


def _packed(tensors: list[onnx.TensorProto]) -> tuple[OnnxIndex, npt.NDArray[np.uint8]]:
    entries = []
    offset = 0
    for tensor in tensors:
        nbytes = math.prod(tensor.dims) * FLOAT_BYTES
        entries.append(
            OnnxTensor(
                name=tensor.name, shape=tuple(tensor.dims), dtype="float32", offset=offset, nbytes=nbytes
            )
        )
        offset += align(nbytes)
    blob = np.zeros(offset, np.uint8)
    for entry, tensor in zip(entries, tensors, strict=True):
        blob[entry.offset : entry.offset + entry.nbytes] = (
            onnx.numpy_helper.to_array(tensor).reshape(-1).view(np.uint8)
        )
    return OnnxIndex(tensors=tuple(entries), blob_bytes=offset), blob


def _copy(tensor: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.doc_string = ""
    if not copy.HasField("raw_data") and copy.data_type != onnx.TensorProto.STRING:
        # The same values have two encodings; equal graphs must have equal bytes.
        copy.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    return copy
