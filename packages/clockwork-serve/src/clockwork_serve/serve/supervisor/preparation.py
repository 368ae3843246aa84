"""Preparation of a repository: its models are compiled and profiled in a child process, ``main`` here."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig, runs
from clockwork_serve.errors import ClockworkError, ConfigError, RepositoryError
from clockwork_serve.integrity import sealed, unsealed
from clockwork_serve.messages import Profile
from clockwork_serve.serve import child
from clockwork_serve.serve.supervisor.config import share_of_memory
from clockwork_serve.serve.supervisor.processes import Child, Launch, describe_exit
from clockwork_serve.serve.transport import escaped
from clockwork_serve.store import (
    Damage,
    Entry,
    Problem,
    ProblemError,
    Repository,
    ServedVersion,
    StoreConfig,
)

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
        process = _PreparingChild(preparation, on_progress, on_line)
        status = await process.ended()
        if status >= 0 or not process.begun.model:
            return process.prepared(status)
        why = "stuck" if process.stuck else describe_exit(status)
        if preparation.threads == 1:
            problem = _crash(process, why)
            _log.error("%s", problem)
            preparation = replace(preparation, crashed=(*preparation.crashed, problem))
        else:
            _log.error("compiling was %s: again, one by one", why)
            preparation = replace(preparation, threads=1)


class _PreparingChild:
    """A child that prepares: what it reports, and how it ends."""

    def __init__(
        self, preparation: Preparation, on_progress: OnProgress, on_line: Callable[[str], None]
    ) -> None:
        self.preparation = preparation
        self.begun = Begun()
        self.stuck = False
        self._failure: Failure | None = None
        self._on_progress = on_progress
        self._on_line = on_line
        self._reported_s = time.monotonic()
        launch = Launch.of("prepare", "supervisor.preparation", preparation)
        self._process = Child(launch, on_line, self._on_output)

    async def ended(self) -> int:
        """Its exit status. It is killed if it reports nothing for ``compile_s`` while it compiles.

        Cancelling stops it.
        """
        end = self._process.ended
        try:
            while not end.done():
                await asyncio.wait({end}, timeout=self._left_s())
                if not end.done() and self._left_s() <= 0:
                    self.stuck = True
                    await self._process.stop(grace_s=0.0)
        except asyncio.CancelledError:
            await self._process.stop(grace_s=1.0)
            raise
        return end.result()

    def prepared(self, status: int) -> PreparedRepository:
        """What it prepared; raises the error that it reported or ended with."""
        if self._failure is not None:
            raise (ConfigError if self._failure.setting else RepositoryError)(self._failure.text)
        if status != 0:
            said = "\n".join(self._process.tail)
            raise RepositoryError(f"compiling ended unexpectedly: {describe_exit(status)}; it said:\n{said}")
        return _read_result(Path(self.preparation.result))

    def _left_s(self) -> float:
        limit_s = self.preparation.settings.compile_s
        # Profiling has a limit of its own.
        return self._reported_s + limit_s - time.monotonic() if self.begun.model else limit_s

    def _on_output(self, line: str) -> None:
        try:
            report: StartProgress | Failure | Begun = msgspec.json.decode(
                line, type=StartProgress | Failure | Begun
            )
        except (msgspec.MsgspecError, ValueError, RecursionError):
            self._on_line(line)  # printed by a model
            return
        self._reported_s = time.monotonic()
        match report:
            case StartProgress():
                self._on_progress(report)
            case Begun():
                self.begun = report
            case Failure():
                self._failure = report


def _crash(process: _PreparingChild, why: str) -> Problem:
    if process.stuck:
        limit_s = process.preparation.settings.compile_s
        expected, found = (
            f"a model that is compiled within {limit_s:g} s",
            "one that takes longer, or for ever",
        )
        advice = "raise compile_s, or serve a smaller model"
    else:
        expected, found = "a model that can be compiled", f"a crash of the compiler ({why})"
        advice = "try its graph with a plain ONNX Runtime session; SIGKILL may mean that memory was short"
    return Problem(
        model=process.begun.model, version=process.begun.version, field="model",
        expected=expected, found=found, advice=advice,
    )  # fmt: skip


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
# The child process: it compiles and profiles, reports its progress, and ends.


def main(argv: Sequence[str]) -> int:
    """Run the :class:`Preparation` given as JSON in ``argv[1]``; returns the exit status."""
    preparation = msgspec.json.decode(argv[1], type=Preparation)
    child.prepare("prepare", preparation.settings)
    os.nice(preparation.nice)
    limit_memory(share_of_memory(preparation.settings.compile_memory))
    try:
        prepared = _prepare(preparation)
    except ClockworkError as error:
        _write(Failure(text=str(error), setting=isinstance(error, ConfigError)))
        return 1
    Path(preparation.result).write_bytes(sealed(RESULT, escaped(prepared)))
    return 0


def _prepare(preparation: Preparation) -> PreparedRepository:
    # Imported here: they load compilers, which the supervisor needs not.
    from clockwork_serve.serve.supervisor.profiling import profile_all
    from clockwork_serve.store import Cache, compile_all

    repository = Repository(preparation.settings.repository, preparation.store)
    asked = bool(preparation.names or preparation.suspects)
    cache = Cache(preparation.store.cache_dir, reads_weights=asked)
    missing: list[Problem] = []
    try:
        for suspect in preparation.suspects:
            cache.inspect(suspect.what, suspect.name)
        entries = _found(repository, preparation, missing) if asked else repository.scan()
        able, unfit = runnable(entries, preparation.devices)
        served, problems = compile_all(
            repository, cache, _progress_reporter("compile"), entries=_without(preparation.crashed, able),
            threads=preparation.threads,
            begin=lambda name, version: _write(Begun(model=name, version=version)),
        )  # fmt: skip
        _write(Begun())
        profiled = profile_all(served, preparation.devices, cache, _progress_reporter("profile"))
    finally:
        cache.close()
    return PreparedRepository(
        names=preparation.names or tuple(entry.name for entry in entries),
        served=profiled.without_problems(served),
        profiles=profiled.profiles,
        problems=(
            *preparation.crashed, *repository.misplaced, *problems, *unfit, *profiled.problems, *missing,
        ),
        warnings=profiled.warnings,
        damage=tuple(cache.damage),
    )  # fmt: skip


def _found(repository: Repository, preparation: Preparation, missing: list[Problem]) -> list[Entry]:
    """The entries of the wanted models. In a repair, models that are no longer there become problems."""
    entries = []
    for name in preparation.names:
        try:
            entries.append(repository.find(name))
        except ProblemError as error:
            if not preparation.suspects:
                raise
            missing.append(error.problem)
    return entries


def limit_memory(nbytes: int) -> None:
    """Limit the private memory of this process, and of each that it starts.

    The address space is not limited: a GPU's driver reserves far more of it than it uses.
    """
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    least = nbytes if most == resource.RLIM_INFINITY else min(nbytes, most)
    resource.setrlimit(resource.RLIMIT_DATA, (least, most))


def runnable(entries: Sequence[Entry], devices: Sequence[DeviceConfig]) -> tuple[list[Entry], list[Problem]]:
    """The models that some device can run, and problems of the others."""
    able: list[Entry] = []
    unfit: list[Problem] = []
    for entry in entries:
        if entry.problems or any(runs(config, entry.backend) for config in devices):
            able.append(entry)
            continue
        wanted = "torch-cpu or cuda:0" if entry.backend == "torch" else "cpu"
        kinds = ", ".join(dict.fromkeys(config.kind for config in devices))
        unfit.append(
            Problem(
                model=entry.name, field="backend",
                expected=f"one that devices of kind {kinds} run", found=f"a {entry.backend} model",
                advice=f"give --device {wanted} as well",
            )
        )  # fmt: skip
    return able, unfit


def _without(crashed: Sequence[Problem], entries: Sequence[Entry]) -> list[Entry]:
    """The entries without the versions that crashed an earlier child."""
    crashed_versions = {(problem.model, problem.version) for problem in crashed}
    return [
        replace(
            entry,
            versions=tuple([one for one in entry.versions if (entry.name, str(one)) not in crashed_versions]),
        )
        for entry in entries
    ]


def _progress_reporter(stage: str) -> Callable[[int, int, str], None]:
    def report(done: int, total: int, text: str) -> None:
        _write(StartProgress(stage=stage, done=done, total=total, text=text))

    return report


def _write(record: StartProgress | Failure | Begun) -> None:
    sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
