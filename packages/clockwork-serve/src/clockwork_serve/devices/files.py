"""Weights files and files of codes: kept open, hashed while they are copied, checked against their record."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from clockwork_serve.devices.arena import Bytes
from clockwork_serve.errors import DeviceError
from clockwork_serve.integrity import Facts, Verified, damage, file_digest, hash_of
from clockwork_serve.messages import Code, Weights

# ------------------------------------------------------------
# Weights files on the host: kept open, and read directly into device memory, without mapping.
#
# All that is copied is verified: the first LOAD of a file hashes the copied bytes; later ones only compare
# the file's size and times. A damaged file is refused, without reading it again if its size and times are
# unchanged.


OPEN_MAX: Final = 256
"""Files kept open, or a quarter of what the system allows if that is less: opening costs about 10 us."""


_OpenFile = tuple[int, tuple[int, int, int], str]
"""The descriptor of an open file, its size and times when it was verified, and the hash of its content."""


class Reading:
    """A file that is being copied, part by part in order, and hashed unless its hash is known."""

    def __init__(self, weights: Weights, fd: int, size: int, *, known: bool) -> None:
        self._path = weights.path
        self._fd = fd
        self._size = size
        self._sum: Any = None if known else hashlib.sha256()
        self.once_ns = 0  # how long hashing took

    def part(self, target: Bytes, start: int) -> None:
        """Fill ``target`` from offset ``start`` of the file. Releases the GIL."""
        try:
            done = _fill(self._fd, target, start)
        except OSError as error:
            raise DeviceError(f"weights {self._path}: cannot be read ({error})") from error
        if done != len(target):
            raise DeviceError(
                f"weights {self._path}: expected {self._size} bytes, the file ends at {start + done}"
            )
        if self._sum is not None:
            began_ns = time.monotonic_ns()
            self._sum.update(target.data)
            self.once_ns += time.monotonic_ns() - began_ns

    @property
    def digest(self) -> str | None:
        """The hash of all parts; None if it was known before."""
        return None if self._sum is None else self._sum.hexdigest()


class Blobs:
    """Open weights files, least recently used first.

    ``verify`` is thread-safe; all other methods are called by the load lane only.
    """

    def __init__(self, open_max: int = 0, verified: Verified | None = None) -> None:
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._open_max = open_max or (min(OPEN_MAX, allowed // 4) if allowed > 0 else OPEN_MAX)
        self._fd_by_path: OrderedDict[str, int] = OrderedDict()
        self._open_by_path: dict[str, _OpenFile] = {}  # of open files only
        self._verified = Verified() if verified is None else verified

    def read_into(self, weights: Weights, target: Bytes) -> int:
        """Fill ``target`` with the file, or raise DeviceError; the time spent on verification (ns)."""
        known = self._open_by_path.get(weights.path)
        if known is not None and self._read_open(known, weights, target):
            return 0
        with self.reading(weights, len(target)) as reading:
            reading.part(target, 0)
        return reading.once_ns

    def _read_open(self, known: _OpenFile, weights: Weights, target: Bytes) -> bool:
        """Fill ``target`` from an open, verified file if its size and times do not change meanwhile."""
        fd, stamp, weights_id = known
        if weights_id != weights.weights_id or stamp[0] != len(target) or _stamp_of(fd) != stamp:
            return False
        self._fd_by_path.move_to_end(weights.path)
        try:
            done = os.preadv(fd, [target.data], 0)
            if done != len(target) and _fill(fd, target, 0) != len(target):
                return False
        except OSError:
            return False  # the caller reads it again and reports the error
        return _stamp_of(fd) == stamp

    @contextlib.contextmanager
    def reading(self, weights: Weights, size: int) -> Iterator[Reading]:
        """Read a file of that size; DamageError at the end if its content does not match its id."""
        fd = self._open(weights)
        try:
            facts = Facts.of(fd)
            known = self._fitting(weights, facts, size)
            reading = Reading(weights, fd, size, known=known)
            yield reading
            self._check_read(weights, fd, facts, reading.digest)
            if self._verified.digest(weights.path, facts) == weights.weights_id:
                stamp = facts.size, facts.mtime_ns, facts.ctime_ns
                self._open_by_path[weights.path] = fd, stamp, weights.weights_id
        except BaseException:
            self._drop(weights.path)  # the path may refer to another file by now
            raise

    def verify(self, weights: Weights) -> None:
        """Hash a file without copying it, unless it is already verified. DamageError if it does not match."""
        try:
            found = file_digest(weights.path, self._verified)
        except OSError as error:
            raise damage("weights", weights.weights_id, weights.path, str(error.strerror)) from error
        if found != weights.weights_id:
            raise damage("weights", weights.weights_id, weights.path, "other content")

    def close(self) -> None:
        """Close every file."""
        for path in list(self._fd_by_path):
            self._drop(path)

    def _fitting(self, weights: Weights, facts: Facts, size: int) -> bool:
        """Whether a file of these facts is known to be valid; DamageError if it is known to be damaged."""
        if facts.size != size:
            raise damage("weights", weights.weights_id, weights.path, f"{facts.size} bytes, not {size}")
        known = self._verified.digest(weights.path, facts)
        if known not in (None, weights.weights_id):
            raise damage("weights", weights.weights_id, weights.path, "other content")
        return known is not None

    def _check_read(self, weights: Weights, fd: int, facts: Facts, digest: str | None) -> None:
        """Verify what was read; ``digest`` is its hash if it was not known before."""
        if Facts.of(fd) != facts:
            raise damage("weights", weights.weights_id, weights.path, "a file that changed while it was read")
        if digest is None:
            return
        self._verified.remember(weights.path, facts, digest)
        if digest != weights.weights_id:
            raise damage("weights", weights.weights_id, weights.path, "other content")

    def _open(self, weights: Weights) -> int:
        path = weights.path
        fd = self._fd_by_path.get(path)
        if fd is None:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise DeviceError(f"weights {path}: cannot be opened ({error.strerror})") from error
                raise damage("weights", weights.weights_id, path, str(error.strerror)) from error
            self._fd_by_path[path] = fd
            if len(self._fd_by_path) > self._open_max:
                self._drop(next(iter(self._fd_by_path)))
        self._fd_by_path.move_to_end(path)
        return fd

    def _drop(self, path: str) -> None:
        self._open_by_path.pop(path, None)
        fd = self._fd_by_path.pop(path, None)
        if fd is not None:
            os.close(fd)


def _stamp_of(fd: int) -> tuple[int, int, int]:
    """The facts of an open file that change when it is written."""
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _fill(fd: int, target: Bytes, start: int) -> int:
    """Read from ``start`` of the file until the target is full or the file ends; the number of bytes read."""
    view, done = target.data, 0
    while done < len(target):
        count = os.preadv(fd, [view[done:]], start + done)
        if not count:
            break
        done += count
    return done


# ------------------------------------------------------------
# The files of a code, verified against its record when they are opened; other files are not read.


_Record = TypeVar("_Record")
_Content = TypeVar("_Content")


def read_file(code: Code, name: str) -> bytes:
    """The content of a file of a code; DamageError if it is not what was stored."""
    return _verified(code, name, Path.read_bytes, hash_of)


def read_record(code: Code, name: str, decoder: msgspec.json.Decoder[_Record]) -> _Record:
    """A record in a file of a code; DeviceError if it is not one."""
    try:
        return decoder.decode(read_file(code, name))
    except (ValueError, RecursionError, msgspec.DecodeError) as error:
        path = Path(code.path) / name
        raise DeviceError(f"code {path}: cannot be read ({error}); compile the model again") from error


def has_file(code: Code, name: str) -> bool:
    """Whether a code has a file of that name."""
    return any(file.name == name for file in code.files)


def check_file(code: Code, name: str) -> Path:
    """The path of a file of a code, for libraries that open it themselves; DamageError if it is damaged."""
    return _verified(code, name, Path, file_digest)


def _verified(
    code: Code, name: str, read: Callable[[Path], _Content], digest: Callable[[_Content], str]
) -> _Content:
    path = Path(code.path) / name
    wanted = next((file.sha256 for file in code.files if file.name == name), None)
    if wanted is None:
        raise damage("code", code.code_id, path, "no such file in its record")
    try:
        content = read(path)
        found = digest(content)
    except OSError as error:
        raise damage("code", code.code_id, path, str(error.strerror)) from error
    if found != wanted:
        raise damage("code", code.code_id, path, "other content")
    return content
