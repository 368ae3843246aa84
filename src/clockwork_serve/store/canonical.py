"""One form for equal graphs, so that they hash alike; never changes what is computed.

ONNX Runtime saves the nodes of an optimised graph in an order that differs from run to run where the graph
leaves it open, and names depend on who exported the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def make_canonical(model: onnx.ModelProto) -> None:
    """Order nodes, rename what has no meaning outside, and take out what does not compute."""
    for field in ("producer_name", "producer_version", "domain", "doc_string", "model_version"):
        model.ClearField(field)
    del model.metadata_props[:]
    _order(model.graph)
    _strip(model.graph)
    _rename_values(model.graph)
    _rename_dims(model.graph)


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


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of inner graphs last."""
    for each in all_graphs(graph):
        yield from each.node


def reads(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name that a graph or one inside it reads, its own ones too."""
    for each in all_graphs(graph):
        for node in each.node:
            yield from node.input
        yield from (output.name for output in each.output)


def _order(graph: onnx.GraphProto) -> None:
    """Put nodes into the order in which the outputs, one after the other, need them."""
    for node in graph.node:
        for inner in subgraphs(node):
            _order(inner)
    needs = [
        [*node.input, *(name for inner in subgraphs(node) for name in reads(inner))] for node in graph.node
    ]
    maker = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
    wanted = [maker[output.name] for output in graph.output if output.name in maker]
    # What no output needs is kept, in the order it had.
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
    """Number values by first use. A name means the same in all graphs, so one table does for all."""
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
