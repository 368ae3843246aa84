"""``clockwork`` itself: its commands and their exit codes.

Exit codes: 0 done; 1 failed, or models have problems; 2 the command line or a setting is invalid; 130
interrupted. An error is one line on standard error, with advice; a traceback is a bug of ours.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

import click

from clockwork_serve import __version__
from clockwork_serve.cli.docs import docs, examples
from clockwork_serve.cli.explain import explain
from clockwork_serve.cli.operate import config, key, live, models
from clockwork_serve.cli.plan import plan
from clockwork_serve.cli.ray import ray
from clockwork_serve.cli.repository import profile, validate
from clockwork_serve.cli.screen import INTERRUPTED, note
from clockwork_serve.cli.serve import controller, gateway, serve, worker
from clockwork_serve.cli.simulate import simulate
from clockwork_serve.cli.top import top
from clockwork_serve.cli.workload import workload
from clockwork_serve.config.former import FORMER_COMMANDS, FORMER_OPTIONS, FORMER_SETTINGS
from clockwork_serve.config.reader import former, former_variables
from clockwork_serve.errors import ClockworkError, ConfigError, described, install_advice

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

FAILED = 1
MISUSED = 2
COMMAND_GROUP: Final = "clockwork_serve.commands"
"""Entry points of this group are commands of other packages: ``name = "module:command"``."""
LABORATORY: Final = {
    "bench": ("", "Send the requests of SCENARIO to a server and report which responses came in time."),
    "demo": ("[demo]", "Serve real pretrained models under load and show what came of it."),
    "reproduce": ("[figures]", "Reproduce a figure of the Clockwork paper: fig2, fig5, ..., fig11, or all."),
}
"""The commands of clockwork-lab: the extra that each needs, and what it does."""


GROUPS: Final = {
    "Serve": ("serve", "validate", "profile", "models", "examples", "demo"),
    "Look": ("top", "live", "explain", "docs"),
    "Plan": ("workload", "simulate", "plan", "bench", "reproduce"),
    "Operate": ("config", "key", "controller", "gateway", "worker", "ray"),
}
"""The commands by what they are for, as ``--help`` lists them."""


class Commands(click.Group):
    """Our commands, and those of other packages: entry points, which are looked up when a command is given.

    If ``clockwork-lab`` is not installed, its commands print how to install it. A command of an earlier
    version prints what does its work now.
    """

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by group; those of other packages come last."""
        others = tuple(sorted(set(self.list_commands(ctx)).difference(*GROUPS.values())))
        width = max(map(len, self.list_commands(ctx)))
        for title, names in {**GROUPS, "Other packages": others}.items():
            found = [(name, command) for name in names if (command := self.get_command(ctx, name))]
            if found:
                room = formatter.width - width - 6
                rows = [(name.ljust(width), command.get_short_help_str(room)) for name, command in found]
                with formatter.section(title):
                    formatter.write_dl(rows)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, sorted."""
        return sorted({*self.commands, *LABORATORY, *_installed()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command of ours, else of another package; None if there is none."""
        found = self.commands.get(cmd_name)
        if found is None and (entry := _installed().get(cmd_name)) is not None:
            return _loaded(entry)
        if found is None and cmd_name in LABORATORY:
            return _missing(cmd_name)
        return _former(cmd_name) if found is None and cmd_name in FORMER_COMMANDS else found


@cache
def _installed() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=COMMAND_GROUP)}


def _loaded(entry: EntryPoint) -> click.Command:
    """A command of another package; if its import fails, the error is shown when the command is run."""
    try:
        found = entry.load()
    except Exception as error:  # noqa: BLE001 - other packages fail as they like, and help must be shown
        package = entry.dist.name if entry.dist else "its package"
        return _failing(
            entry.name,
            f"{entry.name}: expected {entry.value!r} of {package} to be there to import; found "
            f"{described(error)}; install {package} again",
        )
    if not isinstance(found, click.Command):
        return _failing(
            entry.name, f"{entry.name}: expected {entry.value!r} to be a click.Command; found {found!r}"
        )
    return found


def _missing(name: str) -> click.Command:
    extra, what = LABORATORY[name]
    advice = install_advice(f"clockwork-lab{extra}")
    return _failing(
        name,
        f"{name}: expected clockwork-lab, which has this command, to be installed; found none; {advice}",
        f"Not installed: pip install './packages/clockwork-lab{extra}', in a clone.",
        f"{what}\n\n{name} is a command of clockwork-lab, which is not installed. To install it, {advice}",
    )


def _former(name: str) -> click.Command:
    return _failing(
        name,
        f"{name}: expected a command of this version; found one of an earlier one; {FORMER_COMMANDS[name]}",
    )


def _failing(
    name: str, message: str, short_help: str = "Cannot be loaded.", shown: str | None = None
) -> click.Command:
    """A command that accepts any arguments and fails with a message; its help is ``shown``, if given."""

    def complain(words: tuple[str, ...]) -> None:
        raise ConfigError(message)

    return click.Command(
        name, callback=complain, params=[click.Argument(["words"], nargs=-1)], short_help=short_help,
        help=shown, add_help_option=shown is not None, context_settings={"ignore_unknown_options": True},
    )  # fmt: skip


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="clockwork", message="%(prog)s %(version)s")
def clockwork() -> None:
    """Serve thousands of models on a few devices: each request in time, or rejected once it cannot be.

    Start with `clockwork examples` and `clockwork serve examples/models`, or `clockwork serve REPO` for
    models of your own; `clockwork docs` lists what there is to read.
    """


for _command in (
    serve, controller, worker, gateway, validate, profile, models, config, key, simulate, plan, workload,
    explain, live, top, ray, docs, examples,
):  # fmt: skip
    clockwork.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    # No command computes in numpy's own threads, which spin for a while as they are made.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal cannot encode are replaced: an error would lose a run's figures.
            stream.reconfigure(errors="replace")
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    try:
        code = clockwork.main(arguments, prog_name="clockwork", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        return MISUSED
    except click.UsageError as error:
        return _misused(error, arguments)
    except click.ClickException as error:
        return _failed(error.format_message(), FAILED)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except ConfigError as error:
        return _failed(str(error), MISUSED)
    except ClockworkError as error:
        return _failed(str(error), FAILED)
    except BrokenPipeError:
        # The reader of our output closed the pipe, as `head` does; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code if isinstance(code, int) else 0


def _misused(error: click.UsageError, arguments: Sequence[str] | None) -> int:
    if isinstance(error, click.NoSuchOption):
        if old := _former_settings(error, sys.argv[1:] if arguments is None else arguments):
            return _failed(str(former([*old, *former_variables(os.environ)])), MISUSED)
        option = f"{error.ctx.info_name if error.ctx else ''} {error.option_name}"
        if option in FORMER_OPTIONS:
            return _failed(
                f"{option}: found an option of an earlier version; {FORMER_OPTIONS[option]}", MISUSED
            )
    message = error.format_message()
    command = error.ctx.command_path if error.ctx else _named(arguments)
    return _failed(f"{message}{'' if message[-1:] in '.?' else '.'} See {command} --help", MISUSED)


def _former_settings(error: click.NoSuchOption, words: Sequence[str]) -> list[tuple[str, str]]:
    """The settings of earlier versions among the options of a command line, and how they are written."""
    params = error.ctx.command.params if error.ctx else []
    now = {option for param in params for option in (*param.opts, *param.secondary_opts)}
    options = dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--"))
    names = [(one[2:].removeprefix("no-").replace("-", "_"), one) for one in options if one not in now]
    return [(name, option) for name, option in names if name in FORMER_SETTINGS]


def _named(arguments: Sequence[str] | None) -> str:
    """The command that a command line names, for errors of click's that do not say it."""
    command: click.Command = clockwork
    path = ["clockwork"]
    for word in sys.argv[1:] if arguments is None else arguments:
        if isinstance(command, click.Group) and (found := command.get_command(click.Context(command), word)):
            command = found
            path.append(word)
    return " ".join(path)


def _failed(message: str, code: int) -> int:
    note(f"error: {' '.join(message.split())}")
    return code
