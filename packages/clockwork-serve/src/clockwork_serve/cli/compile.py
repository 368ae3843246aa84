"""``clockwork compile`` and ``validate``: compile every model into the cache, as serving does at its start.

They differ in what they show.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from clockwork_serve.cli.options import (
    Command,
    json_flag,
    repository_argument,
    setting_options,
    settings_from,
    torch_target_option,
)
from clockwork_serve.cli.repository import compile_repository, counted, show_problems
from clockwork_serve.cli.screen import say, show_json, show_table, size_text

if TYPE_CHECKING:
    from clockwork_serve.config import Settings
    from clockwork_serve.store import Problem, ServedVersion


def _compiling(command: Command) -> Command:
    """The arguments of both commands."""
    for decorate in (
        json_flag, torch_target_option, setting_options("cache", "max_batch", "largest_batch"),
        repository_argument,
    ):  # fmt: skip
        command = decorate(command)
    return command


def _compiled(
    repository: str | None, config: str | None, flags: dict[str, Any], *, quiet: bool
) -> tuple[Settings, str, list[ServedVersion], list[Problem]]:
    """The work of both commands; the second value is the folder of the results."""
    target = flags.pop("torch_target")
    settings = settings_from(repository, config, flags)
    cache, served, problems = compile_repository(settings, quiet=quiet, torch_target=target)
    cache.close()
    return settings, str(cache.root), served, problems


@click.command("compile")
@_compiling
def compile_(repository: str | None, config: str | None, as_json: bool, **flags: Any) -> int:  # noqa: FBT001
    """Compile the models in REPO into shared code and weights; exits with 1 if one fails."""
    settings, root, served, problems = _compiled(repository, config, flags, quiet=as_json)
    if as_json:
        show_json(
            {
                "repository": settings.repository,
                "cache": root,
                "models": [
                    {
                        "name": each.model.name,
                        "version": each.model.version,
                        "code": each.code.code_id,
                        "backend": each.code.backend,
                        "lifted": each.code.lifted,
                        "batched": each.code.batched,
                        "batch_sizes": each.model.batch_sizes,
                        "weights_bytes": each.model.weights.size,
                        "warnings": each.model.warnings,
                    }
                    for each in served
                ],
                "problems": problems,
            }
        )
        return 1 if problems else 0
    sharing = Counter(each.code.code_id for each in served)
    rows = [
        [
            each.model.key,
            each.code.code_id[:12],
            str(sharing[each.code.code_id]),
            size_text(each.model.weights.size),
            "in pages" if each.code.lifted else "in the artefact",
            " ".join(map(str, each.model.batch_sizes)),
        ]
        for each in served
    ]
    if rows:
        show_table(["model", "code", ">used by", ">weights", "kept", "batch sizes"], rows)
    show_problems(served, problems)
    say(
        f"{counted(len(served), 'model version')} share {counted(len(sharing), 'code')}, "
        f"{counted(len(problems), 'problem')}; cache: {root}"
    )
    return 1 if problems else 0


@click.command()
@_compiling
def validate(repository: str | None, config: str | None, as_json: bool, **flags: Any) -> int:  # noqa: FBT001
    """Check that every model in REPO can be served; exits with 1 if one cannot."""
    settings, _, served, problems = _compiled(repository, config, flags, quiet=as_json)
    if as_json:
        show_json(
            {
                "repository": settings.repository,
                "ok": not problems,
                "models": [
                    {"name": each.model.name, "version": each.model.version, "warnings": each.model.warnings}
                    for each in served
                ],
                "problems": problems,
            }
        )
        return 1 if problems else 0
    rows = [
        [each.model.key, each.model.platform, str(each.model.max_batch_size), counted_warnings(each.model)]
        for each in served
    ]
    rows += [[_name(problem), "", "", "cannot be served"] for problem in problems]
    if rows:
        show_table(["model", "platform", ">max batch", "result"], sorted(rows))
    show_problems(served, problems)
    say(f"{counted(len(served), 'model version')} can be served, {counted(len(problems), 'problem')}")
    return 1 if problems else 0


def counted_warnings(model: Any) -> str:
    """``ok``, with the number of warnings."""
    return f"ok, {counted(len(model.warnings), 'warning')}" if model.warnings else "ok"


def _name(problem: Any) -> str:
    return f"{problem.model}/{problem.version}" if problem.version else problem.model or "(repository)"
