"""``clockwork simulate``: a scenario on virtual time. Implemented by ``apps.simulate`` and ``sim``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clockwork_serve.cli.interrupt import interruptible
from clockwork_serve.cli.options import setting_options, settings_from
from clockwork_serve.cli.replay import refuse_others, replay_journal
from clockwork_serve.cli.screen import Progress, note, say, show_table
from clockwork_serve.errors import ConfigError

if TYPE_CHECKING:
    from clockwork_serve.apps.simulate.play import Played
    from clockwork_serve.apps.simulate.question import SimulationQuestion
    from clockwork_serve.apps.simulate.report import Report

INTERRUPTED = 130
_STDOUT = "-"
_TRACES = "CLOCKWORK_TRACES"


@click.command()
@click.argument("scenario", metavar="SCENARIO", required=False)
@click.option("--replay", metavar="JOURNAL", help="Replay the --journal of a server or a simulation.")
@click.option(
    "--seed",
    type=click.IntRange(0, 1 << 31),
    default=1,
    metavar="N",
    help="Seed of all random choices. [default: 1]",
)
@click.option(
    "--devices", type=click.IntRange(1, 1_000_000), metavar="N", help="Devices, instead of the scenario's."
)
@click.option(
    "--zoo", metavar="NAME|FILE", help="Table of models, instead of the scenario's: v100, or a CSV file."
)
@click.option(
    "--trace-dir", "traces", metavar="DIR", envvar=_TRACES,
    help=f"Folder of trace files. [default: {_TRACES}, else beside the scenario]",
)  # fmt: skip
@setting_options("policy", "max_batch", hidden=("look_ahead_ms", "slack_ms", "reject", "retries"))
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the numbers as JSON to FILE; - is standard output."
)
@click.option("--journal", metavar="FILE", help="Write every event and decision to FILE.")
@click.option("--checks", is_flag=True, help="Check the whole system after every step: several times slower.")
@click.pass_context
def simulate(  # noqa: PLR0913 - one parameter for each option
    context: click.Context,
    /,
    *,
    scenario: str | None,
    replay: str | None,
    seed: int,
    devices: int | None,
    zoo: str | None,
    traces: str | None,
    config: str | None,
    json_file: str | None,
    journal: str | None,
    checks: bool,
    **flags: Any,
) -> int:
    """Run SCENARIO on virtual time, to see whether given devices can serve a given load.

    The controller and the workers are those of the server; devices take the durations of a table. Equal seeds
    give equal runs on any machine. Ctrl-C ends a run early and shows what was reached.

    With --replay: does this version decide as the journal says? Exits with 1 at the first difference.
    """
    if replay is not None:
        refuse_others(context, {"replay", "json_file", "checks"})
        _check_files(json_file, None, None)
        return replay_journal(replay, json_file, checks=checks)
    if scenario is None:
        raise click.UsageError(
            "SCENARIO: expected a file, found none; how to write one: clockwork docs workloads."
        )
    from clockwork_serve.apps.simulate.question import ask
    from clockwork_serve.apps.simulate.report import report
    from clockwork_serve.serve.supervisor.config import controller_config

    settings = settings_from(None, config, flags, needs_repository=False)
    _check_files(json_file, journal, traces)
    question = ask(
        scenario, config=controller_config(settings), seed=seed, zoo=zoo, devices=devices, traces=traces
    )
    played = _play(question, journal, checks=checks, quiet=json_file == _STDOUT)
    made = report(question, played)
    if json_file == _STDOUT:
        click.echo(made.to_json().decode())
    else:
        _show(made)
        if json_file is not None:
            Path(json_file).write_bytes(made.to_json() + b"\n")
            note(f"wrote {json_file}")
    return INTERRUPTED if played.cut else 0


def _check_files(json_file: str | None, journal: str | None, traces: str | None) -> None:
    """Check output files before the run, not after it."""
    for name, file in (("json", json_file), ("journal", journal)):
        if file not in {None, _STDOUT} and not Path(str(file)).absolute().parent.is_dir():
            raise ConfigError(
                f"{name}: expected a file in a folder that exists, found {file}; make the folder"
            )
    if journal is not None and Path(journal).exists():
        raise ConfigError(
            f"journal: expected a file that is not there yet, found {journal}; one journal holds one run"
        )
    if traces is not None and not Path(traces).is_dir():
        raise ConfigError(f"trace_dir: expected a folder of trace files, found {traces}; correct it")


def _play(question: SimulationQuestion, journal: str | None, *, checks: bool, quiet: bool) -> Played:
    from clockwork_serve.apps.simulate.play import play
    from clockwork_serve.telemetry import Journal, head_of

    book = None if journal is None else Journal(Path(journal), head_of(question.config))
    simulation = question.simulation(watchers=[] if book is None else [book], checks=checks)
    total = max(2, round(question.scenario.seconds))
    try:
        with Progress("simulating", quiet=quiet) as progress, interruptible() as stopped:

            def tell(simulated_s: float, took_s: float) -> None:
                speed = simulated_s / took_s if took_s else 0.0
                progress.step(min(int(simulated_s), total - 1), total, f"{speed:.3g} times real time")

            tell(0.0, 0.0)
            return play(simulation, tell=tell, stopped=stopped)
    finally:
        if book is not None:
            book.close()
            if book.dropped:
                note(f"journal: {book.dropped} steps are missing: the disk was too slow")


def _show(made: Report) -> None:
    from clockwork_serve.apps.simulate import words

    for line in words.setup_lines(made):
        say(line)
    say("")
    show_table(words.LOAD_COLUMNS, words.load_rows(made))
    show_table(words.LATENCY_COLUMNS, words.latency_rows(made))
    for line in words.closing_lines(made):
        say(line)
