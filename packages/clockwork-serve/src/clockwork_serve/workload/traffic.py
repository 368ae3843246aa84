"""What a user's own servers logged of their requests: access logs, tables, JSON lines, recordings of bench.

Each source is read once, as a stream, and says afterwards what it could not tell. A journal is read by
``apps.traffic``, for it is above this package.
"""

from __future__ import annotations

import math
import re
from calendar import timegm
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import unquote_to_bytes

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S, counted
from clockwork_serve.workload.tables import MOST_RPS
from clockwork_serve.workload.trace_files import header_of, instant, lines, seconds, slo_of, wrong

USUAL_PATHS: Final = (
    r"/v2/models/([^/\s?]+)(?:/versions/[^/\s?]+)?/(?:infer|generate)"
    r"|/v1/models/([^/\s?:]+)(?:/versions/[^/\s?:]+)?:(?:predict|classify|regress)"
    r"|/predictions/([^/\s?]+)"
)
"""Where a request's path names its model: the Open Inference Protocol, TensorFlow Serving, TorchServe."""
_TIMES: Final = ("timestamp", "time", "seconds", "ts", "@timestamp", "time_iso8601", "start_time")
_MODELS: Final = ("model", "model_name", "function", "func")
_PATHS: Final = ("path", "uri", "request_uri", "url", "request")
_SLOS: Final = ("slo_ms", "slo")
_BENCH: Final = b"CWBENCH1"
_ROWS: Final = 1 << 16
_WALL_S: Final = 1e9  # seconds since 1970 are more than this, and those of a run less
_MOST_ROW: Final = 64
_LOG: Final = re.compile(
    rb"\S+ \S+ .*?\[(\d\d)/([A-Z][a-z][a-z])/(\d{4}):(\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d)\]"
    rb" \"([^\"]*)\" \d{3}\b"
)
_MONTHS: Final = b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


class RequestClass(NamedTuple):
    """What the requests of one load have in common; ``load`` is what the source calls it."""

    tenant: str = ""
    priority: int = 0
    decide_ns: int = -1
    load: str = ""


class LoggedRequest(NamedTuple):
    """A request: the line or record that tells of it, when it came on the source's axis, its model.

    ``slo_ns`` is 0 where the source does not tell.
    """

    line: int
    at_ns: int
    model: str
    slo_ns: int = 0
    whose: RequestClass = RequestClass()


class TrafficSource(Protocol):
    """A source of requests.

    ``wall``: its axis is ns since 1970; known with the first request. ``done_bytes`` of the source are read.
    """

    path: Path
    wall: bool
    done_bytes: int

    def requests(self) -> Iterator[LoggedRequest]:
        """All requests, as they stand there. Raises :class:`ConfigError`."""
        ...

    def notes(self) -> list[str]:
        """What was lost, in sentences; complete after the last request."""
        ...


class _Lines:
    """A text file of one request a line."""

    def __init__(self, path: Path, model: str, paths: str) -> None:
        self.path = path
        self.wall = False
        self.done_bytes = 0
        self.unsized = True
        self._model = model
        try:
            self._paths = re.compile(paths.encode())
        except re.error as error:
            raise ConfigError(f"path: expected a regular expression, found {paths!r:.80}: {error}") from None
        if not self._paths.groups:
            raise ConfigError(
                f"path: expected a group (...) that is the model's name, found none in {paths!r:.80}; add it"
            )
        self._lost: Counter[str] = Counter()
        self._first: dict[str, int] = {}
        self._slos = True

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        for number, line in lines(self.path):
            self.done_bytes += len(line) + 1
            yield number, line

    def _lose(self, what: str, line: int) -> None:
        self._lost[what] += 1
        self._first.setdefault(what, line)

    def notes(self) -> list[str]:
        """What was lost, in sentences."""
        said = ["sizes of inputs are not told: each request has one row of its model's usual shape"]
        if not self._slos:
            said.append("SLOs are not told: --slo-ms gives one to all")
        first = [f", the first in line {self._first[what]}" for what in self._lost]
        return said + [one + where for one, where in zip(told(self._lost), first, strict=True)]

    def _named(self, line: int, name: bytes) -> str:
        """A model's name. Raises :class:`ConfigError` for one that no scenario can have."""
        try:
            text = name.decode()
        except UnicodeDecodeError:
            text = ""
        if not text or not text.isprintable() or text != text.strip() or '"' in text or "," in text:
            raise wrong(
                self.path, line, "model", "a name, without commas, quotes or blanks around it", name,
                "correct the row",
            )  # fmt: skip
        return text

    def _missing(self, line: int, row: bytes) -> str:
        """The model of a row that names none. Raises :class:`ConfigError` if none was given for these."""
        if self._model:
            return self._model
        raise wrong(
            self.path, line, "model", "a value", row[:_MOST_ROW], "give one to such rows: --model NAME"
        )

    def _in_path(self, text: bytes) -> bytes | None:
        match = self._paths.search(text)
        return None if match is None else unquote_to_bytes(next(one for one in match.groups() if one))

    def _at(self, line: int, text: bytes) -> int:
        """When a row came: a date and time, or a number of seconds, ms, us or ns."""
        if text.count(b"-") >= 2:
            self.wall = True
            return instant(self.path, line, "time", text)
        at_ns = seconds(self.path, line, "time", _in_seconds(text))
        self.wall = self.wall or at_ns > _WALL_S * NS_PER_S
        return at_ns


def _in_seconds(text: bytes) -> bytes:
    """A number that counts seconds since 1970, or so many thousandths of them, as seconds."""
    number = text.strip(b'" ')
    whole, _, part = number.partition(b".")
    if not whole.isdigit() or len(whole) < 12:
        return number
    places = 3 * ((len(whole) - 9) // 3)
    return whole[:-places] + b"." + whole[-places:] + part


class TableTraffic(_Lines):
    """A CSV file: columns ``time``, ``model``, and perhaps ``slo_ms``, ``tenant``, ``priority``.

    Without a header: time, model, SLO.
    """

    def requests(self) -> Iterator[LoggedRequest]:
        """All rows. Raises :class:`ConfigError`."""
        skipped, columns = self._columns()
        width, at, model = len(columns), _of(columns, _TIMES), _of(columns, _MODELS)
        slo, tenant, priority = _of(columns, _SLOS), _of(columns, ("tenant",)), _of(columns, ("priority",))
        self._slos = slo is not None
        assert at is not None, "a table has times"
        for number, line in self._lines():
            if number <= skipped:
                continue
            fields = [field.strip() for field in line.split(b",")]
            if len(fields) != width:
                raise wrong(
                    self.path, number, "row", f"{width} fields, as the first line has", len(fields),
                    "is it cut?",
                )  # fmt: skip
            name = (
                self._missing(number, line)
                if model is None
                else self._named(number, fields[model].strip(b'"'))
            )
            whose = RequestClass(
                "" if tenant is None else fields[tenant].strip(b'"').decode("utf-8", "replace"),
                0 if priority is None else self._priority(number, fields[priority]),
            )
            slo_ns = 0 if slo is None else slo_of(self.path, number, fields[slo])
            yield LoggedRequest(number, self._at(number, fields[at]), name, slo_ns, whose)

    def _columns(self) -> tuple[int, list[str]]:
        number, line = header_of(self.path)
        names = [name.strip(b" \"'").decode("utf-8", "replace").lower() for name in line.split(b",")]
        if _of(names, _TIMES) is not None:
            return number, names
        if names[0][:1].isdigit() and len(names) <= 3:
            return 0, ["time", "model", "slo_ms"][: len(names)]
        raise wrong(
            self.path, number, "header", f"a column of times ({', '.join(_TIMES)})", line[:_MOST_ROW],
            "name the columns time, model and slo_ms",
        )  # fmt: skip

    def _priority(self, line: int, text: bytes) -> int:
        if not text:
            return 0
        if not text.isdigit() or not int(text) <= 15:
            raise wrong(self.path, line, "priority", "a whole number in 0..15", text, "correct the row")
        return int(text)


class JsonTraffic(_Lines):
    """JSON lines, as servers and proxies log them: a time, and a model or the path that names it."""

    def requests(self) -> Iterator[LoggedRequest]:
        """All lines that are requests for a model. Raises :class:`ConfigError`."""
        for number, line in self._lines():
            row = self._row(number, line)
            at = _value(row, _TIMES)
            if at is None:
                raise wrong(
                    self.path, number, "time", f"one of {', '.join(_TIMES)}", line[:_MOST_ROW], "add it"
                )
            if name := _value(row, _MODELS):
                model = self._named(number, name)
            elif path := _value(row, _PATHS):
                if (named := self._in_path(path)) is None:
                    self._lose("line without a model in its path (health, metadata, ...)", number)
                    continue
                model = self._named(number, named)
            else:
                model = self._missing(number, line)
            slo = _value(row, _SLOS)
            self._slos = self._slos and slo is not None
            whose = RequestClass((_value(row, ("tenant",)) or b"").decode())
            if "input_length" in row:  # Mooncake's timestamps are ms of a run
                at += b"e-3"
            slo_ns = slo_of(self.path, number, slo or b"")
            yield LoggedRequest(number, self._at(number, at), model, slo_ns, whose)

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            return msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise wrong(
                self.path, number, "row", "an object in JSON", line[:_MOST_ROW], f"correct it ({error})"
            ) from None


class LogTraffic(_Lines):
    """An access log in the common or combined format, as nginx, Apache, Envoy's and others' are.

    Its times are whole seconds, mostly of the responses; the requests of a second are spread over it evenly.
    """

    def requests(self) -> Iterator[LoggedRequest]:
        """All lines that are requests for a model."""
        self.wall, self._slos = True, False
        held: list[LoggedRequest] = []
        for number, line in self._lines():
            match = _LOG.match(line)
            if match is None:
                self._lose("line in another form than an access log has", number)
                continue
            *when, asked = match.groups()
            named = self._in_path(asked)
            if named is None:
                self._lose("line without a model in its path (health, metadata, ...)", number)
                continue
            request = LoggedRequest(number, self._second(number, when), self._named(number, named))
            if held and request.at_ns != held[0].at_ns:
                yield from _spread(held)
                held = []
            held.append(request)
        yield from _spread(held)

    def notes(self) -> list[str]:
        """What was lost, in sentences."""
        times = (
            "times are whole seconds, of the ends of requests: those of a second are spread over it evenly"
        )
        return [times, *super().notes()]

    def _second(self, number: int, when: list[bytes]) -> int:
        day, month, year, hour, minute, second, sign, hours, minutes = when
        if month not in _MONTHS:
            raise wrong(self.path, number, "time", "a month such as Oct", month, "correct the line")
        parts = (int(year), _MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second), 0, 0, 0)
        shift_s = int(hours) * 3600 + int(minutes) * 60
        return (timegm(parts) - (shift_s if sign == b"+" else -shift_s)) * NS_PER_S


def _spread(held: list[LoggedRequest]) -> Iterator[LoggedRequest]:
    """Requests of one second, spread over it."""
    for at, request in enumerate(held):
        yield request._replace(at_ns=request.at_ns + (2 * at + 1) * NS_PER_S // (2 * len(held)))


class _Series(Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class _Matrix(Struct):
    result: list[_Series]


class _RangeAnswer(Struct):
    data: _Matrix


class RatesTraffic:
    """What Prometheus answers to a range query: requests a second by model, or counters of them.

    Instants are drawn: a Poisson process whose rate is each step's, the same whenever it is read.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self.wall = True
        self.done_bytes = 0
        self._model = model
        self._gaps = 0

    def requests(self) -> Iterator[LoggedRequest]:
        """The requests of one step after the other. Raises :class:`ConfigError`."""
        rng = np.random.Generator(np.random.PCG64(0))
        for number, ((before_ns, _), (at_ns, expected)) in enumerate(pairwise(self._steps()), start=1):
            drawn = [
                (at, model)
                for model, count in expected.items()
                for at in rng.integers(before_ns, at_ns, rng.poisson(count)).tolist()
            ]
            for at, model in sorted(drawn):
                yield LoggedRequest(number, at, model)

    def _steps(self) -> list[tuple[int, dict[str, float]]]:
        """Instants in order, and how many requests for each model came since the one before."""
        try:
            series = msgspec.json.decode(self.path.read_bytes(), type=_RangeAnswer).data.result
            tables = [{at: float(value) for at, value in one.values} for one in series]
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.path}: data.result: expected a range query's answer, found {error}; ask query_range"
            ) from None
        times = sorted({at for table in tables for at in table})
        found = [(round(at * NS_PER_S), dict[str, float]()) for at in times]
        for number, (one, table) in enumerate(zip(series, tables, strict=True)):
            model = next((one.metric[name] for name in _MODELS if one.metric.get(name)), self._model)
            if not model:
                raise ConfigError(
                    f"{self.path}: data.result[{number}].metric: expected a label model, found "
                    f"{', '.join(one.metric) or 'none'}; sum by (model), or give --model NAME"
                )
            counts = one.metric.get("__name__", "").endswith("_total")
            for (_, expected), before, at in zip(found[1:], times, times[1:], strict=False):
                value = table.get(at, math.nan)
                if counts:
                    value -= table.get(before, math.nan) if value >= table.get(before, 0.0) else 0.0
                else:
                    value *= at - before
                if math.isfinite(value) and value >= 0:
                    expected[model] = expected.get(model, 0.0) + min(value, MOST_RPS)
                else:
                    self._gaps += 1
        return found

    def notes(self) -> list[str]:
        """What was lost, in sentences."""
        said = [
            "rates have no instants: those of a step are drawn as a Poisson process has them",
            "SLOs are not told: --slo-ms gives one to all",
        ]
        return said + (
            [f"{self._gaps:,} values of series are missing: nothing came then"] if self._gaps else []
        )


class _BenchHead(Struct):
    models: list[str]
    loads: list[str]
    row: list[tuple[str, str]]
    rows: int


class BenchTraffic:
    """What ``clockwork bench --record`` wrote: requests when they were due."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wall = False
        self.done_bytes = 0

    def requests(self) -> Iterator[LoggedRequest]:
        """All requests, in order. Raises :class:`ConfigError`."""
        with self.path.open("rb") as file:
            file.seek(len(_BENCH))
            length = int.from_bytes(file.read(4), "little")
            text = file.read(length)
        try:
            head = msgspec.json.decode(text, type=_BenchHead)
            rows = np.memmap(self.path, np.dtype(head.row), "r", len(_BENCH) + 4 + length, (head.rows,))
            columns = [rows[name] for name in ("scheduled_ns", "model", "load", "slo_ns")]
        except (ValueError, TypeError, OSError, msgspec.MsgspecError, RecursionError) as error:
            raise ConfigError(
                f"{self.path}: expected a whole recording of clockwork bench, found: {error}; record it again"
            ) from None
        names = [name.partition("=")[0] for name in head.models]
        whose = [RequestClass(load=load) for load in head.loads]
        for first in range(0, head.rows, _ROWS):
            pieces = [column[first : first + _ROWS].tolist() for column in columns]
            for number, (at_ns, model, load, slo_ns) in enumerate(zip(*pieces, strict=True), start=first + 1):
                yield LoggedRequest(number, at_ns, names[model], slo_ns, whose[load])
            self.done_bytes = self.path.stat().st_size * (first + len(pieces[0])) // head.rows

    def notes(self) -> list[str]:
        """What was lost, in sentences."""
        return ["sizes of inputs are not told: each request has one row of its model's usual shape"]


def open_traffic(path: Path, *, model: str = "", paths: str = USUAL_PATHS) -> TrafficSource:
    """The source in a file, by how it begins.

    ``model``: of rows that name none; ``paths``: a regular expression of which a group names a request's
    model. Raises :class:`ConfigError`.
    """
    first = begin(path)
    if first.startswith(_BENCH):
        return BenchTraffic(path)
    if b'"resultType"' in first:
        return RatesTraffic(path, model)
    _, line = header_of(path)
    if line.lstrip().startswith(b"{"):
        return JsonTraffic(path, model, paths)
    return (LogTraffic if _LOG.match(line) else TableTraffic)(path, model, paths)


def begin(path: Path) -> bytes:
    """The first bytes of a source. Raises :class:`ConfigError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(256)
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a readable file; found: {error.strerror}; check the path"
        ) from None


def told(lost: Mapping[str, int]) -> list[str]:
    """What was lost, and how often, in words that begin with what is counted."""
    parts = [(count, what.partition(" ")) for what, count in lost.items() if count]
    return [f"{counted(count, noun)} {rest}" for count, (noun, _, rest) in parts]


def _of(names: list[str], known: Iterable[str]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


def _value(row: dict[str, Any], names: Iterable[str]) -> bytes | None:
    """The first of these fields that is a text or a number, as text."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
            return str(value).encode()
    return None
