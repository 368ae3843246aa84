"""Readers of the Azure Functions traces: calls per minute (2019), one row per call (2021); they map nothing.

Official formats: https://github.com/Azure/AzurePublicDataset. A file of 2019 has the columns HashOwner,
HashApp, HashFunction, Trigger and then minutes, numbered 1 to 1440 or any gapless part of it; several files
follow one another in time. A row of 2021 is ``app,func,end_timestamp,duration`` in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from clockwork_serve.errors import ConfigError
from clockwork_serve.workload.processes import Floats
from clockwork_serve.workload.timestamps import Call, seconds
from clockwork_serve.workload.trace_file import header_of, lines, wrong

COLUMNS_2019: Final = (b"HashOwner", b"HashApp", b"HashFunction", b"Trigger")
COLUMNS_2021: Final = b"app,func,end_timestamp,duration"
_DIGITS: Final = b"0123456789,"
_MOST_CALLS: Final = 2**31 - 1


@dataclass(slots=True)
class MinuteTrace:
    """Calls per minute of every function that has any.

    ``counts``: one row per minute kept, one column per function; ``volumes``: calls of each function in all
    ``minutes`` chosen, of which the first are kept. Functions are in the order of their volumes, the busiest
    first; equal ones in the order of their names.
    """

    names: tuple[bytes, ...]
    volumes: Floats
    minutes: int
    counts: np.ndarray

    def minute(self, index: int) -> np.ndarray | None:
        """Calls of every function in that minute; None behind the last one."""
        row: np.ndarray | None = self.counts[index] if index < len(self.counts) else None
        return row


def is_2021(path: Path) -> bool:
    """Whether a file has one row per call."""
    return header_of(path)[1].replace(b" ", b"") == COLUMNS_2021


def read_minutes(paths: list[Path], first: int, minutes: int | None, kept: int) -> MinuteTrace:
    """Read files of 2019 that follow one another in time.

    ``first``: minutes left out at the beginning; ``minutes``: how many are chosen (None: all that follow);
    ``kept``: of these, the first so many are held in memory. A function named twice is one, with the sum of
    its calls. Raises :class:`ConfigError` naming file, line, field, expected and found.
    """
    widths = [_minutes_of(path) for path in paths]
    total = sum(widths)
    if first >= total:
        raise ConfigError(
            f"{paths[0]}: first_minute: expected less than the trace's {total} minutes, found {first}"
        )
    stop = total if minutes is None else min(total, first + minutes)
    kept = min(kept, stop - first)
    volumes: dict[bytes, int] = {}
    parts: list[tuple[int, list[bytes], list[np.ndarray]]] = []
    offset = 0
    for path, width in zip(paths, widths, strict=True):
        keys: list[bytes] = []
        rows: list[np.ndarray] = []
        low, high = max(0, first - offset), min(width, stop - offset)
        if low < high:
            keep = slice(low, max(low, min(high, first + kept - offset)))
            for key, counts in _rows_2019(path, width):
                if calls := int(counts[low:high].sum()):
                    volumes[key] = volumes.get(key, 0) + calls
                    keys.append(key)
                    rows.append(counts[keep].astype(np.int32))
            parts.append((offset + low - first, keys, rows))
        offset += width
    if not volumes:
        raise ConfigError(f"{paths[0]}: expected at least one call in minutes {first} to {stop}, found none")
    return _sorted(volumes, parts, stop - first, kept)


def _sorted(
    volumes: dict[bytes, int], parts: list[tuple[int, list[bytes], list[np.ndarray]]], minutes: int, kept: int
) -> MinuteTrace:
    names = sorted(volumes, key=lambda name: (-volumes[name], name))
    place = {name: index for index, name in enumerate(names)}
    counts = np.zeros((kept, len(names)), dtype=np.int32)
    for start, keys, rows in parts:
        for key, row in zip(keys, rows, strict=True):
            counts[start : start + row.size, place[key]] += row
        rows.clear()
    return MinuteTrace(
        tuple(names), np.array([volumes[name] for name in names], dtype=np.float64), minutes, counts
    )


def _minutes_of(path: Path) -> int:
    """How many columns of minutes a file has; its header is checked."""
    number, line = header_of(path)
    columns = line.split(b",")
    for index, name in enumerate(COLUMNS_2019):
        if index >= len(columns) or columns[index].strip() != name:
            shown = columns[index] if index < len(columns) else "nothing"
            raise wrong(
                path, number, f"column {index + 1}", name.decode(), shown,
                "this is no trace of Azure Functions 2019, nor of 2021 (app,func,end_timestamp,duration)",
            )  # fmt: skip
    minutes = columns[len(COLUMNS_2019) :]
    if not minutes:
        raise wrong(path, number, "column 5", "the number of a minute", "nothing", "is the file cut off?")
    for index, name in enumerate(minutes, start=len(COLUMNS_2019) + 1):
        if not name.strip().isdigit() or len(name) > 18:
            raise wrong(path, number, f"column {index}", "the number of a minute", name, "correct the header")
    for before, after in pairwise(minutes):
        if int(after) != int(before) + 1:
            raise wrong(
                path, number, f"column {after.decode()}", f"minute {int(before) + 1}, without a gap", after,
                "add the missing minutes or name two files",
            )  # fmt: skip
    return len(minutes)


def _rows_2019(path: Path, width: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Name and calls per minute of every row."""
    source = lines(path)
    header = next(source)[1].split(b",")
    for number, line in source:
        names, counts = _split(line, 4)
        empty = b",," in b",%b," % counts
        if empty or counts.translate(None, _DIGITS) or counts.count(b",") != width - 1:
            raise _bad_row(path, number, line, header)
        row = np.fromstring(counts, dtype=np.int64, sep=",")
        if row.size != width or int(row.max()) > _MOST_CALLS:
            raise _bad_row(path, number, line, header)
        yield names.rpartition(b",")[0], row


def _split(line: bytes, fields: int) -> tuple[bytes, bytes]:
    """The first ``fields`` fields, and the rest."""
    at = -1
    for _ in range(fields):
        at = line.find(b",", at + 1)
        if at < 0:
            return line, b""
    return line[:at], line[at + 1 :]


def _bad_row(path: Path, number: int, line: bytes, header: list[bytes]) -> ConfigError:
    """What is wrong with a row of 2019."""
    fields = line.split(b",")
    if len(fields) != len(header):
        return wrong(
            path,
            number,
            "row",
            f"{len(header)} fields, as the header has",
            len(fields),
            "is the row cut or joined?",
        )
    for name, field in zip(header[4:], fields[4:], strict=True):
        if not field.isdigit() or len(field) > 18 or int(field) > _MOST_CALLS:
            expected = f"a whole number of calls in 0..{_MOST_CALLS}"
            return wrong(path, number, f"minute {name.decode()}", expected, field, "correct the count")
    raise AssertionError(f"{path}:{number}: nothing is wrong with this row")


def rows_2021(path: Path) -> Iterator[Call]:
    """Every row of a file of 2021: when the call came (its end less its duration), and its function."""
    source = lines(path)
    next(source)
    for number, line in source:
        fields = line.split(b",")
        if len(fields) != 4:
            raise wrong(
                path, number, "row", f"4 fields ({COLUMNS_2021.decode()})", len(fields), "is the row cut?"
            )
        app, function, end, duration = fields
        took = seconds(path, number, "duration", duration)
        if took < 0:
            raise wrong(path, number, "duration", "seconds >= 0", duration, "correct the row")
        yield number, seconds(path, number, "end_timestamp", end) - took, app + b"," + function
