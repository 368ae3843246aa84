"""Artefacts of a worker on another machine: in its own cache, or taken there from the shared store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from msgspec import structs

from clockwork_serve.errors import RepositoryError
from clockwork_serve.messages import ArtefactDamaged, Code, CodeAdded, Load, Model, Weights
from clockwork_serve.serve.worker.host import is_blob
from clockwork_serve.store import Cache
from clockwork_serve.store.shared import object_name

AT_ONCE: Final = 2  # artefacts taken at a time, so that the network is not idle between two
AGAIN_S: Final = 10.0
"""How long after a failure an artefact is looked for again: nobody else has it."""

_log = logging.getLogger(__name__)

Then = Callable[[str], None]
"""Called with "" once an artefact is in the cache, or with the reason why it cannot be had."""

WeightsFound = Callable[[str, str], None]
"""Called with the id of weights, and with the reason why they cannot be had; "" if they can again."""


class Artefact(NamedTuple):
    """A code or weights: ``what`` is ``code`` or ``weights``, ``name`` its id."""

    what: str
    name: str


class MachineArtefacts:
    """The artefacts of a worker on another machine. For the running loop's thread.

    ``cache`` has the shared store behind it; threads take artefacts from there. ``verify`` queues weights in
    the cache for verification. ``found`` is called with weights that cannot be had, once their code was
    added, and again when that changes.
    """

    def __init__(
        self, cache: Cache, verify: Callable[[Weights], None] = lambda weights: None,
        found: WeightsFound = lambda weights_id, why: None,
    ) -> None:  # fmt: skip
        self._cache = cache
        self._verify = verify
        self._on_found = found
        self._loop = asyncio.get_running_loop()
        self._models: dict[str, Model] = {}
        self._codes: dict[str, CodeAdded] = {}  # those that are wanted
        self._found: dict[str, Code] = {}  # codes as they are in the cache
        self._told: dict[str, str] = {}  # why codes of these cannot be had, as was said last
        self._missing: dict[str, str] = {}  # weights that cannot be had, by id, and why
        self._waiting: dict[Artefact, list[Then]] = {}  # artefacts that are to be taken, in order
        self._taking: dict[Artefact, asyncio.Task[None]] = {}  # those of them that are being taken
        self._again: set[asyncio.TimerHandle] = set()

    def close(self) -> None:
        """Take nothing more, and close the cache."""
        self.forget()
        self._cache.close()

    def forget(self) -> None:
        """Forget models and codes: the link was lost, and the next one starts with the catalogue."""
        for taking in self._taking.values():
            taking.cancel()
        for timer in self._again:
            timer.cancel()
        for wanted in (self._taking, self._again, self._waiting, self._models, self._codes):
            wanted.clear()
        self._told.clear()
        self._missing.clear()

    def add_model(self, model: Model) -> None:
        """Add a served model, and take its weights."""
        self._models[model.key] = model
        if is_blob(model.weights):
            path = str(self._cache.weights_path(model.weights.weights_id))
            here = structs.replace(model.weights, path=path)
            self._need("weights", here.weights_id, partial(self._have_weights, model, here))

    def _have_weights(self, model: Model, here: Weights, why: str) -> None:
        if not why:
            self._verify(here)
        elif self._models.get(model.key) is model:
            self._try_again(partial(self._add_model_again, model))

    def _add_model_again(self, model: Model) -> None:
        if self._models.get(model.key) is model:
            self.add_model(model)

    def remove_model(self, key: str) -> None:
        """Remove a model that is served no more."""
        self._models.pop(key, None)

    def damaged(self, damaged: ArtefactDamaged) -> None:
        """Set a damaged artefact of this cache aside; weights are taken again at once."""
        what, name = damaged.what, damaged.name
        if what != "weights":
            self._cache.inspect(what, name)
        elif name not in self._missing and (users := self._users(name)):
            self._weights_found(name, f"{self._cache.weights_path(name)} is damaged, and is taken again")
            for model in users:
                self.add_model(model)

    def _users(self, weights_id: str) -> list[Model]:
        return [model for model in self._models.values() if model.weights.weights_id == weights_id]

    def _weights_found(self, weights_id: str, why: str) -> None:
        """Weights are in the cache, or cannot be had: say so if it is news."""
        if self._missing.get(weights_id, "") == why:
            return
        users = self._users(weights_id)
        keys = ", ".join(model.key for model in users)
        if why:
            self._missing[weights_id] = why
            _log.error("this worker does not serve %s: weights %s: %s", keys, weights_id, why)
        else:
            del self._missing[weights_id]
            _log.warning("this worker serves %s again: its weights are in the cache", keys)
        if any(model.code_id in self._codes for model in users):  # else the controller may not know of us yet
            self._on_found(weights_id, why)

    def add_code(self, added: CodeAdded, then: Callable[[CodeAdded, str], None]) -> None:
        """Call ``then`` once a code and the weights of all its models are in the cache.

        It is also called with the reason when the code cannot be had, which is tried again.
        """
        code_id = added.code.code_id
        self._codes[code_id] = added
        if added.code.backend == "python":
            then(added, "Python models run on the server's own machine only; they are in no store")
            return
        wanted = [Artefact("code", code_id)]
        wanted += [
            Artefact("weights", model.weights.weights_id)
            for model in self._models.values()
            if model.code_id == code_id and is_blob(model.weights)
        ]
        left, why_not = len(wanted), ""

        def arrived(what: str, why: str) -> None:
            nonlocal left, why_not
            left -= 1
            why_not = why if what == "code" else why_not
            if left == 0 and self._codes.get(code_id) is added:
                self._have_code(added, why_not, then)

        for what, name in wanted:
            self._need(what, name, partial(arrived, what), first=what == "code")

    def remove_code(self, code_id: str) -> None:
        """Remove a code that no model has any more."""
        self._codes.pop(code_id, None)
        self._told.pop(code_id, None)
        self._found.pop(code_id, None)

    def _have_code(self, added: CodeAdded, why: str, then: Callable[[CodeAdded, str], None]) -> None:
        code_id = added.code.code_id
        for model in self._models.values():
            weights_id = model.weights.weights_id
            if model.code_id == code_id and weights_id in self._missing:
                self._on_found(weights_id, self._missing[weights_id])
        if not why:
            self._told.pop(code_id, None)
            then(structs.replace(added, code=self._found[code_id]), "")
            return
        if self._told.get(code_id) != why:
            self._told[code_id] = why
            then(added, why)
        self._try_again(partial(self._add_code_again, added, then))

    def _add_code_again(self, added: CodeAdded, then: Callable[[CodeAdded, str], None]) -> None:
        if self._codes.get(added.code.code_id) is added:
            self.add_code(added, then)

    def load(self, action: Load, then: Callable[[Load, str], None]) -> bool:
        """Call ``then`` with the LOAD of cached weights; returns False if they must be taken first.

        If they cannot be had, it is called with the reason.
        """
        if not is_blob(action.weights):
            then(action, "")
            return True
        weights_id = action.weights.weights_id
        path = str(self._cache.weights_path(weights_id))
        here = structs.replace(action, weights=structs.replace(action.weights, path=path))
        if self._has_weights(weights_id):
            then(here, "")
            return True
        self._need("weights", weights_id, partial(then, here), first=True)
        return False

    def _has_weights(self, weights_id: str) -> bool:
        return weights_id not in self._missing and self._cache.weights_path(weights_id).exists()

    def _need(self, what: str, name: str, then: Then, *, first: bool = False) -> None:
        if what == "weights" and self._has_weights(name):
            then("")
            return
        artefact = Artefact(what, name)
        self._waiting.setdefault(artefact, []).append(then)
        if first and artefact not in self._taking:
            self._take(artefact)
        self._take_next()

    def _take_next(self) -> None:
        for artefact in list(self._waiting):
            if len(self._taking) >= AT_ONCE:
                return
            if artefact not in self._taking:
                self._take(artefact)

    def _take(self, artefact: Artefact) -> None:
        self._taking[artefact] = self._loop.create_task(self._taken(artefact))

    async def _taken(self, artefact: Artefact) -> None:
        try:
            why = await asyncio.to_thread(self._find, artefact)
        except (OSError, RepositoryError) as error:
            why = str(error)
        del self._taking[artefact]
        if artefact.what == "weights":
            self._weights_found(artefact.name, why)
        elif why and self._told.get(artefact.name) != why:
            _log.error("code %s cannot be had: %s", artefact.name, why)
        for then in self._waiting.pop(artefact, []):
            then(why)
        self._take_next()

    def _find(self, artefact: Artefact) -> str:
        """Take an artefact from the store if the cache lacks it; why it cannot be had, or "". In a thread."""
        what, name = artefact
        if what == "code" and (code := self._cache.code(name)) is not None:
            self._found[name] = code
            return ""
        # What was missing may be there, and damaged: it is read.
        found = self._cache.has_weights if name not in self._missing else partial(self._cache.inspect, what)
        if what == "weights" and found(name):
            return ""
        if self._cache.read_only:
            return (
                "cache_dir: expected the model in the cache, or a cache that can be written; found neither: "
                f"{self._cache.root} ({self._cache.read_only}); name another one with --cache"
            )
        shared = self._cache.shared
        assert shared is not None, "a worker on another machine has a store"
        if shared.problems:
            return "; ".join(map(str, shared.problems))
        if what == "weights":
            return (
                f"store: expected a valid {object_name(name)} in {shared.place}; found none there, nor in "
                "the cache; give the server and its workers the same store, and fill it anew "
                "(clockwork profile REPO --store STORE --cache EMPTY_FOLDER)"
            )
        return (
            f"store: expected it in {shared.place}; found it neither there nor in the cache; give the server "
            "and its workers the same store, and fill it (clockwork profile REPO --store STORE)"
        )

    def _try_again(self, work: Callable[[], object]) -> None:
        """Do that a while later, with a store that is read again though it failed."""

        def due() -> None:
            self._again.discard(timer)
            if self._cache.shared is not None:
                self._cache.shared.read_again()
            work()

        timer = self._loop.call_later(AGAIN_S, due)
        self._again.add(timer)
