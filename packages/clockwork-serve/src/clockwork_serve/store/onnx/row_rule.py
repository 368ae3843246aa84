"""The rule by which a graph is plainly row-independent, from the graph alone.

Every value that depends on a request has the rows as axis 0 and nowhere else, by the shapes that onnx
infers; every operator on the way is on the list of ``row_operators``; and nothing is computed with the
number of rows, which may only be moved into the first size of a Reshape. There is no If, Loop or Scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper, shape_inference

from clockwork_serve.store.graph_walks import inner_reads, readers_of, subgraphs
from clockwork_serve.store.onnx.row_operators import (
    NO_END,
    OPEN,
    ROWS,
    RULES,
    Elements,
    Mixes,
    Operation,
    Shape,
    Value,
    shown,
)
from clockwork_serve.store.onnx.weights import is_weight
from clockwork_serve.store.trial import Interface

_MOST_KNOWN = 64
"""Elements of the largest constant that is read: settings are small, and tables are not settings."""
_OF_SETTINGS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL, onnx.TensorProto.FLOAT)
_OLDEST = 7
"""The first opset that broadcasts as numpy does, and whose normalisations do not train by default."""
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def objection(model: onnx.ModelProto, interface: Interface) -> str:
    """Why the graph is not plainly row-independent; empty if it is."""
    try:
        return _Graph(model).objection(interface)
    except Exception as error:  # noqa: BLE001 - onnx raises anything, and what it cannot follow is not plain
        return f"the graph cannot be read as it is ({type(error).__name__})"


class _Graph:
    """A graph and what is known of its values so far."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = onnx.inliner.inline_local_functions(model) if model.functions else model
        self._imports = list(self._model.opset_import)
        self._versions = {_domain(each.domain): each.version for each in self._imports}
        self._readers = readers_of(self._model.graph)
        self._values: dict[str, Value] = {}

    def objection(self, interface: Interface) -> str:
        graph = self._model.graph
        if self._model.functions or len(self._versions) < len(self._imports):
            return "it has functions of another opset than its own"
        if self._versions.get("", _OLDEST) < _OLDEST:
            return f"its opset is {self._versions['']}, and rows are followed from {_OLDEST} on"
        for tensor in graph.initializer:
            self._values[tensor.name] = self._constant(tensor, tensor.name)
        for sparse in graph.sparse_initializer:
            values = sparse.values
            self._values[values.name] = Value("fixed", values.data_type, tuple(sparse.dims))
        types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
        for given in interface.inputs:
            if not given.dims or isinstance(given.dims[0], int):
                return f"axis 0 of input '{given.name}' is not free"
            rest = (dim if isinstance(dim, int) else OPEN for dim in given.dims[1:])
            self._values[given.name] = Value("rows", types[given.name], (ROWS, *rest))
        for node in _needed(graph):
            try:
                self._enter(node)
            except Mixes as error:
                return f"{node.op_type} '{node.name or node.output[0]}' {error}"
            except Exception as error:  # noqa: BLE001 - as above
                name = node.name or next(iter(node.output), "")
                return f"{node.op_type} '{name}' cannot be followed ({type(error).__name__})"
        for output in graph.output:
            if self._values[output.name].source != "rows":
                return f"output '{output.name}' does not depend on the request"
        return ""

    def _constant(self, tensor: onnx.TensorProto, name: str) -> Value:
        """A constant; with its elements if they are few, and the same in all copies of the model."""
        shape = tuple(tensor.dims)
        count = math.prod(shape)
        floats = tensor.data_type == onnx.TensorProto.FLOAT
        weight = floats and is_weight(count, len(shape), self._readers.get(name, ()))
        if weight or count > _MOST_KNOWN or tensor.data_type not in _OF_SETTINGS:
            return Value("fixed", tensor.data_type, shape)
        elements = numpy_helper.to_array(tensor).astype(object)
        return Value("fixed", tensor.data_type, shape, elements)

    def _enter(self, node: onnx.NodeProto) -> None:
        """One operator: what its outputs are."""
        domain, op = _domain(node.domain), node.op_type
        if domain not in ("", "ai.onnx.ml"):
            raise Mixes(f"is an operator of {domain}, which is not on the list")
        if any(True for _ in subgraphs(node)):
            raise Mixes("has a graph inside, which is not looked into")
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if op == "Constant":
            self._values[node.output[0]] = self._literal(node.output[0], attributes)
            return
        inputs = [self._values[name] if name else None for name in node.input]
        if op in _RANDOM or (op == "Dropout" and _trains(inputs)):
            raise Mixes("is random")
        sources = {value.source for value in inputs if value is not None}
        found = self._inferred(node, domain, inputs)
        if "rows" in sources and op != "Shape":
            if "count" in sources and op != "Reshape":
                raise Mixes("computes with the number of rows")
            if op not in RULES:
                raise Mixes("is not on the list of operators that keep rows apart")
            call = Operation(op, self._versions[domain], attributes, inputs, sum(map(bool, node.output)))
            better = [*RULES[op](call), *[None] * len(found)]
            for name, (dtype, shape), own in zip(node.output, found, better, strict=False):
                self._values[name] = Value("rows", dtype, _checked(own or shape))
            return
        known = _moved(op, attributes, inputs)
        if known is None and "count" in sources:
            raise Mixes("computes with the number of rows")
        for name, (dtype, shape) in zip(node.output, found, strict=True):
            elements = _unknown(shape) if known is None else known
            counts = elements is not None and ROWS in elements.ravel().tolist()
            self._values[name] = Value("count" if counts else "fixed", dtype, shape, elements)

    def _literal(self, name: str, attributes: Mapping[str, Any]) -> Value:
        ((kind, found),) = attributes.items()
        if kind in ("value_int", "value_ints", "value_float", "value_floats"):
            dtype = np.int64 if "int" in kind else np.float32
            found = numpy_helper.from_array(np.asarray(found, dtype))
        if isinstance(found, onnx.TensorProto):
            return self._constant(found, name)
        return Value("fixed", onnx.TensorProto.STRING, None)

    def _inferred(
        self, node: onnx.NodeProto, domain: str, inputs: Sequence[Value | None]
    ) -> list[tuple[int, Shape | None]]:
        """Element types and shapes of the outputs, as onnx infers them from those of the inputs."""
        types, data = {}, {}
        for name, value in zip(node.input, inputs, strict=True):
            if value is None:
                continue
            sizes = None if value.shape is None else [None if size == OPEN else size for size in value.shape]
            types[name] = helper.make_tensor_type_proto(value.dtype, sizes)
            if value.known is not None and not any(isinstance(each, str) for each in value.known.flat):
                elements = value.known.astype(helper.tensor_dtype_to_np_dtype(value.dtype))
                data[name] = numpy_helper.from_array(elements, name)
        schema = onnx.defs.get_schema(node.op_type, self._versions[domain], domain)
        found = shape_inference.infer_node_outputs(schema, node, types, data, None, self._imports)
        return [_type_of(found.get(name)) for name in node.output]


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _needed(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The operators that outputs follow from, in order."""
    names = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if not names.isdisjoint(node.output):
            names.update(node.input, inner_reads(node))
            nodes.append(node)
    return nodes[::-1]


def _type_of(found: onnx.TypeProto | None) -> tuple[int, Shape | None]:
    if found is None or not found.HasField("tensor_type"):
        return 0, None
    tensor = found.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    sizes = (ROWS if dim.dim_param == ROWS else OPEN for dim in tensor.shape.dim)
    return tensor.elem_type, tuple(
        dim.dim_value if dim.HasField("dim_value") else size
        for dim, size in zip(tensor.shape.dim, sizes, strict=True)
    )


def _checked(shape: Shape | None) -> Shape:
    """The shape of a result that a rule allows, which has the rows as axis 0 and nowhere else."""
    if not shape:
        raise Mixes("has a result of unknown rank")
    if shape[0] not in (ROWS, OPEN) or ROWS in shape[1:]:
        raise Mixes(f"has a result of shape {shown(shape)}")
    return (ROWS, *shape[1:])


def _trains(inputs: Sequence[Value | None]) -> bool:
    """Whether a Dropout may be in training mode."""
    mode = inputs[2] if len(inputs) > 2 else None
    return mode is not None and (mode.known is None or mode.known.tolist() is not False)


def _unknown(shape: Shape | None) -> Elements | None:
    """Elements of which only the number is known."""
    if shape is None or OPEN in shape or ROWS in shape or math.prod(shape) > _MOST_KNOWN:
        return None
    return np.full(shape, OPEN, object)


def _moved(op: str, attributes: Mapping[str, Any], inputs: Sequence[Value | None]) -> Elements | None:
    """The elements of a result, if the operator does nothing but move known ones."""
    given = [value for value in inputs if value is not None]
    if op == "Shape":
        shape = given[0].shape
        whole = None if shape is None else np.array(shape, object)
        return None if whole is None else whole[attributes.get("start", 0) : attributes.get("end")]
    elements = [value.known for value in given if value.known is not None]
    if op not in _MOVES or len(elements) < len(inputs):
        return None
    if op != "Concat" and any(isinstance(each, str) for setting in elements[1:] for each in setting.flat):
        return None
    return _MOVES[op](attributes, elements)


def _cast(attributes: Mapping[str, Any], given: Sequence[Elements]) -> Elements | None:
    numbers = [each for each in given[0].flat if not isinstance(each, str)]
    same = all(isinstance(each, int) and abs(each) < NO_END for each in numbers)
    return given[0] if same and attributes["to"] in (onnx.TensorProto.INT32, onnx.TensorProto.INT64) else None


def _taken(attributes: Mapping[str, Any], given: Sequence[Elements]) -> Elements:
    axis = attributes.get("axis", 0)
    return np.asarray(np.take(given[0], given[1].astype(np.int64), axis), object)


def _sliced(attributes: Mapping[str, Any], given: Sequence[Elements]) -> Elements:
    array, *settings = given
    if "starts" in attributes:
        starts, ends, axes, steps = attributes["starts"], attributes["ends"], attributes.get("axes"), None
    else:
        starts, ends, axes, steps = [*(each.tolist() for each in settings), None, None][:4]
    places = [slice(None)] * array.ndim
    for number, axis in enumerate(axes or range(len(starts))):
        places[axis] = slice(starts[number], ends[number], steps[number] if steps else 1)
    return array[tuple(places)]


def _axes(attributes: Mapping[str, Any], given: Sequence[Elements]) -> tuple[int, ...] | None:
    found = attributes.get("axes", given[1].tolist() if len(given) > 1 else None)
    return None if found is None else tuple(found)


_MOVES: dict[str, Callable[[Mapping[str, Any], Sequence[Elements]], Elements | None]] = {
    "Cast": _cast,
    "Concat": lambda attributes, given: np.concatenate(given, attributes["axis"]),
    "Gather": _taken,
    "Identity": lambda _, given: given[0],
    "Slice": _sliced,
    "Squeeze": lambda attributes, given: np.squeeze(given[0], _axes(attributes, given)),
    "Unsqueeze": lambda attributes, given: np.expand_dims(given[0], _axes(attributes, given) or ()),
}
