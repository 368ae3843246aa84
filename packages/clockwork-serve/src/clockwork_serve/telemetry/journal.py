"""A journal of every step on disk; it never makes the driver wait and never grows without bound.

A file is a row of records, each a 4-byte little-endian length and that many bytes of msgpack: a
:class:`JournalHead` where a run begins,
then one :class:`Step` each. A thread writes; when it falls behind by more
than ``BACKLOG_BYTES``, steps are left out and the next record says how many. A full file is renamed to
``NAME.1`` (and that to ``NAME.2``, ...), the oldest is deleted.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import platform
import queue
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

import msgspec
from msgspec import Struct, structs

import clockwork_serve
from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.integrity import make_private
from clockwork_serve.messages import ControllerEffect, ControllerEvent, Delivered
from clockwork_serve.units import KIB, MIB

# ------------------------------------------------------------
# The first record of a run in a journal: all that a replay needs beside the steps.


FORMAT: Final = 1
PYTHON, COMPILED = "python", "compiled"
DECIDES: Final = ("controller", "messages", "machine.py", "errors.py", "units.py")
"""What a decision follows from, beside the events and the configuration."""


class JournalHead(Struct, frozen=True, kw_only=True, tag="clockwork journal", tag_field="record"):
    """Who decided what follows, and how it was set; a controller has no other start and rolls no dice.

    ``sources`` is a hash of the code that decides, ``build`` says whether it was compiled, ``config`` holds
    the fields of :class:`ControllerConfig`. Models, profiles, devices and quotas are events.
    ``gateway`` is set where no controller wrote it: what that gateway ended by itself follows.
    """

    version: str
    sources: str
    build: str
    python: str
    started: str
    config: dict[str, Any]
    format: int = FORMAT
    gateway: str = ""

    def controller_config(self) -> ControllerConfig:
        """The controller's settings. Raises :class:`ConfigError` if this version does not know them."""
        if self.format != FORMAT:
            raise ConfigError(
                f"journal: expected format {FORMAT}; found {self.format}, of clockwork {self.version}; "
                "replay it with that version"
            )
        known = {field.name for field in msgspec.structs.fields(ControllerConfig)}
        if unknown := sorted(self.config.keys() - known):
            raise ConfigError(
                f"journal: expected settings that clockwork {clockwork_serve.__version__} knows; found "
                f"{', '.join(unknown)}, of clockwork {self.version}; replay it with that version"
            )
        try:
            return msgspec.convert(self.config, ControllerConfig)
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


def head_of(config: ControllerConfig, started: datetime | None = None) -> JournalHead:
    """The head of a run that this process begins."""
    module = sys.modules[Controller.__module__]
    return JournalHead(
        version=clockwork_serve.__version__,
        sources=sources_hash(Path(clockwork_serve.__file__).parent),
        build=PYTHON if str(module.__file__).endswith(".py") else COMPILED,
        python=platform.python_version(),
        started="" if started is None else started.astimezone(UTC).isoformat(timespec="milliseconds"),
        config=msgspec.to_builtins(config),
    )


_REFUSED: Final = "refused-"


def refusals_of(path: Path, gateway: str, started: datetime | None = None) -> tuple[Path, JournalHead]:
    """Where a gateway keeps what it ended by itself, beside a controller's journal, and how that begins."""
    head = structs.replace(head_of(ControllerConfig(), started), config={}, gateway=gateway)
    return path.with_name(f"{path.name}.{_REFUSED}{gateway}"), head


def refusals_beside(path: Path) -> list[Path]:
    """The files of :func:`refusals_of` that are there, of each gateway the one that it writes now."""
    found = path.parent.glob(f"{glob.escape(path.name)}.{_REFUSED}*") if path.parent.is_dir() else ()
    return sorted(each for each in found if not each.suffix[1:].isdigit())


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


CHUNK_BYTES: Final = 256 * KIB
BACKLOG_BYTES: Final = 64 * MIB
"""About a minute of a controller at full load; a disk that stalls for longer loses steps, not requests."""
RECORD_BYTES_MAX: Final = 64 * MIB

_LENGTH: Final = struct.Struct("<I")
_ARRAY: Final = 0x9
"""How the first byte of a step begins: a short array of msgpack."""
_log = logging.getLogger(__name__)


class Step(Struct, frozen=True, array_like=True):
    """What a driver told its machine at one instant, and what that decided.

    ``dropped`` steps before it are gone: the disk was too slow. A gateway writes those of its own: a
    request and its answer, or answers that were :class:`Delivered` late.
    """

    now_ns: int
    events: tuple[ControllerEvent | Delivered, ...]
    effects: tuple[ControllerEffect, ...]
    dropped: int = 0


class Torn(Struct, frozen=True):
    """A file ends inside a record: who wrote it was killed. ``missing_bytes`` of the record are not there."""

    file: Path
    missing_bytes: int


class Journal:
    """A :class:`~clockwork_serve.telemetry.recorder.Listener` that writes steps to ``path``.

    What a journal that is there holds stays before them. Its files are their owner's alone. ``head`` makes
    it fit for replay. ``file_bytes`` bounds one file, ``files`` how many are kept. Raises
    :class:`ConfigError` if the file is no journal or cannot be opened. Whatever goes wrong later (a full
    disk) ends the journal with one logged line and nothing else.
    """

    def __init__(
        self, path: Path, head: JournalHead | None = None, *, file_bytes: int = 256 * MIB, files: int = 4
    ) -> None:
        assert file_bytes > 0 and files > 0, (file_bytes, files)
        self.path = path
        self.dropped = 0
        self._file_bytes, self._files = file_bytes, files
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        self._unsaid = 0  # steps dropped since the last record
        self._queued_bytes = 0  # written by both threads under _lock
        self._lock = threading.Lock()
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        try:
            _mend(path)
            for existing in journal_files(path):
                make_private("journal", existing)
            self._file: IO[bytes] = _opened(path, "ab")
        except OSError as error:
            raise ConfigError(f"journal: cannot write {path}: {error.strerror}; name another file") from None
        self._head = head
        if head is not None:
            self._append(self._encoder.encode(head))
            self.flush()
        self._thread = threading.Thread(target=self._write_chunks, name="journal", daemon=True)
        self._thread.start()

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent | Delivered], effects: Sequence[ControllerEffect]
    ) -> None:
        """Append one step, an empty one too: that time has passed may change what a machine believes."""
        if self._queued_bytes > BACKLOG_BYTES:
            self.dropped += 1
            self._unsaid += 1
            return
        body = self._encoder.encode((now_ns, events, effects, self._unsaid))
        self._unsaid = 0
        self._append(body)
        if len(self._buffer) >= CHUNK_BYTES:
            self.flush()

    def on_controller(self, config: ControllerConfig) -> None:
        """A successor with that configuration takes over: begin a new run."""
        if self._head is not None:
            self._append(self._encoder.encode(head_of(config)))

    def _append(self, body: bytes) -> None:
        self._buffer += _LENGTH.pack(len(body))
        self._buffer += body

    def flush(self) -> None:
        """Hand what is buffered to the writing thread; the driver calls it when it is idle."""
        if self._buffer:
            with self._lock:
                self._queued_bytes += len(self._buffer)
            self._chunks.put(bytes(self._buffer))
            self._buffer.clear()

    def close(self) -> None:
        """Write what is left and close the file."""
        self.flush()
        self._chunks.put(None)
        self._thread.join()
        self._file.close()

    def _write_chunks(self) -> None:
        failed = False
        while (chunk := self._chunks.get()) is not None:
            if not failed:
                try:
                    self._write(chunk)
                except OSError as error:
                    failed = True
                    _log.error("journal ends: cannot write %s: %s", self.path, error.strerror)
            with self._lock:
                self._queued_bytes -= len(chunk)

    def _write(self, chunk: bytes) -> None:
        if self._file.tell() and self._file.tell() + len(chunk) > self._file_bytes:
            self._rotate()
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]

    def _rotate(self) -> None:
        self._file.close()
        names = [self.path, *(_older(self.path, age) for age in range(1, self._files))]
        for newer, older in reversed(list(itertools.pairwise(names))):
            if newer.exists():
                newer.replace(older)
        self._file = _opened(self.path, "wb")


def _opened(path: Path, mode: str) -> IO[bytes]:
    """A file for writing, which is its owner's alone if it is new."""
    return open(path, mode, buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))


def journal_files(path: Path) -> list[Path]:
    """The files of a journal that exist, oldest first."""
    found = [path] if path.exists() else []
    age = 1
    while (older := _older(path, age)).exists():
        found.insert(0, older)
        age += 1
    return found


def read_journal(path: Path) -> Iterator[Step]:
    """The steps of a journal, oldest first, streamed; what was torn is left out.

    Raises :class:`msgspec.ValidationError` or :class:`ConfigError` where a file is no journal.
    """
    return (record for _, record in read_records(path) if type(record) is Step)


def read_records(path: Path) -> Iterator[tuple[int, JournalHead | Step | Torn]]:
    """All records of a journal, oldest first, streamed; with each, how many bytes were read so far."""
    decode = _decoder()
    done = 0
    for name in journal_files(path):
        with name.open("rb") as file:
            while head := file.read(_LENGTH.size):
                length = _length(head, name)
                body = file.read(length)
                done += len(head) + len(body)
                if len(head) < _LENGTH.size or len(body) < length:
                    yield done, Torn(name, _LENGTH.size - len(head) + length - len(body))
                    break
                yield done, decode(name, body)


class JournalTail:
    """Reads a journal that is being written, one file after the other.

    If more than one is renamed between two calls of :meth:`poll`, those between are left out.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._decode = _decoder()

    def poll(self) -> Iterator[JournalHead | Step]:
        """The records that were whole when it began. Raises :class:`ConfigError` where it is no journal."""
        while self._open():
            file = self._file
            assert file is not None
            end = os.fstat(file.fileno()).st_size
            renamed = not self._path.exists() or os.stat(self._path).st_ino != os.fstat(file.fileno()).st_ino
            yield from self._whole(file, end)
            if not renamed:
                return
            self.close()
            self._file = None

    def close(self) -> None:
        """Read no more."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> bool:
        if self._file is None and self._path.exists():
            self._file = open(self._path, "rb")  # noqa: SIM115 - kept until it is renamed
        return self._file is not None

    def _whole(self, file: IO[bytes], end: int) -> Iterator[JournalHead | Step]:
        while (at := file.tell()) < end:
            length = _length(head, self._path) if (head := file.read(_LENGTH.size)) else 0
            body = file.read(length)
            if not length or len(body) < length:
                file.seek(at)
                return
            yield self._decode(self._path, body)


def _decoder() -> Callable[[Path, bytes], JournalHead | Step]:
    steps, heads = msgspec.msgpack.Decoder(Step), msgspec.msgpack.Decoder(JournalHead)

    def decode(name: Path, body: bytes) -> JournalHead | Step:
        try:
            return steps.decode(body) if body[0] >> 4 == _ARRAY else heads.decode(body)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}: expected a journal; found other bytes: {error}") from None

    return decode


def _length(head: bytes, name: Path) -> int:
    """How long the record is that begins so; 0 if not even that is whole."""
    if len(head) < _LENGTH.size:
        return 0
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= RECORD_BYTES_MAX:
        raise ConfigError(f"{name}: expected a journal; found a record of {length} bytes")
    return int(length)


def _mend(path: Path) -> None:
    """Truncate the incomplete last record of a killed process, so that appended records can be read."""
    if not path.is_file():
        return
    whole, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while whole + _LENGTH.size <= size:
            after = whole + _LENGTH.size + _length(file.read(_LENGTH.size), path)
            if after > size:
                break
            whole = after
            file.seek(whole)
    if whole < size:
        os.truncate(path, whole)


def _older(path: Path, age: int) -> Path:
    return path.with_name(f"{path.name}.{age}")
