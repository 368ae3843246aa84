"""Verification of files by checksum, and files that are their owner's alone.

Content is named by its SHA-256. A file is hashed when a process first reads it, and again whenever its
metadata (device, inode, size, times) differ. Records without such a name carry a seal: a line with the hash
of their place and content, so that neither a changed byte nor two swapped records pass. A change that leaves
the times as they were is not detected.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Final, NamedTuple

from clockwork_serve.errors import DamageError

VERIFIED_MAX: Final = 100_000  # capacity of the cache of verified files: each takes about 400 bytes
SETTLED_NS: Final = 100_000_000
"""A file changed less than this ago may change again within the resolution of its time stamps."""
_SEAL: Final = b"sha256 "
_SEAL_BYTES: Final = len(_SEAL) + 64 + 1
_log = logging.getLogger(__name__)


class Facts(NamedTuple):
    """Metadata by which a file is taken to be unchanged."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: int | Path | str) -> Facts:
        """The metadata of a file, by descriptor or path. Raises OSError."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Verified:
    """A cache of hashes of files, by path, valid while their metadata are the same. Thread-safe."""

    def __init__(self, settled_ns: int = SETTLED_NS) -> None:
        self._settled_ns = settled_ns
        self._found: OrderedDict[str, tuple[Facts, str]] = OrderedDict()  # metadata and hash by path
        self._lock = threading.Lock()

    def digest(self, path: str, facts: Facts) -> str | None:
        """The cached hash of a file with that metadata; None if the file has to be read."""
        with self._lock:
            found = self._found.get(path)
            if found is None or found[0] != facts:
                return None
            self._found.move_to_end(path)
            return found[1]

    def remember(self, path: str, facts: Facts, digest: str) -> None:
        """Cache the hash of a file, unless it changed so recently that another change could go undetected."""
        settled = time.time_ns() - max(facts.mtime_ns, facts.ctime_ns) > self._settled_ns
        with self._lock:
            self._found.pop(path, None)
            if settled:
                self._found[path] = facts, digest
                if len(self._found) > VERIFIED_MAX:
                    self._found.popitem(last=False)

    def __len__(self) -> int:
        return len(self._found)


def hash_of(data: bytes | memoryview) -> str:
    """The SHA-256 of a content, in hex. Releases the GIL for large contents."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path | str, verified: Verified | None = None) -> str:
    """The hash of a file, from ``verified`` or by reading the whole file. Raises OSError.

    Empty if the file changed while it was read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        facts = Facts.of(descriptor)
        known = None if verified is None else verified.digest(str(path), facts)
        if known is not None:
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if Facts.of(descriptor) != facts:
            return ""
    if verified is not None:
        verified.remember(str(path), facts, digest)
    return digest


def sealed(place: str, data: bytes) -> bytes:
    """A record as it is stored at ``place``: its seal, and its content."""
    return _SEAL + _seal(place, data) + b"\n" + data


def unsealed(place: str, stored: bytes) -> bytes:
    """The content of a stored record. Raises ValueError if it is truncated, changed, or of another place."""
    data = stored[_SEAL_BYTES:]
    if stored[:_SEAL_BYTES] != _SEAL + _seal(place, data) + b"\n":
        raise ValueError("its seal does not fit")
    return data


def _seal(place: str, data: bytes) -> bytes:
    where = place.encode()
    digest = hashlib.sha256(b"%d:" % len(where) + where)
    digest.update(data)
    return digest.hexdigest().encode()


def damage(what: str, name: str, path: Path | str, found: str) -> DamageError:
    """The error for an artefact that does not match its hash."""
    return DamageError(
        f"{what} {name}: expected what was stored in {path}, found {found}", what=what, name=name
    )


def make_private(setting: str, path: Path) -> None:
    """Take a file or folder that is ours from all other users; warn if another user's can be written by more.

    Nothing else (a device, a pipe) is touched. Raises OSError.
    """
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if not mode & 0o077 or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return
    if found.st_uid == os.geteuid():
        path.chmod(mode & 0o700)
        _log.warning(
            "%s: %s was open to other users (mode %04o), and is its owner's alone now", setting, path, mode
        )
    elif mode & 0o022:
        _log.warning(
            "%s: expected %s to be its owner's alone, found mode %04o: who can write there can change what "
            "is served; have its owner (user %d) chmod it", setting, path, mode, found.st_uid,
        )  # fmt: skip
