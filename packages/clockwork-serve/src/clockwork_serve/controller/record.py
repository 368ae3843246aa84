"""What the controller's state is made of, so that it can be forked, saved and restored (``state``)."""

from __future__ import annotations


class Record:
    """The base of every class whose instances are part of the controller's state.

    Their fields hold records, lists, dicts, sets and tuples of such, and values that never change: numbers,
    strings, messages, settings. No functions and no handles.
    """

    __slots__ = ()
