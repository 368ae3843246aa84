"""Transfer of artefacts to other machines, which keep them in caches of their own."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from msgspec import structs

from clockwork_serve.errors import RepositoryError
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import (
    ArtefactDamaged,
    Code,
    CodeAdded,
    Fetch,
    Frame,
    Load,
    Model,
    Part,
    Weights,
)
from clockwork_serve.serve.remote.link import PIECE_BYTES
from clockwork_serve.serve.worker.host import is_blob
from clockwork_serve.store import Cache, opened_code
from clockwork_serve.units import GIB

# ------------------------------------------------------------
# Sending and receiving an artefact in parts.
#
# Weights are named by the hash of their content, and a code's record has the hash of each of its files: all
# are verified when they arrive. Python models are not transferred: they are a user's program.


CODE_BYTES_MAX: Final = GIB
"""The most bytes of a code's files, which are held in memory until they are complete."""


class ArrivedDamaged(RepositoryError):
    """A received artefact does not match its name: the sender's is damaged."""


def no_parts(asked: Fetch, why: str) -> Iterator[Frame]:
    """The reply for an artefact that cannot be sent."""
    yield Part(what=asked.what, name=asked.name, last=True, error=why)


def weights_parts(asked: Fetch, weights: Weights) -> Iterator[Frame]:
    """The parts of weights, which are one file."""
    if not is_blob(weights):
        yield from no_parts(asked, "they are no file of their own")
        return
    yield from _parts(asked, [Path(weights.path)])


def code_parts(asked: Fetch, code: Code) -> Iterator[Frame]:
    """The parts of a code, which is a folder of files."""
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


class IncomingArtefact:
    """An artefact that is received in parts, and stored in the cache after the last one."""

    def __init__(self, asked: Fetch, cache: Cache) -> None:
        self._asked = asked
        self._cache = cache
        self._files: dict[str, bytearray] = {}
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._draft = None if asked.what == "code" else (cache.scratch() / "blob").open("wb")

    def close(self) -> None:
        """Discard the draft."""
        if self._draft is not None:
            self._draft.close()
            Path(self._draft.name).unlink(missing_ok=True)

    def take(self, part: Part) -> None:
        """Add one part. Raises :class:`RepositoryError`, and OSError where the disk is full."""
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


# ------------------------------------------------------------
# Artefacts of a remote worker: taken from its own cache, or fetched from the server once.


AT_ONCE: Final = 2  # artefacts fetched at a time, so that the network is not idle between two

_log = logging.getLogger(__name__)

Then = Callable[[str], None]
"""Called with "" once an artefact is in the cache, or with the reason why it cannot be had."""


class MachineArtefacts:
    """The artefacts of a remote worker. For one thread.

    ``ask`` sends a :class:`Fetch` to the server, ``tell`` reports artefacts that arrived damaged; ``verify``
    queues weights in the cache for verification. ``store`` is a cache in the same folder, with the shared
    store behind it: what is there is taken from there, and only the rest is asked for.
    """

    def __init__(
        self, cache: Cache, ask: Callable[[Fetch], None],
        tell: Callable[[ArtefactDamaged], None] = lambda damaged: None,
        verify: Callable[[Weights], None] = lambda weights: None, store: Cache | None = None,
    ) -> None:  # fmt: skip
        self._cache = cache
        self._ask = ask
        self._tell = tell
        self._verify = verify
        self._store = store
        self._taking: set[asyncio.Task[None]] = set()  # from the store
        self._models: dict[str, Model] = {}
        self._waiting: dict[Fetch, list[Then]] = {}  # artefacts to be fetched, in order
        # Those of them that are being fetched, or taken from the store (None).
        self._arriving: dict[Fetch, IncomingArtefact | None] = {}
        self._failed: dict[str, str] = {}  # ids of artefacts that could not be fetched, and why

    def close(self) -> None:
        """Stop fetching, and close the cache."""
        self.forget()
        self._cache.close()
        if self._store is not None:
            self._store.close()

    def forget(self) -> None:
        """Forget models and fetches: the link was lost, and the next one starts with the catalogue."""
        for arriving in self._arriving.values():
            if arriving is not None:
                arriving.close()
        self._arriving.clear()
        self._waiting.clear()
        self._failed.clear()
        self._models.clear()

    def add_model(self, model: Model) -> None:
        """Add a served model, and fetch its weights."""
        self._models[model.key] = model
        if is_blob(model.weights):
            here = structs.replace(
                model.weights, path=str(self._cache.weights_path(model.weights.weights_id))
            )
            self._need("weights", here.weights_id, lambda error: None if error else self._verify(here))

    def damaged(self, damaged: ArtefactDamaged) -> None:
        """Set a damaged artefact of this cache aside; it is fetched again when it is needed."""
        self._cache.inspect(damaged.what, damaged.name)

    def remove_model(self, key: str) -> None:
        """Remove a model that is served no more."""
        self._models.pop(key, None)

    def code(self, added: CodeAdded, then: Callable[[CodeAdded, str], None]) -> None:
        """Call ``then`` once a code and the weights of all its models are in the cache, or with a reason."""
        code_id = added.code.code_id
        if added.code.backend == "python":
            then(added, "Python models run on the server's own machine only; they are not sent to others")
            return
        wanted = [("code", code_id)]
        wanted += [
            ("weights", model.weights.weights_id)
            for model in self._models.values()
            if model.code_id == code_id and is_blob(model.weights)
        ]
        left = len(wanted)

        def arrived(error: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._coded(added, then)

        for what, name in wanted:
            self._need(what, name, arrived, first=what == "code")

    def _coded(self, added: CodeAdded, then: Callable[[CodeAdded, str], None]) -> None:
        code_id = added.code.code_id
        code = self._cache.code(code_id)
        if code is None:
            then(added, f"its artefact could not be fetched: {self._failed.get(code_id, 'it is not there')}")
        else:
            then(structs.replace(added, code=code), "")

    def load(self, action: Load, then: Callable[[Load], None]) -> bool:
        """Call ``then`` with the LOAD of cached weights; returns False if they must be fetched first."""
        if not is_blob(action.weights):
            then(action)
            return True
        weights_id = action.weights.weights_id
        path = str(self._cache.weights_path(weights_id))
        here = structs.replace(action, weights=structs.replace(action.weights, path=path))
        if Path(path).exists():
            then(here)
            return True
        self._need("weights", weights_id, lambda error: then(here), first=True)
        return False

    def take(self, part: Part) -> None:
        """Handle a received part of an artefact."""
        asked = Fetch(what=part.what, name=part.name)
        arriving = self._arriving.get(asked)
        if arriving is None:
            return
        error = ""
        try:
            arriving.take(part)
        except (RepositoryError, OSError) as failure:
            error = str(failure)
            self._failed[part.name] = error
            if isinstance(failure, ArrivedDamaged):
                self._tell(ArtefactDamaged(what=part.what, name=part.name, message=error))
            _log.error("%s %s cannot be had: %s", part.what, part.name, error)
        if part.last or error:
            arriving.close()
            self._arrived(asked, error)

    def _arrived(self, asked: Fetch, error: str) -> None:
        del self._arriving[asked]
        for then in self._waiting.pop(asked, []):
            then(error)
        self._ask_next()

    def _need(self, what: str, name: str, then: Then, *, first: bool = False) -> None:
        if self._cache.code(name) if what == "code" else self._cache.weights_path(name).exists():
            then("")
            return
        asked = Fetch(what=what, name=name)
        self._waiting.setdefault(asked, []).append(then)
        if first and asked not in self._arriving:
            self._arrive(asked)
        self._ask_next()

    def _ask_next(self) -> None:
        for asked in list(self._waiting):
            if len(self._arriving) >= AT_ONCE:
                return
            if asked not in self._arriving:
                self._arrive(asked)

    def _arrive(self, asked: Fetch) -> None:
        if self._store is None:
            self._fetch(asked)
            return
        self._arriving[asked] = None
        taking = asyncio.get_running_loop().create_task(self._take_from(self._store, asked))
        self._taking.add(taking)
        taking.add_done_callback(self._taking.discard)

    async def _take_from(self, store: Cache, asked: Fetch) -> None:
        """Take an artefact from the shared store, or ask the server for it."""
        there = False
        try:
            if asked.what == "code":
                there = await asyncio.to_thread(store.code, asked.name) is not None
            else:
                there = await asyncio.to_thread(store.has_weights, asked.name)
        except (OSError, RepositoryError) as error:
            _log.warning("%s %s cannot be taken from the store: %s", asked.what, asked.name, error)
        if self._arriving.get(asked, self) is not None:
            return  # the link was lost meanwhile
        if there:
            self._arrived(asked, "")
        else:
            self._fetch(asked)

    def _fetch(self, asked: Fetch) -> None:
        try:
            self._arriving[asked] = IncomingArtefact(asked, self._cache)
        except (OSError, RepositoryError) as error:
            self._arriving.pop(asked, None)
            self._failed[asked.name] = f"it cannot be stored: {error}"
            _log.error("%s %s cannot be stored: %s", asked.what, asked.name, error)
            for then in self._waiting.pop(asked, []):
                then(str(error))
            return
        self._ask(asked)
