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
from clockwork_serve.oip.http_infer import DEPTH_MAX, PIECE_BYTES, _flat, _pieces, from_json

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
            st.sampled_from([b",", b"[", b"]", b"1", b" ", b".0", b".5", b"e1"])
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


@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT32", "UINT64"])
def test_integers_may_be_written_as_languages_with_one_kind_of_number_do(datatype: str) -> None:
    raw = b"[1.0, 2, 1e2, -0.0]"
    expected = np.array([1, 2, 100, 0], datatype.lower()).tobytes()
    assert from_json("X", datatype, (4,), memoryview(raw)) == expected
    assert from_json("X", datatype, (2, 2), memoryview(b"[[1.0,2],[1e2,-0.0]]")) == expected


def test_a_float_is_an_integer_only_where_it_is_exactly_that() -> None:
    assert from_json("X", "INT64", (1,), memoryview(b"[9007199254740991.0]")) == (2**53 - 1).to_bytes(
        8, "little"
    )
    for raw in (b"[1.5]", b"[9007199254740993.0]", b"[1e30]"):
        with pytest.raises(InvalidRequest, match=r"expected whole numbers, and below 2\*\*53 where"):
            from_json("X", "INT64", (1,), memoryview(raw))
    for raw in (b"[128.0]", b"[-129.0]"):
        with pytest.raises(InvalidRequest, match="out of range for INT8"):
            from_json("X", "INT8", (1,), memoryview(raw))
    # What is no number at all is told as before.
    for raw, found in ((b'["1"]', "str"), (b"[true]", "bool"), (b"[null]", "null")):
        with pytest.raises(InvalidRequest, match=f"Expected `int`, got `{found}`"):
            from_json("X", "INT32", (1,), memoryview(raw))


def test_large_integers_with_points_become_the_same_tensor() -> None:
    values = np.arange(60_000, dtype="<i4")
    raw = memoryview(json.dumps([float(value) for value in values]).encode())
    assert len(raw) > PIECE_BYTES
    assert from_json("X", "INT32", values.shape, raw) == values.tobytes()


@pytest.mark.parametrize(("datatype", "element"), [("INT32", b"7"), ("BYTES", b'"7"')])
def test_lists_in_lists_are_as_many_as_triton_takes(datatype: str, element: bytes) -> None:
    flat = from_json("X", datatype, (1,), memoryview(b"[" + element + b"]"))
    for depth in (50, DEPTH_MAX):
        raw = b"[" * depth + element + b"]" * depth
        assert from_json("X", datatype, (1,), memoryview(raw)) == flat
    for depth in (DEPTH_MAX + 1, 120):
        raw = b"[" * depth + element + b"]" * depth
        with pytest.raises(InvalidRequest, match=rf"exceeds maximum allowed limit \(100\).*found {depth}"):
            from_json("X", datatype, (1,), memoryview(raw))


def test_an_indented_tensor_of_many_dimensions_is_taken() -> None:
    """Its first number comes after more spaces than brackets."""
    values = np.arange(2**8, dtype="<f4").reshape((2,) * 8)
    raw = memoryview(json.dumps(values.tolist(), indent=8).encode())
    assert from_json("X", "FP32", values.shape, raw) == values.tobytes()
