"""Artefacts as they travel to machines that lack them: files read part by part, and put together again.

Weights are named by the hash of their content, and a code's record has the hash of each of its files: all are
checked when they arrive. Python models stay where they are: they are a user's program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from clockwork_serve.errors import RepositoryError
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import Code, Fetch, Frame, Part, Weights
from clockwork_serve.serve.machine_link import PIECE_BYTES
from clockwork_serve.serve.verifier import is_blob
from clockwork_serve.store import Cache, opened_code
from clockwork_serve.units import GIB

CODE_BYTES_MAX: Final = GIB
"""Of a code's files, which are held in memory until all of them are there."""


class ArrivedDamaged(RepositoryError):
    """What came is not what was asked for: it is damaged where it came from."""


def no_parts(asked: Fetch, why: str) -> Iterator[Frame]:
    """It does not come."""
    yield Part(what=asked.what, name=asked.name, last=True, error=why)


def weights_parts(asked: Fetch, weights: Weights) -> Iterator[Frame]:
    """A blob."""
    if not is_blob(weights):
        yield from no_parts(asked, "they are no file of their own")
        return
    yield from _parts(asked, [Path(weights.path)])


def code_parts(asked: Fetch, code: Code) -> Iterator[Frame]:
    """A code's folder."""
    if code.backend == "python":
        yield from no_parts(asked, "a Python model is a program, and is not sent to other machines")
        return
    folder = Path(code.path)
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        yield from no_parts(asked, f"{folder}: {error.strerror}")
        return
    yield from _parts(asked, files)


def _parts(asked: Fetch, files: list[Path]) -> Iterator[Frame]:
    try:
        for path in files:
            with path.open("rb") as file:
                while data := file.read(PIECE_BYTES):
                    yield Part(what=asked.what, name=asked.name, file=path.name, data=data)
    except OSError as error:
        yield from no_parts(asked, f"{error.filename}: {error.strerror}")
        return
    yield Part(what=asked.what, name=asked.name, last=True)


class Arriving:
    """An artefact that comes part by part, and is in the cache once the last one came."""

    def __init__(self, asked: Fetch, cache: Cache) -> None:
        self._asked = asked
        self._cache = cache
        self._files: dict[str, bytearray] = {}
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._draft = None if asked.what == "code" else (cache.scratch() / "blob").open("wb")

    def close(self) -> None:
        """It comes no further."""
        if self._draft is not None:
            self._draft.close()
            Path(self._draft.name).unlink(missing_ok=True)

    def take(self, part: Part) -> None:
        """One more. Raises :class:`RepositoryError`, and OSError where the disk is full."""
        self._bytes += len(part.data)
        if self._draft is not None:
            self._draft.write(part.data)
            self._digest.update(part.data)
        elif self._bytes > CODE_BYTES_MAX:
            raise RepositoryError(f"code {part.name} has more than {CODE_BYTES_MAX} bytes")
        elif part.file:
            self._files.setdefault(part.file, bytearray()).extend(part.data)
        if part.last:
            self._store(part)

    def _store(self, part: Part) -> None:
        if part.error:
            raise RepositoryError(part.error)
        if self._draft is None:
            self._store_code(part.name)
            return
        self._draft.close()
        if self._digest.hexdigest() != part.name:
            raise ArrivedDamaged(f"weights {part.name}: found others of {self._bytes} bytes")
        self._cache.take_weights(Path(self._draft.name), part.name)

    def _store_code(self, code_id: str) -> None:
        try:
            code = opened_code(code_id, bytes(self._files.pop("code.json", b"")))
        except ValueError as error:
            raise ArrivedDamaged(f"code {code_id}: its description cannot be read: {error}") from None
        files = {file.name: bytes(self._files.get(file.name, b"")) for file in code.files}
        for file in code.files:
            if hash_of(files[file.name]) != file.sha256:
                raise ArrivedDamaged(f"code {code_id}: {file.name}: found other content")
        self._cache.save_code(code, files)
