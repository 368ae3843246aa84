"""Arrays of every datatype, as clients send them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from clockwork_client.tensors import DTYPES

ARRAYS = {
    datatype: np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    for datatype, dtype in DTYPES.items()
    if datatype != "BF16"
} | {
    "BF16": np.array([[0, 1.5, -2], [3, 4, 0.5]]).astype(ml_dtypes.bfloat16),
    "BYTES": np.array([[b"", b"\x00a\x00", b"b" * 300], ["ä".encode(), b"1", b"2"]], object),
}
