"""Trace contexts of clients: what the standard allows is taken, all else is ignored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.oip import trace_context
from clockwork_serve.telemetry.spans import trace_ids

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("parent", "found"),
    [
        (f"00-{TRACE}-{PARENT}-01", f"{TRACE}-{PARENT}-01"),
        (f" 00-{TRACE}-{PARENT}-00\t", f"{TRACE}-{PARENT}-00"),
        (f"cc-{TRACE}-{PARENT}-01", f"{TRACE}-{PARENT}-01"),
        (f"cc-{TRACE}-{PARENT}-01-what-is-to-come", f"{TRACE}-{PARENT}-01"),
    ],
)
def test_a_context_is_taken(parent: str, found: str) -> None:
    assert trace_context(parent) == found


@pytest.mark.parametrize(
    "parent",
    [
        "", "00", f"00-{TRACE}-{PARENT}", f"00-{TRACE}-{PARENT}-1", f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE.upper()}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[:-1]}-{PARENT}-01", f"00-{TRACE}-{PARENT}x-01",
        f"cc-{TRACE}-{PARENT}-01.more", f"00-{TRACE}-{PARENT}-01\n", f"00-{TRACE}-{PARENT}-\u0660\u0661",
        f"00-{TRACE}-{PARENT}-01,00-{TRACE}-{PARENT}-01", "x" * 100_000,
    ],
)  # fmt: skip
def test_a_malformed_context_is_ignored(parent: str) -> None:
    assert trace_context(parent, "vendor=value") == ""


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("vendor=value", "vendor=value"),
        ("a=1 , tenant@b=2,\t, c_*/-=x y!", "a=1,tenant@b=2,c_*/-=x y!"),
        ("A=1", ""), ("a=1,a=2", ""), ("a", ""), ("=1", ""), ("a=1=2", ""), ("a=" + "x" * 257, ""),
        ("a=\x00", ""), ("a=ü", ""), (",".join(f"k{n}=v" for n in range(33)), ""),
        (",".join(f"k{n}={'v' * 60}" for n in range(9)), ""),
    ],
)  # fmt: skip
def test_a_state_is_passed_on_or_dropped(state: str, kept: str) -> None:
    context = f"{TRACE}-{PARENT}-01"

    assert trace_context(f"00-{context}", state) == (f"{context} {kept}" if kept else context)


PARTS = st.sampled_from(
    ["00", "ff", "01", "cc", TRACE, PARENT, "0" * 32, "0" * 16, "-", "-", "-", ",", " ", "x"]
)
STATES = st.sampled_from(["a", "b", "=", "=", ",", ",", " ", "\t", "@", "1", "x" * 300, "\x00", "\u00fc"])


@given(st.lists(PARTS, max_size=9).map("".join) | st.text(), st.lists(STATES, max_size=40).map("".join))
def test_whatever_a_client_sends_is_ignored_or_can_be_read_again(parent: str, state: str) -> None:
    found = trace_context(parent, state)

    assert found.isascii()
    assert len(found) <= 600
    if found:
        ids = trace_ids("r", found)
        assert (len(ids.trace_id), len(ids.parent_id), len(ids.span_id)) == (16, 8, 8)
        assert trace_context(f"00-{found.partition(' ')[0]}", ids.state) == found
