"""Walks over the graphs of a model, and limits on their size with functions expanded.

A small file can describe an endless graph: functions that call functions, or themselves. Larger ones are
refused before any work on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import onnx

from clockwork_serve.store.settings import problem

NODES_MAX: Final = 100_000  # the largest language models have about 50,000
NAMES_MAX: Final = 1_000_000  # inputs of nodes and other names in a graph
AXES_MAX: Final = 64

_Key = tuple[str, str, str]


def checked_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor of a model. Raises ``ProblemError`` for a model of more than the limits allow.

    Nodes are counted with functions written out, and no function may call itself. How deep graphs lie inside
    graphs is limited by protobuf, which reads 100 messages inside of each other.
    """
    _check_names(model)
    _check_calls(model)
    tensors = list(every_tensor(model))
    if any(len(tensor.dims) > AXES_MAX for tensor in tensors):
        raise _too_much(f"tensors of at most {AXES_MAX} axes")
    return tensors


def _too_much(expected: str) -> Exception:
    return problem("model.onnx graph", expected=expected, found="more", advice="split the model")


def _check_names(model: onnx.ModelProto) -> None:
    """Count by the lengths of lists, before anything walks over their elements."""
    nodes = sum(len(function.node) for function in model.functions)
    names = 0
    for graph in all_graphs(model.graph):
        nodes += len(graph.node)
        if nodes > NODES_MAX:
            raise _too_much(f"at most {NODES_MAX} nodes")
        names += len(graph.initializer) + len(graph.input) + len(graph.output) + len(graph.value_info)
        names += sum(len(node.input) + len(node.output) for node in graph.node)
        if names > NAMES_MAX:
            raise _too_much(f"at most {NAMES_MAX} names of values")


def _check_calls(model: onnx.ModelProto) -> None:
    functions = {
        (each.domain, each.name, getattr(each, "overload", "")): list(all_nodes(each))
        for each in model.functions
    }
    if not functions:
        return
    sizes: dict[_Key, int] = {}
    count = 0
    for node in all_nodes(model.graph):
        count += 1
        if _called(node) in functions:
            count += _written_out(_called(node), functions, sizes)
        if count > NODES_MAX:
            raise _too_much(f"at most {NODES_MAX} nodes, functions written out")


def _called(node: onnx.NodeProto) -> _Key:
    return (node.domain, node.op_type, getattr(node, "overload", ""))


def _written_out(first: _Key, functions: dict[_Key, list[onnx.NodeProto]], sizes: dict[_Key, int]) -> int:
    """Nodes of a function with all calls expanded; at most a little too many."""
    opened: dict[_Key, None] = {}  # the chain of calls down to the current one, in order
    stack = [first]
    while stack:
        key = stack[-1]
        if key in sizes:
            stack.pop()
            continue
        called = [each for each in map(_called, functions[key]) if each in functions]
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


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes: branches and loop bodies."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and every graph inside it, outermost first."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of inner graphs last."""
    yield from graph.node
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def inner_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every name that the graphs in a node read, including their own values."""
    for inner in subgraphs(node):
        for each in all_graphs(inner):
            for reader in each.node:
                yield from reader.input
            yield from (output.name for output in each.output)


def readers_of(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """The types of the operators that read each value, in a graph and all inside it."""
    readers: dict[str, list[str]] = {}
    for node in all_nodes(graph):
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    return readers


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
