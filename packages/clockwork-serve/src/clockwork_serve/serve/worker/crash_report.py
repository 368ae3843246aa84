"""What the lanes of a worker are at, in a file that outlives it: whoever finds it dead knows what it died of.

A lane lanes what it is going to do, and that it has done it before anybody hears of that. Nothing is decided
by it while the worker lives.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from clockwork_serve.messages import WorkerLost

_WORDS: Final = 32
"""Of 8 bytes for each lane: the action that it is at, the one before, a code's length, and that code's id."""
_WORD: Final = 8
_TEXT: Final = 3
_TEXT_MAX: Final = (_WORDS - _TEXT) * _WORD

ReadCrashReport = Callable[[str, int], WorkerLost]
"""What a worker's link ended of, given its name and its process."""

_log = logging.getLogger(__name__)


class LaneRecord:
    """One lane's; for its own thread."""

    __slots__ = ("_bytes", "_words")

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory
        self._words = memory.cast("q")

    def action(self, action_id: int) -> None:
        """It is going to do this action."""
        self._words[0] = action_id

    def code(self, code_id: str) -> None:
        """It is going to prepare this code."""
        text = code_id.encode()[:_TEXT_MAX]
        self._bytes[_TEXT * _WORD : _TEXT * _WORD + len(text)] = text
        self._words[2] = len(text)

    def clear(self) -> None:
        """It is done."""
        words = self._words
        words[1] = words[0]
        words[0] = words[2] = 0


class FlightRecorder:
    """Notes for ``lanes`` lanes, in ``memory``; without it, they are of use to nobody."""

    def __init__(self, lanes: int, memory: mmap.mmap | None = None) -> None:
        size = _WORDS * _WORD
        whole = memoryview(bytearray(lanes * size) if memory is None else memory)
        self.lanes = [LaneRecord(whole[at * size : (at + 1) * size]) for at in range(lanes)]


def create_recorder(run_dir: Path, worker: str, lanes: int) -> FlightRecorder:
    """The black box of this process, which is that worker."""
    size = lanes * _WORDS * _WORD
    fd = os.open(_path(run_dir, worker, os.getpid()), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(fd, size)
        return FlightRecorder(lanes, mmap.mmap(fd, size))
    finally:
        os.close(fd)


def no_crash_report(worker: str, pid: int) -> WorkerLost:
    """Nothing is known of it."""
    return WorkerLost(worker=worker)


def read_crash_report(run_dir: Path, worker: str, pid: int) -> WorkerLost:
    """What is to be said of a worker whose link ended; if it is dead, its black box is read, and goes."""
    path = _path(run_dir, worker, pid)
    try:
        if _has_memory(pid):
            return WorkerLost(worker=worker)
        found = path.read_bytes()
        path.unlink()
    except OSError as error:
        _log.warning("what %s died of is not known: %s", worker, error)
        return WorkerLost(worker=worker)
    running: list[int] = []
    before: list[int] = []
    preparing: list[str] = []
    for start in range(0, len(found) - _WORDS * _WORD + 1, _WORDS * _WORD):
        lane = memoryview(found)[start : start + _WORDS * _WORD]
        action_id, before_id, length = lane.cast("q")[:_TEXT]
        if action_id:
            running.append(action_id)
        if before_id:
            before.append(before_id)
        if length:
            text = bytes(lane[_TEXT * _WORD : _TEXT * _WORD + length])
            preparing.append(text.decode(errors="replace"))
    # A signal or a fault may take its time: then it is what was done last, if nobody heard of its result.
    ran = running if running or preparing else before
    idle = not (running or preparing)
    return WorkerLost(worker=worker, running=tuple(ran), preparing=tuple(preparing), idle=idle)


def _has_memory(pid: int) -> bool:
    """Whether that process has memory still: one that dies gives it up before its links end."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def _path(run_dir: Path, worker: str, pid: int) -> Path:
    return run_dir / f"{worker}.{pid}.box"
