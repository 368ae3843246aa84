"""Compiles a repository for commands that need it, with progress; problems are shown, not raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from clockwork_serve.cli.screen import Progress, note
from clockwork_serve.config import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clockwork_serve.store import Cache, Problem, ServedVersion


def compile_repository(
    settings: Settings, *, quiet: bool, torch_target: str | None = None
) -> tuple[Cache, list[ServedVersion], list[Problem]]:
    """Every model of the repository, compiled into the cache (which the caller closes), and the problems.

    ``torch_target``: ``cpu`` or ``cuda``; None: this machine's; "": no device runs torch models.
    Raises :class:`~clockwork_serve.errors.RepositoryError` if repository or cache cannot be used.
    """
    from clockwork_serve.serve.supervisor.config import store_config
    from clockwork_serve.store import Cache, Repository, compile_all

    store = msgspec.structs.replace(
        store_config(settings), torch_target="auto" if torch_target is None else torch_target
    )
    repository = Repository(settings.repository, store)
    cache = Cache(settings.cache)
    with Progress("compiling", quiet=quiet) as progress:
        served, problems = compile_all(repository, cache, progress.step)
    return cache, served, problems


def show_problems(served: Sequence[ServedVersion], problems: Sequence[Problem]) -> None:
    """Warnings and problems, one line each, on standard error."""
    for each in served:
        for warning in each.model.warnings:
            note(f"warning: model '{each.model.name}' version {each.model.version}: {warning}")
    for problem in problems:
        note(f"problem: {problem}")


def counted(number: int, what: str) -> str:
    """``1 model``, ``2 models``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
