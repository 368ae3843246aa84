"""Rewrites MatMul and Gemm with constant weights as 1x1 convolutions, which do not pack their weights.

ONNX Runtime packs a constant right-hand side of MatMul or Gemm once, when it opens a session. Weights that
are an input are packed again in every run, which makes products of few rows up to twice as slow. The
runtime's blocked convolution reads weights in a fixed layout and packs nothing: a product of M rows is an
image of M pixels with K channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from clockwork_serve.store.graph_walks import inner_reads
from clockwork_serve.units import align

NCHWC = "com.microsoft.nchwc"
CHANNELS = 4
"""The runtime reorders into blocks of channels only if the number of channels is a multiple of this."""
LEAST_ELEMENTS = 1 << 15
"""Smaller weights are packed faster (8 us) than the additional nodes around a convolution run."""
LEAST_SIDE = 96  # narrower matrices are multiplied faster than their rows are reordered
ACTIVATIONS = frozenset({"Relu", "Sigmoid", "Tanh"})
"""Activations without parameters that a convolution applies itself."""

TO_RANK_2 = frozenset({"Flatten", "FusedGemm", "Gemm"})
PRODUCTS = {("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedGemm"), ("com.microsoft", "FusedMatMul")}
Matrix = npt.NDArray[np.float32]


@dataclass(slots=True)
class Product:
    """A product that can be rewritten: ``activation(alpha * rows @ matrix (+ bias))``."""

    node: onnx.NodeProto
    weights: onnx.TensorProto
    transposed: bool
    alpha: float
    bias: str
    activation: str

    @property
    def shape(self) -> tuple[int, int]:
        """[K, N]."""
        first, second = self.weights.dims
        return (second, first) if self.transposed else (first, second)


def matmuls_to_convolutions(model: onnx.ModelProto, block: int) -> int:
    """Rewrite every product that qualifies, in place; return their number.

    ``model`` is already optimised. ``block`` is the channels in a block of the runtime's layout on this CPU
    (16 with AVX-512, 8 with AVX2). A product qualifies if its right-hand side is a float32 initialiser of
    rank 2 that nothing else reads, and its left-hand side is not transposed and of suitable length.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers = _readers(graph.node, graph)
    rewriter = Rewriter(graph, block)
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        product = _product(node, weights, readers, block)
        if product is None:
            nodes.append(node)
        else:
            nodes += rewriter.convolution(product)
            count += 1
        rewriter.note(node)
    if count:
        del graph.node[:]
        graph.node.extend(_joined(nodes, graph, rewriter.made))
        if all(entry.domain != NCHWC for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(NCHWC, 1))
    return count


def _product(
    node: onnx.NodeProto, weights: dict[str, onnx.TensorProto], readers: Counter[str], block: int
) -> Product | None:
    """The node as a product, if it qualifies."""
    if (node.domain, node.op_type) not in PRODUCTS:
        return None
    tensor = weights.get(node.input[1])
    if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 2:
        return None
    if min(tensor.dims) < LEAST_SIDE or tensor.dims[0] * tensor.dims[1] < LEAST_ELEMENTS:
        return None
    if readers[tensor.name] != 1:
        return None
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    turned = any(attributes.get(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if turned or attributes.get("beta", 1) != 1:
        return None
    bias = node.input[2] if len(node.input) > 2 else ""
    activation = attributes.get("activation", b"").decode()
    if activation and activation not in ACTIVATIONS:
        return None
    product = Product(
        node, tensor, bool(attributes.get("transB", 0)), attributes.get("alpha", 1.0), bias, activation
    )
    rows, columns = product.shape
    if rows % CHANNELS:
        return None
    whole = not columns % block and bias in weights and list(weights[bias].dims) == [columns]
    return product if not bias or whole else None


class Rewriter:
    """Creates the nodes that replace a product; products with the same left-hand side share its image."""

    def __init__(self, graph: onnx.GraphProto, block: int) -> None:
        self.made: set[str] = set()
        self._graph = graph
        self._block = block
        self._picture_by_source: dict[tuple[str, float], tuple[str, str]] = {}
        self._of_rank_2 = {value.name for value in graph.input if len(value.type.tensor_type.shape.dim) == 2}

    def note(self, node: onnx.NodeProto) -> None:
        """Record which values have rank 2; called for all nodes in order."""
        same = node.op_type in ACTIVATIONS or (node.domain, node.op_type) in PRODUCTS
        if node.op_type in TO_RANK_2 or (same and node.input[0] in self._of_rank_2):
            self._of_rank_2.update(node.output)

    def convolution(self, product: Product) -> list[onnx.NodeProto]:
        """The replacing nodes; the weights are converted to the blocked layout."""
        node, out, columns = product.node, product.node.output[0], product.shape[1]
        nodes: list[onnx.NodeProto] = []
        key = (node.input[0], product.alpha)
        if key not in self._picture_by_source:
            self._picture_by_source[key] = self._picture(product, nodes)
        picture, leading = self._picture_by_source[key]
        inputs = [picture, product.weights.name, *([product.bias] if product.bias else [])]
        nodes += [
            helper.make_node(
                "Conv", inputs, [f"{out}/blocked"],
                domain=NCHWC, kernel_shape=[1, 1], activation=product.activation or None,
            ),
            helper.make_node(
                "ReorderOutput", [f"{out}/blocked"], [f"{out}/flat"],
                domain=NCHWC, channels=columns, channels_last=1,
            ),
        ]  # fmt: skip
        shape = f"{out}/shape"
        if leading:
            parts = [leading, self._constant(f"{out}/columns", np.array([columns]))]
            nodes.append(helper.make_node("Concat", parts, [shape], axis=0))
        else:
            self._constant(shape, np.array([-1, columns]))
        nodes.append(helper.make_node("Reshape", [f"{out}/flat", shape], [out]))
        self.made |= {name for node in nodes for name in node.output}
        matrix = numpy_helper.to_array(product.weights)
        blocked = _blocked(matrix.T if product.transposed else matrix, self._block)
        product.weights.CopyFrom(numpy_helper.from_array(blocked, product.weights.name))
        return nodes

    def _picture(self, product: Product, nodes: list[onnx.NodeProto]) -> tuple[str, str]:
        """The names of the rows as an image, and of their leading dimensions ("" if there is only one)."""
        source, out, rows = product.node.input[0], product.node.output[0], product.shape[0]
        flat, picture, leading = f"{out}/rows", f"{out}/picture", f"{out}/leading"
        scaled = source
        if product.alpha != 1:
            scaled = f"{out}/scaled"
            factor = self._constant(f"{out}/alpha", np.float32(product.alpha))
            nodes.append(helper.make_node("Mul", [source, factor], [scaled]))
        as_picture = self._constant(f"{out}/as_picture", np.array([1, 1, -1, rows]))
        nodes += [
            helper.make_node("Reshape", [scaled, as_picture], [flat]),
            helper.make_node("ReorderInput", [flat], [picture], domain=NCHWC, channels_last=1),
        ]
        if product.node.op_type in TO_RANK_2 or source in self._of_rank_2:
            return picture, ""
        ends = [self._constant(f"{out}/first", np.array([0])), self._constant(f"{out}/last", np.array([-1]))]
        nodes += [
            helper.make_node("Shape", [source], [f"{out}/shape_of_rows"]),
            helper.make_node("Slice", [f"{out}/shape_of_rows", *ends], [leading]),
        ]
        return picture, leading

    def _constant(self, name: str, value: npt.NDArray[np.int64] | np.float32) -> str:
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _joined(nodes: list[onnx.NodeProto], graph: onnx.GraphProto, made: set[str]) -> list[onnx.NodeProto]:
    """Remove the nodes that convert an image to rows only for the next product to convert it back.

    An activation between the two becomes the convolution's own. ``made`` are the rewriter's values.
    """
    maker = {name: node for node in nodes for name in node.output}
    readers = _readers(nodes, graph)
    gone: set[int] = set()
    for reorder in nodes:
        if reorder.op_type != "ReorderInput" or reorder.output[0] not in made:
            continue
        path = [reorder, maker[reorder.input[0]]]
        before = maker.get(path[-1].input[0])
        activation = before if before is not None and before.op_type in ACTIVATIONS else None
        if activation is not None:
            path.append(activation)
        for wanted in ("Reshape", "ReorderOutput", "Conv"):
            before = maker.get(path[-1].input[0])
            if before is None or before.op_type != wanted or before.output[0] not in made:
                break
            path.append(before)
        else:
            convolution = path.pop()
            own = {attribute.name for attribute in convolution.attribute}
            if activation is not None and "activation" in own:
                continue
            if any(readers[node.input[0]] != 1 for node in path):
                continue
            if activation is not None:
                convolution.attribute.append(helper.make_attribute("activation", activation.op_type))
            convolution.output[:] = reorder.output
            gone |= {id(node) for node in path}
    return [node for node in nodes if id(node) not in gone]


def _readers(nodes: Sequence[onnx.NodeProto], graph: onnx.GraphProto) -> Counter[str]:
    """How often each value is read, including by subgraphs and as a graph output."""
    readers = Counter(name for node in nodes for name in node.input)
    readers.update(name for node in nodes for name in inner_reads(node))
    readers.update(value.name for value in graph.output)
    return readers


def _blocked(matrix: Matrix, block: int) -> Matrix:
    """[K, N] in the runtime's layout OIHWBiBo, zero-padded to whole blocks; its shape is [N, K, 1, 1]."""
    rows, columns = (align(size, block) for size in matrix.shape)
    whole = np.zeros((rows, columns), np.float32)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    parts = whole.reshape(rows // block, block, columns // block, block).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(parts).reshape(columns, rows, 1, 1)
