"""Rewrites a model's graph before it is optimised: shapes declared, batches restored; never its weights."""

from __future__ import annotations

import onnx
from msgspec import Struct

from clockwork_serve.store.graph_tensors import GraphTensor, Interface


class Plan(Struct, frozen=True, kw_only=True):
    """How copies of one architecture are prepared, found out on the first of them.

    ``squeezed`` are outputs that lose their batch axis at batch 1, with the shape of a row. ``lost`` says why
    there is no batch, if that loses something. ``branches``: weights inside If, Loop and Scan are lifted too.
    Products with weights are rewritten as convolutions with ``block`` channels in a block; 0: they are not.
    """

    interface: Interface
    max_batch_size: int
    squeezed: dict[str, tuple[int, ...]] = {}
    declared: bool = False
    lost: str = ""
    branches: bool = True
    block: int = 0


def prepared(model: onnx.ModelProto, plan: Plan) -> bytes:
    """The model as it is handed to the optimiser. Changes ``model``."""
    graph = model.graph
    given = {tensor.name for tensor in graph.initializer}
    taken = [value for value in graph.input if value.name in given]
    if taken:
        # A default that a request could override is no constant to the optimiser.
        for value in taken:
            graph.input.remove(value)
        model.ir_version = max(model.ir_version, 4)
    if plan.declared:
        del graph.value_info[:]
        for value, tensor in zip(graph.input, plan.interface.inputs, strict=True):
            _set_shape(value, tensor)
        for value, tensor in zip(graph.output, plan.interface.outputs, strict=True):
            _set_shape(value, _unnamed(tensor))
    for name, row in plan.squeezed.items():
        _restore_batch(graph, name, row)
    return model.SerializeToString()


def _unnamed(tensor: GraphTensor) -> GraphTensor:
    """Without the names of free dimensions behind axis 0: an input that had the name may be fixed now."""
    dims = tensor.dims and (tensor.dims[0], *(d if isinstance(d, int) else "" for d in tensor.dims[1:]))
    return GraphTensor(tensor.name, tensor.datatype, dims)


def _set_shape(value: onnx.ValueInfoProto, tensor: GraphTensor) -> None:
    if tensor.dims is None:
        return
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for dim in tensor.dims:
        if isinstance(dim, int):
            shape.dim.add().dim_value = dim
        elif dim:
            shape.dim.add().dim_param = dim
        else:
            shape.dim.add()


def _restore_batch(graph: onnx.GraphProto, name: str, row: tuple[int, ...]) -> None:
    """Reshape an output to [rows, *row], which costs nothing and holds at every batch size."""
    inner, shape = f"{name}/squeezed", f"{name}/rows"
    for node in graph.node:
        node.output[:] = [inner if output == name else output for output in node.output]
        node.input[:] = [inner if source == name else source for source in node.input]
    graph.initializer.append(
        onnx.helper.make_tensor(shape, onnx.TensorProto.INT64, [1 + len(row)], [-1, *row])
    )
    graph.node.append(onnx.helper.make_node("Reshape", [inner, shape], [name]))
    output = next(value for value in graph.output if value.name == name)
    dims = output.type.tensor_type.shape.dim
    del dims[:]
    dims.add()
    for size in row:
        dims.add().dim_value = size
