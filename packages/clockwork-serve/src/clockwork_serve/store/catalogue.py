"""The catalogue in a shared store: what builders prepared, for servers that have no repository.

Each change is a document of its own, numbered one higher than the last, and the highest counts. A number is
taken by who first creates its file, which the folder's file system or S3 decides (a link, If-None-Match). So
of writers at once each builds on the document of the one before it, and no reader sees half of two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from clockwork_serve.messages import Code, Model
from clockwork_serve.store.cache import LAYOUT, Cache, runtime_of, shared_store
from clockwork_serve.store.compiler import Compiler
from clockwork_serve.store.repository import PLATFORMS, Entry, Repository
from clockwork_serve.store.settings import Problem, ProblemError, ServedVersion, StoreConfig, problem
from clockwork_serve.store.shared import SharedStore, files_of
from clockwork_serve.store.torch.compiler import OnStep

KIND: Final = "catalogue"
TRIES: Final = 20  # how often a writer begins again because another one was first
_DOCUMENT: Final = re.compile(r"\d{9}\.json")
_BACKEND_OF: Final = {platform: backend for backend, platform in PLATFORMS.items()}


class CatalogueDocument(Struct, frozen=True, kw_only=True):
    """What is served, ascending by key, and its codes, without paths; ``number``: its version."""

    number: int = 0
    models: tuple[Model, ...] = ()
    codes: tuple[Code, ...] = ()


def documents(store: SharedStore) -> list[str]:
    """The names of all documents, ascending by number."""
    return sorted(filter(_DOCUMENT.fullmatch, store.names(KIND)))


def newest_of(place: str) -> Callable[[], str]:
    """What returns the name of the newest document in the store there; "" if none can be read."""
    files, folder = files_of(place), f"v{LAYOUT}-{runtime_of()[0]}/{KIND}"

    def newest() -> str:
        try:
            return max(filter(_DOCUMENT.fullmatch, files.names(folder)), default="")
        except Exception:  # noqa: BLE001 - libraries of fsspec raise what they like
            return ""

    return newest


def read_catalogue(store: SharedStore, names: Sequence[str]) -> CatalogueDocument:
    """The last of these documents that is whole; an empty one if there is none. Raises ``ProblemError``."""
    for name in reversed(names):
        content = store.record(f"{KIND}/{name}")
        if content is not None:
            try:
                return msgspec.json.decode(content, type=CatalogueDocument)
            except (ValueError, RecursionError, msgspec.MsgspecError) as error:
                raise problem(
                    "store", expected="a catalogue of this version",
                    found=f"{KIND}/{name} in {store.place} ({error})", advice="update what is older",
                ) from None  # fmt: skip
    if store.problems:
        raise ProblemError(store.problems[0])
    return CatalogueDocument()


def publish(store: SharedStore, served: Sequence[ServedVersion], kept: Collection[str]) -> CatalogueDocument:
    """Make the catalogue that of ``served``, and what it had of the ``kept`` names, which failed this time.

    Python models are left out: they are programs, which no store holds. Raises ``ProblemError``.
    """
    ours = {
        each.model.key: (_nowhere(each.model), msgspec.structs.replace(each.code, path=""))
        for each in served
        if each.code.backend != "python"
    }
    for _ in range(TRIES):
        names = documents(store)
        known = read_catalogue(store, names)
        codes = {code.code_id: code for code in known.codes}
        chosen = {model.key: (model, codes[model.code_id]) for model in known.models if model.name in kept}
        chosen = dict(sorted((chosen | ours).items()))
        document = CatalogueDocument(
            number=1 + int(names[-1].removesuffix(".json")) if names else 1,
            models=tuple([model for model, _ in chosen.values()]),
            codes=tuple({code.code_id: code for _, code in chosen.values()}.values()),
        )
        if (document.models, document.codes) == (known.models, known.codes):
            return known
        if store.create(f"{KIND}/{document.number:09}.json", msgspec.json.encode(document)):
            return document
    raise problem(
        "store", expected="a catalogue that this builder may change", found=f"others that do, {TRIES} times",
        advice="run it again when they are done",
    )  # fmt: skip


def _nowhere(model: Model) -> Model:
    return msgspec.structs.replace(model, weights=msgspec.structs.replace(model.weights, path=""))


class CatalogueRepository(Repository):
    """The models of a catalogue, as a repository is read. Raises ``ProblemError`` if there is none."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.entries: tuple[Entry, ...] = ()
        self.misplaced: tuple[Problem, ...] = ()
        self.models: dict[str, Model] = {}
        self.scan()

    def scan(self) -> list[Entry]:
        """Read the catalogue anew."""
        store = shared_store(self.config.shared)
        document = read_catalogue(store, documents(store))
        if not document.number:
            raise problem(
                "store", expected="a catalogue for this version, runtime and kind of CPU",
                found=f"none in {store.place}",
                advice="run clockwork profile REPO --store on this kind of machine, or give REPO",
            )  # fmt: skip
        self.models = {model.key: model for model in document.models}
        versions: dict[str, list[Model]] = {}
        for model in document.models:
            versions.setdefault(model.name, []).append(model)
        self.entries = tuple(
            Entry(
                name=name, path=store.place, root=store.place, backend=_BACKEND_OF[models[0].platform],
                versions=tuple(sorted(int(model.version) for model in models)),
            )
            for name, models in sorted(versions.items())
        )  # fmt: skip
        return list(self.entries)

    def find_misplaced(self) -> list[Problem]:
        """Nothing lies in a wrong place."""
        return []

    def find(self, name: str) -> Entry:
        """Read one model again. Raises ``ProblemError`` if there is none of that name."""
        found = [entry for entry in self.scan() if entry.name == name]
        if not found:
            raise problem(
                "name", model=name, expected="a model of the catalogue", found="none of that name",
                advice="see the repository index",
            )  # fmt: skip
        return found[0]


class CatalogueCompiler(Compiler):
    """Takes what a catalogue names from the store, where a :class:`Compiler` compiles."""

    def __init__(self, cache: Cache, repository: CatalogueRepository) -> None:
        super().__init__(cache, repository.config)
        self._repository = repository

    def _compile(self, entry: Entry, version: int, on_step: OnStep) -> ServedVersion:
        model = self._repository.models[f"{entry.name}/{version}"]
        code = self.cache.code(model.code_id)
        weights = model.weights
        if code is not None and code.backend != "emulated":
            there = self.cache.has_weights(weights.weights_id, weights.size if code.lifted else None)
            path = str(self.cache.weights_path(weights.weights_id))
            weights = msgspec.structs.replace(weights, path=path)
        if code is None or (weights.path and not there):
            raise problem(
                "store", expected="the code and the weights of what its catalogue names",
                found="none, or damaged ones", advice="run clockwork profile REPO --store again",
            )  # fmt: skip
        return ServedVersion(model=msgspec.structs.replace(model, weights=weights), code=code)
