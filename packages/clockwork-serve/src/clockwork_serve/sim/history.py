"""Finds a request in a journal, and brings a controller back to just before it: an index and checkpoints.

Beside a journal ``NAME`` lies a folder ``NAME.history``. *Segments* of the index say in which record each
request arrived: hashes of ids in order, then as many numbers of records. *Checkpoints* are controllers' saved
states, each named by the number of the record that it is about to observe. Whoever decides a journal again
writes both, never the controller itself. What belongs to deleted parts of the journal is deleted; checkpoints
that take too much are thinned, the older ones more.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import zstandard
from msgspec import Struct

from clockwork_serve.controller import Controller
from clockwork_serve.errors import ConfigError, StateError
from clockwork_serve.messages import Request
from clockwork_serve.sim.replay import decided_again, first_difference
from clockwork_serve.telemetry import JournalFollower, JournalHead, Step, numbered
from clockwork_serve.telemetry.following import first_header
from clockwork_serve.telemetry.journal import journal_bytes
from clockwork_serve.units import GIB

CHECKPOINT_WORK: Final = 8_192
"""Steps and events between two checkpoints: deciding them again takes a fraction of a second."""
SEGMENT_REQUESTS: Final = 32_768
"""Requests in a segment; those since the last one are found by reading the records themselves."""

_HASH_BYTES: Final = 8
_SEGMENT: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+)-([0-9a-f]+)-([0-9a-f]+)\.index")
_CHECKPOINT: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+)\.state")
_log = logging.getLogger(__name__)


class Moment(Struct, frozen=True):
    """A step in a journal: its record's number, and that of the record with which its run begins.

    Where that is gone, ``run`` is the first one of the run that was there.
    """

    run: int
    record: int
    now_ns: int


class _Segment(Struct, frozen=True):
    """A part of the index: of records ``first`` to ``end`` - 1, which are of one run."""

    first: int
    end: int
    run: int
    path: Path

    def records(self, request_id: str) -> list[int]:
        """The records in which it may have arrived: ids of one hash are rare."""
        data = np.memmap(self.path, np.uint8, "r")
        count = len(data) // (_HASH_BYTES + 4)
        hashes = data[: count * _HASH_BYTES].view(np.uint64)
        wanted = np.frombuffer(_hashed(request_id), np.uint64)[0]
        low, high = (int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))
        numbers = data[count * _HASH_BYTES :].view(np.uint32)
        return [self.first + int(number) for number in numbers[low:high]]


class _Checkpoint(Struct, frozen=True):
    """A saved state: ``record`` is the next that it has to observe."""

    record: int
    path: Path


def _hashed(request_id: str) -> bytes:
    return hashlib.blake2b(request_id.encode(), digest_size=_HASH_BYTES).digest()


def folder_of(path: Path) -> Path:
    """Where the index and the checkpoints of a journal are."""
    return path.with_name(f"{path.name}.history")


def _segments(path: Path) -> list[_Segment]:
    """The index's segments, oldest first."""
    found = [_Segment(first, end, run, one) for (first, end, run), one in _named(path, _SEGMENT)]
    return sorted(found, key=lambda segment: segment.first)


def _checkpoints(path: Path) -> list[_Checkpoint]:
    """All checkpoints, oldest first."""
    found = [_Checkpoint(record, one) for (record,), one in _named(path, _CHECKPOINT)]
    return sorted(found, key=lambda checkpoint: checkpoint.record)


def _named(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[list[int], Path]]:
    """The files of one kind, each with the numbers in its name; none of an earlier journal of that name."""
    folder, oldest = folder_of(path), first_header(path)
    for one in folder.iterdir() if folder.is_dir() else ():
        if (match := pattern.fullmatch(one.name)) is not None:
            journal, *numbers = (int(part, 16) for part in match.groups())
            if oldest is not None and journal == oldest.journal:
                yield numbers, one


def _restored(checkpoint: _Checkpoint) -> Controller:
    """Raises :class:`StateError`, or OSError where it was deleted meanwhile."""
    try:
        saved = zstandard.decompress(checkpoint.path.read_bytes())
    except (zstandard.ZstdError, MemoryError) as error:  # a damaged one may claim any size
        found = str(error) or "more bytes than there is memory"
        raise StateError(f"history: expected a checkpoint; found {checkpoint.path}: {found}") from None
    return Controller.restore(saved)


# ------------------------------------------------------------
# Reading.


class History:
    """What is known of a journal beside its records. Nothing is kept open, and nothing is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path) -> History:
        """The history of a journal, as far as somebody wrote it. Raises :class:`ConfigError`."""
        journal_bytes(path)
        return cls(path)

    def find(self, request_id: str) -> Moment | None:
        """The step in which a request arrived, the last one if it came again; None if it is not there.

        Raises :class:`ConfigError` where the journal is damaged.
        """
        segments = _segments(self.path)
        last = segments[-1] if segments else None
        found = self._scan(request_id, last.end if last else None, last.run if last else 0)
        if found is not None:
            return found
        for segment in reversed(segments):
            with suppress(FileNotFoundError):
                for record in reversed(segment.records(request_id)):
                    if (step := self._step(record)) is not None and _arrives(request_id, step):
                        return Moment(segment.run, record, step.now_ns)
        return None

    def controller_at(self, moment: Moment) -> tuple[Controller, Iterator[Step]]:
        """A controller as it was just before that step, and the steps from it on.

        They end where its run does, or where steps are missing. Raises :class:`ConfigError` if the run's
        beginning is gone and no checkpoint is left before the step.
        """
        header = first_header(self.path)
        # One made just before a run's head is of the run before it.
        first = max(moment.run + 1, 0 if header is None else header.first)
        for checkpoint in reversed(_checkpoints(self.path)):
            if first <= checkpoint.record <= moment.record:
                try:
                    controller = _restored(checkpoint)
                except (OSError, StateError) as error:  # deleted meanwhile, or of another version
                    _log.debug("a checkpoint is passed over: %s", error)
                    continue
                return self._played(controller, checkpoint.record, moment)
        return self._played(None, moment.run, moment)

    def _played(
        self, controller: Controller | None, first: int, moment: Moment
    ) -> tuple[Controller, Iterator[Step]]:
        steps = _run_of(self.path, first, moment)
        if controller is None:
            head = next(steps, None)
            if not isinstance(head, JournalHead) or head.continues:
                raise ConfigError(
                    f"history: expected a checkpoint before record {moment.record}, or the beginning of its "
                    "run; both are gone: ask for a later request, or keep a larger journal (journal_size)"
                )
            controller, first = Controller(head.controller_config()), first + 1
        for _ in range(first, moment.record):
            step = next(steps, None)
            if not isinstance(step, Step):
                raise ConfigError(
                    f"history: expected all steps until record {moment.record}; some are missing"
                )
            decided_again(controller, step)
        return controller, (step for step in steps if isinstance(step, Step))

    def _scan(self, request_id: str, first: int | None, run: int) -> Moment | None:
        """Look for a request in all records from one on."""
        found = None
        follower = JournalFollower(self.path, first)
        try:
            for number, record in numbered(follower):
                if isinstance(record, JournalHead):
                    run = number
                elif record.events and _arrives(request_id, record):
                    found = Moment(run, number, record.now_ns)
        finally:
            follower.close()
        return found

    def _step(self, number: int) -> Step | None:
        follower = JournalFollower(self.path, number)
        try:
            at, record = next(numbered(follower), (-1, None))
        finally:
            follower.close()
        return record if at == number and isinstance(record, Step) else None


def _arrives(request_id: str, step: Step) -> bool:
    return any(isinstance(event, Request) and event.request_id == request_id for event in step.events)


def _run_of(path: Path, first: int, moment: Moment) -> Iterator[JournalHead | Step]:
    """The records of a moment's run from ``first`` on, its head if that is the first; until a gap."""
    follower = JournalFollower(path, first)
    wanted = first
    try:
        for number, record in numbered(follower):
            gap = number != wanted or (isinstance(record, Step) and record.dropped)
            if gap or (isinstance(record, JournalHead) and number != moment.run):
                return
            wanted += 1
            yield record
    finally:
        follower.close()


# ------------------------------------------------------------
# Writing.


class Historian:
    """Decides a journal again as its records are taken, and writes its index and checkpoints.

    They go on where an earlier one ended: records are to be taken from number ``start`` on (None: the oldest
    there is). ``bytes_max`` bounds the checkpoints. Raises OSError where the folder cannot be made or
    written. Brains that are compiled cannot be saved: then there is an index only. The journal has a record.
    """

    def __init__(self, path: Path, bytes_max: int = GIB) -> None:
        self.path = path
        self._bytes_max = bytes_max
        folder_of(path).mkdir(mode=0o700, exist_ok=True)
        oldest = first_header(path)
        self._journal = f"{0 if oldest is None else oldest.journal:08x}"
        for one in folder_of(path).iterdir():  # of an earlier journal, or not whole
            if not one.name.startswith(self._journal) or one.suffix == ".part":
                one.unlink(missing_ok=True)
        self._controller: Controller | None = None
        self._work = 0
        self._run = 0
        self._hashes, self._numbers = bytearray(), array("Q")  # of the segment in the making
        self._indexed = self._decided = 0  # the records before these were, earlier
        self.start: int | None = None
        if segments := _segments(path):
            self.start = self._indexed = segments[-1].end
            self._run = segments[-1].run
        for checkpoint in reversed(_checkpoints(path)):
            with suppress(StateError):
                self._controller, self._decided = _restored(checkpoint), checkpoint.record
                break
        if self._controller is None or not segments:
            self.start = None
        else:
            self.start = min(self._indexed, self._decided)

    def take(self, number: int, record: JournalHead | Step) -> None:
        """The next record."""
        if isinstance(record, JournalHead):
            self.flush(number)
            self._run = number
            if number >= self._decided:
                self._begin(record)
            return
        if number >= self._indexed:
            for event in record.events:
                if type(event) is Request:
                    self._hashes += _hashed(event.request_id)
                    self._numbers.append(number)
        if self._controller is not None and number >= self._decided:
            self._play(number, self._controller, record)
        if len(self._numbers) >= SEGMENT_REQUESTS:
            self.flush(number + 1)

    def _begin(self, head: JournalHead) -> None:
        self._controller, self._work = None, 0
        if not head.continues:
            try:
                self._controller = Controller(head.controller_config())
            except ConfigError as error:  # of another version
                self._end(str(error))

    def _play(self, number: int, controller: Controller, step: Step) -> None:
        if step.dropped:
            self._end(f"{step.dropped} steps before record {number} are missing")
            return
        try:
            found = decided_again(controller, step)
        except Exception as error:  # noqa: BLE001 - whatever a broken brain raises
            self._end(f"the controller breaks at record {number}: {error!r}")
            return
        if first_difference(step.effects, found) is not None:
            self._end(f"record {number} is decided otherwise here")
            return
        self._work += 1 + len(step.events)
        if self._work >= CHECKPOINT_WORK:
            self._save(number + 1, controller)

    def _end(self, why: str) -> None:
        """Its state is not the recorded one any more, until a next run begins."""
        self._controller = None
        _log.warning("%s: no checkpoints until its controller starts again: %s", self.path, why)

    def _save(self, record: int, controller: Controller) -> None:
        self._work = 0
        try:
            saved = controller.save()
        except StateError as error:
            _log.debug("no checkpoints: %s", error)
            self._controller = None
            return
        self._write(f"{record:x}.state", zstandard.compress(saved, 1))
        self._forget()

    def flush(self, end: int) -> None:
        """Write a segment of all requests before record ``end``."""
        if self._numbers:
            first = self._numbers[0]
            hashes = np.frombuffer(self._hashes, np.uint64)
            numbers = (np.array(self._numbers, np.uint64) - np.uint64(first)).astype(np.uint32)
            order = np.argsort(hashes, kind="stable")
            name = f"{first:x}-{end:x}-{self._run:x}.index"
            self._write(name, hashes[order].tobytes() + numbers[order].tobytes())
        self._forget()
        self._hashes, self._numbers = bytearray(), array("Q")
        self._indexed = max(end, self._indexed)

    def _write(self, name: str, content: bytes) -> None:
        whole = folder_of(self.path) / f"{self._journal}-{name}"
        part = whole.with_suffix(".part")
        with open(part, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(content)
        part.replace(whole)

    def _forget(self) -> None:
        """Delete what belongs to deleted records, and thin checkpoints that take too much together."""
        header = first_header(self.path)
        oldest = 0 if header is None else header.first
        for segment in _segments(self.path):
            if segment.end <= oldest:
                segment.path.unlink(missing_ok=True)
        kept = []
        for checkpoint in _checkpoints(self.path):
            if checkpoint.record < oldest:
                checkpoint.path.unlink(missing_ok=True)
            else:
                kept.append(checkpoint)
        sizes = {one.record: one.path.stat().st_size for one in kept}
        total = sum(sizes.values())
        while total > self._bytes_max and len(kept) > 2:
            newest = kept[-1].record
            # The one whose neighbours lie closest, for how old it is: gaps grow with age.
            at = min(
                range(1, len(kept) - 1),
                key=lambda at: (kept[at + 1].record - kept[at - 1].record) / (newest - kept[at].record),
            )
            total -= sizes[kept[at].record]
            kept.pop(at).path.unlink(missing_ok=True)


def write_history(path: Path, bytes_max: int = GIB) -> History:
    """The history of a journal, made up to its present end. Raises :class:`ConfigError`."""
    history, historian = History.open(path), Historian(path, bytes_max)
    follower = JournalFollower(path, historian.start)
    try:
        number = -1
        for number, record in numbered(follower):
            historian.take(number, record)
        historian.flush(number + 1)
    finally:
        follower.close()
    return history
