"""What the controller's state is made of, so that it can be forked, saved and restored (``state``)."""

from __future__ import annotations

from clockwork_serve.machine import mypyc_attr


@mypyc_attr(serializable=True)
class Record:
    """The base of every class whose instances are part of the controller's state.

    Their fields hold records, lists, dicts, sets and tuples of such, and values that never change: numbers,
    strings, messages, settings. No functions and no handles. Compiled, a class of this base can be made
    without its ``__init__``, as in pure Python.
    """

    __slots__ = ()
