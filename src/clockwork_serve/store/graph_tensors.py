"""Inputs and outputs of a graph, as records; nothing here knows ONNX."""

from __future__ import annotations

from msgspec import Struct

Dim = int | str
"""A fixed size, or the name of a free one ("" if it has none)."""


class GraphTensor(Struct, frozen=True):
    """One input or output of a graph with its full shape; ``dims`` is None where the rank is not known."""

    name: str
    datatype: str
    dims: tuple[Dim, ...] | None


class Interface(Struct, frozen=True):
    """Inputs and outputs as the graph declares them, in its order."""

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
