"""The outcome of every request: its row in shared memory, how it ended, and the format of the record file.

docs/use/bench.md describes the file byte by byte.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_serve import __version__
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_MS, NS_PER_S

# ------------------------------------------------------------
# How a request ended, in few categories that are the same for every server.


class Kind(IntEnum):
    """How a request ended, as its client sees it. Whether a response was in time is not part of it."""

    OPEN = 0  # no response until the run was over
    ANSWERED = 1
    REJECTED = 2  # the server rejected it
    EXPIRED = 3  # the server reported that its deadline passed
    FAILED = 4  # the server reported an error, of its own or of the request
    RESET = 5  # the connection was closed before the response
    BROKEN = 6  # no connection could be made, or the response is not of the protocol
    ABANDONED = 7  # the generator cancelled it at its deadline (``--abandon``)


class End(NamedTuple):
    """How a request ended: its kind, and the server's reason."""

    kind: Kind
    reason: str


OPEN: Final = 0
ANSWERED: Final = 1
ABANDONED: Final = 2
FIRST_ENDS: Final = (End(Kind.OPEN, ""), End(Kind.ANSWERED, ""), End(Kind.ABANDONED, "at its deadline"))
"""The ends with fixed codes."""
REASONS_MAX: Final = 200  # the most different reasons; all others count as one
_REASON_CHARS: Final = 80
_BY_OUTCOME: Final = {
    "rejected": Kind.REJECTED, "expired": Kind.EXPIRED, "failed": Kind.FAILED, "invalid": Kind.FAILED,
    "cancelled": Kind.FAILED,
}  # fmt: skip
_BY_HTTP: Final = {429: Kind.REJECTED, 503: Kind.REJECTED, 408: Kind.EXPIRED, 504: Kind.EXPIRED}
_GRPC_NAMES: Final = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
    "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_BY_GRPC: Final = {
    "RESOURCE_EXHAUSTED": Kind.REJECTED, "UNAVAILABLE": Kind.REJECTED, "DEADLINE_EXCEEDED": Kind.EXPIRED,
}  # fmt: skip
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")
_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after[ \t]*:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)


class Ends:
    """Codes of ends, in order of first occurrence; ``announce`` gets each new code before it is used."""

    def __init__(self, announce: Callable[[int, End], None]) -> None:
        self._announce = announce
        self._codes = {end: code for code, end in enumerate(FIRST_ENDS)}

    def code(self, kind: Kind, reason: str) -> int:
        """The code of an end; a new one if it is the first of its kind and reason."""
        end = End(kind, reason)
        code = self._codes.get(end)
        if code is None:
            if len(self._codes) >= REASONS_MAX:
                end = End(kind, "other")
            code = self._codes.get(end)
            if code is None:
                code = self._codes[end] = len(self._codes)
                self._announce(code, end)
        return code

    def http(self, status: int, head: bytes, body: bytes) -> tuple[int, int | None]:
        """The code of an HTTP response that is not a success, and its retry-after in ns."""
        fields = _json(body)
        kind = _BY_OUTCOME.get(str(fields.get("outcome")), _BY_HTTP.get(status, Kind.FAILED))
        words = fields.get("reason") or fields.get("error") or fields.get("detail") or ""
        wait = fields.get("retry_after_ms")
        wait_ns = round(wait * NS_PER_MS) if isinstance(wait, int | float) and 0 <= wait < 1e8 else None
        if wait_ns is None and (found := _RETRY_AFTER.search(head)):
            wait_ns = min(int(found[1]), 100_000) * NS_PER_S
        return self.code(kind, f"{status} {_normalised(str(words))}".strip()), wait_ns

    def grpc(self, trailers: Mapping[str, str]) -> tuple[int, int | None]:
        """The code of a call with these trailers, and its retry-after in ns."""
        text = trailers.get("grpc-status", "")
        number = int(text) if text.isdecimal() and len(text) < 4 else -1
        if number == 0:
            return ANSWERED, None
        name = _GRPC_NAMES[number] if 0 < number < len(_GRPC_NAMES) else "no grpc-status"
        kind = _BY_OUTCOME.get(trailers.get("clockwork-outcome", ""), _BY_GRPC.get(name, Kind.FAILED))
        words = trailers.get("clockwork-reason") or unquote(trailers.get("grpc-message", ""))
        try:
            wait_ns: int | None = round(float(trailers["clockwork-retry-after-ms"]) * NS_PER_MS)
        except (KeyError, ValueError, OverflowError):
            wait_ns = None
        return self.code(kind, f"{name} {_normalised(words)}".strip()), wait_ns


def _json(body: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        return fields
    return {"error": bytes(body[:_REASON_CHARS]).decode(errors="replace")}


def _normalised(words: str) -> str:
    """The words with numbers masked, so that equal reasons of different requests are equal."""
    return " ".join(_NUMBER.sub("#", words).split())[:_REASON_CHARS]


# ------------------------------------------------------------
# The records of all requests, as columns and as a file; docs/use/bench.md describes the file byte by byte.


MAGIC: Final = b"CWBENCH1"
ROW: Final = np.dtype(
    [
        ("scheduled_ns", "<i8"), ("sent_ns", "<i8"), ("first_ns", "<i8"), ("last_ns", "<i8"),
        ("slo_ns", "<i8"), ("model", "<i4"), ("load", "<i4"), ("nbytes", "<i4"), ("end", "<i2"),
        ("process", "<i2"),
    ]
)  # fmt: skip
"""One request. Instants are relative to the start of the run; 0: it was not sent, or nothing was received."""

Table = npt.NDArray[Any]


class Head(Struct, frozen=True, kw_only=True):
    """The head of the file: the run, and the names that rows refer to by number."""

    version: str
    scenario: str
    url: str
    seed: int
    warmup_ns: int
    end_ns: int
    models: tuple[str, ...]
    loads: tuple[str, ...]
    ends: tuple[tuple[str, str], ...]
    row: tuple[tuple[str, str], ...]
    rows: int


@dataclass(slots=True)
class Records:
    """All requests in order of their schedule, and the ends that they refer to."""

    table: Table
    ends: tuple[End, ...]

    @property
    def kinds(self) -> Table:
        """The kind of each request's end."""
        kinds: Table = np.array([end.kind for end in self.ends], np.int16)[self.table["end"]]
        return kinds


def head_of(records: Records, **about: Any) -> Head:
    """The head of a file of these records; ``about`` are the fields that do not follow from them."""
    return Head(
        version=__version__, rows=records.table.size,
        ends=tuple((end.kind.name.lower(), end.reason) for end in records.ends),
        row=tuple((name, ROW[name].str) for name in ROW.names or ()), **about,
    )  # fmt: skip


def write_records(path: Path, head: Head, records: Records) -> None:
    """Write the file: magic, length of the head in four bytes, the head as JSON, blanks to 64, the rows."""
    text = msgspec.json.encode(head)
    text += b" " * (-(len(MAGIC) + 4 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(MAGIC + len(text).to_bytes(4, "little") + text)
        records.table.tofile(file)


def read_records(path: Path) -> tuple[Head, Records]:
    """Read a file of :func:`write_records`. Raises :class:`ConfigError` for anything else."""
    content = path.read_bytes()
    length = int.from_bytes(content[8:12], "little")
    if content[:8] != MAGIC:
        raise ConfigError(f"{path}: expected a record of clockwork bench, found another file")
    try:
        head = msgspec.json.decode(content[12 : 12 + length], type=Head)
        table = np.frombuffer(content, ROW, head.rows, 12 + length)
        ends = tuple(End(Kind[kind.upper()], reason) for kind, reason in head.ends)
    except (ValueError, KeyError, RecursionError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: expected a whole record of clockwork bench, found: {error}") from None
    return head, Records(table, ends)


# ------------------------------------------------------------
# Requests and their outcomes, one row a request, in memory that a sender and its parent share.
#
# The parent writes what is due before the run; the sender writes the other columns during it, and logs each
# row that has ended. So the parent can count at any time without messages from the sender.


WIDE: Final = ("scheduled_ns", "slo_ns", "sent_ns", "first_ns", "last_ns")
NARROW: Final = ("model", "load", "message", "status", "nbytes", "ended")
"""``message``: index of the prepared request; ``ended``: not a column but the log of rows that have ended."""
_HEAD_BYTES: Final = 64
_WIDE_BYTES: Final = 8
_ROW_BYTES: Final = 8 * len(WIDE) + 4 * len(NARROW)

Ints = npt.NDArray[np.int64]


class Rows:
    """``size`` rows. Instants are of CLOCK_MONOTONIC less the start of the run; 0 is "not yet"."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, _HEAD_BYTES + max(1, size) * _ROW_BYTES)

    @classmethod
    def make(cls, size: int) -> Rows:
        """New rows, all zero; memory is committed as they are written."""
        fd = os.memfd_create("clockwork-bench", os.MFD_CLOEXEC)
        os.ftruncate(fd, _HEAD_BYTES + max(1, size) * _ROW_BYTES)
        return cls(fd, size)

    def view(self, name: str) -> memoryview[int]:
        """A column, for access to single values."""
        at, _, width = self._place(name)
        column = memoryview(self._map)[at : at + width * self.size]
        return column.cast("q") if width == _WIDE_BYTES else column.cast("i")

    def array(self, name: str) -> npt.NDArray[Any]:
        """A column as an array; it shares the memory of these rows."""
        at, code, _ = self._place(name)
        return np.frombuffer(self._map, dtype=np.dtype(code), count=self.size, offset=at)

    @property
    def counts(self) -> memoryview[int]:
        """How many rows have ended, and how many of open and of closed loads were due."""
        return memoryview(self._map)[:24].cast("q")

    def _place(self, name: str) -> tuple[int, str, int]:
        if name in WIDE:
            return _HEAD_BYTES + WIDE.index(name) * 8 * self.size, "q", 8
        first = _HEAD_BYTES + len(WIDE) * 8 * self.size
        return first + NARROW.index(name) * 4 * self.size, "i", 4
