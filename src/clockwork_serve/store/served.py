"""What compiling gives: a model and its code, ready to be served; nothing but the record."""

from __future__ import annotations

from msgspec import Struct

from clockwork_serve.messages import Code, Model


class Served(Struct, frozen=True, kw_only=True):
    """A version of a model ready to be served. Models of one architecture have equal codes."""

    model: Model
    code: Code
