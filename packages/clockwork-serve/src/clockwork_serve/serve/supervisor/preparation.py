"""Preparation of a repository: its models are compiled and profiled in a child process, ``main`` here."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

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
    opened,
)
from clockwork_serve.units import KIB

if TYPE_CHECKING:
    from clockwork_serve.serve.supervisor.profiling import Profiler
    from clockwork_serve.store import Cache

# ------------------------------------------------------------
# Compiles and profiles the models of a repository in a child process, so that the supervisor stays small and
# a crash of the compiler does not end it.
#
# The child writes its progress to stdout, one JSON record a line, and its result to a file.


LOAD_NICE: Final = 10  # niceness at which models are compiled while others are served
URGENT_MAX: Final = 32
PART_S: Final = 0.5  # how often what is ready is written, if parts are wanted
RESULT: Final = "prepared"  # the name under which the result file is sealed

_log = logging.getLogger(__name__)


class SuspectArtefact(Struct, frozen=True):
    """An artefact that was reported as damaged: ``what`` is ``code`` or ``weights``, ``name`` its id."""

    what: str
    name: str


class Preparation(Struct, frozen=True, kw_only=True):
    """What to prepare: all models of a repository, or only ``names``. ``result`` is the file to write.

    With ``names``, the checksums of weights are verified; at a start only their sizes are compared, for each
    worker verifies weights itself. ``suspects`` are verified in any case. Damaged artefacts are set aside,
    and compiled again. ``again`` measures what is in the cache, too. With ``parts``, what is ready is written
    again and again, to a file with a number at the end of its name, and ``result`` has only the rest.

    ``nice`` is the child's niceness, for when models are served. ``crashed`` versions are left out.
    ``threads`` compile (None: as many as there are cores). The child and each that it starts may use
    ``settings.compile_memory``. If it writes no progress for ``settings.compile_s``, it is stuck, and killed.
    """

    settings: Settings
    store: StoreConfig
    devices: tuple[DeviceConfig, ...]
    result: str
    names: tuple[str, ...] = ()
    suspects: tuple[SuspectArtefact, ...] = ()
    again: bool = False
    parts: bool = False
    nice: int = 0
    crashed: tuple[Problem, ...] = ()
    threads: int | None = None


class PreparedRepository(Struct, frozen=True, kw_only=True):
    """What can be served and what cannot. ``names`` are the models that were examined.

    ``damage`` lists the damaged artefacts that were found in the cache, and set aside. ``measured`` are the
    ids of codes whose profiles are not from the cache.
    """

    names: tuple[str, ...]
    served: tuple[ServedVersion, ...]
    profiles: tuple[Profile, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...] = ()
    damage: tuple[Damage, ...] = ()
    measured: frozenset[str] = frozenset()


class StartProgress(Struct, frozen=True, kw_only=True, tag="progress"):
    """Progress of a start; ``stage`` is ``prepare`` or ``start``, of a child ``compile`` or ``profile``."""

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


class PartReady(Struct, frozen=True, kw_only=True, tag="part"):
    """The child has written what is ready to this file."""

    file: str


OnProgress = Callable[[StartProgress], None]
OnPart = Callable[[PreparedRepository], None]


class Steering:
    """Steers a preparation while it runs: which models are urgent, and whether it gives way to others."""

    def __init__(self) -> None:
        self._urgent: tuple[str, ...] = ()
        self._gives_way = False
        self._process: _PreparingChild | None = None

    def set_urgent(self, names: Sequence[str]) -> None:
        """Prepare the models of these names before others, in that order."""
        self._urgent = tuple(names[:URGENT_MAX])
        if self._process is not None:
            self._process.tell_urgent(self._urgent)

    def give_way(self) -> None:
        """Take a core only where nothing that serves wants it, from now on."""
        self._gives_way = True
        if self._process is not None:
            self._process.give_way()

    def steer(self, process: _PreparingChild) -> None:
        """Steer this child, which has just been started."""
        self._process = process
        self.set_urgent(self._urgent)
        if self._gives_way:
            self.give_way()


async def prepare(
    preparation: Preparation, on_progress: OnProgress, on_line: Callable[[str], None],
    on_part: OnPart = lambda part: None, steering: Steering | None = None,
) -> PreparedRepository:  # fmt: skip
    """Run a child that prepares; cancelling stops it. Each part is given to ``on_part``, the rest returned.

    If the child is killed while it compiles, another one compiles in a single thread, so that the model at
    fault is known. That model is reported as a problem, and a further child compiles the others.

    Raises :class:`RepositoryError` or :class:`ConfigError` if nothing could be prepared.
    """
    while True:
        process = _PreparingChild(preparation, on_progress, on_line, on_part)
        if steering is not None:
            steering.steer(process)
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
        self, preparation: Preparation, on_progress: OnProgress, on_line: Callable[[str], None],
        on_part: OnPart,
    ) -> None:  # fmt: skip
        self.preparation = preparation
        self.begun = Begun()
        self.stuck = False
        self._failure: Failure | None = None
        self._on_progress = on_progress
        self._on_line = on_line
        self._on_part = on_part
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

    def tell_urgent(self, names: tuple[str, ...]) -> None:
        """Tell it which models to prepare first."""
        self._process.write(msgspec.json.encode(names))

    def give_way(self) -> None:
        """Lower its priority, and that of those which it has started: they are a process group."""
        with suppress(OSError):  # it has ended
            os.setpriority(os.PRIO_PGRP, self._process.pid, LOAD_NICE)

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
            report: StartProgress | Failure | Begun | PartReady = msgspec.json.decode(
                line, type=StartProgress | Failure | Begun | PartReady
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
            case PartReady():
                self._on_part(_read_result(Path(report.file)))
            case Failure():
                self._failure = report


def _crash(process: _PreparingChild, why: str) -> Problem:
    if process.stuck:
        expected = f"a model that is compiled within {process.preparation.settings.compile_s:g} s"
        found = "one that takes longer, or for ever"
        advice = "serve a smaller model, or compile it on a faster machine"
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
    _write_result(preparation.result, prepared)
    return 0


def _write_result(file: str, prepared: PreparedRepository) -> None:
    Path(file).write_bytes(sealed(RESULT, escaped(prepared)))


def _prepare(preparation: Preparation) -> PreparedRepository:
    # Imported here: they load compilers, which the supervisor needs not.
    from clockwork_serve.serve.supervisor.profiling import Profiler
    from clockwork_serve.store import Cache, CatalogueCompiler, CatalogueRepository, compile_all

    repository = opened(preparation.settings.repository, preparation.store)
    asked = bool(preparation.names or preparation.suspects)
    missing: list[Problem] = []
    with (
        closing(
            Cache(preparation.store.cache_dir, reads_weights=asked, store=preparation.store.shared)
        ) as cache,
        closing(Profiler(preparation.devices, cache, again=preparation.again)) as profiler,
    ):
        for suspect in preparation.suspects:
            cache.inspect(suspect.what, suspect.name)
        entries = _found(repository, preparation, missing) if asked else repository.scan()
        able, unfit = runnable(entries, preparation.devices)
        able = _without(preparation.crashed, able)
        shares = bool(preparation.settings.listen_machines)
        work = _Work(able, [*preparation.crashed, *unfit, *missing], cache, profiler, shares=shares)
        compiling = partial(
            compile_all, repository, cache, partial(_write_progress, "compile"), entries=able,
            compiler=CatalogueCompiler(cache, repository)
            if isinstance(repository, CatalogueRepository)
            else None,
            threads=preparation.threads, urgent=lambda: work.urgent, tell=work.on_compiling,
        )  # fmt: skip
        with work.in_parts(preparation.result) if preparation.parts else nullcontext():
            work.run(compiling)
        rest = work.take()
    return replace(rest, names=tuple(dict.fromkeys([*preparation.names, *rest.names])))


class _Work:
    """Models are compiled in threads, and profiled meanwhile: urgent ones first, then as they come.

    Those whose codes need not be measured wait for no others. ``urgent`` are names, and may be set by any
    thread. ``problems`` are known already. ``shares``: the shared store gets all of them, also what the cache
    had before, for workers on other machines have them from nowhere else.
    """

    def __init__(
        self, entries: Sequence[Entry], problems: Sequence[Problem], cache: Cache, profiler: Profiler, *,
        shares: bool = False,
    ) -> None:  # fmt: skip
        self.urgent: tuple[str, ...] = ()
        self._cache = cache
        self._shares = shares
        self._profiler = profiler
        self._compiled: SimpleQueue[tuple[str, ServedVersion | Problem] | None] = SimpleQueue()
        self._left = {entry.name: len(entry.versions) for entry in entries}  # versions to be compiled
        self._served: dict[str, list[ServedVersion]] = {}  # versions that are compiled, by name
        self._problems: dict[str, list[Problem]] = {entry.name: [*entry.problems] for entry in entries}
        for found in problems:
            self._problems.setdefault(found.model, []).append(found)
        self._ready: dict[str, None] = {}  # names that are to be profiled
        self._count = 0  # of those that are finished
        self._lock = threading.Lock()
        self._finished: list[str] = []  # and not taken yet
        self._taken = 0, 0  # how many warnings and damaged artefacts were taken
        for name in [name for name in self._problems if not self._left.get(name)]:
            self._finish(name)

    def on_compiling(self, entry: Entry, version: int, found: ServedVersion | Problem | None) -> None:
        """A version is about to be compiled (None), was compiled, or cannot be. For any thread."""
        if found is None:
            _write(Begun(model=entry.name, version=str(version)))
        else:
            self._compiled.put((entry.name, found))

    def run(self, compile_them: Callable[[], object]) -> None:
        """Do all of it; ``compile_them`` calls :meth:`on_compiling`."""
        with ThreadPoolExecutor(1) as pool:
            compiling = pool.submit(compile_them)
            compiling.add_done_callback(self._on_all_compiled)
            ended = False
            while self._ready or not ended:
                name = self._next(ended=ended) if self._compiled.empty() else ""
                if name:
                    self._profile(name)
                elif (result := self._compiled.get()) is None:
                    ended = True
                else:
                    self._collect(*result)
            compiling.result()

    def take(self) -> PreparedRepository:
        """What was finished since the last call. For any thread."""
        with self._lock:
            names, self._finished = self._finished, []
        names.sort()
        served = [each for name in names for each in self._served.pop(name, ())]
        problems = [found for name in names for found in self._problems.pop(name, ())]
        codes = {each.code.code_id for each in served}
        warnings, damage = list(self._profiler.warnings), list(self._cache.damage)
        taken, self._taken = self._taken, (len(warnings), len(damage))
        return PreparedRepository(
            names=tuple(names),
            served=tuple(served),
            profiles=tuple(
                [found for key, found in list(self._profiler.profiles.items()) if key[0] in codes]
            ),
            problems=tuple(problems),
            warnings=tuple(warnings[taken[0] :]),
            damage=tuple(damage[taken[1] :]),
            measured=frozenset(codes & self._profiler.measured),
        )

    @contextmanager
    def in_parts(self, result: str) -> Iterator[None]:
        """Write what is finished again and again, and read from stdin what is urgent, within the block."""
        over = threading.Event()

        def write() -> None:
            for number in count():
                if over.wait(PART_S):
                    return
                part = self.take()
                if part.names:
                    file = f"{result}.{number}"
                    _write_result(file, part)
                    _write(PartReady(file=file))

        def read() -> None:
            rest = b""
            while data := os.read(0, 64 * KIB):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    with suppress(msgspec.MsgspecError, ValueError):
                        self.urgent = msgspec.json.decode(line, type=tuple[str, ...])

        threading.Thread(target=read, daemon=True).start()
        writer = threading.Thread(target=write)
        writer.start()
        try:
            yield
        finally:
            over.set()
            writer.join()

    def _on_all_compiled(self, compiling: Future[object]) -> None:
        _write(Begun())
        self._compiled.put(None)

    def _collect(self, name: str, found: ServedVersion | Problem) -> None:
        if isinstance(found, Problem):
            self._problems[name].append(found)
        else:
            self._served.setdefault(name, []).append(found)
            if self._shares:
                self._cache.share_model(found.code.code_id, found.model.weights.weights_id)
        self._left[name] -= 1
        if not self._left[name]:
            self._ready[name] = None

    def _next(self, *, ended: bool) -> str:
        """The model to profile next; "" to wait for those that are still compiled, until that has ``ended``.

        A user's own code comes last, unless it is urgent: its import may take minutes.
        """
        known = (
            name
            for name in self._ready
            if all(self._profiler.is_known(each.code) for each in self._served.get(name, ()))
        )
        urgent = (name for name in self.urgent if name in self._ready)
        others = (
            name
            for name in self._ready
            if all(each.code.backend != "python" for each in self._served.get(name, ()))
        )
        return next(chain(known, urgent, others, self._ready if ended else ()), "")

    def _profile(self, name: str) -> None:
        del self._ready[name]
        served = self._served.pop(name, [])
        self._served[name] = []
        for each in served:
            problems = self._profiler.profile(each)
            self._problems[name] += problems
            if not problems:
                self._served[name].append(each)
        self._finish(name)
        _write_progress("profile", self._count, len(self._left), name)

    def _finish(self, name: str) -> None:
        with self._lock:
            self._count += 1
            self._finished.append(name)


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
    """The models that some device can run, or without devices all, and problems of the others."""
    able: list[Entry] = []
    unfit: list[Problem] = []
    for entry in entries:
        if entry.problems or not devices or any(runs(config, entry.backend) for config in devices):
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


def _write_progress(stage: str, done: int, total: int, text: str) -> None:
    _write(StartProgress(stage=stage, done=done, total=total, text=text))


def _write(record: StartProgress | Failure | Begun | PartReady) -> None:
    sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
