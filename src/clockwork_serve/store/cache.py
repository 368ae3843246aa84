"""Artefacts on disk, shared by processes; whatever is found in it is whole, or it is not there.

Everything is written beside its place, synced and renamed into it, so that a process killed half-way leaves
only a folder under ``tmp`` that the next one sweeps away.

    CACHE_DIR/v5-RUNTIME/codes/CODE_ID/{model.onnx,index.json,probe.json,code.json}
                                       {1.pt2,2.pt2,...,recipe.json,report.json} of a torch program
                         weights/ID[:2]/ID.bin      blobs, shared by models of equal weights
                         compiled/KEY.json          what a model file and its settings compiled to
                         seen/KEY.json              size and times of a file, and what it compiled to
                         architectures/KEY/         what copies of one architecture have in common
                         profiles/CODE_ID.KIND.json
                         inductor/                  torch's own cache: precompiled headers
                         locks/NN tmp/OWNER/
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from clockwork_serve.errors import RepositoryError
from clockwork_serve.messages import Code, Profile
from clockwork_serve.store.optimiser import runtime_fingerprint
from clockwork_serve.store.problems import ProblemError, problem

LAYOUT = 5
"""Raised whenever what is stored changes its meaning; older folders are left alone."""
_LOCKS = 64
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_Record = TypeVar("_Record")


def digest_of(*parts: bytes | str) -> str:
    """One hash of several parts, each delimited by its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


class Cache:
    """Artefacts for this runtime on this CPU. Raises ``RepositoryError`` if the folder cannot be written."""

    def __init__(
        self, cache_dir: str | os.PathLike[str], *, fingerprint: Mapping[str, str] | None = None
    ) -> None:
        facts = dict(runtime_fingerprint() if fingerprint is None else fingerprint)
        self.runtime = digest_of(msgspec.json.encode(facts, order="sorted"))[:16]
        self.root = Path(cache_dir).expanduser().absolute() / f"v{LAYOUT}-{self.runtime}"
        self._count = itertools.count()
        try:
            for name in ("codes", "weights", "compiled", "seen", "architectures", "profiles", "locks", "tmp"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with self.lock("tmp"):
                self._sweep()
                self._own = Path(tempfile.mkdtemp(dir=self.root / "tmp"))
                self._alive = _locked(self._own / "alive")
            self.write(self.root / "runtime.json", msgspec.json.encode(facts))
        except OSError as error:
            raise RepositoryError(
                f"cache_dir: expected a folder that can be written, found {cache_dir} ({error.strerror}); "
                "give another one"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what belongs to this process only."""
        os.close(self._alive)
        shutil.rmtree(self._own, ignore_errors=True)

    # Records

    def record(self, kind: str, key: str, type_: type[_Record]) -> _Record | None:
        """A stored record, or None if there is none that can be read."""
        try:
            return msgspec.json.decode((self.root / kind / f"{key}.json").read_bytes(), type=type_)
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
            return None

    def save_record(self, kind: str, key: str, value: object) -> None:
        """Store a record, replacing the one that was there.

        It is not synced: one that a power failure tears does not decode, and counts as absent.
        """
        self.write(self.root / kind / f"{key}.json", msgspec.json.encode(value), synced=False)

    def profile(self, code_id: str, device_kind: str) -> Profile | None:
        """The profile measured before, or None."""
        return self.record("profiles", _profile_key(code_id, device_kind), Profile)

    def save_profile(self, profile: Profile) -> None:
        """Keep a profile for the next start."""
        self.save_record("profiles", _profile_key(profile.code_id, profile.device_kind), profile)

    # Codes and weights

    def code(self, code_id: str) -> Code | None:
        """A stored code, with its path in this cache; None if there is none."""
        folder = self.root / "codes" / code_id
        try:
            code = msgspec.json.decode((folder / "code.json").read_bytes(), type=Code)
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
            return None
        return msgspec.structs.replace(code, path=str(folder))

    def save_code(self, code: Code, files: Mapping[str, bytes]) -> Code:
        """Store a code and its files, unless another process did; the code with its path."""
        place = self.root / "codes" / code.code_id
        draft = self._draft()
        draft.mkdir()
        try:
            for name, data in files.items():
                self._write_draft(draft / name, data, place / name)
            self._write_draft(draft / "code.json", msgspec.json.encode(code), place / "code.json")
            if place.exists() and self.code(code.code_id) is None:
                shutil.rmtree(place, ignore_errors=True)
            with contextlib.suppress(FileExistsError):
                draft.rename(place)
        except OSError as error:
            # A folder that is not empty cannot be renamed over: another process was first with the same.
            if error.errno != errno.ENOTEMPTY:
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        stored = self.code(code.code_id)
        if stored is None:
            raise RepositoryError(
                f"cache_dir: expected a code at {place}, found none; is someone emptying it?"
            )
        return stored

    def weights_path(self, weights_id: str) -> Path:
        """Where the blob of that id is, or would be."""
        return self.root / "weights" / weights_id[:2] / f"{weights_id}.bin"

    def save_weights(self, blob: npt.NDArray[np.uint8] | bytes) -> str:
        """Store a blob unless an equal one is there; its id."""
        data = memoryview(blob if isinstance(blob, bytes) else blob.tobytes() if not len(blob) else blob.data)
        weights_id = hashlib.sha256(data).hexdigest()
        path = self.weights_path(weights_id)
        if not _has_size(path, len(data)):
            path.parent.mkdir(exist_ok=True)
            self.write(path, data)
        return weights_id

    def has_weights(self, weights_id: str, file_bytes: int) -> bool:
        """Whether the blob is there in full."""
        return _has_size(self.weights_path(weights_id), file_bytes)

    # Files

    def write(self, path: Path, data: bytes | memoryview, *, synced: bool = True) -> None:
        """Put a whole file at ``path`` or nothing. Raises ``ProblemError`` if the disk is full."""
        draft = self._draft()
        try:
            self._write_draft(draft, data, path, synced=synced)
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Keep other processes from making the same artefact at the same time."""
        number = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % _LOCKS
        descriptor = os.open(
            self.root / "locks" / f"{number:02d}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def scratch(self) -> Path:
        """A new folder for what is made on the way; it goes with this process at the latest."""
        folder = self._draft()
        folder.mkdir()
        return folder

    def _draft(self) -> Path:
        return self._own / str(next(self._count))

    def _write_draft(
        self, draft: Path, data: bytes | memoryview, place: Path, *, synced: bool = True
    ) -> None:
        try:
            with open(draft, "wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                if synced:
                    os.fsync(file.fileno())
        except OSError as error:
            draft.unlink(missing_ok=True)
            if error.errno in _FULL:
                raise _full(place, len(data), error) from None
            raise

    def _sweep(self) -> None:
        """Remove drafts of processes that are gone. Called with the lock, so that no folder is half made."""
        for folder in (self.root / "tmp").iterdir():
            try:
                descriptor = _locked(folder / "alive")
            except (BlockingIOError, FileNotFoundError):
                continue
            os.close(descriptor)
            shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path) -> int:
    """A descriptor that holds a lock on the file for as long as this process lives."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _full(place: Path, needed: int, error: OSError) -> ProblemError:
    try:
        stat = os.statvfs(place.anchor if not place.parent.exists() else place.parent)
        free = f"{stat.f_bavail * stat.f_frsize} bytes free"
    except OSError:
        free = "an unknown number of bytes free"
    return problem(
        "cache_dir", expected=f"room for {needed} bytes at {place}",
        found=f"{free} ({os.strerror(error.errno or 0)})",
        advice="free some space or put cache_dir on another disk",
    )  # fmt: skip


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _profile_key(code_id: str, device_kind: str) -> str:
    return f"{code_id}.{digest_of(device_kind)[:16]}"
