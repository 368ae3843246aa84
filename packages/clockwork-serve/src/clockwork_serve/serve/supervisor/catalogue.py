"""The catalogue of what is served, and repair of the artefacts in it that are found damaged."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from clockwork_serve.errors import ClockworkError
from clockwork_serve.messages import (
    ArtefactDamaged,
    Code,
    CodeAdded,
    CodeRemade,
    CodeRemoved,
    DamageCounted,
    Frame,
    Model,
    ModelAdded,
    ModelRemoved,
    Profile,
)
from clockwork_serve.serve.supervisor.preparation import PreparedRepository, SuspectArtefact
from clockwork_serve.store import Damage, Problem

# ------------------------------------------------------------
# The catalogue: the models, codes and profiles that are served, and why other models are not.


READY: Final = "READY"
LOADING: Final = "LOADING"
BEING_PREPARED: Final = "it is being prepared"
UNAVAILABLE: Final = "UNAVAILABLE"


class IndexEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An entry of the repository index; only the name for a model that was never loaded."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class Catalogue:
    """Models by key and codes by id, as sent to the controller; problems of models by name."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._codes: dict[str, CodeAdded] = {}  # all and only codes of these models
        self._problems: dict[str, tuple[Problem, ...]] = {}
        self._unloaded: dict[str, list[str]] = {}  # versions by name

    @property
    def models(self) -> list[Model]:
        """All that are served, ascending by key."""
        return [self._models[key] for key in sorted(self._models)]

    def code_of(self, model: Model) -> Code:
        """The code of one of them."""
        return self._codes[model.code_id].code

    def names(self) -> set[str]:
        """Names of all that are served."""
        return {model.name for model in self._models.values()}

    def frames(self) -> list[Frame]:
        """The whole catalogue, for a controller that has just connected."""
        return [*self._codes.values(), *(ModelAdded(model=model) for model in self._models.values())]

    def put(self, prepared: PreparedRepository) -> list[Frame]:
        """Serve exactly what was prepared of its ``names``; returns the frames for the controller, in order.

        New versions are added before old ones are removed, so that a model is served throughout.
        """
        codes = self.codes(prepared)
        self._codes.update((added.code.code_id, added) for added in codes)
        frames: list[Frame] = [*codes]
        for each in prepared.served:
            assert each.model.name in prepared.names, (each.model.name, prepared.names)
            if self._models.get(each.model.key) != each.model:
                self._models[each.model.key] = each.model
                frames.append(ModelAdded(model=each.model))
        self.set_problems(prepared.names, prepared.problems)
        kept = {each.model.key for each in prepared.served}
        examined = [model.key for model in self._models.values() if model.name in prepared.names]
        return frames + self._drop(key for key in examined if key not in kept)

    def users(self, suspects: Iterable[SuspectArtefact]) -> tuple[str, ...]:
        """The names of the models that use any of these artefacts, ascending."""
        ids = {(suspect.what, suspect.name) for suspect in suspects}
        return tuple(
            sorted(
                {
                    model.name
                    for model in self._models.values()
                    if ids & {("code", model.code_id), ("weights", model.weights.weights_id)}
                }
            )
        )

    def codes(self, prepared: PreparedRepository) -> list[CodeAdded]:
        """The codes prepared that are new or have other profiles; the catalogue does not change."""
        found = []
        for code in {each.code.code_id: each.code for each in prepared.served}.values():
            own = tuple(profile for profile in prepared.profiles if profile.code_id == code.code_id)
            known = self._codes.get(code.code_id)
            added = CodeAdded(code=code, profiles=own or (known.profiles if known else ()))
            if known != added:
                found.append(added)
        return found

    def refine(self, profiles: Iterable[Profile]) -> list[CodeAdded]:
        """Use these profiles of codes in it from now on; returns the frames for the controller."""
        frames = []
        for profile in profiles:
            known = self._codes.get(profile.code_id)
            if known is None:
                continue
            others = [one for one in known.profiles if one.device_kind != profile.device_kind]
            frames.append(CodeAdded(code=known.code, profiles=(*others, profile)))
            self._codes[profile.code_id] = frames[-1]
        return frames

    def unused(self, codes: Iterable[CodeAdded]) -> list[CodeRemoved]:
        """Removals of those codes, sent to the controller before, that no model uses."""
        return [
            CodeRemoved(code_id=added.code.code_id)
            for added in codes
            if added.code.code_id not in self._codes
        ]

    def still_removed(self, removed: Iterable[ModelRemoved | CodeRemoved]) -> list[Frame]:
        """Of deferred removals, those that still apply: a model may have been loaded again since."""
        return [
            frame
            for frame in removed
            if (
                frame.model not in self._models
                if isinstance(frame, ModelRemoved)
                else frame.code_id not in self._codes
            )
        ]

    def remove(self, name: str) -> list[Frame]:
        """Serve no version of ``name`` any more; returns the frames for the controller."""
        removed = [model for model in self.models if model.name == name]
        if removed:
            self._unloaded[name] = [model.version for model in removed]
        return self._drop(model.key for model in removed)

    def index(
        self, folders: Iterable[str], quarantined: Mapping[str, str] = {}, waiting: Container[str] = ()
    ) -> list[IndexEntry]:
        """Entries of all known models, and of ``folders`` that were never loaded, ascending by name.

        ``quarantined`` holds, by key, why models are in quarantine, ``waiting`` the names of those that are
        being prepared.
        """
        entries = []
        for key, model in self._models.items():
            state, reason = (UNAVAILABLE, quarantined[key]) if key in quarantined else (READY, "")
            if model.name in waiting:
                state, reason = LOADING, BEING_PREPARED
            entries.append(IndexEntry(name=model.name, version=model.version, state=state, reason=reason))
        for name, problems in self._problems.items():
            entries.extend(
                IndexEntry(name=name, version=problem.version, state=UNAVAILABLE, reason=str(problem))
                for problem in problems
            )
        for name, versions in self._unloaded.items():
            entries.extend(
                IndexEntry(name=name, version=version, state=UNAVAILABLE, reason="unloaded")
                for version in versions
            )
        known = {entry.name for entry in entries}
        entries.extend(
            IndexEntry(name=name, state=LOADING, reason=BEING_PREPARED)
            if name in waiting
            else IndexEntry(name=name)
            for name in folders
            if name not in known
        )
        return sorted(entries, key=lambda entry: (entry.name, entry.version.zfill(20)))

    def set_problems(self, names: Iterable[str], problems: Sequence[Problem]) -> None:
        """Replace what the index says of why versions of ``names`` are not served."""
        for name in names:
            self._unloaded.pop(name, None)
            self._problems.pop(name, None)
        for problem in problems:
            self._problems[problem.model] = (*self._problems.get(problem.model, ()), problem)

    def keep(self, name: str, problems: Sequence[Problem]) -> None:
        """Nothing of a load can be served: what is served stays; the index says why others are not."""
        served = {model.version for model in self._models.values() if model.name == name}
        told = [each for each in problems if not served or each.version not in ("", *served)]
        self.set_problems((name,), told)

    def _drop(self, keys: Iterable[str]) -> list[Frame]:
        frames: list[Frame] = []
        for key in list(keys):
            del self._models[key]
            frames.append(ModelRemoved(model=key))
        used = {model.code_id for model in self._models.values()}
        for code_id in [code_id for code_id in self._codes if code_id not in used]:
            del self._codes[code_id]
            frames.append(CodeRemoved(code_id=code_id))
        return frames


# ------------------------------------------------------------
# Repair of artefacts that workers found damaged: they are compiled again from the repository, in batches.
#
# A suspect artefact is verified, and set aside if it is damaged; then the models that use it are compiled, as
# far as their artefacts are missing. A model whose artefact cannot be compiled again is served no more.
# A suspect is always read: what the cache's records say of it is not trusted.


BACKOFF_MAX_S: Final = 60.0
"""An artefact that is damaged again is repaired after 1, 2, 4 ... s, at most this long."""
FORGET_S: Final = 3600.0
_log = logging.getLogger(__name__)


class Repairs:
    """Repairs damaged artefacts, on one loop.

    ``prepare`` verifies suspects, and compiles the models of the given names. ``send`` sends frames to the
    controller, ``report`` logs what was prepared.
    """

    def __init__(
        self, catalogue: Catalogue,
        prepare: Callable[[tuple[str, ...], tuple[SuspectArtefact, ...]], Awaitable[PreparedRepository]],
        send: Callable[..., None], report: Callable[[PreparedRepository], None],
    ) -> None:  # fmt: skip
        self._catalogue = catalogue
        self._prepare = prepare
        self._send = send
        self._report = report
        self._found: Counter[str] = Counter()
        self._remade = 0
        self._lost = 0
        self._suspects: dict[SuspectArtefact, None] = {}  # in the order they were reported
        self._repaired_s: dict[SuspectArtefact, tuple[int, float]] = {}  # how often in a row, and when last
        self._running: asyncio.Task[None] | None = None

    def on_damaged(self, damaged: ArtefactDamaged) -> None:
        """Queue an artefact for repair. Workers report it repeatedly until it is repaired."""
        self._suspects[SuspectArtefact(damaged.what, damaged.name)] = None
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    def count(self, damage: Iterable[Damage]) -> None:
        """Count damaged artefacts that were set aside while models were prepared."""
        self._found.update(one.what for one in damage)

    @property
    def counted(self) -> DamageCounted:
        """The counts since the start."""
        return DamageCounted(found=dict(self._found), remade=self._remade, lost=self._lost)

    async def close(self) -> None:
        """Stop repairing, and wait until a running compiler has ended."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait((self._running,))

    async def _run(self) -> None:
        try:
            while self._suspects:
                now_s = time.monotonic()
                backoff_s = min(self._backoff_s(suspect, now_s) for suspect in self._suspects)
                if backoff_s > 0:
                    await asyncio.sleep(backoff_s)
                    continue
                batch = tuple([one for one in self._suspects if self._backoff_s(one, now_s) <= 0])
                try:
                    await self._repair(batch)
                except ClockworkError as error:
                    _log.error("damaged artefacts could not be made again: %s", error)
                for suspect in batch:
                    # A report that arrived meanwhile was about the damaged file, or will be repeated.
                    self._suspects.pop(suspect, None)
        finally:
            self._running = None

    def _backoff_s(self, suspect: SuspectArtefact, now_s: float) -> float:
        """How long to wait before an artefact is repaired once more."""
        times, last_s = self._repaired_s.get(suspect, (0, 0.0))
        return last_s + min(BACKOFF_MAX_S, 2.0 ** (times - 1)) - now_s if times else 0.0

    async def _repair(self, batch: tuple[SuspectArtefact, ...]) -> None:
        names = self._catalogue.users(batch)
        _log.warning("making again what is damaged: %s", ", ".join(f"{one.what} {one.name}" for one in batch))
        try:
            prepared = await self._prepare(names, batch)
        finally:
            self._record_attempt(batch)
        self._report(prepared)
        names = tuple(sorted(set(names) & self._catalogue.names()))  # unless it was unloaded meanwhile
        served = tuple([each for each in prepared.served if each.model.name in names])
        removed = sorted(set(names) - {each.model.name for each in served})
        for name in removed:
            _log.error("model %s is served no more: it could not be made again", name)
        self._remade += len({(one.what, one.name) for one in prepared.damage if one.what != "record"})
        self._lost += len(removed)
        problems = tuple([problem for problem in prepared.problems if problem.model in names])
        frames = self._catalogue.put(replace(prepared, names=names, served=served, problems=problems))
        frames += [CodeRemade(code_id=one.name) for one in batch if one.what == "code"]
        self._send(*frames, self.counted)

    def _record_attempt(self, batch: tuple[SuspectArtefact, ...]) -> None:
        now_s = time.monotonic()
        for suspect in batch:
            times, last_s = self._repaired_s.get(suspect, (0, now_s))
            self._repaired_s[suspect] = (1 if now_s - last_s > FORGET_S else times + 1, now_s)
        for suspect in [one for one, (_, last_s) in self._repaired_s.items() if now_s - last_s > FORGET_S]:
            del self._repaired_s[suspect]
