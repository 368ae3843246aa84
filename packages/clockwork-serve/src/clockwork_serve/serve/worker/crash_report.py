"""A flight recorder in a worker process, and the crash report that is read from it once the worker has died.

Each lane records in a memory-mapped file what it is about to do, and clears that before it reports a result.
The file outlives the process, so the controller learns which actions and codes were running when it died.
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
"""8-byte words per lane: the current action's id, the previous one's, a code id's length, and the code id."""
_WORD: Final = 8
_TEXT: Final = 3
_TEXT_MAX: Final = (_WORDS - _TEXT) * _WORD

ReadCrashReport = Callable[[str, int], WorkerLost]
"""Returns the event for a worker whose link was lost, given its name and process id."""

_log = logging.getLogger(__name__)


class LaneRecord:
    """The record of one lane, written by the lane's own thread."""

    __slots__ = ("_bytes", "_words")

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory
        self._words = memory.cast("q")

    def action(self, action_id: int) -> None:
        """Record that the lane is about to do this action."""
        self._words[0] = action_id

    def code(self, code_id: str) -> None:
        """Record that the lane is about to prepare this code."""
        text = code_id.encode()[:_TEXT_MAX]
        self._bytes[_TEXT * _WORD : _TEXT * _WORD + len(text)] = text
        self._words[2] = len(text)

    def clear(self) -> None:
        """Record that it is done; the action becomes the previous one."""
        words = self._words
        words[1] = words[0]
        words[0] = words[2] = 0


class FlightRecorder:
    """Records of ``lanes`` lanes in ``memory``; by default in memory that no other process can read."""

    def __init__(self, lanes: int, memory: mmap.mmap | None = None) -> None:
        size = _WORDS * _WORD
        whole = memoryview(bytearray(lanes * size) if memory is None else memory)
        self.lanes = [LaneRecord(whole[at * size : (at + 1) * size]) for at in range(lanes)]


def create_recorder(run_dir: Path, worker: str, lanes: int) -> FlightRecorder:
    """The flight recorder of this process, which runs that worker, in a new file in ``run_dir``."""
    size = lanes * _WORDS * _WORD
    fd = os.open(_path(run_dir, worker, os.getpid()), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(fd, size)
        return FlightRecorder(lanes, mmap.mmap(fd, size))
    finally:
        os.close(fd)


def no_crash_report(worker: str, pid: int) -> WorkerLost:
    """The event for a worker of which there is no crash report."""
    return WorkerLost(worker=worker)


def read_crash_report(run_dir: Path, worker: str, pid: int) -> WorkerLost:
    """The event for a worker whose link was lost. If the process is dead, its file is read and removed.

    A process that lives, or left no file, yields an event without actions.
    """
    path = _path(run_dir, worker, pid)
    try:
        if _has_memory(pid):
            return WorkerLost(worker=worker)
        found = path.read_bytes()
        path.unlink()
    except OSError as error:
        _log.warning("no crash report of %s: %s", worker, error)
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
    # A signal or a fault may take effect late, after the action that caused it: if nothing was running, the
    # previous actions are suspect, unless the controller received their results.
    ran = running if running or preparing else before
    idle = not (running or preparing)
    return WorkerLost(worker=worker, running=tuple(ran), preparing=tuple(preparing), idle=idle)


def _has_memory(pid: int) -> bool:
    """Whether a process still has its memory: a dying process gives it up before its sockets are closed."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def _path(run_dir: Path, worker: str, pid: int) -> Path:
    return run_dir / f"{worker}.{pid}.box"
