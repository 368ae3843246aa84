"""Numbers of JSON decoded a piece at a time: what is right and what is wrong is the same as in one piece."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.http_infer import PIECE_BYTES, _flat, _pieces, from_json

NESTED = st.recursive(
    st.lists(st.integers(-300, 300), max_size=4), lambda inner: st.lists(inner, max_size=4), max_leaves=8
)


def outcome(work: Any) -> Any:
    try:
        return list(work())
    except InvalidRequest:
        return "wrong"


@given(NESTED, st.sampled_from([None, 1, 2]), st.integers(1, 30), st.data())
def test_in_pieces_or_whole_it_is_the_same(
    value: Any, indent: int | None, piece_bytes: int, data: st.DataObject
) -> None:
    text = bytearray(json.dumps(value, indent=indent).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 1))] = data.draw(
            st.sampled_from([b",", b"[", b"]", b"1", b" "])
        )
    raw = memoryview(bytes(text))
    whole = outcome(lambda: _flat("X", "INT32", raw))
    pieces = outcome(lambda: chain.from_iterable(_pieces("X", "INT32", raw, piece_bytes)))
    # A number that does not fit into a piece, with all the brackets and spaces beside it, is none.
    assert pieces in (whole, "wrong")
    if piece_bytes > max(map(len, text.split(b","))):
        assert pieces == whole


def test_large_data_become_the_same_tensor() -> None:
    values = np.arange(100_000, dtype="<f4").reshape(10, -1) / 8
    raw = memoryview(json.dumps(values.tolist()).encode())
    assert len(raw) > PIECE_BYTES
    assert from_json("X", "FP32", values.shape, raw) == values.tobytes()
    for shape, found in (((99_999,), "100000 or more"), ((100_001,), "100000")):
        with pytest.raises(InvalidRequest, match=f"found {found}"):
            from_json("X", "FP32", shape, raw)
