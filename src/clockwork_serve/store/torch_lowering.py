"""Rewrites a program as one flat graph whose constants are tensors of a blob; torch is needed from here on.

Numbers: constants of the program are numbered as its record has them; those of the flat graph are called
``w0``, ``w1`` in the order of their first use, so that names say nothing about who exported the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clockwork_serve.store.torch_archive import refuse
from clockwork_serve.store.torch_program import Program
from clockwork_serve.store.torch_recipe import Norm, Piece, Recipe, Source, laid_out

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
    pieces: dict[str, Piece]
    sources: Sequence[Source]
    folded: int = 0
    recipe: Recipe = field(init=False)

    def settle(self) -> None:
        """Name the constants that are used, and lay them out."""
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
        """Only these constants in the blob: the compiler found that no answer depends on the others."""
        named = {t.name: piece for t, piece in zip(self.recipe.tensors, self.recipe.pieces, strict=True)}
        self._lay_out({name: piece for name, piece in named.items() if name in names})

    def _lay_out(self, named: dict[str, Piece]) -> None:
        tensors, blob_bytes = laid_out([(name, *self._kind(piece)) for name, piece in named.items()])
        self.recipe = Recipe(tensors=tensors, pieces=tuple(named.values()), blob_bytes=blob_bytes)

    def module(self, values: Values, device: str = "cpu") -> Any:
        """The graph with the constants that ``values`` make."""
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

    def _kind(self, piece: Piece) -> tuple[str, tuple[int, ...], int]:
        number = piece.norm.mean if piece.bias and piece.norm is not None else piece.source
        assert number is not None, "only a bias may have no source"
        source = self.sources[number]
        return source.dtype, source.shape, source.item_bytes


def lowered(exported: Any, program: Program, device: str, *, fold: bool) -> Flat:
    """The program's graph, flat; ``fold``: normalisations that follow a convolution become part of it."""
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
                flat.pieces[f"c{number}"] = Piece(source=number)
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
    flat.settle()
    return flat


def _move(node: Any, device: str) -> None:
    """Let tensors that the graph itself makes be made on ``device``."""

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
    for piece in (Piece(source=weight, norm=norm), Piece(source=own, norm=norm, bias=True)):
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
    """The number of a constant that is as the program has it; None for none, -1 for all else."""
    if node is None:
        return None
    piece = flat.pieces.get(node.target) if getattr(node, "op", "") == "get_attr" else None
    return -1 if piece is None or piece.norm is not None or piece.source is None else piece.source
