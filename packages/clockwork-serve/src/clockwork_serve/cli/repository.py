"""``clockwork validate`` and ``profile``: models compiled as serving does at its start.

Problems of models are shown, not raised; a command that has any exits with 1.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click
import msgspec

from clockwork_serve.cli.options import (
    Command,
    json_flag,
    repository_argument,
    setting_options,
    settings_from,
)
from clockwork_serve.cli.screen import Progress, Stages, note, say, show_json, show_table, size_text
from clockwork_serve.config import setting
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import counted, to_ms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clockwork_serve.config import Settings
    from clockwork_serve.messages import Profile
    from clockwork_serve.serve.supervisor.preparation import PreparedRepository, StartProgress
    from clockwork_serve.store import Cache, Problem, ServedVersion


def _compile(
    settings: Settings, torch_target: str | None, *, quiet: bool
) -> tuple[Cache, list[ServedVersion], list[Problem]]:
    """Every model of the repository, compiled into the cache (which the caller closes), and the problems.

    ``torch_target``: ``cpu`` or ``cuda``; None: this machine's.
    Raises :class:`~clockwork_serve.errors.RepositoryError` if repository or cache cannot be used.
    """
    from clockwork_serve.serve.supervisor.config import store_config
    from clockwork_serve.store import Cache, Repository, compile_all

    store = msgspec.structs.replace(store_config(settings), torch_target=torch_target or "auto")
    repository = Repository(settings.repository, store)
    cache = Cache(settings.cache, store=settings.store)
    with Progress("compiling", quiet=quiet) as progress:
        served, problems = compile_all(repository, cache, progress.step)
    return cache, served, problems


def _show(
    columns: Sequence[str], rows: Sequence[Sequence[str]], warnings: Sequence[str],
    problems: Sequence[Problem], summary: str,
) -> None:  # fmt: skip
    """A table, then warnings and problems, one line each, on standard error, and a summary."""
    if rows:
        show_table(columns, rows)
    for warning in warnings:
        note(f"warning: {warning}")
    for problem in problems:
        note(f"problem: {problem}")
    say(summary)


def _share(cache: Cache, served: Sequence[ServedVersion], problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """Add all to the shared store, if there is one, then to its catalogue; what is wrong with the store."""
    from clockwork_serve.store import ProblemError, publish

    found = cache.share()
    if found or cache.shared is None:
        return found
    failed = {(problem.model, problem.version) for problem in problems}
    whole = [each for each in served if (each.model.name, each.model.version) not in failed]
    try:
        publish(cache.shared, whole, kept={problem.model for problem in problems})
    except ProblemError as error:
        return (error.problem,)
    return ()


def _beside(settings: Settings, problems: Sequence[Problem]) -> str:
    """What the summary says of the shared store."""
    if not settings.store:
        return ""
    lacks = any(not problem.model and problem.field == "store" for problem in problems)
    return f", {'not all in ' if lacks else ''}store: {settings.store}"


def _warnings(served: Sequence[ServedVersion]) -> list[str]:
    return [
        f"model '{model.name}' version {model.version}: {warning}"
        for model in (each.model for each in served)
        for warning in model.warnings
    ]


def _torch_target(command: Command) -> Command:
    """``--torch-target``."""
    return click.option(
        "--torch-target", type=click.Choice(["cpu", "cuda"]),
        help="What to compile model.pt2 for. [default: cuda where torch sees a GPU, else cpu]",
    )(command)  # fmt: skip


# ------------------------------------------------------------
# ``profile --no-measure`` and ``validate`` do the same, and differ in what they show.


def _compile_only(settings: Settings, torch_target: str | None, *, as_json: bool) -> int:
    """Compile the models into shared code and weights, for ``profile --no-measure``."""
    cache, served, problems = _compile(settings, torch_target, quiet=as_json)
    problems = [*problems, *_share(cache, served, problems)]
    cache.close()
    if as_json:
        models = [
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
        ]
        show_json(
            {
                "repository": settings.repository, "cache": str(cache.root), "models": models,
                "problems": problems,
            }
        )  # fmt: skip
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
    summary = (
        f"{counted(len(served), 'model version')} share {counted(len(sharing), 'code')}, "
        f"{counted(len(problems), 'problem')}; cache: {cache.root}{_beside(settings, problems)}"
    )
    columns = ["model", "code", ">used by", ">weights", "kept", "batch sizes"]
    _show(columns, rows, _warnings(served), problems, summary)
    return 1 if problems else 0


@click.command()
@click.option(
    "--self-test", is_flag=True, help="Check one --device by a built-in model instead, without REPO."
)
@repository_argument
@setting_options("device", "cache", "store", "max_batch")
@_torch_target
@json_flag
def validate(
    repository: str | None, config: str | None, as_json: bool, torch_target: str | None, self_test: bool,  # noqa: FBT001
    **flags: Any,
) -> int:  # fmt: skip
    """Check that every model in REPO can be served; exits with 1 if one cannot."""
    given = {"REPO": repository, "--torch-target": torch_target} | {
        setting(name).flag: value for name, value in flags.items() if value != ()
    }
    found = [name for name, value in given.items() if value is not None]
    if self_test:
        return _self_test(config, flags, found, as_json=as_json)
    if "--device" in found:
        raise click.UsageError("--device: expected --self-test with it, found none; give both, or neither")
    settings = settings_from(repository, config, flags, needs_repository=False)
    if not settings.repository:
        raise click.UsageError(
            "REPO: expected the folder of a model repository, or --self-test to check a device, found"
            " neither; what is in a repository: clockwork docs model-repository."
        )
    cache, served, problems = _compile(settings, torch_target, quiet=as_json)
    cache.close()
    if as_json:
        models = [
            {
                "name": each.model.name,
                "version": each.model.version,
                "output_bytes": each.model.output_bytes,
                "outputs_open": each.code.outputs_open,
                "warnings": each.model.warnings,
            }
            for each in served
        ]
        show_json(
            {
                "repository": settings.repository, "ok": not problems, "models": models,
                "problems": problems,
            }
        )  # fmt: skip
        return 1 if problems else 0
    rows = [[_name(problem), "", "", "", "cannot be served"] for problem in problems]
    for each in served:
        model = each.model
        warnings = f"ok, {counted(len(model.warnings), 'warning')}" if model.warnings else "ok"
        room = f"{'open, first ' if each.code.outputs_open else ''}{size_text(model.output_bytes)}"
        rows.append([model.key, model.platform, str(model.max_batch_size), room, warnings])
    summary = f"{counted(len(served), 'model version')} can be served, {counted(len(problems), 'problem')}"
    columns = ["model", "platform", ">max batch", ">outputs of a row", "result"]
    _show(columns, sorted(rows), _warnings(served), problems, summary)
    return 1 if problems else 0


def _self_test(
    config: str | None, flags: Mapping[str, object], found: Sequence[str], *, as_json: bool
) -> int:
    """Whether a device works with this version. A GPU that is not there is a result, with status 1."""
    from clockwork_serve.apps.self_test import FAILED, OK, self_test
    from clockwork_serve.serve.supervisor.config import device_configs

    others = ", ".join(name for name in found if name != "--device")
    if others:
        raise click.UsageError(
            f"--self-test: expected only --device, --config and --json with it, found {others};"
            " leave them out"
        )
    devices = device_configs(settings_from(None, config, flags, needs_repository=False))
    if len(devices) != 1:
        names = ", ".join(each.device for each in devices)
        raise ConfigError(f"device: expected one with --self-test, found {names}; check one after the other")
    with Progress("compiling", quiet=as_json) as progress:
        test = self_test(devices[0], progress.step)
    if as_json:
        show_json({"ok": test.ok, **msgspec.structs.asdict(test)})
        return 0 if test.ok else 1
    for name, fact in test.facts.items():
        say(f"{name}: {fact}")
    rows = [
        [each.name, each.result, f"{each.took_ms / 1000:.1f} s" if each.took_ms else "",
         each.found if each.result == OK else ""]
        for each in test.steps
    ]  # fmt: skip
    show_table(["step", "result", ">took", "found"], rows)
    for each in test.steps:
        if each.result == FAILED:
            note(f"problem: {each.name}: {each.found}")
    say(f"{test.device} {'passed' if test.ok else 'did not pass'} the self-test")
    return 0 if test.ok else 1


def _name(problem: Problem) -> str:
    return f"{problem.model}/{problem.version}" if problem.version else problem.model or "(repository)"


# ------------------------------------------------------------
# ``profile`` measures how long every code takes on the devices, as a server does at its start: in a process
# of its own, for a compiler or a model may crash.


def _prepared(settings: Settings, *, again: bool, quiet: bool) -> PreparedRepository:
    """All models of the repository, compiled and measured. Raises ``ClockworkError`` if that cannot be."""
    import asyncio
    import tempfile

    from clockwork_serve.serve.supervisor.config import server_config
    from clockwork_serve.serve.supervisor.preparation import Preparation, prepare

    config = server_config(settings)
    log_level = settings.log_level if settings.is_set("log_level") else "warning"
    shown = Stages(quiet=quiet)
    compiled = False

    def step(progress: StartProgress) -> None:
        # Models are measured while others are compiled, which is shown first.
        nonlocal compiled
        if progress.stage == "compile" or compiled:
            shown.step(progress)
        compiled = compiled or (progress.stage == "compile" and progress.done == progress.total)

    try:
        with tempfile.TemporaryDirectory() as folder:
            preparation = Preparation(
                settings=msgspec.structs.replace(settings, log_level=log_level), store=config.store,
                devices=config.devices, result=f"{folder}/prepared", again=again,
            )  # fmt: skip
            return asyncio.run(prepare(preparation, step, note))
    finally:
        shown.close()


@click.command()
@repository_argument
@setting_options("device", "cache", "store", "max_batch", "threads")
@click.option("--again", is_flag=True, help="Measure again what was measured before.")
@click.option(
    "--no-measure", "unmeasured", is_flag=True, help="Compile only, for devices of another machine."
)
@_torch_target
@json_flag
def profile(
    repository: str | None, config: str | None, again: bool, unmeasured: bool, torch_target: str | None,  # noqa: FBT001
    as_json: bool, **flags: Any,  # noqa: FBT001
) -> int:  # fmt: skip
    """Measure every code in REPO on the devices, and keep the profiles; exits with 1 if a model fails."""
    from clockwork_serve.serve.supervisor.config import store_config
    from clockwork_serve.store import Cache, Repository
    from clockwork_serve.telemetry.journal import machine_name

    settings = settings_from(repository, config, flags)
    if unmeasured:
        return _compile_only(settings, torch_target, as_json=as_json)
    if torch_target is not None:
        raise ConfigError(
            "torch_target: expected --no-measure with it, for a device says what is compiled for it; found "
            f"{torch_target} alone; add --no-measure, or leave it out"
        )
    misplaced = Repository(settings.repository, store_config(settings)).find_misplaced()
    found = _prepared(settings, again=again, quiet=as_json)
    served = sorted(found.served, key=lambda each: (each.model.name, int(each.model.version)))
    profiles = found.profiles
    problems = [*misplaced, *found.problems]
    with Cache(settings.cache, store=settings.store) as cache:
        problems += _share(cache, served, problems)
    if as_json:
        show_json(
            {"profiles": profiles, "models": _names(served), "tables": _tables(served, profiles),
             "measured_on": machine_name(), "warnings": found.warnings, "problems": problems}
        )  # fmt: skip
        return 1 if problems else 0
    kept = f"{counted(len(profiles), 'profile')} kept in {cache.root}{_beside(settings, problems)}"
    columns = ["models", "code", "device", ">ms by batch size", ">LOAD", ">scratch"]
    _show(columns, _rows(served, profiles), found.warnings, problems, kept)
    return 1 if problems else 0


def _names(served: Sequence[ServedVersion]) -> dict[str, list[str]]:
    """Keys of the models that share a code, by code."""
    keys: dict[str, list[str]] = {}
    for each in served:
        keys.setdefault(each.code.code_id, []).append(each.model.key)
    return keys


def _tables(
    served: Sequence[ServedVersion], profiles: Sequence[Profile]
) -> dict[str, list[dict[str, str | float]]]:
    """For ``clockwork simulate --zoo``: a row for each model, by the kind of device.

    A model is called by its name; where several versions are served, all but the last by both.
    """
    from clockwork_serve.workload.zoo import row_of

    last = {each.model.name: each.model.key for each in served}
    tables: dict[str, list[dict[str, str | float]]] = {}
    for each in served:
        model = each.model
        kind = model.name if last[model.name] == model.key else f"{model.name}.{model.version}"
        for profile in profiles:
            if profile.code_id == each.code.code_id:
                row = row_of(kind, model, each.code, profile)
                tables.setdefault(profile.device_kind, []).append(row)
    return tables


def _rows(served: Sequence[ServedVersion], profiles: Sequence[Profile]) -> list[list[str]]:
    keys = _names(served)
    sizes = {each.code.code_id: each.model.weights.size for each in served}
    return [
        [
            _shared_by(keys[each.code_id]),
            each.code_id[:12],
            each.device_kind,
            _durations(each),
            f"{to_ms(each.load_ns(sizes[each.code_id])):.2f} ms",
            size_text(max(each.workspace_bytes.values(), default=0)),
        ]
        for each in sorted(profiles, key=lambda found: (keys[found.code_id][0], found.device_kind))
    ]


def _shared_by(keys: Sequence[str]) -> str:
    """The first of the models, and the number of others."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _durations(profile: Profile) -> str:
    """Durations at powers of two and at the largest size: others are interpolated, and omitted for space."""
    from clockwork_serve.store.cache import batch_sizes

    sizes = [size for size in batch_sizes(max(profile.infer_ns)) if size in profile.infer_ns]
    return "  ".join(f"{size}: {to_ms(profile.infer_ns[size]):.2f}" for size in sizes)
