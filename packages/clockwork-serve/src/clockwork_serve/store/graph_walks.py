"""Walks over the graphs of a model, and limits on their size.

A small file can describe an endless graph: functions that call functions, or themselves; and a parsed one may
take many times its file of memory. What exceeds the limits is refused before any work on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import onnx

from clockwork_serve.store.settings import problem

NODES_MAX: Final = 100_000  # the largest language models have about 50,000
NAMES_MAX: Final = 1_000_000  # inputs of nodes and other names in a graph
NESTING_MAX: Final = 32
AXES_MAX: Final = 64

_Key = tuple[str, str, str]


# ------------------------------------------------------------
# Limits on a file before it is parsed: empty nodes take 75 times as much memory as in the file.
#
# Field numbers are those of the public onnx.proto. What is malformed is left to the parser.


_INSIDE: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 11: "graph"},
    "tensor": {},
}
"""The messages inside of each message that are followed, by the numbers of their fields."""
_INPUT, _OUTPUT, _OP_TYPE = 1, 2, 4  # of NodeProto
_DIMS = 1  # of TensorProto
_HOLDERS = frozenset({b"Constant", b"If", b"Loop", b"Scan"})
"""Operators whose attributes are followed; those of trees hold millions of numbers."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES = 10


def check_limits(data: memoryview) -> None:
    """Raise ``ProblemError`` for a serialised model of more than the limits allow."""
    nodes = names = 0
    stack = [("model", 0, len(data), 0)]
    while stack:
        kind, start, end, depth = stack.pop()
        if depth > NESTING_MAX:
            raise _too_much(f"graphs inside of graphs {NESTING_MAX} deep")
        held: list[tuple[str, int, int, int]] = []
        axes, operator = 0, b""
        for number, wire, first, last in _fields(data, start, end):
            inner = _INSIDE[kind].get(number, "") if wire == _BYTES else ""
            if inner:
                held.append((inner, first, last, depth + (inner == "graph")))
            if inner == "node":
                nodes += 1
            elif inner or kind == "graph" or (kind == "node" and number in (_INPUT, _OUTPUT)):
                names += 1
            elif kind == "node" and number == _OP_TYPE:
                operator = bytes(data[first:last])
            elif kind == "tensor" and number == _DIMS:
                packed = data[first : min(last, first + _VARINT_BYTES * (AXES_MAX + 1))]
                axes += sum(byte < 0x80 for byte in packed)
            if nodes > NODES_MAX:
                raise _too_much(f"at most {NODES_MAX} nodes")
            if names > NAMES_MAX:
                raise _too_much(f"at most {NAMES_MAX} names of values")
            if axes > AXES_MAX:
                raise _too_much(f"tensors of at most {AXES_MAX} axes")
        if kind != "node" or operator in _HOLDERS:
            stack.extend(held)


def _too_much(expected: str) -> Exception:
    return problem("model.onnx graph", expected=expected, found="more", advice="split the model")


def _fields(data: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Field number, wire type, and start and end of the value, of each field of a message."""
    while position < end:
        key, start = _varint(data, position)
        wire = key & 7
        if wire == _VARINT:
            _, position = _varint(data, start)
        elif wire == _BYTES:
            size, start = _varint(data, start)
            position = start + size
        elif wire in (_FIXED32, _FIXED64):
            position = start + (4 if wire == _FIXED32 else 8)
        else:
            return
        if position > end:
            return
        yield key >> 3, wire, start, position


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number and the place behind it; that is behind the end of the data if it is cut or too long."""
    value = shift = 0
    while position < len(data) and shift < 7 * _VARINT_BYTES:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, len(data) + 1


# ------------------------------------------------------------
# Calls of functions, and walks.


def checked_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor of a model. Raises ``ProblemError`` if functions call themselves or too many."""
    _check_calls(model)
    return list(every_tensor(model))


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
