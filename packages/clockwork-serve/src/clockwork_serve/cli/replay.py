"""``clockwork simulate --replay``: repeats and compares the decisions of a journal, by ``sim.replay``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clockwork_serve.cli.interrupt import interruptible
from clockwork_serve.cli.screen import Progress, note, say, show_json
from clockwork_serve.errors import ConfigError

if TYPE_CHECKING:
    from clockwork_serve.sim.replay import Difference, Replayed, Run

INTERRUPTED, DIFFERENT = 130, 1
STDOUT = "-"
_EVENTS_SHOWN = 8
_SHOWN_CHARS = 400


def refuse_others(context: click.Context, taken: set[str]) -> None:
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


def replay_journal(path: str, json_file: str | None, *, checks: bool) -> int:
    """Replay a journal and show the result; the exit status."""
    from clockwork_serve.sim.replay import journal_bytes, replay

    total = max(1, journal_bytes(Path(path)) >> 20)
    with Progress("replaying", quiet=json_file == STDOUT) as progress, interruptible() as stopped:
        replayed = replay(
            Path(path), checks=checks, stopped=stopped,
            tell=lambda done, agreed: progress.step(
                min(done >> 20, total), total, f"MiB, {agreed:,} decisions agree"
            ),
        )  # fmt: skip
    if json_file == STDOUT:
        show_json(as_json(path, replayed))
    else:
        for line in lines(replayed):
            say(line)
        if json_file is not None:
            import msgspec

            Path(json_file).write_bytes(msgspec.json.encode(as_json(path, replayed)) + b"\n")
            note(f"wrote {json_file}")
    if replayed.cut:
        return INTERRUPTED
    return 0 if replayed.agrees else DIFFERENT


def as_json(path: str, replayed: Replayed) -> dict[str, Any]:
    """The result for machines."""
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(replayed)
    return {"journal": path, "agrees": replayed.agrees, "decisions": replayed.decisions, **found}


def lines(replayed: Replayed) -> list[str]:
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
        shown.append(f"  note: its last record is cut short by {run.torn_bytes:,} bytes: it was killed")
    if run.gap:
        shown.append(
            f"  note: then {run.gap:,} steps are missing (the disk was too slow), and all after them"
        )
    return shown


def _difference_lines(found: Difference, replayed: Replayed) -> list[str]:
    run = replayed.runs[found.run - 1]
    events = [f"    {_short(event)}" for event in found.events[:_EVENTS_SHOWN]]
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
        f"    expected {_short(found.expected)}",
        f"    found    {_short(found.found)}",
    ]


def _short(what: object) -> str:
    text = "nothing" if what is None else repr(what)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text):,} characters)"
