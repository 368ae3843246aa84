"""Preparation of a repository in a child process, the catalogue of served models, and repair of artefacts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import ClockworkError, ConfigError, RepositoryError
from clockwork_serve.integrity import unsealed
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
from clockwork_serve.serve.supervisor.processes import Child, Launch, describe_exit
from clockwork_serve.store import Damage, Problem, ServedVersion, StoreConfig

# ------------------------------------------------------------
# Compiles and profiles the models of a repository in a child process, so that the supervisor stays small and
# a crash of the compiler does not end it.
#
# The child writes its progress to stdout, one JSON record a line, and its result to a file.


RESULT: Final = "prepared"
"""The name under which the result file is sealed."""

_log = logging.getLogger(__name__)


class SuspectArtefact(Struct, frozen=True):
    """An artefact that was reported as damaged: ``what`` is ``code`` or ``weights``, ``name`` its id."""

    what: str
    name: str


class Preparation(Struct, frozen=True, kw_only=True):
    """What to prepare: all models of a repository, or only ``names``. ``result`` is the file to write.

    With ``names``, the checksums of weights are verified; at a start only their sizes are compared, for each
    worker verifies weights itself. ``suspects`` are verified in any case. Damaged artefacts are set aside,
    and compiled again.

    ``nice`` lowers the child's priority, for when models are served. ``crashed`` versions are left out.
    ``threads`` compile (None: as many as there are cores). The child and each that it starts may use
    ``settings.compile_memory``. If it writes no progress for ``settings.compile_s``, it is stuck, and killed.
    """

    settings: Settings
    store: StoreConfig
    devices: tuple[DeviceConfig, ...]
    result: str
    names: tuple[str, ...] = ()
    suspects: tuple[SuspectArtefact, ...] = ()
    nice: int = 0
    crashed: tuple[Problem, ...] = ()
    threads: int | None = None


class PreparedRepository(Struct, frozen=True, kw_only=True):
    """What can be served and what cannot. ``names`` are the models that were examined.

    ``damage`` lists the damaged artefacts that were found in the cache, and set aside.
    """

    names: tuple[str, ...]
    served: tuple[ServedVersion, ...]
    profiles: tuple[Profile, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...] = ()
    damage: tuple[Damage, ...] = ()


class StartProgress(Struct, frozen=True, kw_only=True, tag="progress"):
    """Progress of a start; ``stage`` is ``compile``, ``profile`` or ``start``."""

    stage: str
    done: int
    total: int
    text: str = ""


class Failure(Struct, frozen=True, kw_only=True, tag="failure"):
    """Nothing could be prepared; ``setting``: because of a setting, not because of the repository."""

    text: str
    setting: bool = False


class Begun(Struct, frozen=True, kw_only=True, tag="begun", omit_defaults=True):
    """The child has begun to compile this version; without a name: it has compiled all."""

    model: str = ""
    version: str = ""


OnProgress = Callable[[StartProgress], None]


async def prepare(
    preparation: Preparation, on_progress: OnProgress, on_line: Callable[[str], None]
) -> PreparedRepository:
    """Run a child that prepares; cancelling stops it.

    If the child is killed while it compiles, another one compiles in a single thread, so that the model at
    fault is known. That model is reported as a problem, and a further child compiles the others.

    Raises :class:`RepositoryError` or :class:`ConfigError` if nothing could be prepared.
    """
    while True:
        ended = await _run(preparation, on_progress, on_line)
        if ended.status >= 0 or not ended.begun.model:
            return ended.prepared(preparation)
        if preparation.threads == 1:
            problem = _crash(ended, preparation)
            _log.error("%s", problem)
            preparation = replace(preparation, crashed=(*preparation.crashed, problem))
        else:
            why = "stuck" if ended.stuck else describe_exit(ended.status)
            _log.error("compiling was %s: again, one by one", why)
            preparation = replace(preparation, threads=1)


class _Ended(Struct, frozen=True):
    """How a child ended, which version it had begun last, and the last lines that it wrote."""

    status: int
    begun: Begun
    failure: Failure | None
    tail: tuple[str, ...]
    stuck: bool = False

    def prepared(self, preparation: Preparation) -> PreparedRepository:
        """What it prepared; raises the error that it reported or ended with."""
        if self.failure is not None:
            raise (ConfigError if self.failure.setting else RepositoryError)(self.failure.text)
        if self.status != 0:
            said = "\n".join(self.tail)
            raise RepositoryError(
                f"compiling ended unexpectedly: {describe_exit(self.status)}; it said:\n{said}"
            )
        return _read_result(Path(preparation.result))


def _crash(ended: _Ended, preparation: Preparation) -> Problem:
    if ended.stuck:
        return Problem(
            model=ended.begun.model,
            version=ended.begun.version,
            field="model",
            expected=f"a model that is compiled within {preparation.settings.compile_s:g} s",
            found="one that takes longer, or for ever",
            advice="raise compile_s, or serve a smaller model",
        )
    return Problem(
        model=ended.begun.model,
        version=ended.begun.version,
        field="model",
        expected="a model that can be compiled",
        found=f"a crash of the compiler ({describe_exit(ended.status)})",
        advice="try its graph with a plain ONNX Runtime session; SIGKILL may mean that memory was short",
    )


async def _run(preparation: Preparation, on_progress: OnProgress, on_line: Callable[[str], None]) -> _Ended:
    failures: list[Failure] = []
    begun = [Begun()]
    last_output = [time.monotonic()]

    def on_output(line: str) -> None:
        try:
            said: StartProgress | Failure | Begun = msgspec.json.decode(
                line, type=StartProgress | Failure | Begun
            )
        except (msgspec.MsgspecError, ValueError, RecursionError):
            on_line(line)  # printed by a model
            return
        last_output[0] = time.monotonic()
        match said:
            case StartProgress():
                on_progress(said)
            case Begun():
                begun[0] = said
            case Failure():
                failures.append(said)

    child = Child(Launch.of("prepare", "supervisor.preparation_process", preparation), on_line, on_output)
    try:
        stuck = not await _ended_by_itself(child, last_output, begun, preparation.settings.compile_s)
        status = await asyncio.shield(child.ended)
    except asyncio.CancelledError:
        await child.stop(grace_s=1.0)
        raise
    return _Ended(status, begun[0], failures[0] if failures else None, tuple(child.tail), stuck)


async def _ended_by_itself(
    child: Child, last_output: list[float], begun: list[Begun], limit_s: float
) -> bool:
    """Wait for a child; False if it wrote no progress for ``limit_s`` while it compiled, and was killed."""
    while True:
        left_s = last_output[0] + limit_s - time.monotonic()
        if not begun[0].model:
            left_s = limit_s  # it profiles, which has a limit of its own
        if left_s <= 0:
            await child.stop(grace_s=0.0)
            return False
        try:
            await asyncio.wait_for(asyncio.shield(child.ended), left_s)
        except TimeoutError:
            continue
        return True


def _read_result(result: Path) -> PreparedRepository:
    try:
        prepared = msgspec.msgpack.decode(unsealed(RESULT, result.read_bytes()), type=PreparedRepository)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise RepositoryError(
            f"{result}: expected what was compiled, found no such file ({error})"
        ) from error
    result.unlink()
    return prepared


# ------------------------------------------------------------
# The catalogue: the models, codes and profiles that are served, and why other models are not.


READY: Final = "READY"
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

    def put(
        self,
        names: Iterable[str],
        served: Sequence[ServedVersion],
        profiles: Sequence[Profile],
        problems: Sequence[Problem],
    ) -> list[Frame]:
        """Serve exactly ``served`` of the models ``names``; returns the frames for the controller, in order.

        New versions are added before old ones are removed, so that a model is served throughout.
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
        self.set_problems(names, problems)
        kept = {each.model.key for each in served}
        removed = [key for key, model in self._models.items() if model.name in names and key not in kept]
        return frames + self._drop(removed)

    def users(self, suspects: Iterable[SuspectArtefact]) -> tuple[str, ...]:
        """The names of the models that use any of these artefacts, ascending."""
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

    def codes(self, served: Sequence[ServedVersion], profiles: Sequence[Profile]) -> list[CodeAdded]:
        """The codes of ``served`` that are new or have other profiles; the catalogue does not change."""
        found = []
        for code in {each.code.code_id: each.code for each in served}.values():
            own = tuple(profile for profile in profiles if profile.code_id == code.code_id)
            known = self._codes.get(code.code_id)
            added = CodeAdded(code=code, profiles=own or (known.profiles if known else ()))
            if known != added:
                found.append(added)
        return found

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

    def index(self, folders: Iterable[str], quarantined: Mapping[str, str] = {}) -> list[IndexEntry]:
        """Entries of all known models, and of ``folders`` that were never loaded, ascending by name.

        ``quarantined`` holds, by key, why models are in quarantine.
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

    def set_problems(self, names: Iterable[str], problems: Sequence[Problem]) -> None:
        """Replace what the index says of why versions of ``names`` are not served."""
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


# ------------------------------------------------------------
# Repair of artefacts that workers found damaged: they are compiled again from the repository, in batches.
#
# A suspect artefact is verified, and set aside if it is damaged; then the models that use it are compiled, as
# far as their artefacts are missing. A model whose artefact cannot be compiled again is served no more.
# A suspect is always read: what the cache's records say of it is not trusted.


BACKOFF_MAX_S: Final = 60.0
"""An artefact that is damaged again is repaired after 1, 2, 4 ... s, at most this long."""
FORGET_S: Final = 3600.0


class Repairs:
    """Repairs damaged artefacts, on one loop.

    ``prepare`` verifies suspects, and compiles the models of the given names. ``send`` sends frames to the
    controller, ``report`` logs what was prepared.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        prepare: Callable[[tuple[str, ...], tuple[SuspectArtefact, ...]], Awaitable[PreparedRepository]],
        send: Callable[..., None],
        report: Callable[[PreparedRepository], None],
    ) -> None:
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
        served = [each for each in prepared.served if each.model.name in names]
        removed = sorted(set(names) - {each.model.name for each in served})
        for name in removed:
            _log.error("model %s is served no more: it could not be made again", name)
        self._remade += len({(one.what, one.name) for one in prepared.damage if one.what != "record"})
        self._lost += len(removed)
        problems = [problem for problem in prepared.problems if problem.model in names]
        frames: list[Frame] = self._catalogue.put(names, served, prepared.profiles, problems)
        frames += [CodeRemade(code_id=one.name) for one in batch if one.what == "code"]
        self._send(*frames, self.counted)

    def _record_attempt(self, batch: tuple[SuspectArtefact, ...]) -> None:
        now_s = time.monotonic()
        for suspect in batch:
            times, last_s = self._repaired_s.get(suspect, (0, now_s))
            self._repaired_s[suspect] = (1 if now_s - last_s > FORGET_S else times + 1, now_s)
        for suspect in [one for one, (_, last_s) in self._repaired_s.items() if now_s - last_s > FORGET_S]:
            del self._repaired_s[suspect]
