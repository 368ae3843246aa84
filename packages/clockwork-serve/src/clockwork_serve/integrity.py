"""Files that are read back and believed: what their content must be, and when it was last looked at.

Content is named by its SHA-256. A whole file is hashed when a process first reads it, and again whenever it
does not look the same (device, inode, size, times). Records that have no such name carry a seal: a line with
the hash of where they belong and what they say, so that neither a changed digit nor two records in each
other's place pass. What changes under equal times after it was hashed stays unseen.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Final, NamedTuple

from clockwork_serve.errors import DamageError

VERIFIED_MAX: Final = 100_000
"""Files remembered as verified: each takes about 400 bytes."""
SETTLED_NS: Final = 100_000_000
"""A file changed less than this ago may change again within one tick of its time stamps."""
_SEAL: Final = b"sha256 "
_SEAL_BYTES: Final = len(_SEAL) + 64 + 1


class Facts(NamedTuple):
    """What tells, without reading it, that a file is still the one that was read."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: int | Path | str) -> Facts:
        """The facts of a file, by descriptor or path. Raises OSError."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Verified:
    """What was found in files, by path, as long as they look the same. For any thread."""

    def __init__(self, most: int = VERIFIED_MAX, settled_ns: int = SETTLED_NS) -> None:
        self._most = most
        self._settled_ns = settled_ns
        self._found: OrderedDict[str, tuple[Facts, str]] = OrderedDict()  # the hash of what was read
        self._lock = threading.Lock()

    def digest(self, path: str, facts: Facts) -> str | None:
        """The hash of a file that looks like this; None if it must be read to know."""
        with self._lock:
            found = self._found.get(path)
            if found is None or found[0] != facts:
                return None
            self._found.move_to_end(path)
            return found[1]

    def remember(self, path: str, facts: Facts, digest: str) -> None:
        """A file that looks like this was hashed; forgotten at once if it may still change unseen."""
        settled = time.time_ns() - max(facts.mtime_ns, facts.ctime_ns) > self._settled_ns
        with self._lock:
            self._found.pop(path, None)
            if settled:
                self._found[path] = facts, digest
                if len(self._found) > self._most:
                    self._found.popitem(last=False)

    def __len__(self) -> int:
        return len(self._found)


def hash_of(data: bytes | memoryview) -> str:
    """The name of a content. Releases the GIL where there is much."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path | str, verified: Verified | None = None) -> str:
    """The hash of a file, read in whole unless ``verified`` knows it. Raises OSError.

    A file that changes while it is read has the hash of nothing: empty.
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
    """A record as it is stored at ``place``: a line that vouches for it, and what it says."""
    return _SEAL + _seal(place, data) + b"\n" + data


def unsealed(place: str, stored: bytes) -> bytes:
    """What a record says. Raises ValueError if it is torn, changed, or belongs elsewhere."""
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
    """The error for an artefact that is not what its name says."""
    return DamageError(
        f"{what} {name}: expected what was stored in {path}, found {found}; it is made again from the"
        " repository",
        what=what,
        name=name,
    )
