"""``clockwork profile``: measures how long every code takes on the devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from clockwork_serve.cli.options import json_flag, repository_argument, setting_options, settings_from
from clockwork_serve.cli.repository import compile_repository, counted, show_problems
from clockwork_serve.cli.screen import Progress, note, say, show_json, show_table, size_text
from clockwork_serve.units import to_ms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clockwork_serve.messages import Profile
    from clockwork_serve.store import ServedVersion


@click.command()
@repository_argument
@setting_options("device", "cache", "max_batch", "largest_batch", "threads")
@click.option("--again", is_flag=True, help="Measure again what was measured before.")
@json_flag
def profile(
    repository: str | None, config: str | None, again: bool, as_json: bool, **flags: Any  # noqa: FBT001
) -> int:  # fmt: skip
    """Measure every code in REPO on the devices, and keep the profiles; exits with 1 if a model fails."""
    from clockwork_serve.devices import torch_target
    from clockwork_serve.serve.supervisor.config import device_configs
    from clockwork_serve.serve.supervisor.profiling import profile_all

    settings = settings_from(repository, config, flags)
    devices = device_configs(settings)
    cache, served, problems = compile_repository(
        settings, quiet=as_json, torch_target=torch_target(devices) or ""
    )
    try:
        with Progress("profiling", quiet=as_json) as progress:
            profiled = profile_all(served, devices, cache, progress.step, again=again)
    finally:
        cache.close()
    problems = [*problems, *profiled.problems]
    if as_json:
        show_json(
            {"profiles": profiled.profiles, "models": _names(served), "warnings": profiled.warnings,
             "problems": problems}
        )  # fmt: skip
        return 1 if problems else 0
    if profiled.profiles:
        show_table(
            ["models", "code", "device", ">ms by batch size", ">LOAD", ">scratch"],
            _rows(served, profiled.profiles),
        )
    show_problems((), problems)
    for warning in profiled.warnings:
        note(f"warning: {warning}")
    say(f"{counted(len(profiled.profiles), 'profile')} kept in {cache.root}")
    return 1 if problems else 0


def _names(served: Sequence[ServedVersion]) -> dict[str, list[str]]:
    """Keys of the models that share a code, by code."""
    keys: dict[str, list[str]] = {}
    for each in served:
        keys.setdefault(each.code.code_id, []).append(each.model.key)
    return keys


def _rows(served: Sequence[ServedVersion], profiles: Sequence[Profile]) -> list[list[str]]:
    keys = _names(served)
    sizes = {each.code.code_id: each.model.weights.size for each in served}
    return [
        [
            shared_by(keys[each.code_id]),
            each.code_id[:12],
            each.device_kind,
            _durations(each),
            f"{to_ms(each.load_ns(sizes[each.code_id])):.2f} ms",
            size_text(max(each.workspace_bytes.values(), default=0)),
        ]
        for each in sorted(profiles, key=lambda found: (keys[found.code_id][0], found.device_kind))
    ]


def shared_by(keys: Sequence[str]) -> str:
    """The first of the models, and the number of others."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _durations(profile: Profile) -> str:
    """Durations at powers of two and at the largest size: others are interpolated, and omitted for space."""
    from clockwork_serve.store.cache import batch_sizes

    sizes = [size for size in batch_sizes(max(profile.infer_ns)) if size in profile.infer_ns]
    return "  ".join(f"{size}: {to_ms(profile.infer_ns[size]):.2f}" for size in sizes)
