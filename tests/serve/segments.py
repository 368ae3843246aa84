"""Shared memory as a client makes it: an object with a key, written and read like a file."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "/clockwork-test-"


class Segment:
    """One object of shared memory; ``key`` is its name for the server."""

    def __init__(self, key: str, nbytes: int) -> None:
        self.key = key
        self.path = f"/dev/shm{key}"
        self.fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        self.resize(nbytes)

    def resize(self, nbytes: int) -> None:
        os.ftruncate(self.fd, nbytes)

    def write(self, data: bytes, offset: int = 0) -> None:
        assert os.pwrite(self.fd, data, offset) == len(data)

    def read(self, nbytes: int, offset: int = 0) -> bytes:
        return os.pread(self.fd, nbytes, offset)

    def close(self) -> None:
        os.close(self.fd)
        Path(self.path).unlink(missing_ok=True)


@contextmanager
def segment(nbytes: int, content: bytes = b"") -> Iterator[Segment]:
    """An object that is removed afterwards."""
    found = Segment(f"{PREFIX}{uuid.uuid4().hex}", nbytes)
    try:
        found.write(content)
        yield found
    finally:
        found.close()
