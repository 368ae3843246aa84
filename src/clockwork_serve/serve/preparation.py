"""Compiles and profiles what a repository holds, in a child process; the keeper stays light and cannot crash.

The child tells its progress, one JSON record a line, on stdout, and leaves what it made in a file.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import ConfigError, RepositoryError
from clockwork_serve.integrity import unsealed
from clockwork_serve.messages import Profile
from clockwork_serve.serve.supervisor import Child, Launch, describe_exit
from clockwork_serve.store import Damage, Problem, Served, StoreConfig

RESULT: Final = "prepared"
"""Where its seal says that the result belongs."""

_log = logging.getLogger(__name__)


class SuspectArtefact(Struct, frozen=True):
    """An artefact that someone found damaged: ``code`` or ``weights``, and its id."""

    what: str
    name: str


class Preparation(Struct, frozen=True, kw_only=True):
    """What to prepare: all models of a repository, or only ``names``. ``result`` is the file to write.

    Weights are read and hashed where ``names`` are given; at a start, their sizes are compared, and each
    worker verifies what it copies. ``suspects`` are read in any case. What is damaged is set aside, and made.

    ``nice`` lowers the child's priority, for when others serve. ``crashed`` versions are left out.
    ``threads`` compile (None: as many as there are cores). ``memory_bytes``: the most that the child and each
    that it starts may take (0: any). ``silence_s``: so long after its last word it is stuck, and is killed.
    """

    repository: str
    store: StoreConfig
    devices: tuple[DeviceConfig, ...]
    result: str
    names: tuple[str, ...] = ()
    suspects: tuple[SuspectArtefact, ...] = ()
    nice: int = 0
    crashed: tuple[Problem, ...] = ()
    threads: int | None = None
    memory_bytes: int = 0
    silence_s: float = 900.0
    log_level: str = "info"
    log_format: str = "text"


class Prepared(Struct, frozen=True, kw_only=True):
    """What can be served and what cannot; ``names`` are the models that were looked at.

    ``damage`` is what was found in the cache, and set aside.
    """

    names: tuple[str, ...]
    served: tuple[Served, ...]
    profiles: tuple[Profile, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...] = ()
    damage: tuple[Damage, ...] = ()


class Progress(Struct, frozen=True, kw_only=True, tag="progress"):
    """How far a start is; ``stage`` is ``compile``, ``profile`` or ``start``."""

    stage: str
    done: int
    total: int
    text: str = ""


class Failure(Struct, frozen=True, kw_only=True, tag="failure"):
    """Nothing could be prepared; ``setting`` tells a wrong setting from a wrong repository."""

    text: str
    setting: bool = False


class Begun(Struct, frozen=True, kw_only=True, tag="begun", omit_defaults=True):
    """A version that is being compiled from now on; of no name: all are compiled."""

    model: str = ""
    version: str = ""


OnProgress = Callable[[Progress], None]


async def prepare(
    preparation: Preparation, on_progress: OnProgress, on_line: Callable[[str], None]
) -> Prepared:
    """Run a child that prepares; cancelling stops it.

    If it is killed while it compiles, another one does the same in one thread, so that it is known of which
    model; and another one all but that model, which becomes a problem.

    Raises :class:`RepositoryError` or :class:`ConfigError` if it could do nothing at all.
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
    """How a child ended, what it had begun last, and the last lines that it wrote."""

    status: int
    begun: Begun
    failure: Failure | None
    tail: tuple[str, ...]
    stuck: bool = False

    def prepared(self, preparation: Preparation) -> Prepared:
        """What it prepared; raises what it failed of."""
        if self.failure is not None:
            raise (ConfigError if self.failure.setting else RepositoryError)(self.failure.text)
        if self.status != 0:
            said = "\n".join(self.tail)
            raise RepositoryError(
                f"compiling ended unexpectedly: {describe_exit(self.status)}; it said:\n{said}"
            )
        return _taken(Path(preparation.result))


def _crash(ended: _Ended, preparation: Preparation) -> Problem:
    if ended.stuck:
        return Problem(
            model=ended.begun.model,
            version=ended.begun.version,
            field="model",
            expected=f"a model that is compiled within {preparation.silence_s:g} s",
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
    heard = [time.monotonic()]

    def on_output(line: str) -> None:
        try:
            said: Progress | Failure | Begun = msgspec.json.decode(line, type=Progress | Failure | Begun)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            on_line(line)  # something a model printed
            return
        heard[0] = time.monotonic()
        match said:
            case Progress():
                on_progress(said)
            case Begun():
                begun[0] = said
            case Failure():
                failures.append(said)

    child = Child(Launch.of("prepare", "preparation", preparation), on_line, on_output)
    try:
        stuck = not await _outlived(child, heard, begun, preparation.silence_s)
        status = await asyncio.shield(child.ended)
    except asyncio.CancelledError:
        await child.stop(grace_s=1.0)
        raise
    return _Ended(status, begun[0], failures[0] if failures else None, tuple(child.tail), stuck)


async def _outlived(child: Child, heard: list[float], begun: list[Begun], silence_s: float) -> bool:
    """Whether a child ends by itself; one that says nothing for too long while it compiles is killed."""
    while True:
        left_s = heard[0] + silence_s - time.monotonic()
        if not begun[0].model:
            left_s = silence_s  # it measures, with limits of its own
        if left_s <= 0:
            await child.stop(grace_s=0.0)
            return False
        try:
            await asyncio.wait_for(asyncio.shield(child.ended), left_s)
        except TimeoutError:
            continue
        return True


def _taken(result: Path) -> Prepared:
    try:
        prepared = msgspec.msgpack.decode(unsealed(RESULT, result.read_bytes()), type=Prepared)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise RepositoryError(
            f"{result}: expected what was compiled, found no such file ({error})"
        ) from error
    result.unlink()
    return prepared
