"""A journal of every step on disk; it never makes the driver wait and never grows without bound.

A file is a row of chunks: a header (``Header``) and that many bytes of one zstd frame, in which each record
is a 4-byte little-endian length and that many bytes of msgpack: a :class:`JournalHead` where a run begins,
then one :class:`Step` each. Records are numbered from the journal's beginning, across its files. A thread
compresses and writes; when it falls behind by more than ``BACKLOG_BYTES``, steps are left out and the next
record says how many. A full file is renamed to ``NAME.1`` (and that to ``NAME.2``, ...), the oldest is
deleted; each begins with the head of the run that it continues, so that it can be read alone.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import platform
import queue
import struct
import sys
import threading
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from glob import escape
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import zstandard
from msgspec import Struct, structs

import clockwork_serve
from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.integrity import make_private
from clockwork_serve.messages import ControllerEffect, ControllerEvent
from clockwork_serve.units import KIB, MIB

# ------------------------------------------------------------
# The first record of a run in a journal: all that a replay needs beside the steps.


FORMAT: Final = 2
PYTHON, COMPILED = "python", "compiled"
DECIDES: Final = ("controller", "messages", "machine.py", "errors.py", "units.py")
"""What a decision follows from, beside the events and the configuration."""
GONE: Final = {"floor_ns": 0, "load_negative": False, "open_window": False, "released": False}
"""Settings that earlier journals have, and the value at which decisions are as they are without them."""


class JournalHead(Struct, frozen=True, kw_only=True, tag="clockwork journal", tag_field="record"):
    """Who decided what follows, and how it was set; a controller has no other start and rolls no dice.

    ``sources`` is a hash of the code that decides, ``build`` says whether it was compiled, ``config`` holds
    the fields of :class:`ControllerConfig`. Models, profiles, devices and quotas are events. ``started`` is
    the time of day at ``started_ns`` of the controller's clock. ``continues``: no run begins here, but a
    file in the midst of one whose beginning is in an older file. ``machine`` is that of its devices, if they
    are real.
    """

    version: str
    sources: str
    build: str
    python: str
    started: str
    config: dict[str, Any]
    format: int = FORMAT
    started_ns: int = 0
    continues: bool = False
    machine: str = ""

    def controller_config(self) -> ControllerConfig:
        """The controller's settings. Raises :class:`ConfigError` if this version does not know them."""
        if self.format != FORMAT:
            raise ConfigError(
                f"journal: expected format {FORMAT}; found {self.format}, of clockwork {self.version}; "
                "replay it with that version"
            )
        known = {field.name for field in msgspec.structs.fields(ControllerConfig)}
        config = {name: value for name, value in self.config.items() if (name, value) not in GONE.items()}
        if unknown := sorted(config.keys() - known):
            raise ConfigError(
                f"journal: expected settings that clockwork {clockwork_serve.__version__} knows; found "
                f"{', '.join(unknown)}, of clockwork {self.version}; replay it with that version"
            )
        try:
            return msgspec.convert(config, ControllerConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"journal: its settings of the controller are wrong: {error}") from None

    def other_build(self) -> str:
        """How whoever wrote it differs from this process; empty if decisions must be the same."""
        here = head_of(self.controller_config())
        if self.version != here.version:
            return f"clockwork {self.version} wrote it, this is {here.version}"
        if self.sources != here.sources:
            return f"other code wrote it ({self.sources or 'unknown'}; this is {here.sources or 'unknown'})"
        return ""


def machine_name() -> str:
    """This machine, as profiles name it: its processor, and how many there are of it."""
    return f"{os.cpu_count()} x {processor_name()}"


def processor_name() -> str:
    """What the system calls its processor."""
    name = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    return name.strip() or platform.processor() or platform.machine()


def head_of(config: ControllerConfig, started: datetime | None = None, started_ns: int = 0) -> JournalHead:
    """The head of a run that this process begins, at the time of day ``started``."""
    module = sys.modules[Controller.__module__]
    return JournalHead(
        version=clockwork_serve.__version__, sources=sources_hash(Path(clockwork_serve.__file__).parent),
        build=PYTHON if str(module.__file__).endswith(".py") else COMPILED,
        python=platform.python_version(),
        started="" if started is None else started.astimezone(UTC).isoformat(timespec="milliseconds"),
        config=msgspec.to_builtins(config), started_ns=started_ns,
    )  # fmt: skip


def sources_hash(package: Path, parts: Iterable[str] = DECIDES) -> str:
    """A short hash of some sources, by default those that decide; empty if they are not there."""
    found = hashlib.sha256()
    count = 0
    for path in _sources(package, parts):
        found.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
        count += 1
    return found.hexdigest()[:12] if count else ""


def _sources(package: Path, parts: Iterable[str]) -> Iterable[Path]:
    for name in parts:
        path = package / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.exists() else []


# ------------------------------------------------------------
# Chunks.


CHUNK_BYTES: Final = 256 * KIB
"""A chunk is written once its records take so much, before they are compressed, or when it is flushed."""
BACKLOG_BYTES: Final = 64 * MIB
"""Half a minute of a controller at full load; a disk that stalls for longer loses steps, not requests."""
RECORD_BYTES_MAX: Final = 64 * MIB
FILES: Final = 8
"""Into so many files a journal is divided: the oldest part of it is forgotten, an eighth at once."""

MAGIC: Final = b"CWJ\x02"
HEADER: Final = struct.Struct("<4sIIIIqQ")
LENGTH: Final = struct.Struct("<I")
_LEVEL: Final = 1
_log = logging.getLogger(__name__)


class Step(Struct, frozen=True, array_like=True):
    """What a driver told its machine at one instant, and what that decided.

    ``dropped`` steps before it are gone: the disk was too slow.
    """

    now_ns: int
    events: tuple[ControllerEvent, ...]
    effects: tuple[ControllerEffect, ...]
    dropped: int = 0


class Torn(Struct, frozen=True):
    """A file ends inside a chunk: who wrote it was killed. ``missing_bytes`` of the chunk are not there."""

    file: Path
    missing_bytes: int


class Header(Struct, frozen=True):
    """What stands before a chunk's frame.

    ``journal`` tells the journal from others that had its name: a checksum of how it began. The chunk's bytes
    are as many ``packed`` and as many as records. It holds ``count`` records from number ``first`` on; none
    if it is the head with which a file continues a run. ``now_ns`` is its first step's.
    """

    journal: int
    packed_bytes: int
    raw_bytes: int
    count: int
    now_ns: int
    first: int

    @classmethod
    def read(cls, data: bytes, name: Path) -> Header | None:
        """The header in these bytes of that file, None if they are only its beginning.

        Raises :class:`ConfigError` if they are another's.
        """
        if len(data) < HEADER.size:
            if data[: len(MAGIC)] != MAGIC[: len(data)]:
                raise ConfigError(_no_chunk(data, name))
            return None
        magic, *fields = HEADER.unpack(data)
        found = cls(*fields)
        if magic != MAGIC or not 0 < found.raw_bytes <= RECORD_BYTES_MAX + CHUNK_BYTES:
            raise ConfigError(_no_chunk(data, name))
        return found

    def pack(self) -> bytes:
        """Its bytes."""
        return HEADER.pack(
            MAGIC, self.journal, self.packed_bytes, self.raw_bytes, self.count, self.now_ns, self.first
        )


def _no_chunk(data: bytes, name: Path) -> str:
    older = len(data) > LENGTH.size and data[4] >> 4 == 0x8 and data[2:4] == bytes(2)  # a short head
    if older or (data[:3] == MAGIC[:3] and data[:4] != MAGIC):
        found = 1 if older else data[3]
        return (
            f"{name}: expected a journal of format {FORMAT}; found format {found}, of another version of "
            "clockwork: read it with the version that wrote it, or name another file"
        )
    return f"{name}: expected a journal; found other bytes"


# ------------------------------------------------------------
# The writer.


class _Batch(Struct):
    """Records on their way to the writing thread, and the run that the last of them is in."""

    raw: bytearray
    count: int
    now_ns: int
    head: JournalHead | None


class Journal:
    """A :class:`~clockwork_serve.telemetry.recorder.Listener` that writes steps to ``path``.

    What a journal that is there holds stays before them. Its files are their owner's alone. ``head`` makes
    it fit for replay. ``file_bytes`` bounds one file, ``files`` how many are kept. Raises
    :class:`ConfigError` if the file is no journal or cannot be opened. Whatever goes wrong later (a full
    disk) ends the journal with one logged line and nothing else.
    """

    def __init__(
        self, path: Path, head: JournalHead | None = None, *,
        file_bytes: int = 256 * MIB, files: int = FILES,
    ) -> None:  # fmt: skip
        assert file_bytes > 0 and files > 0, (file_bytes, files)
        self.path = path
        self.dropped = 0
        self._file_bytes, self._files = file_bytes, files
        self._encoder = msgspec.msgpack.Encoder()
        self._batch = _Batch(bytearray(), 0, 0, head)
        self._unsaid = 0  # steps dropped since the last record
        self._queued_bytes = 0  # written by both threads under _lock
        self._lock = threading.Lock()
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        try:
            self._next, self._journal = _mend(path)  # the number of the next record, and which journal it is
            for existing in journal_files(path):
                make_private("journal", existing)
            self._file: IO[bytes] = _opened(path, "ab")
        except OSError as error:
            raise ConfigError(f"journal: cannot write {path}: {error.strerror}; name another file") from None
        # Of the writing thread
        self._compress = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress
        self._written: JournalHead | None = None
        if head is not None:
            self._append(head)
            self.flush()
        self._thread = threading.Thread(target=self._write_batches, name="journal", daemon=True)
        self._thread.start()

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Append one step, an empty one too: that time has passed may change what a machine believes."""
        if self._queued_bytes > BACKLOG_BYTES:
            self.dropped += 1
            self._unsaid += 1
            return
        batch = self._batch
        if not batch.count:
            batch.now_ns = now_ns
        try:
            self._append((now_ns, events, effects, self._unsaid))
        except (UnicodeEncodeError, OverflowError):  # it cannot be told; the driver goes on
            self.dropped += 1
            self._unsaid += 1
            return
        self._unsaid = 0
        if len(batch.raw) >= CHUNK_BYTES:
            self.flush()

    def on_controller(self, config: ControllerConfig) -> None:
        """A successor with that configuration takes over: begin a new run."""
        if self._batch.head is not None:
            self.flush()  # a batch is of one run
            self._batch.head = head_of(config)
            self._append(self._batch.head)

    def _append(self, record: object) -> None:
        batch = self._batch
        raw = batch.raw
        at = len(raw)
        raw += b"\0\0\0\0"
        try:
            self._encoder.encode_into(record, raw, -1)
        except Exception:
            del raw[at:]
            raise
        LENGTH.pack_into(raw, at, len(raw) - at - LENGTH.size)
        batch.count += 1

    def flush(self) -> None:
        """Hand what is buffered to the writing thread; the driver calls it when it is idle."""
        batch = self._batch
        if batch.count:
            with self._lock:
                self._queued_bytes += len(batch.raw)
            self._batches.put(batch)
            self._batch = _Batch(bytearray(), 0, 0, batch.head)

    def close(self) -> None:
        """Write what is left and close the file."""
        self.flush()
        self._batches.put(None)
        self._thread.join()
        self._file.close()

    def _write_batches(self) -> None:
        with suppress(OSError):  # it preempts nobody when it wakes, least of all the driver
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        failed = False
        while (batch := self._batches.get()) is not None:
            if not failed:
                try:
                    self._write(batch)
                except OSError as error:
                    failed = True
                    _log.error("journal ends: cannot write %s: %s", self.path, error.strerror)
            with self._lock:
                self._queued_bytes -= len(batch.raw)

    def _write(self, batch: _Batch) -> None:
        chunk = self._chunk(batch.raw, batch.count, batch.now_ns)
        if self._file.tell() and self._file.tell() + len(chunk) > self._file_bytes:
            self._rotate()
            if self._written is not None:
                body = msgspec.msgpack.encode(structs.replace(self._written, continues=True))
                self._write_all(self._chunk(LENGTH.pack(len(body)) + body, 0, batch.now_ns))
        self._write_all(chunk)
        self._next += batch.count
        self._written = batch.head

    def _chunk(self, raw: bytes | bytearray, count: int, now_ns: int) -> bytes:
        packed = self._compress(raw)
        if not self._next:
            self._journal = zlib.crc32(raw)
        return Header(self._journal, len(packed), len(raw), count, now_ns, self._next).pack() + packed

    def _write_all(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]

    def _rotate(self) -> None:
        self._file.close()
        names = [self.path, *(Path(f"{self.path}.{age}") for age in range(1, self._files))]
        for newer, older in reversed(list(itertools.pairwise(names))):
            if newer.exists():
                newer.replace(older)
        self.path.unlink(missing_ok=True)  # the only one: who reads it has it open
        self._file = _opened(self.path, "wb")


def _opened(path: Path, mode: str) -> IO[bytes]:
    """A file for writing, which is its owner's alone if it is new."""
    return open(path, mode, buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))


def journal_files(path: Path) -> list[Path]:
    """The files of a journal that exist, oldest first.

    While they are renamed one name is free, for long if who writes is stopped just then: older ones count.
    """
    parts = [
        (one, one.name.removeprefix(f"{path.name}.")) for one in path.parent.glob(f"{escape(path.name)}.*")
    ]
    aged = sorted([(int(age), one) for one, age in parts if age.isdecimal() and age.isascii()], reverse=True)
    return [one for _, one in aged] + ([path] if path.exists() else [])


def journal_bytes(path: Path) -> int:
    """The size of a journal's files. Raises :class:`ConfigError` if there is no such journal."""
    files = journal_files(path)
    if not files:
        raise ConfigError(f"journal: expected a file that `--journal` wrote; found nothing at {path}")
    return sum(file.stat().st_size for file in files)


def _mend(path: Path) -> tuple[int, int]:
    """Truncate the incomplete last chunk of a killed process, so that appended ones can be read.

    Returns the number of the record that is next, and which journal it is.
    """
    if not path.is_file():
        return 0, 0
    whole, size, following, journal = 0, path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while (header := Header.read(file.read(HEADER.size), path)) is not None:
            after = whole + HEADER.size + header.packed_bytes
            if after > size:
                break
            whole, following, journal = after, header.first + header.count, header.journal
            file.seek(whole)
    if whole < size:
        os.truncate(path, whole)
    return following, journal


_REFUSED: Final = "refused-"


def refusals_path(path: Path, gateway: str) -> Path:
    """The journal in which a gateway keeps what it ends by itself, beside the controller's at ``path``.

    A step has a request and its answer, or answers alone, to requests of which the controller knows: those
    are what their clients got instead of its own, which were late.
    """
    return path.with_name(f"{path.name}.{_REFUSED}{gateway}")


def refusals_beside(path: Path) -> list[Path]:
    """Those of all gateways that are there."""
    found = path.parent.glob(f"{escape(path.name)}.{_REFUSED}*") if path.parent.is_dir() else ()
    return sorted(each for each in found if not each.suffix[1:].isdigit())
