"""What lanes executed lately, in bounded memory, and as few boxes as a screen has room for.

A *box* is an action on its lane: measured, and as predicted. All times are whole microseconds on one axis.
The newest boxes are kept as they are; older ones are merged, so that each lane has a few thousand of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.void]
Row = tuple[int, ...]

BOX: Final = np.dtype(
    [
        ("start", "<i8"), ("lasted", "<u4"), ("ahead", "<i4"), ("expected", "<u4"), ("first", "<i4"),
        ("last", "<i4"), ("model", "<u4"), ("batch", "<u2"), ("requests", "<u2"), ("status", "u1"),
    ]
)  # fmt: skip
"""``ahead``: from its start to the predicted one; ``first``, ``last``: to the deadlines of its requests."""
MERGED: Final = np.dtype(
    [
        ("start", "<i8"), ("lasted", "<u4"), ("model", "<u4"), ("status", "u1"), ("count", "<u4"),
        ("busy", "<u4"),
    ]
)  # fmt: skip
"""``count`` boxes near each other, which took ``busy`` of ``lasted``; the model is that of the longest."""
CHUNK_ROWS: Final = 256
_U4: Final = (1 << 32) - 1
_I4: Final = (1 << 31) - 1
_U2: Final = (1 << 16) - 1


def box(
    start_us: int, lasted_us: int, predicted: tuple[int, int], deadlines: tuple[int, int], *numbers: int
) -> Row:
    """A row of ``BOX``; ``predicted`` is an instant and a duration.

    ``numbers``: model, batch, requests, status. What does not fit is cut to the nearest number that does.
    """
    model, batch, requests, status = numbers
    near = [min(max(at - start_us, -_I4), _I4) for at in (predicted[0], *deadlines)]
    return (
        start_us, min(max(lasted_us, 0), _U4), near[0], min(max(predicted[1], 0), _U4), near[1], near[2],
        model, min(batch, _U2), min(requests, _U2), status,
    )  # fmt: skip


def merged(rows: Rows, width_us: int) -> Rows:
    """Boxes of ``BOX``, those that begin in the same stretch of ``width_us`` merged into one."""
    if not len(rows):
        return np.empty(0, MERGED)
    key = rows["start"] // width_us
    rows = rows[np.lexsort((rows["lasted"], key))]
    key = rows["start"] // width_us
    first = np.concatenate(([0], np.flatnonzero(np.diff(key)) + 1))
    found = np.empty(len(first), MERGED)
    start = np.minimum.reduceat(rows["start"], first)
    end = np.maximum.reduceat(rows["start"] + rows["lasted"], first)
    bounds = np.append(first, len(rows))
    found["start"], found["lasted"] = start, np.minimum(end - start, _U4)
    found["model"] = rows["model"][bounds[1:] - 1]
    found["status"] = np.maximum.reduceat(rows["status"], first)
    found["count"] = np.diff(bounds)
    found["busy"] = np.minimum(np.add.reduceat(rows["lasted"].astype(np.int64), first), _U4)
    return found


class _Chunk(NamedTuple):
    """Rows that follow each other, and between when and when they lie; what they took in all."""

    rows: Rows
    start_us: int
    end_us: int
    busy_us: int


def _chunk(rows: Rows, busy: str = "lasted") -> _Chunk:
    last = rows[-1]
    end_us = int(last["start"]) + int(last["lasted"])
    return _Chunk(rows, int(rows["start"][0]), end_us, int(rows[busy].sum(dtype=np.int64)))


class LaneBoxes:
    """The boxes of one lane, oldest first; ``added`` were ever added."""

    __slots__ = ("_chunks", "_merged", "_new", "added")

    def __init__(self) -> None:
        self.added = 0
        self._new: list[Row] = []
        self._chunks: deque[_Chunk] = deque()
        self._merged: deque[_Chunk] = deque()

    def add(self, row: Row) -> bool:
        """Add a row of ``BOX``; whether a chunk became full."""
        self.added += 1
        self._new.append(row)
        if len(self._new) < CHUNK_ROWS:
            return False
        self._chunks.append(_chunk(np.array(self._new, BOX)))
        self._new.clear()
        return True

    @property
    def oldest_us(self) -> int | None:
        """When the last box of the oldest whole chunk ended; None without one."""
        return self._chunks[0].end_us if self._chunks else None

    def merge_oldest(self, width_us: int) -> None:
        """Give up the details of the oldest chunk."""
        self._merged.append(_chunk(merged(self._chunks.popleft().rows, width_us), "busy"))

    def forget(self, until_us: int) -> int:
        """Drop what ended before; how many whole chunks of unmerged boxes that were."""
        while self._merged and self._merged[0].end_us < until_us:
            self._merged.popleft()
        count = len(self._chunks)
        while self._chunks and self._chunks[0].end_us < until_us:
            self._chunks.popleft()
        return count - len(self._chunks)

    def since(self, cursor: int) -> list[Row]:
        """The boxes that were added after the first ``cursor`` ones, as far as they are kept."""
        wanted = self.added - cursor
        have = len(self._new)
        found = self._new[max(0, have - wanted) :]
        for chunk in reversed(self._chunks):
            if have >= wanted:
                break
            found[:0] = chunk.rows[max(0, len(chunk.rows) - wanted + have) :].tolist()
            have += len(chunk.rows)
        return found

    def between(self, from_us: int, to_us: int) -> tuple[Rows, Rows]:
        """What overlaps a stretch: boxes, and merged ones."""
        new = [_chunk(np.array(self._new, BOX))] if self._new else []
        return (
            _overlapping([*self._chunks, *new], from_us, to_us, BOX),
            _overlapping(self._merged, from_us, to_us, MERGED),
        )

    def busy_us(self, from_us: int, to_us: int) -> int:
        """How much of a stretch the lane was busy, as far as boxes have details."""
        total = sum(max(0, min(row[0] + row[1], to_us) - max(row[0], from_us)) for row in self._new)
        for chunk in self._chunks:
            if from_us <= chunk.start_us and chunk.end_us <= to_us:
                total += chunk.busy_us
            elif chunk.start_us < to_us and chunk.end_us > from_us:
                start = np.maximum(chunk.rows["start"], from_us)
                end = np.minimum(chunk.rows["start"] + chunk.rows["lasted"], to_us)
                total += int(np.maximum(end - start, 0).sum())
        return total


def _overlapping(chunks: Iterable[_Chunk], from_us: int, to_us: int, kind: Any) -> Rows:
    near = [one.rows for one in chunks if one.start_us <= to_us and one.end_us >= from_us]
    if not near:
        return np.empty(0, kind)
    rows: Rows = np.concatenate(near)
    inside: Rows = rows[(rows["start"] <= to_us) & (rows["start"] + rows["lasted"] >= from_us)]
    return inside


def drawn_new(rows: Iterable[Row], pixel_us: int) -> list[Sequence[int]]:
    """A few boxes in the order in which they were added, as :func:`drawn` gives many."""
    found: list[Sequence[int]] = []
    open_: list[int] = []
    pixel = longest = -1
    for row in rows:
        start, lasted = row[0], row[1]
        if lasted >= pixel_us:
            found.append(row)
        elif start // pixel_us == pixel:
            open_[1] = max(open_[1], start + lasted - open_[0])
            open_[3] = max(open_[3], row[9])
            open_[4] += 1
            open_[5] += lasted
            if lasted > longest:
                open_[2], longest = row[6], lasted
        else:
            open_ = [start, lasted, row[6], row[9], 1, lasted]
            pixel, longest = start // pixel_us, lasted
            found.append(open_)
    found.sort(key=itemgetter(0))
    return found


def drawn(boxes: Rows, older: Rows, pixel_us: int) -> list[Row]:
    """Boxes for a screen, by their starts: those of a pixel or more have ten numbers, merged ones six."""
    wide = boxes["lasted"] >= pixel_us
    rows: list[Row] = boxes[wide].tolist()
    rows += merged(boxes[~wide], pixel_us).tolist()
    rows += _rejoined(older, pixel_us).tolist()
    rows.sort()
    return rows


def _rejoined(rows: Rows, width_us: int) -> Rows:
    """Merged boxes merged again, for wider pixels."""
    if not len(rows) or width_us <= int(rows["lasted"].max()):
        return rows
    first = np.concatenate(([0], np.flatnonzero(np.diff(rows["start"] // width_us)) + 1))
    end = np.maximum.reduceat(rows["start"] + rows["lasted"], first)
    found = rows[first].copy()
    found["lasted"] = np.minimum(end - found["start"], _U4)
    found["status"] = np.maximum.reduceat(rows["status"], first)
    for name in ("count", "busy"):
        found[name] = np.minimum(np.add.reduceat(rows[name].astype(np.int64), first), _U4)
    return found
