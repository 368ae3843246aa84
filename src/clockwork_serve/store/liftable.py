"""Which float tensors of a graph are weights, by size and by who reads them; never by their values.

Lifted are float32 tensors of at least 16 elements, and smaller ones that only layers read as their weights:
the bias of a classifier with ten classes is a weight too, and copies could not share a code without lifting
it. Everything else stays in the code: integers (shapes, axes, quantised weights), other float types, and the
small constants (Clip bounds, epsilons, factors) whose values optimisations look at.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_LIFTED_ELEMENTS = 16
FLOAT_BYTES = 4

_LAYERS = frozenset(
    {
        "Attention", "BatchNormalization", "BiasGelu", "Conv", "ConvTranspose", "EmbedLayerNormalization",
        "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "GRU", "Gemm", "GroupNormalization",
        "InstanceNormalization", "LSTM", "LayerNormalization", "MatMul", "PRelu", "RNN",
        "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
    }
)  # fmt: skip
"""Operators all of whose float inputs are data or weights, never a setting."""
_ELEMENTWISE = frozenset({"Add", "Div", "Mul", "Sub"})
"""Operators that add a bias or apply a scale; a single number may be a constant of a formula instead."""


def is_weight(elements: int, rank: int, readers: Sequence[str]) -> bool:
    """Whether a float32 tensor is lifted; ``readers`` are the types of the operators that read it."""
    if elements >= MIN_LIFTED_ELEMENTS:
        return True
    if not rank or not elements or not readers:
        return False
    return all(reader in _LAYERS or (reader in _ELEMENTWISE and elements > 1) for reader in readers)
