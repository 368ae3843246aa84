"""Compiles a program's flat graph into packages without constants, and verifies their results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clockwork_serve.store.torch.archive import refuse
from clockwork_serve.store.torch.plan import OPTIONS
from clockwork_serve.store.torch.program import BlobPiece, BlobRecipe, Norm, Program, StoredConstant, laid_out
from clockwork_serve.store.trial import Array, GraphTensor, RunError, difference

# ------------------------------------------------------------
# Rewrites a program as one flat graph whose constants are tensors of a blob; this needs torch.
#
# Numbers: constants of the program are numbered as in its record; those of the flat graph are called ``w0``,
# ``w1`` in the order of their first use, so that names do not depend on how the model was exported.


_ATEN = torch.ops.aten
_CONVOLUTIONS = {
    op
    for name in ("conv1d", "conv2d", "conv3d")
    for op in (getattr(_ATEN, name).default, getattr(_ATEN, name).padding)
}
_PLAIN_NORM = _ATEN.batch_norm.default
_NATIVE_NORM = _ATEN._native_batch_norm_legit_no_training.default  # noqa: SLF001 - an operator's name

Values = Callable[[int], npt.NDArray[np.void]]


@dataclass
class Flat:
    """A flat graph and how its constants are made from the program's. ``pieces`` by the name of a node."""

    graph: Any
    pieces: dict[str, BlobPiece]
    sources: Sequence[StoredConstant]
    folded: int = 0
    recipe: BlobRecipe = field(init=False)

    def lay_out(self) -> None:
        """Name the constants that are used, and assign their places in the blob."""
        used = [node for node in self.graph.nodes if node.op == "get_attr"]
        for node in [node for node in used if not node.users]:
            self.graph.erase_node(node)
        used = [node for node in used if node.users]
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        used.sort(key=lambda node: min(order[user] for user in node.users))
        named = {}
        for number, node in enumerate(used):
            named[f"w{number}"] = self.pieces[node.target]
            node.target = f"w{number}"
        self._lay_out(named)

    def keep(self, names: set[str]) -> None:
        """Keep only these constants in the blob: the compiler found that no result depends on the others."""
        named = {t.name: piece for t, piece in zip(self.recipe.tensors, self.recipe.pieces, strict=True)}
        self._lay_out({name: piece for name, piece in named.items() if name in names})

    def _lay_out(self, named: dict[str, BlobPiece]) -> None:
        tensors, blob_bytes = laid_out([(name, *self._kind(piece)) for name, piece in named.items()])
        self.recipe = BlobRecipe(tensors=tensors, pieces=tuple(named.values()), blob_bytes=blob_bytes)

    def module(self, values: Values, device: str = "cpu") -> Any:
        """The graph with the constants that ``values`` returns."""
        root = torch.nn.Module()
        for name, tensor in self.tensors(values, device).items():
            root.register_buffer(name, tensor)
        return torch.fx.GraphModule(root, self.graph)

    def tensors(self, values: Values, device: str = "cpu") -> dict[str, Any]:
        """The constants by name, as views of one blob."""
        blob = torch.from_numpy(self.recipe.blob(values)).to(device)
        made = {}
        for each in self.recipe.tensors:
            dtype = getattr(torch, each.dtype)
            part = blob[each.offset : each.offset + each.size]
            made[each.name] = part.view(dtype).reshape(each.shape) if each.size else part.new_empty(
                each.shape, dtype=dtype
            )  # fmt: skip
        return made

    def _kind(self, piece: BlobPiece) -> tuple[str, tuple[int, ...], int]:
        number = piece.norm.mean if piece.bias and piece.norm is not None else piece.source
        assert number is not None, "only a bias may have no source"
        source = self.sources[number]
        return source.dtype, source.shape, source.item_bytes


def lowered(exported: Any, program: Program, device: str, *, fold: bool) -> Flat:
    """The program's graph, flattened; ``fold``: fold normalisations into the convolutions before them."""
    if any(node.op == "get_attr" for node in exported.graph.nodes):
        exported = exported.run_decompositions({})
    flat = Flat(torch.fx.Graph(), {}, program.sources)
    made: dict[Any, Any] = {}
    by_number: dict[int, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in program.constants:
            number = program.constants[node.name]
            if number not in by_number:
                by_number[number] = flat.graph.get_attr(f"c{number}")
                flat.pieces[f"c{number}"] = BlobPiece(source=number)
            made[node] = by_number[number]
        elif node.op == "placeholder" and node.name in program.inputs:
            made[node] = flat.graph.placeholder(node.name)
        elif node.op == "placeholder":
            if node.users:
                refuse("inputs that are tensors", f"'{node.name}', which is none", "export it with tensors")
        elif node.op == "call_function":
            made[node] = flat.graph.node_copy(node, lambda each: made[each])
            made[node].meta = {}
            _move(made[node], device)
        elif node.op == "output":
            flat.graph.output(tuple(made[each] for each in node.args[0]))
        else:
            refuse("a graph without inner graphs", f"'{node.target}'", "export it without control flow")
    if fold:
        _fold(flat)
    flat.graph.eliminate_dead_code()
    flat.lay_out()
    return flat


def _move(node: Any, device: str) -> None:
    """Have the graph create its own tensors on ``device``."""

    def moved(value: Any) -> Any:
        return torch.device(device) if isinstance(value, torch.device) else value

    node.args = torch.fx.node.map_aggregate(node.args, moved)
    node.kwargs = torch.fx.node.map_aggregate(node.kwargs, moved)


def _fold(flat: Flat) -> None:
    for node in list(flat.graph.nodes):
        if node.op == "call_function" and node.target in (_PLAIN_NORM, _NATIVE_NORM):
            _fold_one(flat, node)


def _fold_one(flat: Flat, node: Any) -> None:
    args = list(node.args)
    native = node.target == _NATIVE_NORM
    if node.kwargs or (not native and args[5]):
        return
    uses = [use for use in node.users if native]
    if native and any(use.args[1:] != (0,) for use in uses):
        return
    before = args[0]
    if getattr(before, "target", None) not in _CONVOLUTIONS or len(before.users) != 1 or before.kwargs:
        return
    scale, shift, mean, variance = (_number(flat, each) for each in args[1:5])
    weight, own = (_number(flat, each) for each in (*before.args[1:3], None)[:2])
    constants = [weight, mean, variance, *(n for n in (scale, shift, own) if n is not None)]
    if any(number is None or number < 0 or flat.sources[number].dtype != "float32" for number in constants):
        return
    assert mean is not None and variance is not None
    norm = Norm(mean=mean, variance=variance, scale=scale, shift=shift, epsilon=args[6 if native else 7])
    new = []
    for piece in (BlobPiece(source=weight, norm=norm), BlobPiece(source=own, norm=norm, bias=True)):
        name = f"f{len(flat.pieces)}"
        flat.pieces[name] = piece
        with flat.graph.inserting_before(before):
            new.append(flat.graph.get_attr(name))
    before.args = (before.args[0], *new, *before.args[3:])
    for use in uses or [node]:
        use.replace_all_uses_with(before)
        flat.graph.erase_node(use)
    if native:
        flat.graph.erase_node(node)
    flat.folded += 1


def _number(flat: Flat, node: Any) -> int | None:
    """The number of a constant that is used unchanged; None for no constant, -1 for anything else."""
    if node is None:
        return None
    piece = flat.pieces.get(node.target) if getattr(node, "op", "") == "get_attr" else None
    return -1 if piece is None or piece.norm is not None or piece.source is None else piece.source


# ------------------------------------------------------------
# Compiles flat graphs into packages without constants, and verifies that a package computes the same.
#
# A package that gives the same results as the program, with the model's weights and with others, contains no
# value of a weight.


SAME = {"float32": 1e-5, "float64": 1e-5}
"""Relative difference up to which results count as equal on a CPU, by element type of the weights."""
SAME_COARSE = 2e-2  # the same for other element types, and for float32 on a GPU, which may multiply in TF32
_TIMED_S = 0.5
_TIMED_RUNS = (3, 30)


class Eager:
    """A graph run operator by operator: the reference."""

    def __init__(self, module: Any, inputs: Sequence[GraphTensor], device: str) -> None:
        self._module = module
        self.inputs = inputs
        self.device = device

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs in order. Raises ``RunError``."""
        try:
            outputs = self.call(tensors_of(inputs, self.inputs, self.device))
        except Exception as error:  # operators raise arbitrary errors on inputs that do not fit
            raise RunError(f"{type(error).__name__}: {error}") from error
        return [array_of(output) for output in outputs]

    def call(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The outputs of one run."""
        with torch.no_grad():
            outputs: Sequence[Any] = self._module(*inputs)
        return outputs


class FilledPackage(Eager):
    """A compiled package with constants set, as on a device."""

    def __init__(self, path: Path, inputs: Sequence[GraphTensor], device: str) -> None:
        super().__init__(torch._inductor.aoti_load_package(str(path)), inputs, device)  # noqa: SLF001 - torch's own interface
        self._kept: object = None

    def constants(self) -> set[str]:
        """The names of the constants that it reads."""
        return set(self._module.get_constant_fqns())

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Use these constants from now on, without copying them."""
        self._kept = tensors
        self._module.load_constants(dict(tensors), check_full_update=True, user_managed=True)


def compile_package(module: Any, inputs: Sequence[Any], path: Path) -> None:
    """Compile a graph for inputs of exactly these shapes. Raises any error of the compiler."""
    with torch.no_grad():
        exported = torch.export.export(module, tuple(inputs))
        torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - torch's own interface
            exported, package_path=str(path), inductor_configs=dict(OPTIONS)
        )


def tensors_of(arrays: Mapping[str, Array], inputs: Sequence[GraphTensor], device: str) -> list[Any]:
    """Arrays as tensors, in calling order. BF16 is in arrays of 16 bits."""
    tensors = []
    for each in inputs:
        tensor = torch.from_numpy(np.ascontiguousarray(arrays[each.name]))
        tensors.append((tensor.view(torch.bfloat16) if each.datatype == "BF16" else tensor).to(device))
    return tensors


def array_of(output: Any) -> Array:
    """A tensor as an array; BF16, which numpy lacks, as float32."""
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"expected a tensor as output, found {type(output).__name__}")
    plain = output.detach().cpu()
    array: Array = (plain.float() if plain.dtype == torch.bfloat16 else plain).contiguous().numpy()
    return array


def scrambled(values: Values, dtypes: Sequence[str]) -> Values:
    """Other weights of the same scale and signs: the elements of each constant permuted and scaled.

    Integers are kept, for they are positions and the like.
    """
    random = np.random.default_rng(1)
    made: dict[int, npt.NDArray[np.void]] = {}

    def other(number: int) -> npt.NDArray[np.void]:
        if number not in made:
            old = values(number)
            made[number] = old
            if dtypes[number] in ("float16", "float32", "float64") and old.size:
                numbers = old.view(np.dtype(dtypes[number]))
                flat = random.permutation(numbers.reshape(-1)) * random.uniform(0.8, 1.25, numbers.size)
                new = flat.astype(numbers.dtype).reshape(numbers.shape)
                made[number] = new.view(old.dtype)
        return made[number]

    return other


def proved(
    package: FilledPackage, program: Flat, packed: Flat, values: Values, inputs: Mapping[str, Array]
) -> float:
    """The largest relative difference between program and package, over the model's weights and others."""
    device = package.device
    worst = 0.0
    for each in (values, scrambled(values, [source.dtype for source in program.sources])):
        wanted = Eager(program.module(each, device), package.inputs, device).run(inputs)
        package.load(packed.tensors(each, device))
        worst = max(worst, difference(package.run(inputs), wanted))
    package.load(packed.tensors(values, device))
    return worst


def allowed(program: Flat, device: str) -> float:
    """The difference that rounding alone may make."""
    dtypes = {source.dtype for source in program.sources if "float" in source.dtype}
    if device != "cpu":
        return SAME_COARSE
    return max((SAME.get(dtype, SAME_COARSE) for dtype in dtypes), default=SAME["float32"])


def timed_ns(package: FilledPackage, inputs: Sequence[Any], device: str) -> int:
    """The median time of a run: CPU time of this process on a CPU, so that other processes do not matter."""
    package.call(inputs)
    clock = time.process_time_ns if device == "cpu" else time.perf_counter_ns
    taken: list[int] = []
    until = time.perf_counter() + _TIMED_S
    least, most = _TIMED_RUNS
    while len(taken) < least or (len(taken) < most and time.perf_counter() < until):
        start = clock()
        package.call(inputs)
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return round(statistics.median(taken))
