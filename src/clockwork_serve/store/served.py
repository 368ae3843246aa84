"""What compiling gives: a model and its code, ready to be served; nothing but the record."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from clockwork_serve.messages import Code, Model


class Served(Struct, frozen=True, kw_only=True):
    """A version of a model ready to be served. Models of one architecture have equal codes."""

    model: Model
    code: Code


def codes_of(served: Sequence[Served]) -> dict[str, Code]:
    """The distinct codes, by id."""
    return {each.code.code_id: each.code for each in served}
