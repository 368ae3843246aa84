"""Compiles and profiles what a repository holds, in a child process; the keeper stays light and cannot crash.

The child tells its progress, one JSON record a line, on stdout, and leaves what it made in a file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import ConfigError, RepositoryError
from clockwork_serve.messages import Profile
from clockwork_serve.serve.supervisor import Child, Launch, describe_exit
from clockwork_serve.store import Problem, Served, StoreConfig

_log = logging.getLogger(__name__)


class Preparation(Struct, frozen=True, kw_only=True):
    """What to prepare: all models of a repository, or only ``names``. ``result`` is the file to write.

    ``nice`` lowers the child's priority, for when others serve.
    """

    repository: str
    store: StoreConfig
    devices: tuple[DeviceConfig, ...]
    result: str
    names: tuple[str, ...] = ()
    nice: int = 0
    log_level: str = "info"
    log_format: str = "text"


class Prepared(Struct, frozen=True, kw_only=True):
    """What can be served and what cannot; ``names`` are the models that were looked at."""

    names: tuple[str, ...]
    served: tuple[Served, ...]
    profiles: tuple[Profile, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...] = ()


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


OnProgress = Callable[[Progress], None]


async def prepare(
    preparation: Preparation, on_progress: OnProgress, on_line: Callable[[str], None]
) -> Prepared:
    """Run a child that prepares; cancelling stops it.

    Raises :class:`RepositoryError` or :class:`ConfigError` if it could do nothing at all.
    """
    failures: list[Failure] = []

    def on_output(line: str) -> None:
        try:
            said = msgspec.json.decode(line, type=Progress | Failure)
        except msgspec.MsgspecError:
            on_line(line)  # something a model printed
            return
        if isinstance(said, Progress):
            on_progress(said)
        else:
            failures.append(said)

    launch = Launch(
        name="prepare",
        module="clockwork_serve.serve.preparation_process",
        config=msgspec.json.encode(preparation).decode(),
    )
    child = Child(launch, on_line, on_output)
    try:
        status = await asyncio.shield(child.ended)
    except asyncio.CancelledError:
        await child.stop(grace_s=1.0)
        raise
    if failures:
        raise ConfigError(failures[0].text) if failures[0].setting else RepositoryError(failures[0].text)
    if status != 0:
        said = "\n".join(child.tail)
        raise RepositoryError(f"compiling ended unexpectedly: {describe_exit(status)}; it said:\n{said}")
    return _taken(Path(preparation.result))


def _taken(result: Path) -> Prepared:
    prepared = msgspec.msgpack.decode(result.read_bytes(), type=Prepared)
    result.unlink()
    return prepared
