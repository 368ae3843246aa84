"""Traces of one row per call, read as a stream and put in order; they are never held whole.

A CSV file with a column TIMESTAMP (ISO 8601, such as ``2023-11-16 18:15:46.6805900``, or seconds) or
``seconds``, and perhaps a column ``function``; or a file of nothing but seconds, one a line. All names of
columns in any case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.processes import Floats, Indices, Ints
from clockwork_serve.workload.trace_file import header_of, lines, wrong

Call = tuple[int, int, bytes]
"""Line of the file, ns on the trace's own axis, name of the function (empty if the trace has none)."""
Rows = Callable[[], Iterator[Call]]

LONGEST_DISORDER_NS: Final = 24 * 3600 * NS_PER_S
"""A call may come so much later in the file than it should; what is held in memory is this long at most."""
_CHUNK: Final = 1 << 13
_MINUTE_NS: Final = 60 * NS_PER_S
FAR_NS: Final = 1 << 62
_MOST_S: Final = 4e9
_TIME_COLUMNS: Final = ("timestamp", "seconds")
_FUNCTION_COLUMNS: Final = ("function", "func")
_ISO: Final = re.compile(
    rb"\s*\"?(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(Z|[+-]\d\d:?\d\d)?\"?\s*", re.IGNORECASE
)


@dataclass(slots=True)
class CallTrace:
    """What one reading of a trace has told: enough to read it again in order.

    ``names`` of functions, the busiest first, equal ones by name, with their ``volumes``; ``origin_ns``:
    where the chosen part begins, on the trace's own axis; ``length_ns``: from there to its end; ``until_ns``:
    where it ends, on that axis; ``disorder_ns``: how much earlier than one before it a call can be.
    """

    names: tuple[bytes, ...]
    volumes: Floats
    origin_ns: int
    length_ns: int
    until_ns: int
    disorder_ns: int
    rows: Rows

    def chunks(self) -> Iterator[tuple[int, Ints, Indices]]:
        """Calls in order: until before when a chunk is complete, times and functions; in ns after the origin.

        Equal times stay in the order of the file. What is held is as long as the file's disorder.
        """
        place = {name: index for index, name in enumerate(self.names)}
        held_times, held_functions = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
        times: list[int] = []
        functions: list[int] = []
        latest = self.origin_ns
        for _, at_ns, name in self.rows():
            latest = max(latest, at_ns)
            if self.origin_ns <= at_ns < self.until_ns:
                times.append(at_ns - self.origin_ns)
                functions.append(place[name])
            elif latest - self.disorder_ns >= self.until_ns:
                break
            if len(times) >= max(_CHUNK, held_times.size):
                held_times, held_functions = _sorted(held_times, held_functions, times, functions)
                times, functions = [], []
                horizon = latest - self.disorder_ns - self.origin_ns
                due = int(np.searchsorted(held_times, horizon))
                yield horizon, held_times[:due], held_functions[:due]
                held_times, held_functions = held_times[due:], held_functions[due:]
        yield self.length_ns, *_sorted(held_times, held_functions, times, functions)


def _sorted(
    held_times: Ints, held_functions: Indices, times: list[int], functions: list[int]
) -> tuple[Ints, Indices]:
    """What was held and what came, in order of time."""
    all_times = np.concatenate([held_times, np.array(times, dtype=np.int64)])
    order = np.argsort(all_times, kind="stable")
    return all_times[order], np.concatenate([held_functions, np.array(functions, dtype=np.int32)])[order]


def survey(path: Path, rows: Rows, first: int, minutes: int | None) -> CallTrace:
    """Read a trace twice and note what reading it in order takes.

    ``first`` minutes after its first call are left out, ``minutes`` follow. Raises :class:`ConfigError`.
    """
    begin, latest, disorder = FAR_NS, -FAR_NS, 0
    for line, at_ns, _ in rows():
        begin = min(begin, at_ns)
        if at_ns < latest - disorder:
            disorder = latest - at_ns
            if disorder > LONGEST_DISORDER_NS:
                expected = f"at most {LONGEST_DISORDER_NS / NS_PER_S:g} s less than in a row before"
                found_s = f"{disorder / NS_PER_S:g} s less"
                raise wrong(path, line, "time", expected, found_s, "sort the file by time")
        latest = max(latest, at_ns)
    if begin == FAR_NS:
        raise ConfigError(f"{path}:2: row: expected at least one call, found none; is the file cut off?")
    origin = begin + first * _MINUTE_NS
    until = FAR_NS if minutes is None else origin + minutes * _MINUTE_NS
    volumes: dict[bytes, int] = {}
    for _, at_ns, name in rows():
        if origin <= at_ns < until:
            volumes[name] = volumes.get(name, 0) + 1
    if not volumes:
        raise ConfigError(
            f"{path}: first_minute: expected calls after minute {first}, found the last in minute "
            f"{(latest - begin) // _MINUTE_NS}; choose an earlier part"
        )
    names = sorted(volumes, key=lambda name: (-volumes[name], name))
    counts = np.array([volumes[name] for name in names], dtype=np.float64)
    length = min(latest + 1, until) - origin
    return CallTrace(tuple(names), counts, origin, length, until, disorder, rows)


def seconds(path: Path, line: int, field: str, text: bytes) -> int:
    """A number of seconds that an axis of ns can hold, in ns. Raises :class:`ConfigError`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < _MOST_S:
        raise wrong(path, line, field, f"seconds, of less than {_MOST_S:g}", text, "correct the row")
    return round(value * NS_PER_S)


def has_functions(path: Path) -> bool:
    """Whether the file names functions."""
    return _columns(path)[2] is not None


def rows_timestamps(path: Path) -> Iterator[Call]:
    """Every row in the file's order. Raises :class:`ConfigError`."""
    skip, time_column, function_column, width = _columns(path)
    for number, line in lines(path):
        if number <= skip:
            continue
        fields = line.split(b",")
        if len(fields) != width:
            raise wrong(
                path, number, "row", f"{width} fields, as the first line has", len(fields), "is it cut?"
            )
        text = fields[time_column]
        at_ns = _instant(path, number, text) if text.count(b"-") >= 2 else seconds(path, number, "time", text)
        yield number, at_ns, b"" if function_column is None else fields[function_column].strip()


def _columns(path: Path) -> tuple[int, int, int | None, int]:
    """Lines of header, index of the column of times, of functions if there is one, number of columns."""
    number, line = header_of(path)
    names = [name.strip(b" \"'").decode("utf-8", "replace").lower() for name in line.split(b",")]
    if len(names) == 1 and names[0] not in _TIME_COLUMNS:
        try:
            float(names[0])
        except ValueError:
            pass
        else:
            return 0, 0, None, 1
    time_column = next((names.index(name) for name in _TIME_COLUMNS if name in names), None)
    if time_column is None:
        raise wrong(
            path,
            number,
            "header",
            "a column TIMESTAMP or seconds",
            line,
            "rename the column that holds the times",
        )
    function_column = next((names.index(name) for name in _FUNCTION_COLUMNS if name in names), None)
    return number, time_column, function_column, len(names)


def _instant(path: Path, line: int, text: bytes) -> int:
    """A date and time as ns since 1970 UTC; one that names no offset is taken for UTC."""
    expected = "a time such as 2023-11-16 18:15:46.6805900"
    match = _ISO.fullmatch(text)
    if match is None:
        raise wrong(path, line, "TIMESTAMP", expected, text, "correct the row")
    day, clock, offset = match.groups()
    try:
        instant = np.datetime64(f"{day.decode()}T{clock.decode()}", "ns").astype(np.int64)
    except ValueError:
        raise wrong(path, line, "TIMESTAMP", expected, text, "correct the row") from None
    shift = 0
    if offset and offset not in b"Zz":
        sign = -1 if offset[:1] == b"-" else 1
        shift = sign * (int(offset[1:3]) * 3600 + int(offset[-2:]) * 60)
    return int(instant) - shift * NS_PER_S
