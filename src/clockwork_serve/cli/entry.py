"""``clockwork`` itself: its commands, and how every one of them ends. It does none of their work.

Exit codes: 0 done; 1 it did not work, or models have problems; 2 the command line or a setting is wrong;
130 interrupted. An error is one line on standard error, with what to do; a traceback is a bug of ours.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click

from clockwork_serve import __version__
from clockwork_serve.cli.bench import bench
from clockwork_serve.cli.compile import compile_, validate
from clockwork_serve.cli.demo import demo
from clockwork_serve.cli.gateway import gateway
from clockwork_serve.cli.key import key
from clockwork_serve.cli.models import models
from clockwork_serve.cli.profile import profile
from clockwork_serve.cli.reproduce import reproduce
from clockwork_serve.cli.screen import note
from clockwork_serve.cli.serve import serve
from clockwork_serve.cli.simulate import simulate
from clockwork_serve.cli.worker import worker
from clockwork_serve.errors import ClockworkError, ConfigError

FAILED = 1
MISUSED = 2
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="clockwork", message="%(prog)s %(version)s")
def clockwork() -> None:
    """Serve thousands of models on a few devices: every request in time, or refused at once.

    Start with `clockwork demo`, or `clockwork serve REPO` for models of your own.
    """


for _command in (
    serve, worker, gateway, validate, compile_, profile, models, key, demo, simulate, bench, reproduce,
):  # fmt: skip
    clockwork.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. The end of the process is here and nowhere else."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a letter gets another; that may not cost the figures of a long run.
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
        said = error.format_message()
        command = error.ctx.command_path if error.ctx else "clockwork"
        return _failed(f"{said}{'' if said[-1:] in '.?' else '.'} See {command} --help", MISUSED)
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
        # Who read our output has gone, as `head` does; nothing may be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code if isinstance(code, int) else 0


def _failed(message: str, code: int) -> int:
    note(f"error: {' '.join(message.split())}")
    return code
