"""The classification extension: the best classes of an output instead of its numbers; it only ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clockwork_serve.oip.datatypes import DTYPES, encode_strings
from clockwork_serve.oip.records import OutputTensor


def classify(tensor: OutputTensor, count: int, labels: Sequence[str], *, batched: bool) -> OutputTensor:
    """BYTES ``value:index[:label]`` of the ``count`` highest values, of each row if batched."""
    values = np.frombuffer(tensor.data, DTYPES[tensor.datatype])
    rows = tensor.shape[0] if batched else 1
    values = values.reshape(rows, -1)
    count = min(count, values.shape[1])
    # Stable, so that of equals the first class wins.
    best = np.argsort(-values.astype(np.float64), axis=1, kind="stable")[:, :count]
    texts = [_text(values[row, index], int(index), labels) for row in range(rows) for index in best[row]]
    shape = (rows, count) if batched else (count,)
    return OutputTensor(tensor.name, "BYTES", shape, encode_strings(text.encode() for text in texts))


def _text(value: np.generic, index: int, labels: Sequence[str]) -> str:
    shown = f"{float(value):f}" if value.dtype.kind == "f" else str(int(value))
    return f"{shown}:{index}:{labels[index]}" if index < len(labels) else f"{shown}:{index}"
