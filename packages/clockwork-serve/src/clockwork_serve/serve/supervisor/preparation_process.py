"""The child process that compiles and profiles models, reports its progress, and ends."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from clockwork_serve.devices import DeviceConfig, runs
from clockwork_serve.errors import ClockworkError, ConfigError
from clockwork_serve.integrity import sealed
from clockwork_serve.serve import child
from clockwork_serve.serve.supervisor.config import share_of_memory
from clockwork_serve.serve.supervisor.preparation import (
    RESULT,
    Begun,
    Failure,
    Preparation,
    PreparedRepository,
    StartProgress,
)
from clockwork_serve.serve.supervisor.profiling import profile_all
from clockwork_serve.serve.transport import escaped
from clockwork_serve.store import Cache, Entry, Problem, ProblemError, Repository, compile_all


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
        problems=(*preparation.crashed, *problems, *unfit, *profiled.problems, *missing),
        warnings=profiled.warnings,
        damage=tuple(cache.damage),
    )


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
