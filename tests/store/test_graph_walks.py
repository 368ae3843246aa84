"""Limits on a model's file hold before it is parsed, and what is no model is left to the parser."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.store.graph_walks import check_limits
from clockwork_serve.store.settings import ProblemError
from tests.store import graphs

WHOLE = graphs.scalar_input().SerializeToString()


@given(st.integers(0, len(WHOLE)), st.binary(max_size=30))
def test_a_damaged_file_is_never_a_crash(cut, tail):
    with contextlib.suppress(ProblemError):
        check_limits(memoryview(WHOLE[:cut] + tail))


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"\x3a\x80", b"\x3a\xff\x01", b"\x0b", WHOLE])
def test_what_is_no_model_is_left_to_the_parser(data):
    check_limits(memoryview(data))


def message(number: int, content: bytes) -> bytes:
    size, encoded = len(content), bytearray()
    while size > 127:
        encoded.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *encoded, size]) + content


EMPTY = {
    "nodes": 2_000_000 * b"\x0a\x00",
    "nodes of a branch": message(1, message(4, b"If") + message(5, message(6, 2_000_000 * b"\x0a\x00"))),
    "weights": 2_000_000 * b"\x2a\x00",
    "attributes": message(1, 2_000_000 * b"\x2a\x00"),
}


@pytest.mark.parametrize(
    "what",
    [
        "nodes",
        "nodes of a branch",
        *(pytest.param(it, marks=pytest.mark.slow) for it in ("weights", "attributes")),
    ],
)
def test_millions_of_empty_parts_are_refused_before_they_are_parsed(what):
    with pytest.raises(ProblemError, match="found more"):
        check_limits(memoryview(message(7, EMPTY[what])))
