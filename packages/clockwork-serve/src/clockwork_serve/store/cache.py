"""Artefacts on disk, shared by processes; an artefact is either complete or absent.

Everything is written to a temporary place, synced and renamed, and then the folder is synced. So a process
killed half-way leaves only a folder under ``tmp``, which the next process removes, and a power failure leaves
no partial artefact.

Everything is verified when it is read back: weights are named by the hash of their file, a code's record has
the hash of each of its files, and records are sealed (see ``integrity``). What does not match is moved to
``damaged`` and counts as absent, so that it is made again.

    CACHE_DIR/v7-RUNTIME/codes/CODE_ID/{model.onnx,index.json,probe.json,code.json}
                                       {1.pt2,2.pt2,...,recipe.json,report.json} of a torch program
                         weights/ID[:2]/ID.bin      blobs, shared by models of equal weights
                         compiled/KEY.json          what a model file and its settings compiled to
                         seen/KEY.json              size and times of a file, and what it compiled to
                         architectures/KEY/         what models of equal graphs have in common
                         profiles/CODE_ID.KIND.json
                         inductor/                  torch's own cache: precompiled headers
                         damaged/                   damaged artefacts, the last few, for inspection
                         locks/{NN,inner-NN} tmp/OWNER/
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_serve.errors import RepositoryError, encodable, printable
from clockwork_serve.integrity import Facts, Verified, file_digest, hash_of, make_private, sealed, unsealed
from clockwork_serve.messages import Code, CodeFile, Profile, TensorSpec, Weights
from clockwork_serve.store.optimiser import runtime_fingerprint
from clockwork_serve.store.settings import Damage, ModelSettings, Problem, ProblemError, problem
from clockwork_serve.store.shared import FULL, RECORDS, SharedStore, sync_folder
from clockwork_serve.units import KIB, MIB, align

LAYOUT = 7  # incremented whenever what is stored changes, or what decides it; older folders are not touched
KEPT_DAMAGED = 16
KEPT_DAMAGED_BYTES = 256 * MIB
"""How many damaged artefacts, and how many bytes of them, are kept; the oldest are deleted first."""
_FOLDERS = (
    "codes", "weights", "compiled", "seen", "architectures", "profiles", "damaged", "locks", "tmp",
)  # fmt: skip
_RUNTIME = "runtime.json"
_COMPARED_BYTES = 1 * MIB
_LOCKS = 64
_Record = TypeVar("_Record")

_log = logging.getLogger(__name__)


def digest_of(*parts: bytes | str) -> str:
    """One hash of several parts, each delimited by its length. File names may be any bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def runtime_of(fingerprint: Mapping[str, str] | None = None) -> tuple[str, bytes]:
    """The id of this runtime on this CPU, and what it stands for, as JSON."""
    facts = msgspec.json.encode(
        dict(runtime_fingerprint() if fingerprint is None else fingerprint), order="sorted"
    )
    return digest_of(facts)[:16], facts


def shared_store(place: str) -> SharedStore:
    """The shared store at a place, for this runtime on this CPU."""
    runtime, facts = runtime_of()
    return SharedStore(place, f"v{LAYOUT}-{runtime}", facts)


class Cache:
    """Artefacts for this runtime on this CPU. Raises ``RepositoryError`` if the folder cannot be used.

    ``reads_weights``: a blob counts as present only once it was read and hashed, not if its size alone
    matches. Without it, the process that copies the blob verifies it. ``damage`` lists what was set aside.

    ``store``: the shared store behind this cache (a folder, or a URL for fsspec), if any. What is absent here
    is taken from there, and what is stored here is stored there, too.

    A folder that cannot be written (``read_only`` says why) is used as it is, if it is not empty: records are
    not kept, and what is missing is a ``ProblemError`` where it would be stored.
    """

    def __init__(
        self, cache_dir: str | os.PathLike[str], *, fingerprint: Mapping[str, str] | None = None,
        reads_weights: bool = True, store: str = "",
    ) -> None:  # fmt: skip
        self.runtime, facts = runtime_of(fingerprint)
        self.root = Path(cache_dir).expanduser().absolute() / f"v{LAYOUT}-{self.runtime}"
        if encodable(str(self.root)) != str(self.root):
            found = printable(str(self.root))
            raise RepositoryError(
                f"cache_dir: expected a path in UTF-8, found {found}; give another one with --cache"
            )
        self.reads_weights = reads_weights
        self.damage: list[Damage] = []
        self._verified = Verified()
        self._setting_aside = threading.Lock()
        self._count = itertools.count()
        self.shared = SharedStore(store, self.root.name, facts) if store else None
        self._own: Path | None = None
        self.read_only = ""
        try:
            self._open(facts)
        except OSError as error:
            self.read_only = error.strerror or str(error)
            if not os.access(self.root / _RUNTIME, os.R_OK):
                raise RepositoryError(self._unusable(Path(cache_dir))) from None
            _log.info("cache: %s cannot be written (%s); what is there is used", self.root, self.read_only)

    def _open(self, facts: bytes) -> None:
        """Make all folders, and one of our own for drafts."""
        self.root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root.mkdir(mode=0o700, exist_ok=True)
        make_private("cache", self.root)
        for name in _FOLDERS:
            (self.root / name).mkdir(exist_ok=True)
        with self.lock("tmp"):
            self._sweep()
            self._own = Path(tempfile.mkdtemp(dir=self.root / "tmp"))
            self._alive = _locked(self._own / "alive")
        if not (self.root / _RUNTIME).exists():
            self.write(self.root / _RUNTIME, facts)

    def _unusable(self, folder: Path) -> str:
        found = f"{folder} ({self.read_only})"
        with contextlib.suppress(OSError):
            others = [each.name for each in folder.iterdir() if each.name != self.root.name]
            if any(name.startswith("v") for name in others):
                found += ", filled by another version, runtime or CPU"
        return (
            f"cache_dir: expected a folder that can be written, found {found}; give another with --cache; "
            "to serve from one that cannot, fill it first where it can, by this version on this kind of CPU: "
            "clockwork profile REPO --cache FOLDER"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary files of this process."""
        if self._own is not None:
            os.close(self._alive)
            shutil.rmtree(self._own, ignore_errors=True)

    # Records

    def record(self, kind: str, key: str, type_: type[_Record]) -> _Record | None:
        """A stored record, or None if there is no valid one."""
        judged = self._facts("record", f"{kind}/{key}.json")
        content = self.read(kind, f"{key}.json")
        if content is None:
            return None
        try:
            return msgspec.json.decode(content, type=type_)
        except (ValueError, RecursionError, msgspec.MsgspecError) as error:
            again = not self.set_aside("record", f"{kind}/{key}.json", str(error), judged)
        return self.record(kind, key, type_) if again else None

    def save_record(self, kind: str, key: str, value: object) -> None:
        """Store a record, replacing an earlier one; in a read-only cache, do nothing."""
        if self.read_only:
            return
        place = f"{kind}/{key}.json"
        stored = sealed(place, msgspec.json.encode(value))
        self.write(self.root / place, stored)
        if self.shared is not None and kind in RECORDS:
            self.shared.save_record(place, stored)

    def read(self, kind: str, name: str) -> bytes | None:
        """The content of a sealed file, here or in the shared store, or None if there is no valid one."""
        content = self._here(kind, name)
        if content is None and self.shared is not None and kind in RECORDS:
            content = self.shared.record(f"{kind}/{name}")
            if content is not None and not self.read_only:
                self.write(self.root / kind / name, sealed(f"{kind}/{name}", content))
        return content

    def _here(self, kind: str, name: str) -> bytes | None:
        place = f"{kind}/{name}"
        judged = self._facts("record", place)
        try:
            return unsealed(place, (self.root / place).read_bytes())
        except OSError:
            return None
        except ValueError as error:
            again = not self.set_aside("record", place, str(error), judged)
        return self._here(kind, name) if again else None

    def profile(self, code_id: str, device_kind: str) -> Profile | None:
        """The stored profile, or None."""
        return self.record("profiles", _profile_key(code_id, device_kind), Profile)

    def profiles(self, code_id: str) -> list[Profile]:
        """The profiles of a code for all kinds of device that there were, here and in the shared store."""
        found = [self.record("profiles", key, Profile) for key in sorted(self._profile_keys.get(code_id, ()))]
        return [each for each in found if each is not None]

    @functools.cached_property
    def _profile_keys(self) -> dict[str, set[str]]:
        """The keys of all profiles, by code."""
        names = {path.name for path in (self.root / "profiles").glob("*.json")}
        keys: dict[str, set[str]] = {}
        for name in names | (self.shared.names("profiles") if self.shared is not None else set()):
            keys.setdefault(name.partition(".")[0], set()).add(name.removesuffix(".json"))
        return keys

    def save_profile(self, profile: Profile) -> None:
        """Store a profile."""
        self.save_record("profiles", _profile_key(profile.code_id, profile.device_kind), profile)

    # Codes and weights

    def code(self, code_id: str) -> Code | None:
        """A stored code, with its path in this cache; None unless all its files are present and valid.

        Files are hashed once, and again when they appear changed: a lifted graph is small. One that is not
        here is taken from the shared store.
        """
        return self._code_here(code_id) or self._taken_code(code_id)

    def _code_here(self, code_id: str) -> Code | None:
        folder, name = self.root / "codes" / code_id, "code.json"
        judged = self._facts("code", code_id)
        if judged is None:
            return None
        try:
            code = opened_code(code_id, (folder / name).read_bytes())
            for file in code.files:
                name = file.name
                self._check_file(folder / name, file.sha256)
        except (OSError, ValueError) as error:
            found = error.strerror if isinstance(error, OSError) else error
            again = not self.set_aside("code", code_id, f"{name}: {found}", judged)
            return self._code_here(code_id) if again else None
        return msgspec.structs.replace(code, path=str(folder))

    def _check_file(self, path: Path, sha256: str) -> None:
        if file_digest(path, self._verified) != sha256:
            raise ValueError("other content")

    def code_file(self, code_id: str, name: str) -> bytes | None:
        """The content of a file of a code; if it is not what was stored, None, and the code is set aside."""
        judged = self._facts("code", code_id)
        code = self.code(code_id)
        wanted = {file.name: file.sha256 for file in code.files} if code is not None else {}
        if name not in wanted:
            return None
        try:
            data = (self.root / "codes" / code_id / name).read_bytes()
        except OSError:
            return None
        if hash_of(data) != wanted[name]:
            again = not self.set_aside("code", code_id, f"{name}: other content", judged)
            return self.code_file(code_id, name) if again else None
        return data

    def save_code(self, code: Code, files: Mapping[str, bytes]) -> Code:
        """Store a code and its files, unless another process did; the code with its path."""
        stored = self._store_code(code, files)
        self._share_code(stored)
        return stored

    def _store_code(self, code: Code, files: Mapping[str, bytes]) -> Code:
        place = self.root / "codes" / code.code_id
        manifest = tuple(CodeFile(name, hash_of(data)) for name, data in sorted(files.items()))
        code = msgspec.structs.replace(code, files=manifest, path="")
        record = sealed(_code_place(code.code_id), msgspec.json.encode(code))
        draft = self._draft()
        draft.mkdir()
        try:
            for name, data in files.items():
                self._write_draft(draft / name, data, place / name)
            self._write_draft(draft / "code.json", record, place / "code.json")
            self._code_here(code.code_id)  # a damaged one is set aside
            sync_folder(draft)
            with contextlib.suppress(FileExistsError):
                draft.rename(place)
                sync_folder(place.parent)
        except OSError as error:
            # A folder that is not empty cannot be renamed over: another process was first with the same.
            if error.errno != errno.ENOTEMPTY:
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        stored = self._code_here(code.code_id)
        if stored is None:
            raise RepositoryError(
                f"cache_dir: expected a code at {place}, found none; is someone emptying it?"
            )
        return stored

    def weights_path(self, weights_id: str) -> Path:
        """The path of the blob of that id, whether it exists or not."""
        return self.root / "weights" / weights_id[:2] / f"{weights_id}.bin"

    def save_weights(self, blob: npt.NDArray[np.uint8] | bytes) -> str:
        """Store a blob unless an equal one exists; its id."""
        data = memoryview(blob if isinstance(blob, bytes) else blob.tobytes() if not len(blob) else blob.data)
        weights_id = hash_of(data)
        path = self.weights_path(weights_id)
        judged = self._facts("weights", weights_id)
        if not _holds(path, data):
            self.set_aside("weights", weights_id, "other content", judged)
            self._weights_folder(path)
            self.write(path, data)
        if self.shared is not None:
            self.shared.save_object(weights_id, path)
        return weights_id

    def take_weights(self, draft: Path, weights_id: str) -> None:
        """Move a scratch file, whose content has that id, into the cache as its blob."""
        path = self.weights_path(weights_id)
        self._weights_folder(path)
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        draft.rename(path)
        sync_folder(path.parent)

    def has_weights(self, weights_id: str, file_bytes: int | None = None) -> bool:
        """Whether the blob is present, or was in the shared store; it is set aside if it does not match.

        ``file_bytes``, if known, is its expected size. It is read only if this cache ``reads_weights``.
        """
        return self._weights_here(weights_id, file_bytes) or self._taken_weights(weights_id, file_bytes)

    def _weights_here(self, weights_id: str, file_bytes: int | None) -> bool:
        path = self.weights_path(weights_id)
        judged = self._facts("weights", weights_id)
        try:
            found = path.stat().st_size
            fits = file_bytes is None or found == file_bytes
            if fits and (not self.reads_weights or file_digest(path, self._verified) == weights_id):
                return True
        except OSError:
            return False
        again = not self.set_aside(
            "weights", weights_id, "other content" if fits else f"{found} bytes", judged
        )
        return again and self._weights_here(weights_id, file_bytes)

    def inspect(self, what: str, name: str) -> bool:
        """Verify a suspected artefact by reading it anew; whether it is valid. It is set aside if not."""
        self._verified = Verified()
        if what == "code":
            return self.code(name) is not None
        reads, self.reads_weights = self.reads_weights, True
        try:
            return self.has_weights(name)
        finally:
            self.reads_weights = reads

    def set_aside(self, what: str, name: str, found: str, judged: Facts | None) -> bool:
        """Move a damaged artefact to ``damaged``, so that it is made again; the last few are kept.

        ``judged`` are its metadata from before it was read. False if another artefact is there by now, which
        another process made meanwhile and nobody here has read: it stays.
        """
        place = self._place(what, name)
        with self._setting_aside:
            if self._facts(what, name) != judged:
                return False
            if self.read_only:
                _log.error(
                    "cache: %s %s is damaged (%s), and cannot be set aside: %s", what, name, found, place
                )
                return True
            kept = self.root / "damaged" / f"{time.time_ns():020d}-{what}-{name.replace('/', '-')}"
            try:
                kept.parent.mkdir(exist_ok=True)
                place.rename(kept)
            except OSError:
                return True  # another process moved it, or it cannot be moved
            self.damage.append(Damage(what, name, found))
            _log.error("cache: %s %s is damaged (%s) and was set aside: %s", what, name, found, kept)
            self._drop_oldest_damaged()
        return True

    def _place(self, what: str, name: str) -> Path:
        if what == "code":
            return self.root / "codes" / name
        return self.weights_path(name) if what == "weights" else self.root / name

    def _facts(self, what: str, name: str) -> Facts | None:
        """The metadata of a stored artefact, which tell it from another one in its place; None if absent."""
        try:
            return Facts.of(self._place(what, name))
        except OSError:
            return None

    def _drop_oldest_damaged(self) -> None:
        room = KEPT_DAMAGED_BYTES
        with contextlib.suppress(OSError):
            for at, path in enumerate(sorted((self.root / "damaged").iterdir(), reverse=True)):
                files = list(path.iterdir()) if path.is_dir() else [path]
                room -= sum(file.stat().st_size for file in files)
                if at < KEPT_DAMAGED and room >= 0:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    # The shared store behind it

    def share(self) -> tuple[Problem, ...]:
        """Add to the shared store, if there is one, what it lacks of what is here; what is wrong with it."""
        shared = self.shared
        if shared is None:
            return ()
        there = shared.names("codes")
        for folder in sorted((self.root / "codes").iterdir()):
            if folder.name not in there and (code := self._code_here(folder.name)) is not None:
                self._share_code(code)
        for folder in sorted((self.root / "weights").iterdir()):
            there = shared.objects(folder.name)
            for path in sorted(folder.glob("*.bin")):
                if path.stem not in there and file_digest(path, self._verified) == path.stem:
                    shared.save_object(path.stem, path)
        for kind in RECORDS:
            there = shared.names(kind)
            for path in sorted((self.root / kind).iterdir()):
                place = f"{kind}/{path.name}"
                if path.name not in there and (content := self._here(kind, path.name)) is not None:
                    shared.save_record(place, sealed(place, content))
        return shared.problems

    def share_model(self, code_id: str, weights_id: str) -> None:
        """Add to the shared store what it lacks of a code and weights that are here."""
        shared = self.shared
        if shared is None:
            return
        if code_id not in shared.names("codes") and (code := self._code_here(code_id)) is not None:
            self._share_code(code)
        path = self.weights_path(weights_id)
        if path.exists():
            shared.save_object(weights_id, path)

    def _share_code(self, code: Code) -> None:
        """Store a code that is here in the shared store: its files, then its record."""
        if self.shared is None:
            return
        folder = Path(code.path)
        for file in code.files:
            self.shared.save_object(file.sha256, folder / file.name)
        self.shared.save_record(_code_place(code.code_id), (folder / "code.json").read_bytes())

    def _taken_code(self, code_id: str) -> Code | None:
        """A code from the shared store, stored here; None if it is not there."""
        place = _code_place(code_id)
        if self.shared is None or self.read_only or (record := self.shared.record(place)) is None:
            return None
        try:
            code = opened_code(code_id, sealed(place, record))
        except ValueError as error:
            _log.error("store: %s in %s cannot be read: %s", place, self.shared.place, error)
            return None
        files = {}
        for file in code.files:
            content = self.shared.object(file.sha256)
            if content is None:
                return None
            files[file.name] = content
        return self._store_code(code, files)

    def _taken_weights(self, weights_id: str, file_bytes: int | None) -> bool:
        """Whether the blob was in the shared store, and is here now."""
        if self.shared is None or self.read_only:
            return False
        path, draft = self.weights_path(weights_id), self._draft()
        try:
            if not self.shared.fetch(weights_id, draft):
                return False
            self.take_weights(draft, weights_id)
        except OSError as error:
            if error.errno in FULL:
                raise _full(path, file_bytes or 1, error) from None
            raise
        finally:
            draft.unlink(missing_ok=True)
        return True

    # Files

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file atomically. Raises ``ProblemError`` if the disk is full."""
        draft = self._draft()
        try:
            self._write_draft(draft, data, path)
            draft.rename(path)
            sync_folder(path.parent)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def lock(self, key: str, *, inner: bool = False) -> Iterator[None]:
        """Hold a lock between processes while making an artefact, which nobody does in a read-only cache.

        Keys share a few slots. A lock that is taken while another is held is an ``inner`` one: those have
        slots of their own, and whoever holds one takes no further lock, so that no two wait for each other.
        """
        if self.read_only:
            yield
            return
        number = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % _LOCKS
        slot = self.root / "locks" / (f"inner-{number:02d}" if inner else f"{number:02d}")
        descriptor = os.open(slot, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def scratch(self) -> Path:
        """A new temporary folder, removed at the latest when this process ends."""
        folder = self._draft()
        folder.mkdir()
        return folder

    def _draft(self) -> Path:
        if self.read_only or self._own is None:
            raise problem(
                "cache_dir", expected="the model in the cache, or a cache that can be written",
                found=f"neither: {self.root} ({self.read_only})",
                advice="fill it where it can be, by this version with these settings (clockwork profile)",
            )  # fmt: skip
        return self._own / str(next(self._count))

    def _weights_folder(self, path: Path) -> None:
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            sync_folder(path.parent.parent)

    def _write_draft(self, draft: Path, data: bytes | memoryview, place: Path) -> None:
        try:
            with open(draft, "wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
        except OSError as error:
            draft.unlink(missing_ok=True)
            if error.errno in FULL:
                raise _full(place, len(data), error) from None
            raise

    def _sweep(self) -> None:
        """Remove drafts of processes that have ended. Called with the lock, so no folder is half made."""
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


def opened_code(code_id: str, record: bytes) -> Code:
    """The code of a ``code.json``. Raises ValueError if it belongs to another code or is damaged."""
    try:
        code = msgspec.json.decode(unsealed(_code_place(code_id), record), type=Code)
    except (RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(str(error)) from None
    if code.code_id != code_id:
        raise ValueError(f"it is of code {code.code_id}")
    if any(Path(file.name).name != file.name for file in code.files):
        raise ValueError("names of files that lead elsewhere")
    return code


def _code_place(code_id: str) -> str:
    return f"codes/{code_id}/code.json"


def _holds(path: Path, data: memoryview) -> bool:
    """Whether a file with this exact content exists."""
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != len(data):
                return False
            for start in range(0, len(data), _COMPARED_BYTES):
                part = data[start : start + _COMPARED_BYTES]
                if file.read(len(part)) != part:
                    return False
    except OSError:
        return False
    return True


def _profile_key(code_id: str, device_kind: str) -> str:
    return f"{code_id}.{digest_of(device_kind)[:16]}"


# ------------------------------------------------------------
# What a version of a model compiled to, as stored between runs.


_UNLIFTED_FACTOR = 2
"""Memory of an ordinary session, as a multiple of its file (measured: 1.6, more while it opens)."""


_OPEN_OUTPUT_BYTES = 64 * KIB
"""The first guess, at least, of what outputs of a row take where only a run tells."""


class Compiled(Struct, frozen=True, kw_only=True):
    """What a model file and its settings compiled to. ``weights_bytes`` is the size of the stored file."""

    code_id: str
    weights_id: str
    weights_bytes: int
    lifted: bool
    max_batch_size: int
    batch_sizes: tuple[int, ...]
    output_bytes: int
    warnings: tuple[str, ...] = ()

    def weights(self, cache: Cache) -> Weights:
        """The weights record, with its path in this cache."""
        return Weights(
            weights_id=self.weights_id,
            path=str(cache.weights_path(self.weights_id)),
            size=self.weights_bytes if self.lifted else _UNLIFTED_FACTOR * self.weights_bytes,
        )

    def present(self, cache: Cache) -> bool:
        """Whether code and weights are both present and valid."""
        whole = cache.has_weights(self.weights_id, self.weights_bytes)
        return whole and cache.code(self.code_id) is not None


def compiled_of(
    code: Code, weights_id: str, weights_bytes: int, settings: ModelSettings, *, max_batch_size: int,
    seen_bytes: int = 0, warnings: Iterable[str] = (),
) -> Compiled:  # fmt: skip
    """What a model compiled to, a code and weights. ``seen_bytes`` of outputs were seen in a trial."""
    return Compiled(
        code_id=code.code_id, weights_id=weights_id, weights_bytes=weights_bytes, lifted=code.lifted,
        max_batch_size=max_batch_size, batch_sizes=code.batch_sizes,
        output_bytes=_output_room(code.outputs, seen_bytes, settings.output_bytes),
        warnings=tuple(text for text in warnings if text),
    )  # fmt: skip


def _output_room(outputs: tuple[TensorSpec, ...], seen_bytes: int, asked: int | None) -> int:
    """Bytes of room per request row: exact if all sizes are known, else a first guess."""
    sizes = [spec.row_bytes for spec in outputs]
    exact = sum(align(size or 0) for size in sizes)
    if None not in sizes:
        return max(exact, 1)
    return max(exact, align(max(seen_bytes, _OPEN_OUTPUT_BYTES)) if asked is None else asked)


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The powers of two below ``max_batch_size``, and that itself; only 1 if there is no batch."""
    sizes = []
    size = 1
    while size < max_batch_size:
        sizes.append(size)
        size *= 2
    return (*sizes, max(max_batch_size, 1))


def fine_batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Sizes for codes that run without padding: every size up to 8, then four between powers of two."""
    sizes = []
    size = 1
    while size < max_batch_size:
        sizes.append(size)
        size += 1 << max(0, size.bit_length() - 3)
    return (*sizes, max(max_batch_size, 1))
