"""Proves from a graph that a model is row-independent, or names the operator that may mix rows.

The original graph is walked once for each number of rows that will be served, with the shapes of the trial:
for each value, the analysis tracks which axis holds the rows. It runs no kernel, and uses no float values
that differ between copies of a model, so that its result holds for all copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper, shape_inference

from clockwork_serve.store.graph_walks import all_graphs, all_nodes, readers_of
from clockwork_serve.store.onnx.row_rules import ELEMENTWISE, MAKERS, RANDOM, RULES, SIZES_AT, joined
from clockwork_serve.store.onnx.row_values import (
    MOST_ELEMENTS,
    Array,
    Mixes,
    Operation,
    RowAxis,
    Shape,
    Value,
    axis_of,
    computed,
)
from clockwork_serve.store.onnx.weights import is_weight
from clockwork_serve.store.trial import Fill, Interface

_MOST_STEPS = 64  # iterations of a loop that are walked; by then it must have reached a fixed point
_OTHER_SIZE = 2  # added to dimensions that requests choose, so that nothing holds only for the trial's size
_MANY_NODES = 5000
"""Larger graphs (walking one takes a second and more) are analysed at fewer numbers of rows."""
_MOST_STEPS_WALKED = 10_000
"""The most operators walked in loops (4 s here): a small file can contain loops without end."""
_WALKS = 10  # more walks of a graph than there are numbers of rows
_ANALYSIS_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError,
    ValueError, onnx.defs.SchemaError, shape_inference.InferenceError,
)  # fmt: skip

_SAME_SHAPE = frozenset(
    {
        "Hardmax", "Imputer", "LRN", "LogSoftmax", "LpNormalization", "MeanVarianceNormalization",
        "Normalizer", "Scaler", "Softmax",
    }
)  # fmt: skip

_FIRST_STRING_ONLY = ("Gather", "Split")
"""Of a block of strings after their axis ONNX Runtime 1.32 copies the first and leaves the others empty."""

Scope = dict[str, Value]


def veto(model: onnx.ModelProto, interface: Interface, fills: Sequence[Fill], sizes: Iterable[int]) -> str:
    """Why this model may not be row-independent, at one of these numbers of rows; empty if it is.

    ``fills`` are the inputs that ran. Dimensions that ``interface`` leaves to requests are analysed at a
    second size too.
    """
    try:
        graph = _Graph(model)
    except _ANALYSIS_ERRORS as error:
        return f"the graph cannot be analysed ({type(error).__name__})"
    counts = sorted({size for size in sizes if size > 1} | {3})
    if graph.nodes > _MANY_NODES:
        counts = [3, counts[-1]]
    for count in counts:
        reason = graph.veto({fill.name: (count, *fill.shape[1:]) for fill in fills}, count)
        if reason:
            return reason
    dims = {tensor.name: tensor.dims or () for tensor in interface.inputs}
    if not any(isinstance(dim, str) for each in dims.values() for dim in each[1:]):
        return ""
    shapes = {
        fill.name: (
            counts[-1],
            *(
                size + _OTHER_SIZE if isinstance(dim, str) else size
                for dim, size in zip(dims[fill.name][1:], fill.shape[1:], strict=True)
            ),
        )
        for fill in fills
    }
    return graph.veto(shapes, counts[-1], misfit_counts=False)


class _Graph:
    """A model, prepared for walking."""

    def __init__(self, model: onnx.ModelProto) -> None:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        self._model = model
        self._versions = {each.domain: each.version for each in model.opset_import}
        self._versions[""] = self._versions.get("", self._versions.get("ai.onnx", 1))
        self._imports = [helper.make_opsetid(domain, version) for domain, version in self._versions.items()]
        self._readers = readers_of(model.graph)
        self._attributes: dict[int, dict[str, Any]] = {}
        # Caches are keyed by id(), which is unique only as long as the messages are kept.
        self._kept = (list(all_graphs(model.graph)), list(all_nodes(model.graph)))
        self._constants = {id(graph): self._initialisers(graph) for graph in self._kept[0]}
        self.nodes = len(self._kept[1])
        self.count = 0
        self._misfit_counts = True
        self._walked = 0

    def veto(self, shapes: Mapping[str, Shape], count: int, *, misfit_counts: bool = True) -> str:
        """Why ``count`` rows may interact. ``misfit_counts``: whether shapes that do not fit are a reason."""
        self.count = count
        scope: Scope = {}
        for value in self._model.graph.input:
            if value.name in shapes:
                dtype = value.type.tensor_type.elem_type
                scope[value.name] = Value(dtype, shapes[value.name], RowAxis(0))
        self._misfit_counts = misfit_counts
        try:
            outputs = self._walk(self._model.graph, scope)
        except _SizesDoNotFit:
            return ""
        except _TooManySteps:
            return f"its loops take more than {_MOST_STEPS_WALKED} steps"
        for declared, found in zip(self._model.graph.output, outputs, strict=True):
            if found.mixed:
                return found.mixed
            if found.rows is None or found.rows.axis or not found.rows.plain:
                return f"output '{declared.name}' does not have the rows on axis 0"
        return ""

    def _initialisers(self, graph: onnx.GraphProto) -> Scope:
        found = {tensor.name: self._constant(tensor, tensor.name) for tensor in graph.initializer}
        for sparse in graph.sparse_initializer:
            found[sparse.values.name] = Value(sparse.values.data_type, tuple(sparse.dims))
        return found

    def _constant(self, tensor: onnx.TensorProto, name: str) -> Value:
        """A constant; with its elements if they are few and are not weights that differ between copies."""
        shape = tuple(tensor.dims)
        size = math.prod(shape)
        floats = tensor.data_type == onnx.TensorProto.FLOAT
        weight = floats and is_weight(size, len(shape), self._readers.get(name, ()))
        if weight or size > MOST_ELEMENTS or tensor.data_type == onnx.TensorProto.STRING:
            return Value(tensor.data_type, shape)
        try:
            return Value(tensor.data_type, shape, known=np.asarray(numpy_helper.to_array(tensor)))
        except (ValueError, TypeError):
            return Value(tensor.data_type, shape)

    # Walking

    def _walk(
        self, graph: onnx.GraphProto, outer: Mapping[str, Value], given: Sequence[Value] = ()
    ) -> list[Value]:
        """The outputs of a graph with the inputs ``given``, in the scope ``outer``."""
        scope = dict(outer) | self._constants[id(graph)]
        scope.update(zip((value.name for value in graph.input), given, strict=False))
        for node in graph.node:
            for name, value in zip(node.output, self._outputs(node, scope), strict=False):
                if name:
                    scope[name] = value
        return [scope[output.name] for output in graph.output]

    def _outputs(self, node: onnx.NodeProto, scope: Scope) -> list[Value]:
        self._walked += 1
        if self._walked > _MOST_STEPS_WALKED + _WALKS * self.nodes:
            raise _TooManySteps
        try:
            inputs = [scope[name] if name else None for name in node.input]
        except KeyError as error:
            return self._mixed(node, f"reads {error}, which no node produces")
        domain = "" if node.domain in ("ai.onnx", "ai.onnx.ml") else node.domain
        op = node.op_type
        try:
            if not domain and op in _SPECIAL:
                return _SPECIAL[op](self, node, inputs, scope)
            mixed = next((value.mixed for value in inputs if value is not None and value.mixed), "")
            if mixed:
                return [Value(0, None, mixed=mixed)] * len(node.output)
            return self._plain(node, domain, inputs)
        except Mixes as error:
            return self._mixed(node, str(error))
        except _ANALYSIS_ERRORS as error:
            return self._mixed(node, f"cannot be analysed ({type(error).__name__})")

    def _mixed(self, node: onnx.NodeProto, why: str) -> list[Value]:
        name = f" '{node.name}'" if node.name else f" (output '{next(iter(node.output), '')}')"
        return [Value(0, None, mixed=f"{node.op_type}{name} {why}")] * len(node.output)

    def _plain(self, node: onnx.NodeProto, domain: str, inputs: list[Value | None]) -> list[Value]:
        """An operator without subgraphs."""
        op = node.op_type
        if op in RANDOM:
            raise Mixes("is random")
        if any(value is not None and value.items is not None for value in inputs):
            raise Mixes("works on a sequence")
        rule = RULES.get((domain, op))
        if rule is None and domain:
            raise Mixes(f"is an operator of {domain} that is not known to keep rows apart")
        attributes = self.attributes(node)
        if op in _FIRST_STRING_ONLY:
            _check_strings(attributes.get("axis", 0), inputs[0])
        version = self._versions.get(node.domain, 1) if domain else self._versions[""]
        types = self._types(node, domain, version, inputs)
        has_rows = any(value is not None and value.rows is not None for value in inputs)
        if not has_rows and op not in MAKERS:
            return self._fixed(node, version, inputs, types)
        if rule is None:
            raise Mixes("is an operator that is not known to keep rows apart")
        for number, value in enumerate(inputs if has_rows else ()):
            settings = SIZES_AT.get(op, frozenset())
            if value is not None and value.rows is None and value.is_sized and number not in settings:
                raise Mixes("computes with the number of rows")
        call = Operation(op, version, attributes, inputs, [shape for _, shape in types], self.count)
        found = rule(call)
        if not has_rows and not any(found):
            return self._fixed(node, version, inputs, types)
        values = [
            Value(dtype, self._checked(shape, rows), rows)
            for (dtype, shape), rows in zip(types, found, strict=True)
        ]
        for number, why in call.drop:
            values[number] = self._mixed(node, why)[0]
        return values

    def _checked(self, shape: Shape | None, rows: RowAxis | None) -> Shape | None:
        """The shape, if it can hold the rows."""
        if shape is not None and rows is not None:
            fits = rows.axis < len(shape) and shape[rows.axis] == rows.outer * self.count * rows.inner
            if not fits:
                raise Mixes("has an output with a different number of rows")
        return shape

    def _fixed(
        self, node: onnx.NodeProto, version: int, inputs: Sequence[Value | None],
        types: Sequence[tuple[int, Shape | None]],
    ) -> list[Value]:  # fmt: skip
        """Outputs that do not depend on any request."""
        sized = any(value is not None and value.is_sized for value in inputs)
        found = computed(node, version, inputs, [shape for _, shape in types])
        if found is None:
            return [Value(dtype, shape, sized=sized) for dtype, shape in types]
        return [
            Value(dtype, array.shape, known=array.astype(_numpy_type(dtype, array)), sized=flags)
            for (dtype, _), array, flags in zip(types, *found, strict=True)
        ]

    def attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Attributes by name, tensors as arrays."""
        found = self._attributes.get(id(node))
        if found is None:
            found = {}
            for attribute in node.attribute:
                value = helper.get_attribute_value(attribute)
                if isinstance(value, onnx.TensorProto):
                    value = numpy_helper.to_array(value)
                found[attribute.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
            self._attributes[id(node)] = found
        return found

    def _types(
        self, node: onnx.NodeProto, domain: str, version: int, inputs: Sequence[Value | None]
    ) -> list[tuple[int, Shape | None]]:
        """Element types and shapes of the outputs."""
        if domain:
            return _foreign_types(node, inputs, self.attributes(node))
        place = node.domain if node.domain == "ai.onnx.ml" else ""
        schema = onnx.defs.get_schema(node.op_type, self._versions.get(place, 1) if place else version, place)
        types, data = {}, {}
        for name, value in zip(node.input, inputs, strict=True):
            if value is not None:
                types[name] = helper.make_tensor_type_proto(value.dtype, value.shape)
                if value.known is not None:
                    data[name] = numpy_helper.from_array(np.asarray(value.known, order="C"), name)
        try:
            found = shape_inference.infer_node_outputs(schema, node, types, data, None, self._imports)
        except shape_inference.InferenceError as error:
            if not self._misfit_counts:
                raise _SizesDoNotFit from error
            raise Mixes("has shapes that do not fit") from error
        return _completed(node, inputs, [_type_of(found.get(name)) for name in node.output])

    # Operators with rules of their own

    def constant(self, node: onnx.NodeProto, _: list[Value | None], __: Scope) -> list[Value]:
        attribute = node.attribute[0]
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.SparseTensorProto):
            return [Value(value.values.data_type, tuple(value.dims))]
        if not isinstance(value, onnx.TensorProto):
            kind = {"value_float": np.float32, "value_floats": np.float32}.get(attribute.name, np.int64)
            if attribute.name.startswith("value_string"):
                return [Value(onnx.TensorProto.STRING, () if attribute.name[-1] != "s" else (len(value),))]
            value = numpy_helper.from_array(np.asarray(value, kind))
        return [self._constant(value, node.output[0])]

    def shape(self, node: onnx.NodeProto, inputs: list[Value | None], _: Scope) -> list[Value]:
        value = inputs[0]
        assert value is not None
        if value.shape is None:
            raise Mixes(value.mixed or "has a shape that depends on values")
        known, sized = np.array(value.shape, np.int64), self._sized_axes(value)
        if node.op_type == "Size":
            known, sized = np.array(known.prod()), np.array(sized.any())
        else:
            attributes = self.attributes(node)
            part = slice(attributes.get("start", 0), attributes.get("end", None))
            known, sized = known[part], sized[part]
        return [Value(onnx.TensorProto.INT64, known.shape, known=known, sized=sized)]

    def _sized_axes(self, value: Value) -> Array:
        """Which sizes depend on the number of rows."""
        assert value.shape is not None
        axes = np.full(len(value.shape), value.is_sized or bool(value.mixed))
        if value.rows is not None:
            axes[value.rows.axis] = True
        return axes

    def branch(self, node: onnx.NodeProto, inputs: list[Value | None], scope: Scope) -> list[Value]:
        condition = inputs[0]
        assert condition is not None
        if condition.mixed:
            return [Value(0, None, mixed=condition.mixed)] * len(node.output)
        if condition.rows is not None:
            raise Mixes("selects its branch by values of requests")
        if condition.is_sized:
            raise Mixes("selects its branch by the number of rows")
        graphs = {attribute.name: attribute.g for attribute in node.attribute}
        yes, no = graphs["then_branch"], graphs["else_branch"]
        if condition.known is not None:
            return self._walk(yes if condition.known.reshape(-1)[0] else no, scope)
        return [_merged(a, b) for a, b in zip(self._walk(yes, scope), self._walk(no, scope), strict=True)]

    def loop(self, node: onnx.NodeProto, inputs: list[Value | None], scope: Scope) -> list[Value]:
        count, going = inputs[0], inputs[1] if len(inputs) > 1 else None
        body = self._body(node)
        for each in (count, going):
            self._check_constant(each, "has a trip count that depends on")
        if count is None or count.known is None:
            raise Mixes("has a trip count or a condition that is not constant")
        times = int(count.known.reshape(-1)[0])
        carried = [value for value in inputs[2:] if value is not None]
        scanned: list[list[Value]] = [[] for _ in range(len(body.output) - 1 - len(carried))]
        true = Value(onnx.TensorProto.BOOL, (), known=np.array(True))  # noqa: FBT003 - numpy's own
        going = going or true
        step = 0
        converged = False
        while step < times and not converged:
            if going.known is None:
                raise Mixes("has a trip count or a condition that is not constant")
            if not going.known.reshape(-1)[0]:
                times = step
                break
            counter = Value(onnx.TensorProto.INT64, (), known=np.array(step))
            walked_long = step >= _MOST_STEPS
            before = [each.unknown() for each in carried] if walked_long else carried
            outputs = self._walk(body, scope, [counter.unknown() if walked_long else counter, going, *before])
            going, carried = outputs[0], outputs[1 : 1 + len(carried)]
            self._check_constant(going, "has a condition that depends on")
            for values, value in zip(scanned, outputs[1 + len(carried) :], strict=True):
                values.append(value)
            converged = walked_long and [each.unknown() for each in carried] == before
            if walked_long and not converged:
                raise Mixes(f"reaches no fixed point within {_MOST_STEPS} iterations")
            step += 1
        return [*carried, *(_stacked(values, times, 0) for values in scanned)]

    def scan(self, node: onnx.NodeProto, inputs: list[Value | None], scope: Scope) -> list[Value]:
        if self._versions[""] < 9:
            raise Mixes("is of an old version")
        attributes = {
            each.name: helper.get_attribute_value(each) for each in node.attribute if each.name != "body"
        }
        body = self._body(node)
        number = attributes["num_scan_inputs"]
        values = [value for value in inputs if value is not None]
        carried, given = values[: len(values) - number], values[len(values) - number :]
        axes = attributes.get("scan_input_axes", [0] * number)
        parts, times = [], 0
        for value, place in zip(given, axes, strict=True):
            if value.mixed:
                return [Value(0, None, mixed=value.mixed)] * len(node.output)
            axis = axis_of(place, len(value.sizes))
            if value.rows is not None and value.rows.axis == axis:
                raise Mixes("runs along the rows")
            if value.is_sized:
                raise Mixes("computes with the number of rows")
            times = value.sizes[axis]
            shape = (*value.sizes[:axis], *value.sizes[axis + 1 :])
            rows = value.rows and value.rows.at(value.rows.axis - (value.rows.axis > axis))
            parts.append(Value(value.dtype, shape, rows))
        outputs: list[Value] = []
        for _ in range(_MOST_STEPS):
            before = [each.unknown() for each in carried]
            outputs = self._walk(body, scope, [*before, *parts])
            carried = [each.unknown() for each in outputs[: len(carried)]]
            if carried == before:
                break
        else:
            raise Mixes(f"reaches no fixed point within {_MOST_STEPS} iterations")
        places = attributes.get("scan_output_axes", [0] * (len(outputs) - len(carried)))
        scanned = [
            _stacked([value.unknown()], times, axis_of(place, len(value.shape or ()) + 1))
            for value, place in zip(outputs[len(carried) :], places, strict=True)
        ]
        return [*carried, *scanned]

    def sequence(self, node: onnx.NodeProto, inputs: list[Value | None], _: Scope) -> list[Value]:
        """Sequences of tensors that the graph itself builds and takes apart."""
        values = [value for value in inputs if value is not None]
        mixed = next(
            (each.mixed for value in values for each in (value, *(value.items or ())) if each.mixed), ""
        )
        if mixed:
            return [Value(0, None, mixed=mixed)] * len(node.output)
        attributes = self.attributes(node)
        if node.op_type == "SequenceConstruct":
            return [Value(0, None, items=tuple(values))]
        if node.op_type == "SplitToSequence":
            return [Value(0, None, items=_pieces(values[0], values[1:], attributes))]
        items = values[0].items
        if not items:
            raise Mixes("works on a sequence that is not known")
        if node.op_type == "SequenceAt":
            place = values[1]
            if place.known is None or place.is_sized:
                raise Mixes("selects a part by values that are not constant")
            return [items[int(place.known.reshape(-1)[0])]]
        return [_concatenated(items, attributes)]

    def _body(self, node: onnx.NodeProto) -> onnx.GraphProto:
        return next(attribute.g for attribute in node.attribute if attribute.name == "body")

    def _check_constant(self, value: Value | None, what: str) -> None:
        if value is not None and value.mixed:
            raise Mixes(f"{what} mixed rows: {value.mixed}")
        if value is not None and value.rows is not None:
            raise Mixes(f"{what} values of requests")
        if value is not None and value.is_sized:
            raise Mixes(f"{what} the number of rows")


class _SizesDoNotFit(Exception):
    """The graph does not accept these sizes, which proves nothing."""


class _TooManySteps(Exception):
    """Nested loops with more steps than are walked."""


def _merged(a: Value, b: Value) -> Value:
    """What is known whichever of two branches runs."""
    if a.mixed or b.mixed:
        return a if a.mixed else b
    if a.items is not None or b.items is not None:
        return a.with_mixed("If has branches that return sequences")
    if a.rows != b.rows:
        return a.with_mixed("If has branches with the rows on different axes")
    shape = a.shape if a.shape == b.shape else None
    return Value(a.dtype, shape, a.rows, sized=a.is_sized or b.is_sized)


def _pieces(value: Value, given: Sequence[Value], attributes: Mapping[str, Any]) -> tuple[Value, ...]:
    """The parts of a tensor that is split along an axis other than the rows."""
    axis = axis_of(attributes.get("axis", 0), len(value.sizes))
    if value.is_sized or (value.rows is not None and value.rows.axis == axis):
        raise Mixes("splits the rows")
    size, drop = value.sizes[axis], not given and not attributes.get("keepdims", 1)
    parts = [1] * size
    if given:
        if given[0].known is None or given[0].is_sized:
            raise Mixes("splits by values that are not constant")
        sizes = given[0].known
        step = int(sizes.reshape(-1)[0])
        parts = sizes.tolist() if sizes.ndim else [min(step, size - start) for start in range(0, size, step)]
    rows = value.rows and value.rows.at(value.rows.axis - (drop and value.rows.axis > axis))
    before, behind = value.sizes[:axis], value.sizes[axis + 1 :]
    return tuple(Value(value.dtype, (*before, *(() if drop else (part,)), *behind), rows) for part in parts)


def _concatenated(items: Sequence[Value], attributes: Mapping[str, Any]) -> Value:
    """Tensors concatenated along an axis, which may be a new one."""
    fresh = bool(attributes.get("new_axis", 0))
    shapes = [item.sizes for item in items]
    axis = axis_of(attributes["axis"], len(shapes[0]) + fresh)
    size = len(items) if fresh else sum(shape[axis] for shape in shapes)
    shape = (*shapes[0][:axis], size, *shapes[0][axis + (not fresh) :])
    if all(item.rows is None for item in items):
        return Value(items[0].dtype, shape, sized=any(item.is_sized for item in items))
    rows = joined(list(items), -1 if fresh else axis)
    assert rows is not None
    return Value(items[0].dtype, shape, rows.at(rows.axis + (fresh and rows.axis >= axis)))


def _stacked(values: Sequence[Value], times: int, axis: int) -> Value:
    """One value for each iteration of a loop, stacked along a new axis."""
    if not values:
        return Value(0, None, mixed="a loop without iterations")
    first = values[0]
    if first.mixed:
        return first
    found = next((value for value in values if value.mixed), None)
    if found is not None:
        return found
    if any(value.items is not None for value in values):
        return first.with_mixed("a loop that returns sequences")
    if any(value.rows != first.rows for value in values):
        return first.with_mixed("a loop with the rows on different axes")
    sized = any(value.is_sized for value in values)
    rows = first.rows and first.rows.at(first.rows.axis + (first.rows.axis >= axis))
    even = all(value.shape == first.shape for value in values)
    shape = (*first.shape[:axis], times, *first.shape[axis:]) if even and first.shape is not None else None
    return Value(first.dtype, shape, rows, sized=sized)


def _completed(
    node: onnx.NodeProto, inputs: Sequence[Value | None], types: list[tuple[int, Shape | None]]
) -> list[tuple[int, Shape | None]]:
    """Shapes that onnx does not infer, of operators that it expands into functions, or not at all."""
    shapes = [value.shape for value in inputs if value is not None]
    if len(types) != 1 or types[0][1] is not None or None in shapes:
        return types
    dtype = types[0][0] or next(value.dtype for value in inputs if value is not None)
    known = [shape for shape in shapes if shape is not None]
    if node.op_type in ELEMENTWISE:
        return [(dtype, np.broadcast_shapes(*known))]
    if node.op_type in _SAME_SHAPE:
        return [(dtype, known[0])]
    if node.op_type in ("LinearRegressor", "TreeEnsembleRegressor"):
        named = {attribute.name: attribute.i for attribute in node.attribute}
        return [(dtype, (known[0][0], named.get("n_targets", named.get("targets", 1))))]
    return types


def _numpy_type(dtype: int, array: Array) -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(dtype) if dtype else array.dtype


def _type_of(found: onnx.TypeProto | None) -> tuple[int, Shape | None]:
    if found is None or not found.HasField("tensor_type"):
        return 0, None
    tensor = found.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim)


def _foreign_types(
    node: onnx.NodeProto, inputs: Sequence[Value | None], attributes: Mapping[str, Any]
) -> list[tuple[int, Shape | None]]:
    """Element types and shapes of the com.microsoft operators that have rules."""
    values = [value for value in inputs if value is not None]
    first, op = values[0], node.op_type
    shape: Shape
    if op == "FusedConv":
        return [(first.dtype, None)]
    if op in ("FusedMatMul", "FusedGemm", "MatMulIntegerToFloat"):
        a, b = list(first.sizes), list(values[1].sizes)
        if len(a) < 2 or len(b) < 2:
            raise Mixes("multiplies vectors")
        a = [*a[:-2], a[-1], a[-2]] if attributes.get("transA") else a
        b = [*b[:-2], b[-1], b[-2]] if attributes.get("transB") else b
        shape = (*np.broadcast_shapes(tuple(a[:-2]), tuple(b[:-2])), a[-2], b[-1])
        return [(onnx.TensorProto.FLOAT, shape)]
    if op in ("QLinearAdd", "QLinearMul"):
        return [(first.dtype, np.broadcast_shapes(first.sizes, values[3].sizes))]
    if op == "QLinearConcat":
        parts = [value.sizes for value in values[2::3]]
        axis = axis_of(attributes["axis"], len(parts[0]))
        size = sum(part[axis] for part in parts)
        return [(values[2].dtype, (*parts[0][:axis], size, *parts[0][axis + 1 :]))]
    if op == "QuantizeLinear":
        return [(values[2].dtype if len(values) > 2 else onnx.TensorProto.UINT8, first.sizes)]
    dtype = values[1].dtype if op == "DequantizeLinear" else first.dtype
    return [(dtype, first.sizes)] * len(node.output)


_Special = Callable[[_Graph, onnx.NodeProto, list[Value | None], Scope], list[Value]]
_SPECIAL: dict[str, _Special] = {
    "Constant": _Graph.constant, "If": _Graph.branch, "Loop": _Graph.loop, "Scan": _Graph.scan,
    "ConcatFromSequence": _Graph.sequence, "SequenceAt": _Graph.sequence,
    "SequenceConstruct": _Graph.sequence, "SplitToSequence": _Graph.sequence,
    "Shape": _Graph.shape, "Size": _Graph.shape,
}  # fmt: skip


def _check_strings(axis: int, value: Value | None) -> None:
    """A kernel that copies only the first string of each block: blocks must not contain the rows."""
    if value is None or value.dtype != onnx.TensorProto.STRING or value.rows is None or value.shape is None:
        return
    if value.rows.axis > axis % max(len(value.shape), 1):
        raise Mixes("copies only the first of several strings after its axis, where the rows are")
