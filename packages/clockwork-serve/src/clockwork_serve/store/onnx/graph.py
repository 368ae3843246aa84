"""A model's graph before optimisation: its inputs and outputs, its batch axis, and declared shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import msgspec
import onnx
from msgspec import Struct

from clockwork_serve.errors import did_you_mean
from clockwork_serve.messages import TensorSpec
from clockwork_serve.store.settings import ModelSettings, StoreConfig, TensorSettings, problem
from clockwork_serve.store.trial import Dim, GraphTensor, Interface

# ------------------------------------------------------------
# Rewrites a model's graph before optimisation: declared shapes and batch axes; its weights are not changed.


class GraphPlan(Struct, frozen=True, kw_only=True):
    """How copies of one architecture are prepared, determined on the first of them.

    ``squeezed`` are outputs that lose their batch axis at batch 1, with the shape of a row. ``stated`` are
    outputs whose dims the settings state, ``opened`` those that they open where the graph has a size.
    ``lost`` says why there is no batch, if that is a disadvantage. ``branches``: weights inside If, Loop and
    Scan are lifted too. Products with weights are rewritten as convolutions with ``block`` channels in a
    block; 0: they are not.
    """

    interface: Interface
    max_batch_size: int
    squeezed: dict[str, tuple[int, ...]] = {}
    stated: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    lost: str = ""
    branches: bool = True
    block: int = 0


def prepared(model: onnx.ModelProto, plan: GraphPlan) -> bytes:
    """The serialised model for the optimiser. Changes ``model``.

    Shapes that the graph declares of what it computes are left out, for they may be those of one run; the
    optimiser infers what follows from the inputs.
    """
    graph = model.graph
    given = {tensor.name for tensor in graph.initializer}
    kept = {tensor.name for tensor in plan.interface.inputs}
    taken = [value for value in graph.input if value.name in given - kept]
    if taken:
        # The optimiser does not treat an initialiser as constant if it is also an input, hence overridable.
        for value in taken:
            graph.input.remove(value)
        model.ir_version = max(model.ir_version, 4)
    for value in graph.value_info:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    for value, tensor in zip(graph.input, plan.interface.inputs, strict=True):
        _set_shape(value, tensor)
    for value, tensor in zip(graph.output, plan.interface.outputs, strict=True):
        value.type.tensor_type.ClearField("shape")
        if tensor.name in plan.stated:
            _set_shape(value, _unnamed(tensor))
    for name, row in plan.squeezed.items():
        _restore_batch(graph, name, row)
    return model.SerializeToString()


def _unnamed(tensor: GraphTensor) -> GraphTensor:
    """Without names of free dimensions after axis 0: an input of that name may be fixed now."""
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
    """Reshape an output to [rows, *row], which costs nothing and is valid for every batch size."""
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


# ------------------------------------------------------------
# Inputs and outputs of a graph, and whether axis 0 is a batch, without running it.


_T = onnx.TensorProto
OIP_TYPES: dict[int, str] = {
    _T.BOOL: "BOOL", _T.UINT8: "UINT8", _T.UINT16: "UINT16", _T.UINT32: "UINT32", _T.UINT64: "UINT64",
    _T.INT8: "INT8", _T.INT16: "INT16", _T.INT32: "INT32", _T.INT64: "INT64",
    _T.FLOAT16: "FP16", _T.BFLOAT16: "BF16", _T.FLOAT: "FP32", _T.DOUBLE: "FP64", _T.STRING: "BYTES",
}  # fmt: skip
"""The Open Inference Protocol's names of ONNX element types."""


_SEQUENCE = re.compile("seq|time|token|frame|length|steps", re.IGNORECASE)
"""Names of axes that are part of one request."""


class Batching(Struct, frozen=True):
    """``max_batch_size`` as in Triton, and why it is 0 if that is a disadvantage."""

    max_batch_size: int
    lost: str = ""


def interface_of(model: onnx.ModelProto, optional: Collection[str] = ()) -> Interface:
    """The interface of a model. Raises ``ProblemError`` for a type that the protocol cannot carry.

    Initialisers that are inputs, too, are constants, but for those named ``optional``, which a request may
    give: they are the defaults.
    """
    given = {tensor.name for tensor in model.graph.initializer}
    defaults = given.intersection(optional)
    given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    inputs = tuple(
        msgspec.structs.replace(_tensor(value, "input"), optional=value.name in defaults)
        for value in model.graph.input
        if value.name not in given - defaults
    )
    outputs = tuple(_tensor(value, "output") for value in model.graph.output)
    if not outputs:
        raise problem(
            "outputs", expected="at least one output", found="none", advice="export the model again"
        )
    return Interface(inputs, outputs)


def _tensor(value: onnx.ValueInfoProto, role: str) -> GraphTensor:
    kind = value.type.WhichOneof("value")
    where = f"{role} '{value.name}'"
    if kind not in (None, "tensor_type"):
        raise problem(
            where, expected="a tensor", found=f"a {str(kind).removesuffix('_type')}",
            advice="export the model with tensors only (classifiers of scikit-learn: zipmap off)",
        )  # fmt: skip
    tensor = value.type.tensor_type
    if tensor.elem_type not in OIP_TYPES:
        name = _T.DataType.Name(tensor.elem_type) if tensor.elem_type in _T.DataType.values() else "unknown"
        raise problem(
            where, expected="an element type of the Open Inference Protocol", found=name,
            advice="cast it inside the graph",
        )  # fmt: skip
    dims: tuple[Dim, ...] | None = None
    if tensor.HasField("shape"):
        dims = tuple(
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param
            for dim in tensor.shape.dim
        )
    return GraphTensor(value.name, OIP_TYPES[tensor.elem_type], dims)


def batching_of(interface: Interface, settings: ModelSettings, config: StoreConfig) -> Batching:
    """Whether axis 0 can be a batch: free, and the same for every input and output."""
    asked = settings.max_batch_size
    if asked == 0 or not (asked or interface.inputs):
        return Batching(0)
    obstacle = _obstacle(interface) or ("" if asked else _sequence(interface))
    if not obstacle:
        return bounded(asked, config)
    wish = f"max_batch_size {asked} was asked for, but " if asked else ""
    remedy = "; to batch, export it with axis 0 of every input and output as a free batch dimension"
    return Batching(
        0,
        f"{wish}{obstacle}: served with max_batch_size 0 (requests give full shapes), one request per run"
        + (remedy if interface.inputs else ""),
    )


def bounded(asked: int | None, config: StoreConfig) -> Batching:
    """The batch size asked for (None: the default), as far as it is allowed."""
    if asked is None:
        return Batching(min(config.max_batch_size, config.largest_batch))
    if asked <= config.largest_batch:
        return Batching(asked)
    return Batching(
        config.largest_batch,
        f"max_batch_size {asked} was asked for, but at most max_batch = {config.largest_batch} rows are "
        "compiled and profiled: requests of more rows are refused; raise max_batch to allow them",
    )


def _obstacle(interface: Interface) -> str:
    if not interface.inputs:
        return "the model has no input"
    names = set()
    for role, tensors in (("input", interface.inputs), ("output", interface.outputs)):
        for tensor in tensors:
            if tensor.dims is None and role == "output":
                continue  # a trial run shows it
            if not tensor.dims and role == "output":
                continue  # it may be squeezed at batch 1, which a trial run shows and a Reshape corrects
            if tensor.optional:
                return f"{role} '{tensor.name}' is optional"
            if not tensor.dims:
                return f"{role} '{tensor.name}' has no axis 0"
            first = tensor.dims[0]
            if isinstance(first, int):
                return f"axis 0 of {role} '{tensor.name}' is fixed to {first}{_elsewhere(interface, tensor)}"
            if first and role == "input":
                names.add(first)
    if len(names) > 1:
        return f"axis 0 of the inputs is not the same dimension ({', '.join(sorted(map(str, names)))})"
    return ""


def _sequence(interface: Interface) -> str:
    """Why axis 0 is not a batch, judging by its name: a sequence of 40 tokens is one request, not 40."""
    for tensor in interface.inputs:
        first = tensor.dims[0] if tensor.dims else ""
        if isinstance(first, str) and _SEQUENCE.search(first) and "batch" not in first.lower():
            return (
                f"axis 0 of input '{tensor.name}' is '{first}', by its name a sequence and no batch"
                " (set max_batch_size > 0 to batch it)"
            )
    return ""


def _elsewhere(interface: Interface, tensor: GraphTensor) -> str:
    """A hint where the batch seems to be another axis of ``tensor``."""
    firsts = {other.dims[0] for other in interface.inputs if other.dims} - {""}
    for axis, dim in enumerate(tensor.dims or ()):
        if axis and isinstance(dim, str) and dim in firsts:
            return f" and its batch dimension '{dim}' is axis {axis}"
    return ""


def declared(interface: Interface, settings: ModelSettings, *, batched: bool) -> Interface:
    """The interface with declared dims applied. Raises ``ProblemError`` if they contradict the graph.

    If the model cannot be batched although it was configured to, dims declared without the batch axis are
    still accepted.
    """
    lenient = settings.max_batch_size != 0
    return Interface(
        _declared(interface.inputs, settings.inputs, "inputs", batched=batched, lenient=lenient),
        _declared(interface.outputs, settings.outputs, "outputs", batched=batched, lenient=lenient),
    )


def _declared(
    tensors: Sequence[GraphTensor], stated: Sequence[TensorSettings], role: str, *, batched: bool,
    lenient: bool,
) -> tuple[GraphTensor, ...]:  # fmt: skip
    by_name = {tensor.name: tensor for tensor in tensors}
    for each in stated:
        if each.name not in by_name:
            raise problem(
                f"{role} '{each.name}'", expected="a tensor of the model", found=each.name,
                advice=did_you_mean(each.name, by_name),
            )  # fmt: skip
    stated_by_name = {each.name: each for each in stated}
    return tuple(
        _fitted(tensor, stated_by_name[tensor.name], role, batched=batched, lenient=lenient)
        if tensor.name in stated_by_name
        else tensor
        for tensor in tensors
    )


def _fitted(
    tensor: GraphTensor, stated: TensorSettings, role: str, *, batched: bool, lenient: bool
) -> GraphTensor:
    where = f"{role} '{tensor.name}'"
    if stated.datatype is not None and stated.datatype != tensor.datatype:
        raise problem(
            f"{where} datatype",
            expected=tensor.datatype,
            found=stated.datatype,
            advice="declare what the model has",
        )
    if stated.dims is None:
        return tensor
    full: tuple[Dim, ...] = tuple("" if dim == -1 else dim for dim in stated.dims)
    if batched:
        full = ("" if not tensor.dims else tensor.dims[0], *full)
    elif lenient and tensor.dims and len(full) == len(tensor.dims) - 1:
        full = (tensor.dims[0], *full)
    if tensor.dims is None:
        return msgspec.structs.replace(tensor, dims=full)
    shown = [dim if isinstance(dim, int) else -1 for dim in tensor.dims[1 if batched else 0 :]]
    # An output may have other sizes than the graph says; what an input has, the graph was made for.
    yielding: tuple[Dim, ...] = ("",) if role == "outputs" else ()
    fits = len(full) == len(tensor.dims) and all(
        isinstance(own, str) or new in (own, *yielding) for own, new in zip(tensor.dims, full, strict=True)
    )
    if not fits:
        note = (
            " (without the batch axis; with max_batch_size = 0 the full shape)"
            if batched
            else " (the full shape)"
        )
        raise problem(
            f"{where} dims", expected=f"{shown}{note}", found=list(stated.dims),
            advice="declare the dims that the model has; only those that are -1 in it may be chosen",
        )  # fmt: skip
    dims = tuple(
        own if new == "" and isinstance(own, str) else new for own, new in zip(tensor.dims, full, strict=True)
    )
    return msgspec.structs.replace(tensor, dims=dims)


def opened(graph: GraphTensor, stated: GraphTensor) -> bool:
    """Whether settings leave a dimension open that has a size in the graph."""
    pairs = zip(graph.dims or (), stated.dims or (), strict=False)
    return any(isinstance(own, int) and isinstance(new, str) for own, new in pairs)


def specs(tensors: Sequence[GraphTensor], *, batched: bool) -> tuple[TensorSpec, ...]:
    """The tensors as requests see them: without the batch axis if batched, -1 where a request chooses."""
    skipped = 1 if batched else 0
    return tuple(
        TensorSpec(
            name=tensor.name,
            datatype=tensor.datatype,
            shape=tuple(dim if isinstance(dim, int) else -1 for dim in (tensor.dims or ())[skipped:]),
            optional=tensor.optional,
        )
        for tensor in tensors
    )
