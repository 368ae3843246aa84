"""Weights files on the host: opened once, read straight into device memory; never mapped, never written."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Final

from clockwork_serve.devices.arena import Bytes
from clockwork_serve.errors import DeviceError

OPEN_MAX: Final = 256
"""Files kept open: opening costs about 10 us, and the usual limit of a process is 1024 files."""


class Blobs:
    """Open weights files, least recently used first. Used by the load lane only."""

    def __init__(self, open_max: int = OPEN_MAX) -> None:
        self._open_max = open_max
        self._fd_by_path: OrderedDict[str, int] = OrderedDict()

    def read_into(self, path: str, target: Bytes) -> None:
        """Fill ``target`` with the file; DeviceError unless it is exactly as long. Releases the GIL."""
        self.read_part(path, target, 0, len(target))

    def read_part(self, path: str, target: Bytes, start: int, size: int) -> None:
        """Fill ``target`` from ``start`` of a file; DeviceError unless the file is ``size`` bytes long."""
        fd = self._open(path, size)
        try:
            done = _fill(fd, target, start)
        except OSError as error:
            self._drop(path)
            raise DeviceError(f"weights {path}: cannot be read ({error})") from error
        if done != len(target):
            self._drop(path)
            raise DeviceError(f"weights {path}: expected {size} bytes, the file ends at {start + done}")

    def close(self) -> None:
        """Close every file."""
        for path in list(self._fd_by_path):
            self._drop(path)

    def _open(self, path: str, size: int) -> int:
        fd = self._fd_by_path.get(path)
        if fd is None:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DeviceError(f"weights {path}: {error.strerror}; compile the model again") from error
            self._fd_by_path[path] = fd
            if len(self._fd_by_path) > self._open_max:
                self._drop(next(iter(self._fd_by_path)))
        self._fd_by_path.move_to_end(path)
        found = os.fstat(fd).st_size
        if found != size:
            self._drop(path)
            raise DeviceError(
                f"weights {path}: expected {size} bytes, found {found}; compile the model again"
            )
        return fd

    def _drop(self, path: str) -> None:
        fd = self._fd_by_path.pop(path, None)
        if fd is not None:
            os.close(fd)


def _fill(fd: int, target: Bytes, start: int) -> int:
    """Read from ``start`` of the file until the target is full or the file ends; how far it came."""
    view, done = target.data, 0
    while done < len(target):
        count = os.preadv(fd, [view[done:]], start + done)
        if not count:
            break
        done += count
    return done
