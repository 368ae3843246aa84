"""Command-line options generated from the table of settings."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from clockwork_serve.cli.screen import note
from clockwork_serve.config import SETTINGS, Setting, Settings, read_settings, setting
from clockwork_serve.config.table import JoiningProcess
from clockwork_serve.config.values import switch
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S

Command = TypeVar("Command", bound=Callable[..., Any])
STDOUT: Final = "-"  # as the name of a file
TRACES_VARIABLE: Final = "CLOCKWORK_TRACES"
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_METAVARS = {
    "port": "PORT", "ms": "MS", "s": "SECONDS", "memory": "PREFIX", "device": "DEVICE", "cache": "FOLDER",
    "store": "FOLDER|URL", "journal": "memory|FILE|off", "size": "SIZE",
    "host": "ADDRESS", "policy": "NAME", "format": "text|json", "level": "LEVEL",
    "certificate": "FILE", "key": "FILE", "ca": "FILE", "keys": "FILE", "machines": "HOST:PORT",
    "controller": "HOST:PORT", "name": "NAME", "lease": "NAME",
}  # fmt: skip
"""By the last word of a setting's name, where its default does not show what its values are."""


def repository_argument(command: Command) -> Command:
    """The model repository, as an argument that may be replaced by a setting."""
    return click.argument("repository", metavar="REPO", required=False)(command)


def json_flag(command: Command) -> Command:
    """``--json``: the output as JSON, on standard output."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")(command)


def seed_option(command: Command) -> Command:
    """``--seed``."""
    return click.option(
        "--seed", type=click.IntRange(0, 1 << 31), default=1, metavar="N",
        help="Seed of all random choices. [default: 1]",
    )(command)  # fmt: skip


def traces_option(command: Command) -> Command:
    """``--trace-dir``, as ``traces``: a folder that is there."""

    def check(_: click.Context, __: click.Parameter, folder: str | None) -> str | None:
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"trace_dir: expected a folder of trace files, found {folder}; correct it")
        return folder

    return click.option(
        "--trace-dir", "traces", metavar="DIR", envvar=TRACES_VARIABLE, callback=check,
        help=f"Folder of trace files. [default: {TRACES_VARIABLE}, else beside the scenario]",
    )(command)  # fmt: skip


def output_option(name: str, shown: str) -> Callable[[Command], Command]:
    """``--NAME FILE``, as ``NAME_file``. That its folder is there is seen before the work, not after it."""

    def check(_: click.Context, __: click.Parameter, file: str | None) -> str | None:
        if file not in {None, STDOUT} and not Path(str(file)).absolute().parent.is_dir():
            raise ConfigError(
                f"{name}: expected a file in a folder that exists, found {file}; make the folder"
            )
        return file

    return click.option(f"--{name}", f"{name}_file", metavar="FILE", callback=check, help=shown)


def write_output(file: str | None, text: bytes) -> None:
    """Write to a file that an option names, and say so; ``-`` is standard output, None nothing at all."""
    if file == STDOUT:
        click.echo(text.decode())
    elif file is not None:
        Path(file).write_bytes(text + b"\n")
        note(f"wrote {file}")


def duration_ns(name: str, text: str) -> int:
    """A time such as ``90s``, ``30m``, ``1h`` or ``2d``. Raises :class:`ConfigError`, with that name."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None or not float(found[1]):
        raise ConfigError(
            f"{name}: expected a time such as 90s, 30m, 1h or 2d, found {text!r:.40}; correct it"
        )
    return round(float(found[1]) * _UNITS[found[2]] * NS_PER_S)


def setting_options(*shown: str, hidden: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """``--config`` and an option for each setting named; ``hidden`` ones work but are not in the help."""

    def decorate(command: Command) -> Command:
        for name in reversed(hidden):
            command = _option(setting(name), hidden=True)(command)
        for name in reversed(shown):
            command = _option(setting(name), hidden=False)(command)
        if hidden:
            command = click.option(
                "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_help_all,
                help="Show this, with every setting, and exit.",
            )(command)  # fmt: skip
        return click.option("--config", metavar="FILE", help="TOML file of settings.")(command)

    return decorate


def _help_all(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:  # noqa: FBT001
    """The command's help with the options that it hides otherwise."""
    if wanted and not context.resilient_parsing:
        hidden = [one for one in context.command.params if isinstance(one, click.Option) and one.hidden]
        for one in hidden:
            one.hidden = False
        click.echo(context.get_help())
        for one in hidden:
            one.hidden = True
        context.exit()


def all_but(*names: str) -> tuple[str, ...]:
    """The names of all settings that are options, except some."""
    return tuple(entry.name for entry in SETTINGS if entry.name not in {*names, "repository"})


def taken_by(process: JoiningProcess, *but: str) -> tuple[str, ...]:
    """The names of all settings that such a process uses, except some."""
    return tuple(entry.name for entry in SETTINGS if process in entry.elsewhere and entry.name not in but)


def _option(entry: Setting, *, hidden: bool) -> Callable[[Command], Command]:
    shown = f"{entry.help[0].upper()}{entry.help[1:]}."
    if entry.name == "device":
        shown = f"{entry.help}."
    if entry.read is switch:
        flags = f"{entry.flag}/--no-{entry.flag[2:]}"
        return click.option(flags, entry.name, default=None, help=shown, hidden=hidden)
    if entry.shown:
        shown += f" [default: {entry.shown}]"
    return click.option(
        entry.flag, entry.name, metavar=_metavar(entry), multiple=entry.name == "device", help=shown,
        hidden=hidden,
    )  # fmt: skip


def _metavar(entry: Setting) -> str:
    """What stands for a value in ``--help``. Sizes of memory have defaults like 64MiB, 1GB or 75%."""
    if entry.shown is not None and entry.shown.endswith(("B", "%")):
        return "SIZE"
    word = entry.name.rpartition("_")[2]
    return _METAVARS.get(word, "N" if isinstance(entry.default, int | float) else "TEXT")


def settings_from(
    repository: str | None, config: str | None, flags: Mapping[str, object], *,
    needs_repository: bool = True, or_store: bool = False,
) -> Settings:  # fmt: skip
    """All settings, the command line first. Warnings go to standard error.

    ``or_store``: a shared store will do, which may have a catalogue.
    """
    given = {name: None if value == () else value for name, value in flags.items()}
    settings = read_settings({"repository": repository, **given}, os.environ, config)
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)
    if needs_repository and not (settings.repository or (or_store and settings.store)):
        raise click.UsageError(
            "REPO: expected the folder of a model repository, found none; what is in it: "
            "clockwork docs model-repository.",
            click.get_current_context(silent=True),
        )
    return settings
