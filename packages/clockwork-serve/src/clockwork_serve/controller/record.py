"""What the controller's state is made of, so that it can be forked, saved and restored (``state``)."""

from __future__ import annotations

from typing import Final

SHARED: Final = "shared"
"""``field: Annotated[type, SHARED]``: other fields may hold the same list, dict, set or tuple."""


class Record:
    """The base of every class whose instances are part of the controller's state.

    Their fields hold records, lists, dicts, sets and tuples of such, and values that never change: numbers,
    strings, messages, settings. No functions and no handles.

    A class of which there are many records declares the types of its fields (``field: type`` in its body),
    for a fork copies such fields faster. A list, dict, set or tuple in a declared field is in no other field,
    unless it is declared ``SHARED``.
    """

    __slots__ = ()
