"""Headers of HTTP/2: the standard's own examples, and what is no header block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_lab.bench.messages import Undecodable, decode, literal

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=400)


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        # RFC 7541, C.2.2, C.2.4, C.4.1 and parts of C.6.1
        ("040c2f73616d706c652f70617468", {":path": "/sample/path"}),
        ("82", {":method": "GET"}),
        (
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            {":method": "GET", ":scheme": "http", ":path": "/", ":authority": "www.example.com"},
        ),
        ("48826402", {":status": "302"}),
        ("6196d07abe941054d444a8200595040b8166e082a62d1bff", {"date": "Mon, 21 Oct 2013 20:13:21 GMT"}),
        ("6e919d29ad171863c78f0b97c8e9ae82ae43d3", {"location": "https://www.example.com"}),
        ("2082", {":method": "GET"}),
        ("", {}),
    ],
)  # fmt: skip
def test_the_examples_of_the_standard(block: str, headers: dict[str, str]) -> None:
    assert decode(bytes.fromhex(block)) == headers


@given(st.dictionaries(TEXT.filter(bool), TEXT))
def test_what_is_written_is_read(headers: dict[str, str]) -> None:
    assert decode(b"".join(literal(name, value) for name, value in headers.items())) == headers


@pytest.mark.parametrize(
    "block", ["80", "be", "3fe11f", "00", "0001", "000161", "7f", "00ffffffffffffffff", "0003616263"]
)
def test_what_is_no_block_is_refused(block: str) -> None:
    with pytest.raises(Undecodable):
        decode(bytes.fromhex(block))


@given(st.binary(max_size=60))
def test_any_bytes_are_headers_or_refused(block: bytes) -> None:
    try:
        decode(block)
    except Undecodable:
        return
