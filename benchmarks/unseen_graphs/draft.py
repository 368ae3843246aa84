"""A graph in the making, a node at a time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
DOMAIN = "unseen"


class Draft:
    """Nodes, weights and functions of one graph, or of a branch of it."""

    def __init__(self, dice: random.Random, opset: int, names: Iterator[int] | None = None) -> None:
        self.dice, self.opset = dice, opset
        self.names = itertools.count() if names is None else names
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []

    def name(self) -> str:
        """One that nothing has yet."""
        return f"t{next(self.names)}"

    def ops(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Add a node; the names of its outputs."""
        made = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, **attributes))
        return made

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output."""
        return self.ops(kind, *inputs, **attributes)[0]

    def constant(self, array: Array) -> str:
        """A constant: an initialiser, or a node."""
        if self.dice.random() < 0.5:
            made = self.name()
            self.weights.append(numpy_helper.from_array(array, made))
            return made
        return self.op("Constant", value=numpy_helper.from_array(array))

    def ints(self, *values: int) -> str:
        """A list of integers."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        """A float32 without axes."""
        return self.constant(np.array(value, np.float32))

    def whole(self, value: int) -> str:
        """An int64 without axes."""
        return self.constant(np.array(value, np.int64))

    def random(self, *shape: int, scale: float = 1.0) -> str:
        """Weights drawn at random."""
        rng = np.random.default_rng(self.dice.getrandbits(32))
        return self.constant((rng.standard_normal(shape) * scale).astype(np.float32))

    def fresh(self) -> Draft:
        """A branch or body of this graph."""
        return Draft(self.dice, self.opset, self.names)

    def body(
        self, make: Callable[[Draft], Sequence[tuple[str, int]]], inputs: Sequence[tuple[str, int, int]] = ()
    ) -> onnx.GraphProto:
        """A subgraph; inputs are names with types and numbers of axes, outputs names with types."""
        inner = self.fresh()
        outputs = [(inner.op("Identity", name), kind) for name, kind in make(inner)]
        self.functions += inner.functions
        taken = [
            helper.make_tensor_value_info(name, kind, [f"{name}_{axis}" for axis in range(axes)])
            for name, kind, axes in inputs
        ]
        given = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
        return helper.make_graph(inner.nodes, self.name(), taken, given, inner.weights)

    def branch(self, condition: str, then: Callable[[Draft], str], other: Callable[[Draft], str]) -> str:
        """An If of floats."""
        first = self.body(lambda d: [(then(d), TensorProto.FLOAT)])
        second = self.body(lambda d: [(other(d), TensorProto.FLOAT)])
        return self.op("If", condition, then_branch=first, else_branch=second)

    def call(self, make: Callable[[Draft, str], str], value: str, name: str) -> str:
        """A local function of one input, and a call of it."""
        inner = self.fresh()
        inner.dice = random.Random(self.dice.getrandbits(32))
        given = inner.name()
        made = make(inner, given)
        stored = [helper.make_node("Constant", [], [weight.name], value=weight) for weight in inner.weights]
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, 1)]
        self.functions += inner.functions
        self.functions.append(
            helper.make_function(DOMAIN, name, [given], [made], [*stored, *inner.nodes], opsets)
        )
        return self.op(name, value, domain=DOMAIN)

    # Operators whose form depends on the opset

    def reduce(self, kind: str, value: str, axes: Sequence[int], *, keepdims: int = 1) -> str:
        """A Reduce* over some axes."""
        if self.opset >= (13 if kind == "ReduceSum" else 18):
            return self.op(kind, value, self.ints(*axes), keepdims=keepdims)
        return self.op(kind, value, axes=list(axes), keepdims=keepdims)

    def squeeze(self, value: str, *axes: int, kind: str = "Squeeze") -> str:
        """Squeeze, or Unsqueeze."""
        if self.opset >= 13:
            return self.op(kind, value, self.ints(*axes))
        return self.op(kind, value, axes=list(axes))

    def unsqueeze(self, value: str, *axes: int) -> str:
        """Add axes."""
        return self.squeeze(value, *axes, kind="Unsqueeze")

    def cast(self, value: str, kind: int = TensorProto.FLOAT) -> str:
        """To another type."""
        return self.op("Cast", value, to=kind)

    def size(self, value: str, axis: int) -> str:
        """A dimension, as a list of one integer."""
        return self.op("Gather", self.op("Shape", value), self.ints(axis), axis=0)

    def shape(self, *parts: str) -> str:
        """Dimensions, joined."""
        return self.op("Concat", *parts, axis=0)

    def slice(self, value: str, start: int, end: int, axis: int = 0, step: int = 1) -> str:
        """Part of a tensor."""
        return self.op("Slice", value, *(self.ints(number) for number in (start, end, axis, step)))

    def top(self, value: str, k: str, axis: int, *, largest: int = 1) -> list[str]:
        """TopK: values and indices."""
        return self.ops("TopK", value, k, outputs=2, axis=axis, largest=largest)

    def model(
        self, inputs: Mapping[str, tuple[int, Sequence[str | int]]], outputs: Mapping[str, int]
    ) -> onnx.ModelProto:
        """The finished model; the outputs' shapes stay open."""
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
            self.weights,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, 1)]
        used = opsets if self.functions else opsets[:1]
        return helper.make_model(graph, opset_imports=used, ir_version=9, functions=self.functions)
