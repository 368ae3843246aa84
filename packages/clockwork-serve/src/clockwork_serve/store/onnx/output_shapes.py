"""The shapes of a model's outputs: inferred, seen in a trial, or open where values of the inputs decide.

A graph says which shapes its outputs have, and that may be how they were once, when it was exported. So what
it says is believed only of outputs whose shapes follow from the shapes of the inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx

from clockwork_serve.store.graph_walks import inner_reads, subgraphs
from clockwork_serve.store.settings import problem
from clockwork_serve.store.trial import Dim, GraphTensor, Interface, Trial

# ------------------------------------------------------------
# Which shapes depend on values: followed through the operators, in the order of the graph.


_BY_ANY = frozenset(
    {
        "BeamSearch", "Compress", "ConcatFromSequence", "DynamicTimeWarping", "GreedySearch", "If",
        "ImageDecoder", "Loop", "MelWeightMatrix", "NonMaxSuppression", "NonZero", "Range", "RemovePadding",
        "RestorePadding", "Sampling", "SequenceAt", "SequenceErase", "SequenceMap", "SplitToSequence",
        "StringNormalizer", "StringSplit", "Tokenizer", "Unique", "WhisperBeamSearch",
    }
)  # fmt: skip
"""Operators whose outputs have shapes that depend on the values of any input."""
_BY_SOME = {
    "AffineGrid": (1,), "BlackmanWindow": (0,), "CenterCropPad": (1,), "Col2Im": (1, 2),
    "ConstantOfShape": (0,), "ConvTransposeWithDynamicPads": (2,), "CropAndResize": (3,), "DFT": (1, 2),
    "DynamicSlice": (1, 2, 3), "Expand": (1,), "ExpandDims": (1,), "GroupQueryAttention": (5, 6),
    "HammingWindow": (0,), "HannWindow": (0,), "MaxUnpool": (2,), "OneHot": (1,), "Pad": (1, 3),
    "ReduceL1": (1,), "ReduceL2": (1,), "ReduceLogSum": (1,), "ReduceLogSumExp": (1,), "ReduceMax": (1,),
    "ReduceMean": (1,), "ReduceMin": (1,), "ReduceProd": (1,), "ReduceSum": (1,), "ReduceSumSquare": (1,),
    "Reshape": (1,), "Resize": (1, 2, 3), "STFT": (1, 3), "Slice": (1, 2, 3, 4), "Split": (1,),
    "Squeeze": (1,), "Tile": (1, 2), "TopK": (1,), "Unsqueeze": (1,), "Upsample": (1,),
}  # fmt: skip
"""Those of which only some inputs matter, by their positions."""
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})


def shaped_by_values(graph: onnx.GraphProto, inputs: Iterable[str]) -> frozenset[str]:
    """Names of the outputs whose shapes may depend on the values of ``inputs``, not on their shapes alone.

    ``graph``: as the runtime optimised it, without functions, a name meaning the same inside as outside.
    """
    shapes: set[str] = set()
    _follow(graph, set(inputs), shapes)
    return frozenset(output.name for output in graph.output if output.name in shapes)


def _follow(graph: onnx.GraphProto, values: set[str], shapes: set[str]) -> None:
    """Add to ``values`` and ``shapes`` the names of what has such values, or such a shape."""
    for node in graph.node:
        read = {*node.input, *inner_reads(node)}
        shaped = not read.isdisjoint(shapes)
        valued = shaped or not read.isdisjoint(values)
        for inner in subgraphs(node) if valued else ():
            values.update(value.name for value in inner.input)
            _follow(inner, values, shapes)
            shaped = shaped or any(output.name in shapes for output in inner.output)
        made = {name for name in node.output if name}
        if valued and (shaped or _decides(node, values)):
            shapes |= made
        if valued and (shaped or node.op_type not in ("Shape", "Size")):
            values |= made


def _decides(node: onnx.NodeProto, values: set[str]) -> bool:
    if node.op_type in _BY_ANY or node.domain not in _KNOWN_DOMAINS:
        return True
    places = _BY_SOME.get(node.op_type, ())
    return any(node.input[place] in values for place in places if place < len(node.input))


# ------------------------------------------------------------
# The outputs as requests see them.


def resolved_outputs(
    interface: Interface, inferred: list[list[int | str | None]], trial: Trial | None, *, batched: bool,
    stated: Collection[str], by_values: Collection[str],
) -> tuple[GraphTensor, ...]:  # fmt: skip
    """The outputs with dimensions fixed where possible.

    ``inferred``: what follows from the shapes of the inputs. ``stated``: outputs whose dims the settings
    state. ``by_values``: those whose shapes depend on values. Raises ``ProblemError`` if a trial shows other
    dims than those stated, and values do not decide.
    """
    skipped = 1 if batched else 0
    static = all(isinstance(dim, int) for tensor in interface.inputs for dim in (tensor.dims or ())[skipped:])
    outputs = []
    for order, tensor in enumerate(interface.outputs):
        seen = trial.outputs[order].shape if trial is not None else None
        known: list[Dim] = [dim if isinstance(dim, int) else "" for dim in inferred[order]]
        rank = len(known if tensor.dims is None else tensor.dims) if seen is None else len(seen)
        known = known if len(known) == rank else [""] * rank
        declared = tensor.dims if tensor.dims is not None and len(tensor.dims) == rank else known
        if seen is not None and tensor.name in stated:
            _check_stated(tensor, seen, skipped, sure=tensor.name not in by_values)
        dims: list[Dim] = []
        for axis, (own, dim) in enumerate(zip(declared, known, strict=True)):
            size = None if seen is None else seen[axis]
            if batched and axis == 0:
                dims.append("")
            elif tensor.name in stated and isinstance(own, int):
                dims.append(own)
            else:
                likely = [dim] if tensor.name in by_values else [dim, own, size if static else None]
                fits = (each for each in likely if isinstance(each, int) and size in (None, each))
                dims.append(next(fits, ""))
        outputs.append(GraphTensor(tensor.name, tensor.datatype, tuple(dims)))
    return tuple(outputs)


def _check_stated(tensor: GraphTensor, seen: tuple[int, ...], skipped: int, *, sure: bool) -> None:
    dims = tensor.dims or ()
    pairs = zip(dims[skipped:], seen[skipped:], strict=False)
    if len(dims) != len(seen) or (sure and any(isinstance(own, int) and own != dim for own, dim in pairs)):
        raise problem(
            f"output '{tensor.name}' dims", expected=f"{list(seen[skipped:])} as it was in a trial",
            found=[dim if isinstance(dim, int) else -1 for dim in dims[skipped:]],
            advice="declare the dims that the model has, or none",
        )  # fmt: skip
