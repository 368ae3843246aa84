"""Reads journals: whole ones, from a record on, or as they grow, while their files are renamed and deleted.

A file that was opened is read to its end, whatever its name is by then. What comes after it is found by the
numbers of records, not by names; what was deleted unread is counted as lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import zstandard
from msgspec import Struct, structs

from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Answer
from clockwork_serve.telemetry.journal import (
    HEADER,
    LENGTH,
    Header,
    JournalHead,
    Step,
    Torn,
    journal_files,
    refusals_beside,
)

_ARRAY: Final = 0x9  # how the first byte of a step begins: a short array of msgpack
_LISTINGS: Final = 20  # looks at a journal's files until two agree: they are renamed one after the other


class Chunk(Struct, frozen=True):
    """A chunk that was read: its header, its frame, the file that it is in, and where it ends there."""

    header: Header
    packed: bytes
    name: Path
    end: int

    def records(self) -> Iterator[tuple[int, JournalHead | Step]]:
        """Its records, each with its number.

        Raises :class:`ConfigError` if it is damaged.
        """
        raw, at, number = self._raw(), 0, self.header.first
        while at < len(raw):
            (length,) = LENGTH.unpack_from(raw, at) if at + LENGTH.size <= len(raw) else (0,)
            at += LENGTH.size
            body = raw[at : at + length]
            if not length or len(body) < length:
                raise ConfigError(f"{self.name}: expected a journal; found a record of {length} bytes")
            try:
                yield number, _steps.decode(body) if body[0] >> 4 == _ARRAY else _heads.decode(body)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                raise ConfigError(f"{self.name}: expected a journal; found other bytes: {error}") from None
            at += length
            number += 1

    def _raw(self) -> memoryview:
        size = self.header.raw_bytes
        try:
            if zstandard.frame_content_size(self.packed) == size:
                return memoryview(zstandard.decompress(self.packed))  # its objects are for one thread each
        except zstandard.ZstdError as error:
            raise ConfigError(f"{self.name}: expected a journal; found a damaged chunk: {error}") from None
        raise ConfigError(f"{self.name}: expected a journal; found a chunk of another size than it says")


_steps: Final = msgspec.msgpack.Decoder(Step)
_heads: Final = msgspec.msgpack.Decoder(JournalHead)


class JournalFile:
    """An open file of a journal: it can be read after it was renamed or deleted. Raises OSError."""

    def __init__(self, name: Path) -> None:
        self.name = name
        self._file = name.open("rb", buffering=0)
        found = os.fstat(self._file.fileno())
        self.identity = (found.st_dev, found.st_ino)

    @property
    def size(self) -> int:
        """Its bytes, by now."""
        return os.fstat(self._file.fileno()).st_size

    def header(self, at: int) -> Header | None:
        """The header there, None if it is not, or not whole. Raises :class:`ConfigError`."""
        return Header.read(os.pread(self._file.fileno(), HEADER.size, at), self.name)

    def chunk(self, at: int, from_record: int = 0) -> Chunk | None:
        """The chunk there, None if it is not, or not whole; without its frame if its records are earlier.

        Raises :class:`ConfigError`.
        """
        header = self.header(at)
        if header is None:
            return None
        end, packed = at + HEADER.size + header.packed_bytes, b""
        if header.first + header.count > from_record:
            packed = os.pread(self._file.fileno(), header.packed_bytes, at + HEADER.size)
            return Chunk(header, packed, self.name, end) if len(packed) == header.packed_bytes else None
        return Chunk(header, packed, self.name, end) if end <= self.size else None

    def missing_bytes(self, at: int) -> int:
        """How many bytes the chunk lacks that begins there; 0 if none begins."""
        there = self.size - at
        header = self.header(at)
        whole = HEADER.size + (0 if header is None else header.packed_bytes)
        return whole - there if there > 0 else 0

    def close(self) -> None:
        """Close it."""
        self._file.close()


class JournalFollower:
    """Reads a journal from record ``first`` on (None: the oldest that is there), and what is added to it.

    ``lost`` counts the records that were deleted unread, ``count`` the chunks that were read. ``torn`` is
    what the present file ends with, if that is no whole chunk: it is being written, or who wrote it was
    killed.
    """

    def __init__(self, path: Path, first: int | None = None) -> None:
        self.path = path
        self.lost = 0
        self.done_bytes = 0
        self.first = first
        self.count = 0
        self._next = first
        self._file: JournalFile | None = None
        self._file_first = 0
        self._at = 0

    @property
    def torn(self) -> Torn | None:
        """See above."""
        missing = 0 if self._file is None else self._file.missing_bytes(self._at)
        return Torn(self.path, missing) if missing else None

    def chunks(self) -> Iterator[Chunk]:
        """All chunks that are whole by now; called again, those that came since.

        Raises :class:`ConfigError` where a file is no journal.
        """
        while self._file is not None or self._open_next():
            assert self._file is not None
            ended = self._renamed()  # before reading: what it has then is all that it will have
            chunk = self._file.chunk(self._at, self._next or 0)
            if chunk is not None:
                self._at = chunk.end
                self.done_bytes += HEADER.size + chunk.header.packed_bytes
                after = chunk.header.first + chunk.header.count
                if self._next is None or after > self._next:
                    self._next = after
                    self.count += 1
                    yield chunk
            elif ended:
                self.close()
            else:
                return

    def close(self) -> None:
        """Close the file that is open; the next call of ``chunks`` opens the one that follows."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _renamed(self) -> bool:
        assert self._file is not None
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return True
        return (found.st_dev, found.st_ino) != self._file.identity

    def _open_next(self) -> bool:
        """Open the file with the record that is next, or the oldest one after it; False if there is none."""
        before: list[tuple[int, int]] = []
        for _ in range(_LISTINGS):
            files = self._opened()
            found = [file.identity for _, file in files]
            at = self._fitting([first for first, _ in files])
            exact = at is not None and self._next is not None and files[at][0] <= self._next
            if exact or found == before:
                for number, (_, file) in enumerate(files):
                    if number != at:
                        file.close()
                return at is not None and self._begin(*files[at])
            for _, file in files:
                file.close()
            before = found
        return False

    def _fitting(self, firsts: list[int]) -> int | None:
        """Of files that begin with these records, ascending, the one to read next."""
        if self._next is None:
            return 0 if firsts else None
        older = [at for at, first in enumerate(firsts) if first <= self._next]
        # The last file with an earlier record has the next one, or it was read to its end.
        if older and (older[-1] + 1 < len(firsts) or not self._is_read(firsts[older[-1]])):
            return older[-1] + self._is_read(firsts[older[-1]])
        return 0 if firsts and not older else None

    def _is_read(self, first: int) -> bool:
        return self._at > 0 and first == self._file_first

    def _opened(self) -> list[tuple[int, JournalFile]]:
        """The journal's files that have a chunk, by their first records."""
        files, found = list[JournalFile](), list[tuple[int, JournalFile]]()
        try:
            for name in journal_files(self.path):
                with suppress(FileNotFoundError):
                    files.append(JournalFile(name))
            for file in files:
                if (header := file.header(0)) is not None:
                    found.append((header.first, file))
                else:
                    file.close()
        except ConfigError:
            for file in files:
                file.close()
            raise
        return sorted(found, key=lambda pair: pair[0])

    def _begin(self, first: int, file: JournalFile) -> bool:
        if self._next is not None and first > self._next:
            self.lost += first - self._next
            self._next = first
        self._file, self._file_first, self._at = file, first, 0
        return True


def read_journal(path: Path) -> Iterator[Step]:
    """The steps of a journal, oldest first, streamed; what was torn is left out.

    Raises :class:`ConfigError` where a file is no journal.
    """
    return (record for _, record in read_records(path) if type(record) is Step)


def gateway_answer(path: Path, request_id: str) -> Answer | None:
    """What a gateway answered by itself, by what it kept beside the journal at ``path``; None if nothing.

    Either its request never reached the controller, or the controller's answer was late at the gateway.
    """
    for beside in refusals_beside(path):
        for step in read_journal(beside):
            for effect in step.effects:
                if isinstance(effect, Answer) and effect.request_id == request_id:
                    return effect
    return None


def read_records(path: Path) -> Iterator[tuple[int, JournalHead | Step | Torn]]:
    """All records of a journal, oldest first, streamed; with each, how many bytes were read so far.

    The journal may grow meanwhile; steps that were deleted unread are said by the next one to be dropped.
    The head of a file in the midst of a run is only given where all before it is gone.
    """
    follower = JournalFollower(path)
    try:
        for _, record in numbered(follower):
            yield follower.done_bytes, record
        if (torn := follower.torn) is not None:
            yield follower.done_bytes, torn
    finally:
        follower.close()


def numbered(follower: JournalFollower) -> Iterator[tuple[int, JournalHead | Step]]:
    """What there is to read by now, as :func:`read_records` gives it, each record with its number."""
    lost, first = follower.lost, follower.first or 0
    for chunk in follower.chunks():
        gone, lost = follower.lost - lost, follower.lost
        for number, record in chunk.records():
            if number < first:
                continue
            if isinstance(record, JournalHead):
                if not record.continues or follower.count == 1:
                    yield number, record
            elif gone:
                yield number, structs.replace(record, dropped=record.dropped + gone)
                gone = 0
            else:
                yield number, record


def first_header(path: Path) -> Header | None:
    """The header of a journal's oldest chunk; None if it has none yet. Raises :class:`ConfigError`."""
    follower = JournalFollower(path)
    try:
        return next((chunk.header for chunk in follower.chunks()), None)
    finally:
        follower.close()
