"""``clockwork compile``: fills the cache with codes and weights, so that a later start is quick."""

from __future__ import annotations

from collections import Counter
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
from clockwork_serve.cli.screen import say, show_json, show_table, size_text


@click.command("compile")
@repository_argument
@setting_options("cache", "max_batch", "largest_batch")
@torch_target_option
@json_flag
def compile_(repository: str | None, config: str | None, as_json: bool, **flags: Any) -> int:  # noqa: FBT001
    """Compile the models in REPO into shared code and weights; exits with 1 if one fails."""
    target = flags.pop("torch_target")
    settings = settings_from(repository, config, flags)
    cache, served, problems = compile_repository(settings, quiet=as_json, torch_target=target)
    cache.close()
    if as_json:
        show_json(
            {
                "repository": settings.repository,
                "cache": str(cache.root),
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
        f"{counted(len(problems), 'problem')}; cache: {cache.root}"
    )
    return 1 if problems else 0
