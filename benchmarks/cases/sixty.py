"""Sixty cases that are tests, too: each kind of mixing, and what must keep its batches."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases.case import Case


def sixty() -> Iterator[Case]:
    """The cases."""
    yield from ()
