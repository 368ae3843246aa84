"""What a torch program is compiled for, and the messages of the process that does it, as records."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from clockwork_serve.store.cache import batch_sizes
from clockwork_serve.store.onnx.graph import batching_of, declared
from clockwork_serve.store.onnx.row_trial import undeclared
from clockwork_serve.store.settings import ModelSettings, Problem, StoreConfig
from clockwork_serve.store.torch.archive import refuse
from clockwork_serve.store.torch.program import Program, renamed
from clockwork_serve.store.trial import Dim, Fill, GraphTensor, Interface

BATCH = "batch"  # the name of the batch dimension in a plan, whatever the program calls it


class TorchPlan(Struct, frozen=True, kw_only=True):
    """``interface`` has all dimensions fixed but axis 0, if ``batched``, as only the configuration can say.

    ``sizes`` are the batch sizes to try, ascending. ``lost`` says why there is no batch, or a smaller one.
    """

    interface: Interface
    batched: bool
    max_batch_size: int
    sizes: tuple[int, ...]
    lost: str = ""

    def inputs_of(self, *, batched: bool) -> tuple[GraphTensor, ...]:
        """The inputs; of one row each if there is no batch."""
        if batched or not self.batched:
            return self.interface.inputs
        return tuple(_fixed(tensor, {BATCH: 1}) for tensor in self.interface.inputs)


OPTIONS: dict[str, bool | str] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.use_runtime_constant_folding": False,
    "always_keep_tensor_constants": True,
    "freezing": False,
}
"""How programs are compiled: no value of a weight may become part of the code."""


class CompileJob(Struct, frozen=True, kw_only=True):
    """A program to compile into ``folder``; of its plan's sizes, the first and the last are always kept."""

    program: str
    folder: str
    plan: TorchPlan
    target: str


class CompileStep(Struct, frozen=True, kw_only=True, tag="step"):
    """A progress message: the current step."""

    text: str


class CompileReport(Struct, frozen=True, kw_only=True, tag="report"):
    """The result of a job: packages in its folder, or a ``problem``.

    ``lost`` says why there is no batch although one was declared.
    ``row_ns`` is the time per row at each size that was tried; ``difference`` the largest found between
    package and program.
    """

    problem: Problem | None = None
    batch_sizes: tuple[int, ...] = ()
    outputs: tuple[GraphTensor, ...] = ()
    fills: tuple[Fill, ...] = ()
    lost: str = ""
    folded: int = 0
    row_ns: dict[int, int] = {}
    difference: float = 0.0


# ------------------------------------------------------------
# The plan for a program: the batch sizes, and every other dimension fixed.


def planned(
    program: Program, settings: ModelSettings, config: StoreConfig,
    sizes_of: Callable[[int], tuple[int, ...]] = batch_sizes,
) -> TorchPlan:  # fmt: skip
    """The plan for a program. Raises ``ProblemError`` if dimensions beside the batch are open."""
    found = Interface(
        renamed(program.interface.inputs, [each.name for each in settings.inputs], "inputs"),
        renamed(program.interface.outputs, [each.name for each in settings.outputs], "outputs"),
    )
    if settings.max_batch_size and _exported_for_one(found):
        found = _one_row_as_batch(found)
        ranges = {BATCH: (1, 1)}
    else:
        ranges = program.ranges
    batching = batching_of(found, settings, config)
    symbol = _symbol(found)
    lost = batching.lost
    most = batching.max_batch_size
    asked = settings.max_batch_size
    if most and not asked:
        lost, most = undeclared("a torch program is batched only where its configuration says so"), 0
    if most and any(not tensor.dims or tensor.dims[0] != symbol for tensor in found.outputs):
        lost = "axis 0 of an output is not the batch dimension of the inputs: served with max_batch_size 0"
        most = 0
    if symbol and ranges.get(symbol, (1, 1))[0] > 2:
        refuse(
            "a batch dimension that starts at 1", f"one that starts at {ranges[symbol][0]}",
            "export it with torch.export.Dim('batch', min=1, max=64)",
        )  # fmt: skip
    if most and ranges.get(symbol, (1, most))[1] < most:
        most = ranges[symbol][1]
        lost = f"max_batch_size {asked} was asked for, but the program is exported for at most {most} rows"
    interface = declared(found, settings, batched=most > 0)
    fixed = _settled(found, interface, symbol, ranges, batched=most > 0)
    return TorchPlan(
        interface=fixed, batched=most > 0, max_batch_size=most, sizes=sizes_of(most), lost=lost
    )  # fmt: skip


def _symbol(found: Interface) -> str:
    """The name of the batch dimension: axis 0 of the first input, if that is free."""
    dims = found.inputs[0].dims if found.inputs else None
    return dims[0] if dims and isinstance(dims[0], str) else ""


def _exported_for_one(found: Interface) -> bool:
    tensors = (*found.inputs, *found.outputs)
    return bool(found.inputs) and all(tensor.dims and tensor.dims[0] == 1 for tensor in tensors)


def _one_row_as_batch(found: Interface) -> Interface:
    def opened(tensors: tuple[GraphTensor, ...]) -> tuple[GraphTensor, ...]:
        return tuple(
            GraphTensor(each.name, each.datatype, (BATCH, *(each.dims or ())[1:])) for each in tensors
        )

    return Interface(opened(found.inputs), opened(found.outputs))


def _settled(
    found: Interface, stated: Interface, symbol: str, ranges: dict[str, tuple[int, int]], *, batched: bool
) -> Interface:
    """Every free dimension replaced by the size declared for it, wherever it occurs."""
    sizes: dict[str, Dim] = {}
    if symbol:
        sizes[symbol] = BATCH if batched else 1
    for own, declared_ in zip(
        (*found.inputs, *found.outputs), (*stated.inputs, *stated.outputs), strict=True
    ):
        for old, new in zip(own.dims or (), declared_.dims or (), strict=True):
            if not isinstance(old, str) or not isinstance(new, int):
                continue
            least, most = ranges.get(old, (0, new))
            if sizes.setdefault(old, new) != new or not least <= new <= most:
                refuse(
                    f"dims of '{own.name}' that the program allows ({old} in {least}..{most})",
                    f"{new}, and {sizes[old]} elsewhere" if sizes[old] != new else str(new),
                    "declare the same size wherever a dimension occurs, or export the program for it",
                )  # fmt: skip
    inputs = tuple(_fixed(tensor, sizes) for tensor in found.inputs)
    for tensor in inputs:
        free = [
            dim
            for axis, dim in enumerate(tensor.dims or ())
            if isinstance(dim, str) and (axis or not batched)
        ]
        if free:
            shown = [
                dim if isinstance(dim, int) else -1 for dim in (tensor.dims or ())[1 if batched else 0 :]
            ]
            refuse(
                f"fixed dimensions beside the batch, which input '{tensor.name}' has not", f"dims {shown}",
                f'declare inputs = [{{name = "{tensor.name}", dims = [...]}}] in clockwork.toml, '
                "or export with no other dimension dynamic",
            )  # fmt: skip
    return Interface(inputs, tuple(_fixed(tensor, sizes) for tensor in found.outputs))


def _fixed(tensor: GraphTensor, sizes: dict[str, Dim] | dict[str, int]) -> GraphTensor:
    dims = tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in tensor.dims or ())
    return GraphTensor(tensor.name, tensor.datatype, dims)
