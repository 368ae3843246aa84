"""``clockwork simulate``: a scenario on virtual time (``apps.simulate``), or a journal (``sim.replay``)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from msgspec import Struct

from clockwork_serve.cli.options import (
    STDOUT,
    output_option,
    seed_option,
    setting_options,
    settings_from,
    traces_option,
    write_output,
)
from clockwork_serve.cli.screen import (
    INTERRUPTED,
    Progress,
    interruptible,
    note,
    say,
    show_json,
    show_table,
)
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import counted, plain

if TYPE_CHECKING:
    from clockwork_serve.apps.simulate import Latency, LoadReport, Played, Report, SimulationQuestion
    from clockwork_serve.sim import Constants
    from clockwork_serve.sim.replay import Difference, Replayed, Run

DIFFERENT = 1


delays_option = click.option(
    "--delays", metavar="JOURNAL",
    help="Delays and noise as a server had them, from its --journal. [default: those of the journal "
    "behind --zoo, else of a quiet machine]",
)  # fmt: skip


def measured(journal: str | None) -> Constants | None:
    """What ``--delays`` asks for. Raises :class:`ConfigError`."""
    from clockwork_serve.apps.learned import read_delays

    return None if journal is None else read_delays(journal)


@click.command()
@click.argument("scenario", metavar="SCENARIO", required=False)
@click.option("--replay", metavar="JOURNAL", help="Replay the --journal of a server or a simulation.")
@seed_option
@click.option(
    "--devices", type=click.IntRange(1, 1_000_000), metavar="N", help="Devices, instead of the scenario's."
)
@click.option(
    "--zoo", metavar="NAME|FILE",
    help="Table of models, instead of the scenario's: v100, a CSV file, a profile as JSON, or a journal.",
)  # fmt: skip
@click.option("--foreign-profile", "foreign", is_flag=True, help="--zoo may be measured on another machine.")
@delays_option
@traces_option
@setting_options("policy", "max_batch", "slack_ms")
@output_option("json", "Write the numbers as JSON to FILE; - is standard output.")
@output_option("journal", "Write every event and decision to FILE.")
@click.option("--checks", is_flag=True, help="Check the whole system after every step: several times slower.")
@click.pass_context
def simulate(  # noqa: PLR0913 - one parameter for each option
    context: click.Context, /, *, scenario: str | None, replay: str | None, seed: int, devices: int | None,
    zoo: str | None, foreign: bool, delays: str | None, traces: str | None, config: str | None,
    json_file: str | None, journal_file: str | None, checks: bool, **flags: Any,
) -> int:  # fmt: skip
    """Run SCENARIO on virtual time, to see whether given devices can serve a given load.

    The controller and the workers are those of the server; devices take the durations of a table. Equal seeds
    give equal runs on any machine. Ctrl-C ends a run early and shows what was reached.

    With --replay: does this version decide as the journal says? Exits with 1 at the first difference.
    """
    if replay is not None:
        _refuse_others(context, {"replay", "json_file", "checks"})
        return _replay(replay, json_file, checks=checks)
    if scenario is None:
        raise click.UsageError(
            "SCENARIO: expected a file, found none; how to write one: clockwork docs workloads."
        )
    from clockwork_serve.apps.simulate import ask, report
    from clockwork_serve.serve.supervisor.config import controller_config

    settings = settings_from(None, config, flags, needs_repository=False)
    if journal_file is not None and Path(journal_file).exists():
        raise ConfigError(
            f"journal: expected a file that is not there yet, found {journal_file}; one journal holds one run"
        )
    question = ask(
        scenario, config=controller_config(settings), seed=seed, zoo=zoo, devices=devices, traces=traces,
        foreign=foreign, constants=measured(delays),
    )  # fmt: skip
    played = _play(question, journal_file, checks=checks, quiet=json_file == STDOUT)
    made = report(question, played)
    if json_file != STDOUT:
        _show(made)
    write_output(json_file, made.to_json())
    return INTERRUPTED if played.cut else 0


def _show(made: Report) -> None:
    for line in setup_lines(made):
        say(line)
    say("")
    show_table(LOAD_COLUMNS, load_rows(made))
    show_table(LATENCY_COLUMNS, latency_rows(made))
    for line in closing_lines(made):
        say(line)


def _play(question: SimulationQuestion, journal: str | None, *, checks: bool, quiet: bool) -> Played:
    from clockwork_serve.apps.simulate import play
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


# ------------------------------------------------------------
# A report for people: lines and rows of text. They compute nothing that is not in the report.


LOAD_COLUMNS = (
    "load", ">offered", ">r/s", ">goodput r/s", ">in time", ">late", ">refused", ">cold starts",
    ">mean batch",
)  # fmt: skip
LATENCY_COLUMNS = ("load", "latency of", ">count", ">p50 ms", ">p99 ms", ">p99.9 ms", ">max ms")


def setup_lines(report: Report) -> list[str]:
    """What was simulated."""
    setup: dict[str, Any] = report.setup
    workers = counted(setup["devices"] // setup["devices_per_worker"], "worker")
    devices = f"{counted(setup['devices'], 'device')} of {setup['zoo']} on {workers}"
    memory = f"{setup['memory_mib']:g} MiB each in pages of {setup['page_mib']:g} MiB"
    share = "; no LOAD beside an INFER" if setup["lanes_share"] else ""
    models = f"{setup['models']:,} of {counted(setup['kinds'], 'kind')}"
    return [
        f"{report.scenario}: {report.seconds:g} s, of which {report.warmup_s:g} s of warm-up are not counted",
        f"  cluster    {devices}, {memory}{share}",
        *_under("", [_group(group) for group in setup["groups"]]),
        f"  models     {models}, {setup['weights_mib']:,.0f} MiB of weights",
        f"  loads      {'; '.join(_asked(load) for load in report.loads)}",
        f"  policy     {setup['policy']}, batches of at most {setup['max_batch']}; seed {setup['seed']}",
        *_under("workload", setup["workload"]),
        *_under("constants", setup["constants"]),
    ]


def load_rows(report: Report) -> list[list[str]]:
    """A row for each load under ``LOAD_COLUMNS``."""
    return [
        [
            load.name, f"{load.offered:,}", rate(load.offered_rps), rate(load.goodput_rps),
            "-" if load.satisfaction is None else share(load.satisfaction), f"{load.late:,}",
            f"{sum(load.refused.values()):,}", f"{load.cold:,}",
            "-" if load.mean_batch is None else f"{load.mean_batch:.2f}",
        ]
        for load in report.loads
    ]  # fmt: skip


def latency_rows(report: Report) -> list[list[str]]:
    """Two rows for each load under ``LATENCY_COLUMNS``."""
    rows = []
    for load in report.loads:
        rows.append([load.name, "answers in time", *_latency(load.answers)])
        if load.refusals.count:
            rows.append(["", "all other answers", *_latency(load.refusals)])
    return rows


def closing_lines(report: Report) -> list[str]:
    """Why requests were refused, what the devices did, when it broke, how long it took."""
    lines = [
        f"  {load.name}: " + ", ".join(f"{count:,} {reason}" for reason, count in load.refused.items())
        for load in report.loads
        if load.refused
    ]
    if lines:
        lines.insert(0, "refused, by reason")
    busy = report.devices
    each = "its" if busy.devices == 1 else "their"
    lines.append(
        f"devices: executing {100 * busy.exec_busy:.1f} % and loading {100 * busy.load_busy:.1f} % of {each} "
        f"time; {busy.infers:,} INFER, {busy.loads:,} LOAD, {busy.unloads:,} UNLOAD, "
        f"{busy.refused:,} refused by workers"
    )
    if report.faults:
        hits = ", ".join(f"{count:,} {kind}" for kind, count in report.faults.items())
        lines.append(f"faults that hit something: {hits}")
    lines += [
        f"nothing is known of {load.name}: none of its requests was sent after the warm-up of "
        f"{report.warmup_s:g} s; a trace that is played faster ends sooner"
        for load in report.loads
        if not load.offered
    ]
    if any(load.offered for load in report.loads):
        lines.append(_broke(report))
    ended = sum(load.offered - load.open for load in report.loads)
    speed = report.reached_s / report.took_s if report.took_s else 0.0
    lines.append(f"took {report.took_s:.1f} s, {speed:.3g} times real time; {ended:,} requests counted")
    if report.cut:
        still = sum(load.open for load in report.loads)
        lines.append(
            f"CUT at {report.reached_s:.1f} s of {report.seconds:g} s: all numbers are of the time until "
            f"then; {counted(still, 'request')} without an answer"
        )
    return lines


def _broke(report: Report) -> str:
    first = report.first_break
    unit = "second" if report.stretch_s == 1 else "minute"
    if first is None:
        return f"every {unit} after the warm-up: all requests answered in time"
    worst = f"; worst {first.load}: {share(first.load_satisfaction)}" if len(report.loads) > 1 else ""
    return (
        f"breaks first in {unit} {round(first.from_s / report.stretch_s) + 1} ({first.from_s:g} to "
        f"{first.to_s:g} s): {share(first.satisfaction)} in time{worst}"
    )


def _asked(load: LoadReport) -> str:
    slo = "no SLO" if load.slo_ms is None else f"SLO {plain(load.slo_ms)} ms"
    return f"{load.name} ({load.arrivals}, {slo})"


def _latency(latency: Latency) -> list[str]:
    values = (latency.p50_ms, latency.p99_ms, latency.p999_ms, latency.max_ms)
    return [f"{latency.count:,}", *("-" if value is None else f"{value:.2f}" for value in values)]


def _group(group: dict[str, Any]) -> str:
    """Devices of a cluster that are alike."""
    memory = "" if group["memory_mib"] is None else f", {group['memory_mib']} MiB each"
    known = "" if group["profiled"] else ", which no profile tells"
    speed = "as the zoo says" if group["slower"] == 1 else f"{group['slower']:g} times as slow{known}"
    return f"{group['devices']} of them {speed}{memory}"


def _under(name: str, lines: Iterable[str]) -> list[str]:
    """Lines under a name that stands in front of the first."""
    return [f"  {'' if at else name:<10} {line}" for at, line in enumerate(lines)]


def rate(per_second: float) -> str:
    """Requests per second."""
    return f"{per_second:,.1f}" if per_second < 1000 else f"{per_second:,.0f}"


def share(part: float) -> str:
    """A share in percent, cut and not rounded: 100 % means all."""
    return "100 %" if part >= 1 else f"{math.floor(part * 100_000) / 1000:.3f} %"


# ------------------------------------------------------------
# ``--replay``: repeats and compares the decisions of a journal.


_EVENTS_SHOWN = 8
_SHOWN_CHARS = 400


def _refuse_others(context: click.Context, taken: set[str]) -> None:
    """Raise :class:`ConfigError` for options that a replay takes from its journal instead."""
    given = [
        option.opts[-1] if option.param_type_name == "option" else "SCENARIO"
        for option in context.command.params
        if option.name not in taken
        and context.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise ConfigError(
            f"replay: expected a journal alone, which contains the controller's settings; found "
            f"{', '.join(given)} too; leave it out"
        )


def _replay(path: str, json_file: str | None, *, checks: bool) -> int:
    """Replay a journal and show the result; the exit status."""
    from clockwork_serve.sim.replay import replay
    from clockwork_serve.telemetry.journal import journal_bytes

    total = max(1, journal_bytes(Path(path)) >> 20)
    with Progress("replaying", quiet=json_file == STDOUT) as progress, interruptible() as stopped:
        replayed = replay(
            Path(path), checks=checks, stopped=stopped,
            tell=lambda done, agreed: progress.step(
                min(done >> 20, total), total, f"MiB, {agreed:,} decisions agree"
            ),
        )  # fmt: skip
    if json_file == STDOUT:
        show_json(_replay_json(path, replayed))
    else:
        for line in replay_lines(replayed):
            say(line)
        write_output(json_file, msgspec.json.encode(_replay_json(path, replayed)))
    if replayed.cut:
        return INTERRUPTED
    return 0 if replayed.agrees else DIFFERENT


def _replay_json(path: str, replayed: Replayed) -> dict[str, Any]:
    """The result for machines."""
    found: dict[str, Any] = named(replayed)
    return {"journal": path, "agrees": replayed.agrees, "decisions": replayed.decisions, **found}


def named(value: Any) -> Any:
    """Plain data with the names of all fields, of messages too, which are arrays on links."""
    match value:
        case Struct():
            tag = value.__struct_config__.tag
            fields = {name: named(getattr(value, name)) for name in value.__struct_fields__}
            return fields if tag is None else {"type": tag, **fields}
        case list() | tuple():
            return [named(each) for each in value]
        case dict():
            return {key: named(each) for key, each in value.items()}
        case _:
            return msgspec.to_builtins(value)


def replay_lines(replayed: Replayed) -> list[str]:
    """The result for people."""
    shown: list[str] = []
    for number, run in enumerate(replayed.runs, start=1):
        shown += _run_lines(run, f"run {number} of {len(replayed.runs)}: " if len(replayed.runs) > 1 else "")
    if replayed.difference is not None:
        shown += _difference_lines(replayed.difference, replayed)
    elif replayed.cut:
        shown.append(f"CUT: {replayed.decisions:,} decisions agree so far")
    elif not replayed.agrees:
        shown.append(f"INCOMPLETE: {replayed.decisions:,} decisions agree; the rest cannot be replayed")
    else:
        shown.append(f"the same: {replayed.decisions:,} decisions agree, and none differs")
    return shown


def _run_lines(run: Run, title: str) -> list[str]:
    head = run.head
    seconds = (run.ended_ns - run.began_ns) / 1e9
    config = head.config
    started = f", started {head.started}" if head.started else ""
    limits = f"batches of at most {config.get('max_batch')}, {config.get('expected_devices')} devices"
    done = f"{run.decisions:,} decisions on {run.events:,} events over {seconds:,.1f} s"
    shown = [
        f"{title}clockwork {head.version}, {head.build} {head.python}, code {head.sources or '?'}{started}",
        f"  policy {config.get('policy')}, {limits}",
        f"  {done}: {run.effects:,} effects",
    ]
    if run.other_build:
        shown.append(f"  note: {run.other_build}: what differs may be meant so")
    if run.torn_bytes:
        shown.append(f"  note: its last chunk is cut short by {run.torn_bytes:,} bytes: it was killed")
    if run.gap:
        shown.append(
            f"  note: then {run.gap:,} steps are missing (the disk was too slow), and all after them"
        )
    return shown


def _difference_lines(found: Difference, replayed: Replayed) -> list[str]:
    run = replayed.runs[found.run - 1]
    events = [f"    {short(event)}" for event in found.events[:_EVENTS_SHOWN]]
    if len(found.events) > _EVENTS_SHOWN:
        events.append(f"    and {len(found.events) - _EVENTS_SHOWN:,} more")
    after_s = (found.now_ns - (run.began_ns or found.now_ns)) / 1e9
    where = f"record {found.record:,}, {found.now_ns} ns ({after_s:.6f} s after its run began)"
    shown = [
        f"DIFFERENT at {where}; {replayed.decisions:,} decisions before it agree",
        f"  observed {'these events' if events else 'nothing: it was woken'}",
        *events,
    ]
    if found.broke:
        shown.append(f"  the controller broke: {found.broke}")
    return [
        *shown,
        f"  effect {found.at + 1}",
        f"    expected {short(found.expected)}",
        f"    found    {short(found.found)}",
    ]


def short(what: object) -> str:
    """A message as a line shows it, cut if it is long."""
    text = "nothing" if what is None else repr(what)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text):,} characters)"
