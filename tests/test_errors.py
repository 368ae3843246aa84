"""Text that others chose becomes ours: one line, short, encodable, whatever it was and whatever it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.errors import (
    ClockworkError,
    InvalidRequest,
    described,
    did_you_mean,
    encodable,
    printable,
)

ANY_TEXT = st.text(st.characters(), max_size=200)  # lone surrogates, too


@given(ANY_TEXT, st.integers(10, 100))
def test_printable_text_is_one_short_line_that_can_be_encoded_and_stays_as_it_is(
    text: str, most: int
) -> None:
    found = printable(text, most)
    assert found.isprintable()
    found.encode()
    assert len(found) <= most
    assert printable(found, most) == found


@given(ANY_TEXT)
def test_text_that_is_printable_and_short_is_left_alone(text: str) -> None:
    assert (printable(text) == text) == text.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\ud800", r"\ud800"),
        ("a\r\nSet-Cookie: b", r"a\r\nSet-Cookie: b"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x00", r"\x00"),
        ("abc\u202edef", r"abc\u202edef"),
        ("naïve 😀 日本", "naïve 😀 日本"),
        ("x" * 20, "xxxxxxx..."),
        ("\n" * 6, r"\n\n\n\..."),
    ],
)
def test_what_it_holds_beside_text_stands_as_escapes(text: str, shown: str) -> None:
    assert printable(text, 10 if len(text) in (6, 20) else 100) == shown


@given(ANY_TEXT)
def test_our_errors_can_be_sent_whatever_they_quote(text: str) -> None:
    assert str(ClockworkError(f"model {text}")).encode() == f"model {encodable(text)}".encode()
    assert str(InvalidRequest(f"input {text}")).isprintable()


def test_a_request_is_quoted_in_part() -> None:
    assert len(str(InvalidRequest("x" * 10**6))) == 1000


class Text(str):
    """A string with methods of its own."""

    __slots__ = ()

    def split(self, *_: object) -> list[str]:  # type: ignore[override]
        raise SystemExit


class Fails(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class NoText(Exception):
    def __str__(self) -> str:
        return 1  # type: ignore[return-value] # noqa: PLE0307


class Tricky(Exception):
    def __str__(self) -> str:
        return Text("odd \ud800")


class Named(type):
    @property
    def __name__(cls) -> str:
        raise SystemExit


class Nameless(Exception, metaclass=Named):
    """An exception whose class does not tell its name."""


class Liar(Exception):
    @property
    def __class__(self) -> type:
        raise SystemExit


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ValueError("unknown op \ud800"), r"ValueError: unknown op \ud800"),
        (lambda: ValueError("two\nlines"), "ValueError: two lines"),
        (ValueError, "ValueError"),
        (KeyboardInterrupt, "KeyboardInterrupt"),
        (Fails, "Fails: (its text cannot be had)"),
        (NoText, "NoText: (its text cannot be had)"),
        (Tricky, r"Tricky: odd \ud800"),
        (lambda: Nameless("x"), "Nameless: x"),
        (lambda: Liar("x"), "Liar: x"),
        (lambda: ExceptionGroup("g", [ValueError("\ud800")]), "ExceptionGroup: g (1 sub-exception)"),
    ],
)  # fmt: skip
def test_an_exception_is_described_without_its_help(make: Callable[[], BaseException], said: str) -> None:
    assert described(make()) == said


def test_a_description_is_short() -> None:
    assert len(described(ValueError("x" * 10**7))) == 1000


def test_advice_names_the_nearest_word_or_those_that_are_known() -> None:
    assert did_you_mean("http-prt", ["host", "http_port"]) == "did you mean http_port?"
    assert did_you_mean("Max_Batch", ["max_batch_size", "slo_ms"]) == "did you mean max_batch_size?"
    assert did_you_mean("rate", ["rate_rps", "trace"]) == "did you mean rate_rps?"
    assert did_you_mean("server", ["seed", "slo_ms"]) == "known: seed, slo_ms"
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", [f"{at:02}" for at in range(13)]).endswith("10, 11, ...")
    assert did_you_mean("zzz", []) == "none is known"
