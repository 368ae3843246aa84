"""How the demo evaluates a model: a request function, a result in words, and error measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[Any]]
Send = Callable[[Tensors], Tensors]
"""Sends one request (batch axis included where the model has one) and returns its outputs by name."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A model's result in words, and whether it is the known right one."""

    answer: str
    ok: bool


def relative_error(found: Tensors, expected: Tensors) -> float:
    """The largest of max|a - b| / max|b| over the outputs; infinite if names, shapes or texts differ."""
    if found.keys() != expected.keys():
        return float("inf")
    worst = 0.0
    for name, wanted in expected.items():
        got = found[name]
        if wanted.dtype.kind not in "fiub":
            worst = worst if got.shape == wanted.shape and _texts(got) == _texts(wanted) else float("inf")
            continue
        if got.shape != wanted.shape or not np.all(np.isfinite(got)):
            return float("inf")
        scale = float(np.max(np.abs(wanted), initial=0.0))
        gap = float(np.max(np.abs(got.astype(np.float64) - wanted.astype(np.float64)), initial=0.0))
        worst = max(worst, gap / scale if scale > 0 else gap)
    return worst


def _texts(array: npt.NDArray[Any]) -> list[bytes]:
    return [text.encode() if isinstance(text, str) else bytes(text) for text in array.reshape(-1).tolist()]


def cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """The cosine between two vectors."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
