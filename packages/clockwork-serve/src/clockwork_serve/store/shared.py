"""The shared store: artefacts by content and records, for all machines; in a folder, or where fsspec reaches.

    STORE/objects/ID[:2]/ID                        weights, and files of codes, by the hash of their content
          v7-RUNTIME/runtime.json                  the runtime and the CPU that the records beside it are for
                     codes/CODE_ID/code.json       has the hash of each of the code's files
                     compiled/ architectures/ profiles/ catalogue/
          tmp/                                     drafts, if it is a folder

An object never changes, and a record is written in one piece after the objects that it names. So whoever
reads finds an artefact whole or not at all, however many write. All that is read is verified, by its hash or
its seal; what does not fit counts as absent, and is written anew by who makes it again.

No server depends on it: where it fails it is logged once, and this process asks no more of it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec

from clockwork_serve.errors import FORBIDDEN, described, install_advice
from clockwork_serve.integrity import file_digest, hash_of, sealed, unsealed
from clockwork_serve.store.settings import Problem, ProblemError, problem
from clockwork_serve.units import MIB

RECORDS: Final = ("compiled", "architectures", "profiles")  # kinds of records in it, beside those of codes
STALL_S: Final = 60.0  # an operation that moves no byte for so long has failed
PAUSES_S: Final = (0.5, 2.0)
"""Before an operation that failed is tried again; not if it would fail again: no rights, or no room."""
CREATES: Final = frozenset({"s3", "s3a", "memory"})
"""Protocols by which a file is created only if it is absent, even by several at once."""
DRAFT_S: Final = 86_400.0
"""A draft as old as that is left from a process that was killed; on which machine, nobody knows."""
_PIECE: Final = 8 * MIB
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RUNTIME_FOLDER: Final = re.compile(r"v\d+-[0-9a-f]{16}")
_OTHERS_NAMED: Final = 3

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Tick = Callable[[], object]  # called whenever bytes have moved


# ------------------------------------------------------------
# Where the files of a store are. Each method may raise OSError, those by fsspec whatever its libraries do.


class StoreFiles(Protocol):
    """Files by name, with slashes between folders; a file that is written is complete or absent."""

    def read(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""

    def get(self, name: str, into: Path, tick: Tick) -> None:
        """Copy a file to a local one. Raises FileNotFoundError."""

    def put(
        self, name: str, source: bytes | Path, tick: Tick, *, new: bool = False, lasts: bool = True
    ) -> None:
        """Write a file, replacing an earlier one; ``source`` is its content, or a local file.

        ``new``: raises FileExistsError instead, and of several who try at once one succeeds. Unless it
        ``lasts``, it waits for no disk: a loss of power may take it until :meth:`persist`, and who reads it
        meanwhile may find a part.
        """

    def persist(self, name: str) -> None:
        """Have a file outlast a loss of power."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def names(self, folder: str) -> set[str]:
        """The names in a folder, none if it is absent."""


class FolderFiles:
    """In a folder, perhaps of a network's file system. The folder itself must exist.

    It is never made: where a volume is not mounted, its files would go to the disk below.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()
        self._swept = False
        with suppress(OSError):
            if self._root.stat().st_mode & 0o002:
                _log.warning(
                    "store: every user may write to %s, and so change what is served, and run code; "
                    "take that from them (chmod o-w)", self._root,
                )  # fmt: skip

    def read(self, name: str) -> bytes:
        """See :class:`StoreFiles`."""
        self._check()
        return (self._root / name).read_bytes()

    def get(self, name: str, into: Path, tick: Tick) -> None:
        """See :class:`StoreFiles`."""
        self._check()
        with open(self._root / name, "rb", buffering=0) as file, open(into, "wb", buffering=0) as copy:
            while piece := file.read(_PIECE):
                _write(copy, piece)
                tick()

    def put(
        self, name: str, source: bytes | Path, tick: Tick, *, new: bool = False, lasts: bool = True
    ) -> None:
        """See :class:`StoreFiles`."""
        self._check()
        self._sweep()
        path, draft = self._root / name, self._root / "tmp" / uuid.uuid4().hex
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes) and not (new or lasts):
            # A draft that replaces a file waits for its content to reach the disk, whoever asks for that.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with open(descriptor, "wb", buffering=0) as file:
                _write(file, source)
                if file.tell() != os.fstat(descriptor).st_size:
                    file.truncate()
            return
        try:
            with open(draft, "xb", buffering=0) as file:
                if isinstance(source, bytes):
                    _write(file, source)
                else:
                    with open(source, "rb", buffering=0) as original:
                        while piece := original.read(_PIECE):
                            _write(file, piece)
                            tick()
                if lasts:
                    os.fsync(file.fileno())
            if new:
                os.link(draft, path)
            else:
                draft.rename(path)
        finally:
            with suppress(OSError):  # renamed, or not even made
                draft.unlink()
        if lasts:
            sync_folder(path.parent)

    def persist(self, name: str) -> None:
        """See :class:`StoreFiles`."""
        path = self._root / name
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sync_folder(path.parent)

    def has(self, name: str) -> bool:
        """See :class:`StoreFiles`."""
        self._check()
        return (self._root / name).is_file()

    def names(self, folder: str) -> set[str]:
        """See :class:`StoreFiles`."""
        self._check()
        try:
            return {path.name for path in (self._root / folder).iterdir()}
        except FileNotFoundError:
            return set()

    def _check(self) -> None:
        if not self._root.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is no such folder: make it, or mount it")

    def _sweep(self) -> None:
        """Make the folder of drafts, and remove the old ones in it."""
        if not self._swept:
            (self._root / "tmp").mkdir(exist_ok=True)
            for draft in (self._root / "tmp").iterdir():
                with suppress(OSError):
                    if time.time() - draft.stat().st_mtime > DRAFT_S:
                        draft.unlink()
            self._swept = True


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class FsspecFiles:
    """Where fsspec reaches: S3 and the like. A file there is written in one operation, or not at all."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec

            self._files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise problem(
                "store", expected="a folder, or a URL that fsspec and the library for it reach",
                found=f"{url} ({described(error)})",
                advice=f"{install_advice('clockwork-serve[store]')}; s3:// needs s3fs, http:// aiohttp",
            ) from None  # fmt: skip
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes:
        """See :class:`StoreFiles`."""
        return bytes(self._files.cat_file(self._path(name)))

    def get(self, name: str, into: Path, tick: Tick) -> None:
        """See :class:`StoreFiles`."""
        self._files.get_file(self._path(name), str(into), callback=_callback(tick))

    def put(
        self, name: str, source: bytes | Path, tick: Tick, *, new: bool = False, lasts: bool = True
    ) -> None:
        """See :class:`StoreFiles`."""
        if new:
            self._create(name, source)
        elif isinstance(source, bytes):
            self._files.pipe_file(self._path(name), source)
        else:
            self._files.put_file(str(source), self._path(name), callback=_callback(tick))

    def persist(self, name: str) -> None:
        """See :class:`StoreFiles`."""  # every file there does

    def _create(self, name: str, source: bytes | Path) -> None:
        protocols = self._files.protocol
        protocols = {protocols} if isinstance(protocols, str) else {*protocols}
        if not protocols & CREATES:
            raise PermissionError(
                errno.EPERM,
                "no file there is created only if it is absent: catalogues and leases need a folder, or s3://",
            )
        assert isinstance(source, bytes)
        try:
            self._files.pipe_file(self._path(name), source, mode="create")
        except OSError:  # some of its libraries say so by other errors
            if self.has(name):
                raise FileExistsError(errno.EEXIST, "it is there", name) from None
            raise

    def has(self, name: str) -> bool:
        """See :class:`StoreFiles`."""
        return bool(self._files.exists(self._path(name)))

    def names(self, folder: str) -> set[str]:
        """See :class:`StoreFiles`."""
        try:
            found = self._files.ls(self._path(folder).rstrip("/"), detail=False)
        except FileNotFoundError:
            return set()
        return {Path(path).name for path in found}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _callback(tick: Tick) -> Any:
    """What fsspec calls as a transfer goes on."""
    from fsspec.callbacks import Callback

    return Callback(hooks={"tick": lambda *_, **__: tick()})


def files_of(place: str) -> StoreFiles:
    """The files of the store at ``place``: a folder, or a URL for fsspec.

    Raises ``ProblemError`` if no library reaches the URL.
    """
    protocol, _, path = place.rpartition("://")
    return FsspecFiles(place) if protocol not in ("", "file") else FolderFiles(Path(path))


# ------------------------------------------------------------
# The store: verified, watched, tried again.


class SharedStore:
    """The shared store at ``place``: a folder, or a URL for fsspec. For any thread.

    ``runtime`` is the folder of this runtime's records, ``facts`` what it stands for, as JSON. ``problems``
    say why it is no longer read, or written. Raises ``ProblemError`` if no library reaches the URL.
    """

    def __init__(
        self, place: str, runtime: str, facts: bytes, *,
        stall_s: float = STALL_S, pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:  # fmt: skip
        self.place = place
        self._runtime = runtime
        self._facts = facts
        self._stall_s = stall_s
        self._pauses_s = pauses_s
        self._files = files_of(place)
        self._given_up: dict[str, Problem] = {}  # by "read" and "write"
        self._damaged: set[str] = set()  # names of files that were found so, to be written anew
        self._introduced = False
        self._explained = False
        self._lock = threading.Lock()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why it is no longer read, or written."""
        return tuple(dict.fromkeys(self._given_up.values()))

    # Reading

    def record(self, place: str) -> bytes | None:
        """The content of a record, by its place: what was sealed. None if there is no valid one."""
        stored = self._verified(f"{self._runtime}/{place}", lambda data: unsealed(place, data))
        if stored is None:
            self._explain_absence()
        return stored

    def object(self, digest: str) -> bytes | None:
        """The content of that hash, or None."""

        def checked(data: bytes) -> bytes:
            if hash_of(data) != digest:
                raise ValueError("other content")
            return data

        return self._verified(object_name(digest), checked)

    def fetch(self, digest: str, into: Path) -> bool:
        """Copy the content of that hash to a local file; whether it is there."""
        name = object_name(digest)

        def copied(tick: Tick) -> bool:
            self._files.get(name, into, tick)
            return True

        for _ in range(2):  # once more if it was damaged on its way
            if not self._read(copied):
                return False
            if file_digest(into) == digest:
                return True
        self._found_damaged(name, "other content")
        return False

    def names(self, kind: str) -> set[str]:
        """The names of records of a kind, or of codes."""
        return self._read(lambda tick: self._files.names(f"{self._runtime}/{kind}")) or set()

    def objects(self, prefix: str) -> set[str]:
        """The hashes of objects that begin with those two characters."""
        return self._read(lambda tick: self._files.names(f"objects/{prefix}")) or set()

    def _verified(self, name: str, check: Callable[[bytes], bytes]) -> bytes | None:
        """What ``check`` returns of a file's content, or None."""
        found = ""
        for _ in range(2):
            data = self._read(lambda tick: self._files.read(name))
            if data is None:
                return None
            try:
                return check(data)
            except ValueError as error:
                found = str(error)
        self._found_damaged(name, found)
        return None

    def _found_damaged(self, name: str, found: str) -> None:
        if name not in self._damaged:
            _log.error("store: %s in %s is damaged (%s), and counts as absent", name, self.place, found)
        self._damaged.add(name)

    def _explain_absence(self) -> None:
        """Once, where something is absent: say so if the store is for other runtimes and CPUs altogether."""
        with self._lock:
            explained, self._explained = self._explained, True
        if explained:
            return
        there = self._read(lambda tick: self._files.names("")) or set()
        others = sorted(filter(_RUNTIME_FOLDER.fullmatch, there))
        if not others or self._runtime in others:
            return
        found = [self._difference(other) for other in others[:_OTHERS_NAMED]]
        _log.warning("%s", problem(
            "store", expected="artefacts for this version, runtime and kind of CPU",
            found=f"in {self.place} those for {'; '.join(found)}",
            advice="models are compiled here; clockwork profile REPO --store on this kind of machine does so "
            "beforehand",
        ))  # fmt: skip

    def _difference(self, other: str) -> str:
        """In what another runtime differs from this one."""
        if other.partition("-")[0] != self._runtime.partition("-")[0]:
            return "another version of clockwork-serve"
        data = self._read(lambda tick: self._files.read(f"{other}/runtime.json")) or b"{}"
        try:
            theirs = msgspec.json.decode(data, type=dict[str, str])
        except (ValueError, RecursionError, msgspec.MsgspecError):
            theirs = {}
        ours = msgspec.json.decode(self._facts, type=dict[str, str])
        unlike = [key for key in ours if ours[key] != theirs.get(key)]
        if "onnxruntime" in unlike:
            return f"onnxruntime {theirs.get('onnxruntime', '(unknown)')}, not {ours['onnxruntime']}"
        return "another kind of CPU" if {"cpu_flags", "machine"} & {*unlike} else f"another {unlike}"

    # Writing

    def save_record(self, place: str, stored: bytes) -> None:
        """Store a sealed record, replacing an earlier one; the objects that it names come before it."""
        if not self._introduced:
            self._save(f"{self._runtime}/runtime.json", self._facts, anew=False)
            self._introduced = True
        self._save(f"{self._runtime}/{place}", stored)

    def create(self, place: str, content: bytes) -> bool:
        """Store a record unless its place is taken; whether it is this one. Raises ``ProblemError``."""
        name, stored = f"{self._runtime}/{place}", sealed(place, content)
        try:
            self._tried("write", lambda tick: self._files.put(name, stored, tick, new=True), FileExistsError)
        except FileExistsError:
            return self.record(place) == content  # by an attempt of ours whose answer was lost
        return True

    def save_object(self, digest: str, source: bytes | Path) -> None:
        """Store a content of that hash, or a local file of it, unless it is there."""
        self._save(object_name(digest), source, anew=False)

    def _save(self, name: str, source: bytes | Path, *, anew: bool = True) -> None:
        if "write" in self._given_up:
            return

        def save(tick: Tick) -> None:
            if anew or name in self._damaged or not self._files.has(name):
                self._files.put(name, source, tick)

        try:
            self._tried("write", save)
        except ProblemError as error:
            self._give_up("write", error.problem)
        else:
            self._damaged.discard(name)

    # Operations

    def _read(self, work: Callable[[Tick], Answer]) -> Answer | None:
        """What ``work`` returns; None if what it reads is absent, or nothing is read any more."""
        if "read" in self._given_up:
            return None
        try:
            return self._tried("read", work, FileNotFoundError)
        except FileNotFoundError:
            return None
        except ProblemError as error:
            self._give_up("read", error.problem)
            return None

    def read_again(self) -> None:
        """Read it though it failed: for who has no other source, a while after that."""
        with self._lock:
            self._given_up.pop("read", None)

    def _give_up(self, what: str, why: Problem) -> None:
        with self._lock:
            known = self._given_up.setdefault(what, why)
        if known is why:
            _log.error("%s; it is not %s any more", why, "read" if what == "read" else "written to")

    def _tried(
        self, what: str, work: Callable[[Tick], Answer], answer: type[OSError] | tuple[()] = ()
    ) -> Answer:
        """What ``work`` returns, tried again where that may help. Raises ``ProblemError``.

        ``answer`` is an error that is an answer, and raised as it is. So is a reader's own full disk.
        """
        for pause_s in (*self._pauses_s, 0.0):
            try:
                return _watched(work, self._stall_s)
            except Exception as error:  # libraries of fsspec raise what they like
                own_disk = what == "read" and getattr(error, "errno", None) in FULL
                if own_disk or isinstance(error, answer):
                    raise
                failure = self._failure(what, error)
                if _is_final(error):
                    break
            time.sleep(pause_s)
        raise failure

    def _failure(self, what: str, error: Exception) -> ProblemError:
        found = f"{self.place}: {described(error)}"
        number = getattr(error, "errno", None)
        if isinstance(error, PermissionError) or number in FORBIDDEN:
            expected = f"a store that this process may {what}"
            advice = "give it the right, or fill the store from where it is given (clockwork profile --store)"
        elif number in FULL:
            expected, advice = "a store with room", "free some space, or name a larger one"
        elif isinstance(error, _Stalled):
            expected = f"a store that moves a byte within {self._stall_s:g} s"
            advice = "look at its server and the network"
        else:
            expected = "a store that can be reached"
            advice = "check its name, its server, the network and the credentials"
        return problem("store", expected=expected, found=found, advice=advice)


class _Stalled(Exception):
    """Nothing moved for too long."""


def _is_final(error: Exception) -> bool:
    """Whether trying again would not help, or took too long already."""
    number = getattr(error, "errno", None)
    known = isinstance(error, PermissionError | NotADirectoryError | _Stalled)
    return known or number in FORBIDDEN or number in FULL


def _watched(work: Callable[[Tick], Answer], stall_s: float) -> Answer:
    """What ``work`` returns or raises; :class:`_Stalled` if it does not tick for ``stall_s`` seconds.

    It runs in a thread of its own, since nothing ends a thread that waits for a network's file system.
    """
    moved_s = [time.monotonic()]
    answer: Future[Answer] = Future()

    def tick() -> None:
        moved_s[0] = time.monotonic()

    def run() -> None:
        try:
            answer.set_result(work(tick))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            answer.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    while not answer.done():
        left_s = moved_s[0] + stall_s - time.monotonic()
        if left_s <= 0:
            raise _Stalled("nothing moved")
        wait((answer,), timeout=left_s)
    return answer.result()


def object_name(digest: str) -> str:
    """The name, in a store, of the file of weights or of a code that has this hash."""
    return f"objects/{digest[:2]}/{digest}"
