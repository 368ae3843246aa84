"""Elements of BYTES are looked at a piece at a time, and whoever cuts them finds what was found at once."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_client.datatypes import Buffer, decode_strings, encode_strings
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import StringsWalk, strings
from clockwork_serve.units import MIB
from tests.oip.models import Recorded


def walk(data: Buffer, count: int, *, text: bool = False) -> int:
    """To its end; in how many pieces."""
    walked, pieces = StringsWalk(), 1
    walked.add("X", data, count, text=text)
    while walked.step():
        pieces += 1
    return pieces


@pytest.mark.parametrize(("count", "nbytes"), [(13_702, 4096), (16_384, 3), (3, 20 * MIB), (1, 0)])
def test_no_piece_is_larger_or_has_more_elements_than_is_said(count: int, nbytes: int) -> None:
    data = Recorded((struct.pack("<I", nbytes) + b"x" * nbytes) * count)
    walked = StringsWalk()
    walked.add("X", data, count, text=True)
    more, read = True, 0
    while more:
        more = walked.step()
        assert len(data.taken) <= strings.STRINGS_AT_ONCE
        assert sum(data.taken) <= 2 * strings.STRING_BYTES_AT_ONCE
        read += sum(data.taken)
        data.taken.clear()
    assert read == count * nbytes


def test_many_tensors_are_no_larger_a_piece_than_one() -> None:
    walked = StringsWalk()
    for _ in range(100):
        walked.add("X", encode_strings([b"x"] * 1000), 1000, text=True)
    pieces = 1
    while walked.step():
        pieces += 1
    assert pieces > 100 * 1000 // strings.STRINGS_AT_ONCE


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_strings_survive(elements: list[bytes]) -> None:
    data = encode_strings(elements)
    walk(data, len(elements))
    assert list(decode_strings(data)) == elements


@given(st.binary(max_size=40), st.integers(0, 5))
def test_any_bytes_are_strings_or_refused(data: bytes, count: int) -> None:
    try:
        walk(data, count)
    except InvalidRequest:
        return
    elements = list(decode_strings(data))
    assert len(elements) == count
    assert encode_strings(elements) == data


TEXTS = st.one_of(st.text(max_size=9).map(str.encode), st.binary(max_size=9), st.just(b"\xe2\x82\xac" * 9))


@given(st.lists(TEXTS, min_size=1, max_size=5), st.binary(max_size=5))
def test_a_cut_in_any_place_changes_nothing(elements: list[bytes], rest: bytes) -> None:
    data = memoryview(encode_strings(elements) + rest)
    at_once = told(data, len(elements))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(strings, "STRINGS_AT_ONCE", 2)
        patched.setattr(strings, "STRING_BYTES_AT_ONCE", 4)
        assert told(data, len(elements)) == at_once
    if all(map(is_text, elements)):
        assert at_once == "" if not rest else "hold more" in at_once


def told(data: Buffer, count: int) -> str:
    """What is wrong with them."""
    try:
        walk(data, count, text=True)
    except InvalidRequest as error:
        return str(error)
    return ""


def is_text(element: bytes) -> bool:
    try:
        element.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_an_element_that_ends_beyond_its_tensor_is_refused() -> None:
    data = struct.pack("<I", 5 * MIB) + b"x" * 4 * MIB
    with pytest.raises(InvalidRequest, match="hold fewer"):
        walk(data, 1, text=True)
