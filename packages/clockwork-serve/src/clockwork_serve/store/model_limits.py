"""Limits on the size of a graph with functions expanded; larger ones are refused before any work on them.

A small file can describe an endless graph: functions that call functions, or themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import onnx

from clockwork_serve.store.settings import problem

NODES_MAX: Final = 100_000
"""The largest language models have about 50,000."""
NAMES_MAX: Final = 1_000_000
"""Inputs of nodes and other names in a graph."""
NESTING_MAX: Final = 32
AXES_MAX: Final = 64

_Key = tuple[str, str, str]


def check_size(model: onnx.ModelProto) -> None:
    """Raise ``ProblemError`` for more than ``NODES_MAX`` nodes, and for functions that call themselves."""
    functions = {_key(function): list(_nodes(function.node)) for function in model.functions}
    sizes: dict[_Key, int] = {}
    count = 0
    for node in _nodes(model.graph.node):
        count += 1
        called = (node.domain, node.op_type, getattr(node, "overload", ""))
        if called in functions:
            count += _written_out(called, functions, sizes)
        if count > NODES_MAX:
            raise problem(
                "model.onnx graph", expected=f"at most {NODES_MAX} nodes, functions written out",
                found="more", advice="split the model",
            )  # fmt: skip


def _written_out(first: _Key, functions: dict[_Key, list[onnx.NodeProto]], sizes: dict[_Key, int]) -> int:
    """Nodes of a function with all calls expanded; at most a little too many."""
    opened: dict[_Key, None] = {}  # the chain of calls down to the current one, in order
    stack = [first]
    while stack:
        key = stack[-1]
        if key in sizes:
            stack.pop()
            continue
        called = [
            (node.domain, node.op_type, getattr(node, "overload", ""))
            for node in functions[key]
        ]  # fmt: skip
        called = [each for each in called if each in functions]
        unknown = dict.fromkeys(each for each in called if each not in sizes)
        if not unknown:
            sizes[key] = min(len(functions[key]) + sum(sizes[each] for each in called), NODES_MAX + 1)
            opened.pop(key, None)
            continue
        opened[key] = None
        again = next((each for each in unknown if each in opened), None)
        if again is not None:
            raise problem(
                "model.onnx functions", expected="functions that do not call themselves",
                found=f"'{again[0]}.{again[1]}', which does", advice="export the model again",
            )  # fmt: skip
        stack.append(next(iter(unknown)))
    return sizes[first]


def _key(function: onnx.FunctionProto) -> _Key:
    return (function.domain, function.name, getattr(function, "overload", ""))


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, including those of the graphs in their attributes."""
    stack = [iter(nodes)]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            continue
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                stack.append(iter(attribute.g.node))
            stack.extend(iter(graph.node) for graph in attribute.graphs)


def every_tensor(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor in a message, wherever it may be: in bodies of functions and sparse tensors too."""
    stack = [message]
    while stack:
        each = stack.pop()
        if isinstance(each, onnx.TensorProto):
            yield each
            continue
        for field, value in each.ListFields():
            if field.message_type is not None:
                stack.extend([value] if hasattr(value, "ListFields") else value)
