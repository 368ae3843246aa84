"""The one form of messages about scenarios and traces; it never decides what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from clockwork_serve.errors import ConfigError

_SHOWN = 80
"""Characters of a found value that a message shows."""


class FieldError(ConfigError):
    """One field of a record is wrong: ``field``, and ``what`` was expected, found and can be done.

    Records raise it when they are built; who read them from a file adds the file and the line.
    """

    def __init__(self, field: str, what: str) -> None:
        """Complain about ``field``: ``what`` follows its name in the message."""
        super().__init__(f"{field}: {what}")
        self.field = field
        self.what = what


def found(value: object) -> str:
    """A value as messages show it: cut if long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def unfit(field: str, expected: str, value: object, remedy: str) -> FieldError:
    """The error of one field."""
    return FieldError(field, f"expected {expected}, found {found(value)}; {remedy}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Advice for a name that nobody knows."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1)
    if near:
        return f"did you mean {near[0]}?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"known: {shown}" if choices else "none is known"
