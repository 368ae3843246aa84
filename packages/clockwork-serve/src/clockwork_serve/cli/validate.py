"""``clockwork validate``: compiles as serving does before it starts; it measures, imports, starts nothing."""

from __future__ import annotations

from typing import Any

import click

from clockwork_serve.cli.options import (
    json_flag,
    repository_argument,
    setting_options,
    settings_from,
    torch_target_option,
)
from clockwork_serve.cli.repository import compile_repository, counted, show_problems
from clockwork_serve.cli.screen import say, show_json, show_table


@click.command()
@repository_argument
@setting_options("cache", "max_batch", "largest_batch")
@torch_target_option
@json_flag
def validate(repository: str | None, config: str | None, as_json: bool, **flags: Any) -> int:  # noqa: FBT001
    """Check that every model in REPO can be served; exits with 1 if one cannot."""
    target = flags.pop("torch_target")
    settings = settings_from(repository, config, flags)
    cache, served, problems = compile_repository(settings, quiet=as_json, torch_target=target)
    cache.close()
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
