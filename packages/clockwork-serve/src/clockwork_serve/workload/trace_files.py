"""Trace files read line by line: calls with timestamps, and both forms of the Azure Functions traces."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S, ms, plain
from clockwork_serve.workload.processes import Floats, Ints
from clockwork_serve.workload.tables import NO_SLO_MS, found

# ------------------------------------------------------------
# Lines of a trace file, plain or gzipped, one at a time; it never holds a file or guesses at line ends.


_LONGEST: Final = 1 << 20  # bytes of a line; a row of the official Azure files (1,440 minutes) has some 5,000
_BOM: Final = b"\xef\xbb\xbf"
_POINTER: Final = b"version https://git-lfs.github.com/"


def wrong(path: Path, line: int, field: str, expected: str, value: object, remedy: str) -> ConfigError:
    """The error about one field of one line."""
    shown = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return ConfigError(f"{path}:{line}: {field}: expected {expected}, found {found(shown)}; {remedy}")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Number, from 1, and content of every line that is not blank.

    Lines may end in ``\n`` or ``\r\n``, in one file too; a lone ``\r`` is refused. Raises
    :class:`ConfigError`.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            while line := file.readline(_LONGEST):
                number += 1
                if number == 1 and line.startswith(_POINTER):
                    raise wrong(
                        path, 1, "file", "a trace", "a pointer to it, of git-lfs", "fetch it: git lfs pull"
                    )
                if len(line) == _LONGEST and not line.endswith(b"\n"):
                    ends = "a longer one with a lone \\r in it" if b"\r" in line[:-1] else "a longer one"
                    raise wrong(
                        path, number, "line", f"at most {_LONGEST} bytes", ends, "is this a CSV file?"
                    )
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if b"\r" in line:
                    raise wrong(
                        path, number, "line end", r"\n or \r\n", "a lone \\r", "convert the file's line ends"
                    )
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise wrong(path, number + 1, "file", "whole gzip data", str(error), "fetch the file again") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a readable trace file, found: {error.strerror or error}; check the path"
        ) from None


def header_of(path: Path) -> tuple[int, bytes]:
    """The first line. Raises :class:`ConfigError` if there is none."""
    for number, line in lines(path):
        return number, line
    raise ConfigError(
        f"{path}:1: header: expected a line of column names, found an empty file; is it cut off?"
    )


# ------------------------------------------------------------
# Traces of one row per call, read as a stream and put in order; they are never held whole.
#
# A CSV file with a column TIMESTAMP (ISO 8601, such as ``2023-11-16 18:15:46.6805900``, or seconds), ``time``
# or ``seconds``, and perhaps columns ``function`` (or ``model``) and ``slo_ms``; a file of nothing but
# seconds, one a line; or JSON lines, such as Mooncake's, whose timestamps are ms. All names of columns in any
# case.


Call = tuple[int, int, bytes, int]
"""Line of the file, ns on the trace's own axis, name of the function (empty if the trace has none), SLO in ns
(0: the row has none)."""
Rows = Callable[[], Iterator[Call]]

LONGEST_DISORDER_NS: Final = 24 * 3600 * NS_PER_S
"""A call may come so much later in the file than it should; what is held in memory is this long at most."""
_CHUNK: Final = 1 << 13
_MINUTE_NS: Final = 60 * NS_PER_S
FAR_NS: Final = 1 << 62
_MOST_S: Final = 4e9
_TIME_COLUMNS: Final = ("timestamp", "seconds", "time")
_FUNCTION_COLUMNS: Final = ("function", "func", "model")
_SLO_COLUMNS: Final = ("slo_ms", "slo")
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

    def chunks(self) -> Iterator[tuple[int, Ints, Ints, Ints]]:
        """Calls in order: until when a chunk is complete; times (ns after the origin), functions, SLOs.

        Equal times stay in the order of the file. What is held is as long as the file's disorder.
        """
        place = {name: index for index, name in enumerate(self.names)}
        held = np.empty((0, 3), dtype=np.int64)
        came: list[tuple[int, int, int]] = []
        latest = self.origin_ns
        for _, at_ns, name, slo_ns in self.rows():
            latest = max(latest, at_ns)
            if self.origin_ns <= at_ns < self.until_ns:
                came.append((at_ns - self.origin_ns, place[name], slo_ns))
            elif latest - self.disorder_ns >= self.until_ns:
                break
            if len(came) >= max(_CHUNK, len(held)):
                held, came = _sorted(held, came), []
                horizon = latest - self.disorder_ns - self.origin_ns
                due = int(np.searchsorted(held[:, 0], horizon))
                yield horizon, *held[:due].T
                held = held[due:]
        yield self.length_ns, *_sorted(held, came).T


def _sorted(held: Ints, came: list[tuple[int, int, int]]) -> Ints:
    """The rows that were held and those that came, in order of time."""
    rows = np.concatenate([held, np.array(came, dtype=np.int64).reshape(-1, 3)])
    return rows[np.argsort(rows[:, 0], kind="stable")]


def survey(path: Path, rows: Rows, first: int, minutes: int | None) -> CallTrace:
    """Read a trace twice and note what reading it in order takes.

    ``first`` minutes after its first call are left out, ``minutes`` follow. Raises :class:`ConfigError`.
    """
    begin, latest, disorder = FAR_NS, -FAR_NS, 0
    for line, at_ns, _, _ in rows():
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
    for _, at_ns, name, _ in rows():
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
        raise wrong(path, line, field, f"seconds, of less than {plain(_MOST_S)}", text, "correct the row")
    return round(value * NS_PER_S)


class CallColumns(NamedTuple):
    """Lines of header, the number of columns, and which of them tells what; None: none does."""

    skipped: int
    width: int
    time: int
    function: int | None = None
    slo: int | None = None


def rows_timestamps(path: Path) -> Iterator[Call]:
    """Every row in the file's order. Raises :class:`ConfigError`."""
    columns = columns_of(path)
    if columns is None:
        yield from _rows_json(path)
        return
    time_column, function_column, slo_column = columns.time, columns.function, columns.slo
    for number, line in lines(path):
        if number <= columns.skipped:
            continue
        fields = line.split(b",")
        if len(fields) != columns.width:
            raise wrong(
                path, number, "row", f"{columns.width} fields, as the first line has", len(fields),
                "is it cut?",
            )  # fmt: skip
        text = fields[time_column]
        at_ns = (
            instant(path, number, "TIMESTAMP", text)
            if text.count(b"-") >= 2
            else seconds(path, number, "time", text)
        )
        function = b"" if function_column is None else fields[function_column].strip(b' "')
        yield number, at_ns, function, 0 if slo_column is None else slo_of(path, number, fields[slo_column])


def slo_of(path: Path, line: int, text: bytes) -> int:
    """An SLO in ms, as ns; 0 where there is none. Raises :class:`ConfigError`."""
    if not text.strip():
        return 0
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.001 <= value <= NO_SLO_MS:
        raise wrong(
            path, line, "slo_ms", f"milliseconds, 0.001 to {plain(NO_SLO_MS)}", text, "correct the row"
        )
    return ms(value)


def _rows_json(path: Path) -> Iterator[Call]:
    """Rows of JSON lines, whose ``timestamp`` is ms, as Mooncake's is."""
    for number, line in lines(path):
        try:
            at_ms = msgspec.json.decode(line, type=_JsonCall).timestamp
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise wrong(
                path, number, "row", '{"timestamp": MS, ...}', line, f"correct it ({error})"
            ) from None
        if not 0 <= at_ms < _MOST_S * 1e3:
            raise wrong(
                path, number, "timestamp", f"ms, less than {plain(_MOST_S * 1e3)}", at_ms, "correct it"
            )
        yield number, ms(at_ms), b"", 0


class _JsonCall(Struct):
    timestamp: float


def columns_of(path: Path) -> CallColumns | None:
    """The columns of a file of single calls, by its first line; None: it has JSON lines."""
    number, line = header_of(path)
    if line.lstrip().startswith(b"{"):
        return None
    names = [name.strip(b" \"'").decode("utf-8", "replace").lower() for name in line.split(b",")]
    if len(names) == 1 and names[0] not in _TIME_COLUMNS:
        try:
            float(names[0])
        except ValueError:
            pass
        else:
            return CallColumns(0, 1, 0)

    def of(known: tuple[str, ...]) -> int | None:
        return next((names.index(name) for name in known if name in names), None)

    time_column = of(_TIME_COLUMNS)
    if time_column is None:
        advice = "rename the column that holds the times"
        raise wrong(path, number, "header", "a column TIMESTAMP, time or seconds", line, advice)
    return CallColumns(number, len(names), time_column, of(_FUNCTION_COLUMNS), of(_SLO_COLUMNS))


def instant(path: Path, line: int, field: str, text: bytes) -> int:
    """A date and time as ns since 1970 UTC; one that names no offset is taken for UTC."""
    expected = "a time such as 2023-11-16 18:15:46.6805900"
    match = _ISO.fullmatch(text)
    if match is None:
        raise wrong(path, line, field, expected, text, "correct the row")
    day, clock, offset = match.groups()
    try:
        at_ns = np.datetime64(f"{day.decode()}T{clock.decode()}", "ns").astype(np.int64)
    except ValueError:
        raise wrong(path, line, field, expected, text, "correct the row") from None
    shift = 0
    if offset and offset not in b"Zz":
        sign = -1 if offset[:1] == b"-" else 1
        shift = sign * (int(offset[1:3]) * 3600 + int(offset[-2:]) * 60)
    return int(at_ns) - shift * NS_PER_S


# ------------------------------------------------------------
# Readers of the Azure Functions traces: calls per minute (2019), one row per call (2021); they map nothing.
#
# Official formats: https://github.com/Azure/AzurePublicDataset. A file of 2019 has the columns HashOwner,
# HashApp, HashFunction, Trigger and then minutes, numbered 1 to 1440 or any gapless part of it; several files
# follow one another in time. A row of 2021 is ``app,func,end_timestamp,duration`` in seconds.


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
    return _sorted_minutes(volumes, parts, stop - first, kept)


def line_2019(paths: list[Path], name: bytes) -> tuple[Path, int]:
    """The file and line of a function's first row; it is in one of them."""
    return next((path, number) for path in paths for number, line in lines(path) if line.startswith(name))


def _sorted_minutes(
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
            path, number, "row", f"{len(header)} fields, as the header has", len(fields),
            "is the row cut or joined?",
        )  # fmt: skip
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
        yield number, seconds(path, number, "end_timestamp", end) - took, app + b"," + function, 0
