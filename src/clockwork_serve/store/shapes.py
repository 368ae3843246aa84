"""Reads a trial: is axis 0 truly a batch, which shapes do outputs have, how much room do they take."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from clockwork_serve.messages import TensorSpec
from clockwork_serve.store.graph_tensors import Dim, GraphTensor, Interface
from clockwork_serve.store.problems import problem
from clockwork_serve.store.trial import Trial
from clockwork_serve.units import align

DATA_DEPENDENT_OPS = frozenset(
    {"NonZero", "Unique", "NonMaxSuppression", "Compress", "Loop", "If", "Range", "SequenceAt", "StringSplit"}
)
"""Operators whose output shape depends on values, so that one run does not tell it."""
_ROOM_FACTOR = 16
"""How much larger than the trial's, which is small, a request's outputs may be where it chooses its shape."""


class Verdict(Struct, frozen=True):
    """Of a batch: why there is none, what is doubtful about it, which outputs are squeezed at batch 1."""

    lost: str = ""
    doubt: str = ""
    squeezed: dict[str, tuple[int, ...]] = {}


def judged(
    trial: Trial | str, interface: Interface, *, batched: bool, asked: bool, veto: str = ""
) -> Verdict:
    """Whether rows are apart: no trial showed otherwise, and an analysis has no ``veto``.

    ``asked``: the operator said that there is a batch, which overrules a veto, but nothing that was seen.
    Of a model that could not be tried out (``trial`` says why) the analysis alone can say it.
    """
    if not batched:
        return Verdict()
    if isinstance(trial, str):
        return _analysed(veto, asked=asked)
    if trial.outputs_of_two is None or trial.two_failed:
        return Verdict(_unbatched(f"it does not run on several rows ({trial.two_failed})"))
    static = all(isinstance(dim, int) for tensor in interface.inputs for dim in (tensor.dims or ())[1:])
    squeezed = {}
    for tensor, one, two in zip(interface.outputs, trial.outputs, trial.outputs_of_two, strict=True):
        shapes = f"has shape {list(one.shape)} for one row and {list(two.shape)} for two"
        if not two.ndim or two.shape[0] != 2:
            return Verdict(_unbatched(f"output '{tensor.name}' {shapes}"))
        row = two.shape[1:]
        if one.shape != (1, *row):
            if one.size != two.size // 2 or not (static or not row):
                return Verdict(_unbatched(f"output '{tensor.name}' {shapes}"))
            squeezed[tensor.name] = tuple(row)
    if trial.mixed:
        wish = "max_batch_size was asked for, but " if asked else ""
        seen = f"{trial.mixed}; {veto}" if veto else trial.mixed
        return Verdict(_unbatched(f"{wish}an answer depends on the rows beside it ({seen})"))
    verdict = _analysed(veto, asked=asked)
    return verdict if verdict.lost else msgspec.structs.replace(verdict, squeezed=squeezed)


def _analysed(veto: str, *, asked: bool) -> Verdict:
    if not veto:
        return Verdict()
    reason = f"an answer may depend on the rows beside it: {veto}"
    if asked:
        return Verdict(doubt=f"{reason}; batched as max_batch_size asks for")
    return Verdict(_unbatched(reason) + _INSIST)


_INSIST = "; where you know that no row reads another, max_batch_size > 0 insists"


def _unbatched(reason: str) -> str:
    return (
        f"{reason}: served with max_batch_size 0 (requests give full shapes), one request per run; "
        "to batch, export it with rows that are computed independently along axis 0"
    )


def settled_outputs(
    interface: Interface,
    inferred: list[list[int | str | None]],
    trial: Trial | None,
    *,
    batched: bool,
    by_values: bool,
) -> tuple[GraphTensor, ...]:
    """The outputs with every dimension fixed that can be: by inference, or by the trial if inputs are."""
    skipped = 1 if batched else 0
    static = all(isinstance(dim, int) for tensor in interface.inputs for dim in (tensor.dims or ())[skipped:])
    outputs = []
    for order, tensor in enumerate(interface.outputs):
        seen = trial.outputs[order].shape if trial is not None else None
        known: list[Dim] = [dim if isinstance(dim, int) else "" for dim in inferred[order]]
        if seen is not None and len(known) != len(seen):
            known = [""] * len(seen)
        said = tensor.dims if tensor.dims is not None and len(tensor.dims) == len(known) else known
        dims: list[Dim] = []
        for axis, (own, dim) in enumerate(zip(said, known, strict=True)):
            if seen is not None and isinstance(own, int) and axis >= skipped and own != seen[axis]:
                raise problem(
                    f"output '{tensor.name}' dims", expected=f"{list(seen[skipped:])} as it was in a trial",
                    found=[size if isinstance(size, int) else -1 for size in said[skipped:]],
                    advice="declare the dims that the model has, or none",
                )  # fmt: skip
            fixed = own if isinstance(own, int) else dim
            if not isinstance(fixed, int) and static and not by_values and seen is not None:
                fixed = seen[axis]
            dims.append("" if batched and axis == 0 else fixed)
        outputs.append(GraphTensor(tensor.name, tensor.datatype, tuple(dims)))
    return tuple(outputs)


def output_room(
    outputs: tuple[TensorSpec, ...], trial: Trial | None, *, least: int, asked: int | None
) -> int:
    """Bytes of room per request row: exact if all sizes are known, else what was asked for or a guess."""
    exact = 0
    open_ended = False
    for spec in outputs:
        size = spec.row_bytes if spec.datatype != "BYTES" else None
        open_ended = open_ended or size is None
        exact += align(size or 0)
    if not open_ended:
        return max(exact, 1)
    if asked is not None:
        return max(asked, exact)
    seen = sum(align(array.nbytes) for array in trial.outputs) if trial is not None else 0
    return align(max(least, exact, _ROOM_FACTOR * seen))
