"""What a user's own servers logged of their requests: tables, JSON lines, ServeGen's clients.

Each source is read once, as a stream, and says afterwards what it could not tell. A journal is read by
``apps.traffic``, for it is above this package.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import unquote_to_bytes

import msgspec
import numpy as np

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S, counted, plain
from clockwork_serve.workload.processes import Ints
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
_BARE_TIME: Final = re.compile(r"\d[\d.:tz+ -]*")
NO_SLOS: Final = "SLOs are not told: --slo-ms gives one to all"
_WALL_S: Final = 1e9  # seconds since 1970 are more than this, and those of a run less
_MOST_ROW: Final = 64
_MOST_NS: Final = 1 << 62
_MOST_RATE, _MOST_SHAPE = 2e4, 1e9
"""Of one client: a window of its requests is held in memory."""
_WINDOW_NS: Final = 600 * NS_PER_S
_WINDOW: Final = re.compile(rb"\d+,[^,]*,[^,]*,(Gamma|Weibull|),[^,]*,[^,]*")
_WINDOW_FIELDS: Final = 6


class RequestClass(NamedTuple):
    """What the requests of one load have in common."""

    tenant: str = ""
    priority: int = 0
    decide_ns: int = -1


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
        self._unread: list[str] = []

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
            said.append(NO_SLOS)
        if self._unread:
            said.append(f"a row is one request, whatever {', '.join(self._unread)} may say: not read")
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
        self._unread = [
            name for place, name in enumerate(columns) if place not in {at, model, slo, tenant, priority}
        ]
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
        if _BARE_TIME.fullmatch(names[0]) and len(names) <= 3:
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


@dataclass(slots=True)
class _Window:
    """A stretch of a client's time in which its rate and the law of its gaps do not change."""

    at_ns: int
    rate_rps: float
    law: str
    shape: float

    def draw(self, end_ns: int, rng: np.random.Generator) -> Ints:
        """When its requests come, as many as the rate says: gaps of that law, which fill it together."""
        count = round(self.rate_rps * (end_ns - self.at_ns) / NS_PER_S) if self.law else 0
        gaps = (rng.standard_gamma if self.law == "Gamma" else rng.weibull)(self.shape, count + 1)
        whole = gaps.sum()
        if not 0 < whole < math.inf:  # of a shape so small that its gaps are nothing, or all
            gaps, whole = np.ones(count + 1), count + 1
        at: Ints = self.at_ns + (np.cumsum(gaps[:-1] / whole) * (end_ns - self.at_ns)).astype(np.int64)
        return np.minimum(at, end_ns - 1)


class ClientRatesTraffic:
    """ServeGen's clients (github.com/alibaba/ServeGen): a model's folder of ``chunk-N-trace.csv``, or one.

    Each file is a client's. A row is a window of its time: from when on in s, requests a second, how much
    the gaps between them vary, their law (``Gamma``, ``Weibull``; none: no request), its shape and scale. All
    clients ask one model. Instants are drawn, the same whenever they are read.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self.wall = False
        self.done_bytes = 0
        self._files = sorted(path.glob("*-trace.csv")) if path.is_dir() else [path]
        self._model = model or (path if path.is_dir() else path.parent).absolute().name
        self._from_ns, self._to_ns = 0, _MOST_NS
        if not self._files:
            raise ConfigError(
                f"{path}: expected a folder with ServeGen's chunk-N-trace.csv of a model, found none; name "
                "one, such as data/language/m-large"
            )
        if set(self._model) & set('",') or not self._model.isprintable():
            raise ConfigError(
                f"model: expected a name without commas and quotes, found {self._model!r}; give --model NAME"
            )

    def choose(self, from_ns: int, to_ns: int | None) -> None:
        """Draw windows that are in that part of the trace, as a whole or not, and no others."""
        self._from_ns, self._to_ns = from_ns, _MOST_NS if to_ns is None else to_ns

    def requests(self) -> Iterator[LoggedRequest]:
        """The requests of all clients, window after window. Raises :class:`ConfigError`."""
        clients = {file.name.encode(): self._client(file) for file in self._files}
        starts, *others = ([window.at_ns for window in client] for client in clients.values())
        for file, found in zip(self._files[1:], others, strict=True):
            if found != starts:
                raise ConfigError(
                    f"{file}: time: expected the windows of {self._files[0].name}, found others; "
                    "name a folder whose files are of one time"
                )
        size = sum(file.stat().st_size for file in self._files)
        ends = [*starts[1:], starts[-1] + (starts[-1] - starts[-2] if len(starts) > 1 else _WINDOW_NS)]
        for number, end_ns in enumerate(ends):
            if end_ns > self._from_ns and starts[number] < self._to_ns:
                drawn = [
                    client[number].draw(end_ns, np.random.Generator(np.random.PCG64([number, *name])))
                    for name, client in clients.items()
                ]
                for at_ns in np.sort(np.concatenate(drawn)).tolist():
                    yield LoggedRequest(number + 1, at_ns, self._model)
            self.done_bytes = size * (number + 1) // len(ends)

    def _client(self, file: Path) -> list[_Window]:
        found: list[_Window] = []
        for number, line in lines(file):
            fields = [field.strip() for field in line.split(b",")]
            if len(fields) != _WINDOW_FIELDS:
                raise wrong(
                    file, number, "row", "time, rate, variation, law, shape and scale", line[:_MOST_ROW],
                    "name a file as ServeGen has them",
                )  # fmt: skip
            at_ns, law = seconds(file, number, "time", fields[0]), fields[3].decode("utf-8", "replace")
            if found and at_ns <= found[-1].at_ns:
                raise wrong(file, number, "time", "more than in the row before", fields[0], "sort the rows")
            if law not in ("", "Gamma", "Weibull"):
                raise wrong(file, number, "law", "Gamma, Weibull or nothing", fields[3], "correct the row")
            rate_rps = self._number(file, number, "rate", fields[1], _MOST_RATE)
            shape = self._number(file, number, "shape", fields[4], _MOST_SHAPE)
            found.append(_Window(at_ns, rate_rps, law if shape else "", shape))
        if not found:
            raise ConfigError(f"{file}: expected a row for each window, found none; is it cut off?")
        return found

    def _number(self, file: Path, line: int, field: str, text: bytes, most: float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= most:
            raise wrong(file, line, field, f"a number in 0..{plain(most)}", text, "correct the row")
        return value

    def notes(self) -> list[str]:
        """What was lost, in sentences."""
        return [
            "windows have no instants: those of a client are drawn by the law of its gaps",
            NO_SLOS,
            f"{counted(len(self._files), 'client')} ask one model; lengths of what they ask are left out",
        ]


def open_traffic(path: Path, *, model: str = "", paths: str = USUAL_PATHS) -> TrafficSource:
    """The source in a file, by how it begins, or in a folder.

    ``model``: of rows that name none; ``paths``: a regular expression of which a group names a request's
    model. Raises :class:`ConfigError`.
    """
    if path.is_dir():
        return ClientRatesTraffic(path, model)
    _, line = header_of(path)
    if line.lstrip().startswith(b"{"):
        return JsonTraffic(path, model, paths)
    if _WINDOW.fullmatch(line):
        return ClientRatesTraffic(path, model)
    return TableTraffic(path, model, paths)


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
