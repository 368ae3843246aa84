"""What the keeper says is served: models, codes, profiles, and why others are not. It does no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from clockwork_serve.messages import CodeAdded, CodeRemoved, Frame, Model, ModelAdded, ModelRemoved, Profile
from clockwork_serve.serve.preparation import SuspectArtefact
from clockwork_serve.store import Problem, Served

READY: Final = "READY"
UNAVAILABLE: Final = "UNAVAILABLE"


class IndexEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the repository index; of a model that was never asked for, its name and no more."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class Catalogue:
    """Models by key and codes by id, as the controller was told; problems of models by name."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._codes: dict[str, CodeAdded] = {}  # all and only codes of these models
        self._problems: dict[str, tuple[Problem, ...]] = {}
        self._unloaded: dict[str, list[str]] = {}  # versions by name

    @property
    def models(self) -> list[Model]:
        """All that are served, ascending by key."""
        return [self._models[key] for key in sorted(self._models)]

    def names(self) -> set[str]:
        """Names of all that are served."""
        return {model.name for model in self._models.values()}

    def frames(self) -> list[Frame]:
        """All of it, for a controller that knows nothing."""
        return [*self._codes.values(), *(ModelAdded(model=model) for model in self._models.values())]

    def put(
        self,
        names: Iterable[str],
        served: Sequence[Served],
        profiles: Sequence[Profile],
        problems: Sequence[Problem],
    ) -> list[Frame]:
        """Serve exactly ``served`` of the models ``names``; what the controller must be told, in order.

        The new comes before the old goes, so that a model is served throughout.
        """
        names = set(names)
        codes = self.codes(served, profiles)
        self._codes.update((added.code.code_id, added) for added in codes)
        frames: list[Frame] = [*codes]
        for each in served:
            assert each.model.name in names, (each.model.name, names)
            if self._models.get(each.model.key) != each.model:
                self._models[each.model.key] = each.model
                frames.append(ModelAdded(model=each.model))
        self.note(names, problems)
        kept = {each.model.key for each in served}
        gone = [key for key, model in self._models.items() if model.name in names and key not in kept]
        return frames + self._drop(gone)

    def users(self, suspects: Iterable[SuspectArtefact]) -> tuple[str, ...]:
        """Names of the models that need any of these artefacts, ascending."""
        ids = {(suspect.what, suspect.name) for suspect in suspects}
        return tuple(
            sorted(
                {
                    model.name
                    for model in self._models.values()
                    if ("code", model.code_id) in ids or ("weights", model.weights.weights_id) in ids
                }
            )
        )

    def codes(self, served: Sequence[Served], profiles: Sequence[Profile]) -> list[CodeAdded]:
        """What is new about the codes of ``served``; nothing changes by asking."""
        found = []
        for code in {each.code.code_id: each.code for each in served}.values():
            own = tuple(profile for profile in profiles if profile.code_id == code.code_id)
            known = self._codes.get(code.code_id)
            added = CodeAdded(code=code, profiles=own or (known.profiles if known else ()))
            if known != added:
                found.append(added)
        return found

    def unused(self, codes: Iterable[CodeAdded]) -> list[CodeRemoved]:
        """Of codes that the controller was told, those that no model has."""
        return [
            CodeRemoved(code_id=added.code.code_id)
            for added in codes
            if added.code.code_id not in self._codes
        ]

    def still(self, removed: Iterable[ModelRemoved | CodeRemoved]) -> list[Frame]:
        """Of removals that were put off, those that are as wished still: others may have come back."""
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
        """Serve no version of ``name`` any more; what the controller must be told."""
        gone = [model for model in self.models if model.name == name]
        if gone:
            self._unloaded[name] = [model.version for model in gone]
        return self._drop(model.key for model in gone)

    def index(self, folders: Iterable[str], quarantined: Mapping[str, str] = {}) -> list[IndexEntry]:
        """All that is known, and the ``folders`` of models that nothing is known of, ascending by name.

        ``quarantined`` tells, by key, why models are served to nobody.
        """
        entries = [
            IndexEntry(
                name=model.name,
                version=model.version,
                state=UNAVAILABLE if key in quarantined else READY,
                reason=quarantined.get(key, ""),
            )
            for key, model in self._models.items()
        ]
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
        entries.extend(IndexEntry(name=name) for name in folders if name not in known)
        return sorted(entries, key=lambda entry: (entry.name, entry.version.zfill(20)))

    def note(self, names: Iterable[str], problems: Sequence[Problem]) -> None:
        """Tell in the index why of ``names`` not all that was asked for is served."""
        for name in names:
            self._unloaded.pop(name, None)
            self._problems.pop(name, None)
        for problem in problems:
            self._problems[problem.model] = (*self._problems.get(problem.model, ()), problem)

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
