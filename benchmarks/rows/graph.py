"""Pieces that graphs made by chance are built of: values whose rows are followed, and the scope they grow in.

A value knows which of its axes is the batch, whether its rows were mixed by construction, and whether it is
exact: only chosen, moved or cast from inputs, so that no rounding decides where a later operator branches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

ROWS = -1
"""Stands in a shape where the batch is."""
FLOATS = ("f4", "f2", "f8")
INTEGERS = ("i8", "i4")
TEXT = "O"
LOCAL = "local"
"""The domain of local functions."""
ONNX_TYPES: dict[str, int] = {
    "f4": T.FLOAT, "f2": T.FLOAT16, "f8": T.DOUBLE, "i8": T.INT64, "i4": T.INT32, "i1": T.INT8,
    "u1": T.UINT8, "?": T.BOOL, TEXT: T.STRING,
}  # fmt: skip

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of a graph."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    mixed: bool = False
    exact: bool = True

    @property
    def axis(self) -> int | None:
        """Where the batch is; None if the value has no rows."""
        return self.shape.index(ROWS) if ROWS in self.shape else None

    @property
    def rank(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    @property
    def others(self) -> list[int]:
        """The axes that are not the batch."""
        return [axis for axis, size in enumerate(self.shape) if size != ROWS]

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype in FLOATS

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return int(np.prod([size for size in self.shape if size != ROWS], dtype=np.int64))

    def sized(self, axis: int, *sizes: int) -> tuple[int, ...]:
        """The shape with these sizes instead of that axis."""
        return (*self.shape[:axis], *sizes, *self.shape[axis + 1 :])


Source = Value | str


def name_of(source: Source) -> str:
    """The name by which a node takes it."""
    return source if isinstance(source, str) else source.name


@dataclass(slots=True)
class Scope:
    """A graph, a branch, a loop's body or a function while it grows.

    ``lows`` are the least values of integer inputs that take no others.
    ``constants_as_nodes``: as functions need it. Subgraphs share the dice, the count of names, functions and
    domains.
    """

    random: random.Random
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)
    count: list[int] = field(default_factory=lambda: [0])
    lows: dict[str, int] = field(default_factory=dict)
    constants_as_nodes: bool = False
    depth: int = 0

    def inner(self, *, function: bool = False) -> Scope:
        """A scope inside this one."""
        inner = replace(self, nodes=[], initializers=[], depth=self.depth + 1)
        inner.values = [] if function else list(self.values)
        inner.constants_as_nodes = function or self.constants_as_nodes
        return inner

    def fresh(self) -> str:
        """A name that nothing has."""
        self.count[0] += 1
        return f"v{self.count[0]}"

    def chance(self, share: float) -> bool:
        """True that often."""
        return self.random.random() < share

    def constant(self, value: Any, dtype: str = "i8") -> str:
        """A constant: an initialiser, or a node."""
        array = np.asarray(value, dtype=None if dtype == TEXT else dtype)
        name = self.fresh()
        if dtype == TEXT:
            array = np.asarray(value, object)
            text = [str(each).encode() for each in array.ravel()]
            tensor = helper.make_tensor(name, T.STRING, list(array.shape), np.asarray(text, object))
        else:
            tensor = numpy_helper.from_array(array, name)
        if self.constants_as_nodes or self.random.random() < 0.3:
            if dtype == "i8" and array.ndim < 2 and self.opset >= 12 and self.random.random() < 0.4:
                form = {"value_ints": array.tolist()} if array.ndim else {"value_int": int(array)}
                self.nodes.append(helper.make_node("Constant", [], [name], **form))
                return name
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def weights(self, dtype: str, *shape: int, scale: float = 0.5) -> str:
        """Random numbers of a seed of their own."""
        dice = np.random.default_rng(self.random.getrandbits(32))
        return self.constant(dice.standard_normal(shape) * scale, dtype)

    def op(self, kind: str, *inputs: Source, domain: str = "", **attributes: Any) -> str:
        """A node with one output."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: Source, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """A node with several outputs."""
        names = [self.fresh() for _ in range(outputs)]
        self.node(kind, [name_of(each) for each in inputs], names, domain=domain, **attributes)
        return names

    def node(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        """A node whose outputs are named."""
        if domain:
            self.domains.add(domain)
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), domain=domain, **attributes))

    # What changed its form between opsets

    def squeeze(self, source: Source, *axes: int) -> str:
        """Without axes of size one."""
        return self._with_axes("Squeeze", source, axes, since=13)

    def unsqueeze(self, source: Source, *axes: int) -> str:
        """With new axes of size one."""
        return self._with_axes("Unsqueeze", source, axes, since=13)

    def reduced(self, kind: str, source: Source, axes: Sequence[int], *, keepdims: int) -> str:
        """A reduction; no axes: over all."""
        since = 13 if kind == "ReduceSum" else 18
        if not axes:
            return self.op(kind, source, keepdims=keepdims)
        return self._with_axes(kind, source, axes, since=since, keepdims=keepdims)

    def _with_axes(self, kind: str, source: Source, axes: Sequence[int], *, since: int, **more: Any) -> str:
        if self.opset >= since:
            return self.op(kind, source, self.constant(list(axes)), **more)
        return self.op(kind, source, axes=list(axes), **more)

    def slice(self, source: Source, start: int, end: int, axis: int, step: int = 1) -> str:
        """A part of one axis."""
        bounds = [self.constant([bound]) for bound in (start, end, axis, step)]
        return self.op("Slice", source, *bounds)

    def rows(self, source: Value, *, scalar: bool = False) -> str:
        """How many rows there are, asked of the shape: one integer in an axis of its own, or a scalar."""
        assert source.axis is not None
        shape = self.op("Shape", source)
        if scalar:
            return self.op("Gather", shape, self.constant(source.axis), axis=0)
        way = self.random.randrange(4 if self.opset >= 15 else 3)
        if way == 0:
            return self.slice(shape, source.axis, source.axis + 1, 0)
        if way == 1:
            return self.unsqueeze(self.op("Gather", shape, self.constant(source.axis), axis=0), 0)
        if way == 2:
            return self.op("Gather", shape, self.constant([source.axis]), axis=0)
        return self.op("Shape", source, start=source.axis, end=source.axis + 1)

    def shape_with_rows(self, source: Value, shape: Sequence[int]) -> str:
        """A shape computed from that of ``source``: its rows where ``ROWS`` stands."""
        parts = [self.rows(source) if size == ROWS else self.constant([size]) for size in shape]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def cast(self, source: Value, dtype: str) -> Value:
        """In another element type."""
        if source.dtype == dtype:
            return source
        exact = source.exact and (dtype in FLOATS or not source.is_float)
        return replace(source, name=self.op("Cast", source, to=ONNX_TYPES[dtype]), dtype=dtype, exact=exact)

    def to_front(self, source: Value) -> Value:
        """With the batch as axis 0."""
        axis = source.axis
        if not axis:
            return source
        return self.transposed(source, [axis, *[each for each in range(source.rank) if each != axis]])

    def transposed(self, source: Value, order: Sequence[int]) -> Value:
        """Axes in another order."""
        shape = tuple(source.shape[each] for each in order)
        return replace(source, name=self.op("Transpose", source, perm=list(order)), shape=shape)

    def info(self, value: Value) -> onnx.ValueInfoProto:
        """Its declaration, rank known, the batch named."""
        dims = ["N" if size == ROWS else size for size in value.shape]
        return helper.make_tensor_value_info(value.name, ONNX_TYPES[value.dtype], dims)

    def graph(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.GraphProto:
        """What has grown so far, as a graph."""
        return helper.make_graph(self.nodes, name, list(inputs), list(outputs), self.initializers)

    def turn(self, start: Value) -> tuple[str, str, Value]:
        """What this scope is given as a loop's body: the turn's number, whether it goes on, a value."""
        number, going, carried = (self.fresh() for _ in range(3))
        return number, going, replace(start, name=carried)

    def body(self, given: tuple[str, str, Value], still: str, after: Value) -> onnx.GraphProto:
        """A loop's body: what its turn is ``given``, whether it goes on after it, and with which value."""
        number, going, held = given
        inputs = [self.info(Value(number, "i8", ())), self.info(Value(going, "?", ())), self.info(held)]
        return self.graph("body", inputs, [self.info(Value(still, "?", ())), self.info(after)])

    def opsets(self, *domains: str) -> list[onnx.OperatorSetIdProto]:
        """What its nodes need, and these domains."""
        all_domains = (*domains, *sorted(self.domains - {*domains}))
        versions = {each: 3 if each == "ai.onnx.ml" else 1 for each in all_domains}
        return [helper.make_opsetid(*each) for each in (("", self.opset), *versions.items())]
