"""What became of every request, as columns and as a file; docs/bench.md describes the file byte by byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_serve import __version__
from clockwork_serve.bench.ends import End, Kind
from clockwork_serve.errors import ConfigError

MAGIC: Final = b"CWBENCH1"
ROW: Final = np.dtype(
    [
        ("scheduled_ns", "<i8"), ("sent_ns", "<i8"), ("first_ns", "<i8"), ("last_ns", "<i8"),
        ("slo_ns", "<i8"), ("model", "<i4"), ("load", "<i4"), ("nbytes", "<i4"), ("end", "<i2"),
        ("process", "<i2"),
    ]
)  # fmt: skip
"""One request. Instants from the start of the run; 0: it was not sent, nothing came."""

Table = npt.NDArray[Any]


class Head(Struct, frozen=True, kw_only=True):
    """What the file says before its rows: the names that rows point to by number."""

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
    """All requests in order of their schedule, and the ends that they point to."""

    table: Table
    ends: tuple[End, ...]

    @property
    def kinds(self) -> Table:
        """The kind of each request's end."""
        kinds: Table = np.array([end.kind for end in self.ends], np.int16)[self.table["end"]]
        return kinds


def head_of(records: Records, **about: Any) -> Head:
    """The head of a file of these records; ``about`` are its fields that they do not tell."""
    return Head(
        version=__version__, rows=records.table.size,
        ends=tuple((end.kind.name.lower(), end.reason) for end in records.ends),
        row=tuple((name, ROW[name].str) for name in ROW.names or ()), **about,
    )  # fmt: skip


def write_records(path: Path, head: Head, records: Records) -> None:
    """The file: magic, length of the head in four bytes, the head as JSON, blanks up to 64, the rows."""
    text = msgspec.json.encode(head)
    text += b" " * (-(len(MAGIC) + 4 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(MAGIC + len(text).to_bytes(4, "little") + text)
        records.table.tofile(file)


def read_records(path: Path) -> tuple[Head, Records]:
    """What :func:`write_records` wrote. Raises :class:`ConfigError` for anything else."""
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
