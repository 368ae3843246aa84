"""``clockwork what-if``: a journal played again with something changed (``sim.what_if``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clockwork_serve.cli.options import json_flag
from clockwork_serve.cli.screen import INTERRUPTED, Progress, interruptible, note, say, show_json, show_table
from clockwork_serve.cli.simulate import named, replay_lines, share
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import counted, ms, to_ms

if TYPE_CHECKING:
    from clockwork_serve.messages import ControllerEffect
    from clockwork_serve.sim.what_if import AskedWorld, ChangedRequests, Compared, WhatIf, WorldSide

SHOWN = 20  # models and tenants that are shown; --json has all


@click.command("what-if", epilog="What it says: clockwork docs explain (docs/use/explain.md)")
@click.argument("journal", metavar="JOURNAL")
@click.option("--devices", metavar="+N|-N", help="N devices more, each like the first one, or less.")
@click.option("--policy", default="", metavar="NAME", help="By another policy.")
@click.option(
    "--slo-ms", "slos", multiple=True, metavar="MODEL=MS", help="Another SLO for all of a model's requests."
)
@click.option("--rate", type=click.FloatRange(0, 100), default=1.0, metavar="X", help="X times the requests.")
@click.option(
    "--without-tenant", "without", multiple=True, metavar="NAME", help="Without this tenant's requests."
)
@click.option("--profile", metavar="FILE", help="With the durations of a table, such as a new version's.")
@click.option("--foreign-profile", "foreign", is_flag=True, help="It may be measured on another machine.")
@click.option(
    "--fail-below", type=click.FloatRange(0, 100), metavar="PERCENT",
    help="Exit with 1 if less would have been answered in time.",
)  # fmt: skip
@json_flag
def what_if(  # noqa: PLR0913, PLR0917 - one parameter for each option; click gives them by name
    journal: str, devices: str | None, policy: str, slos: tuple[str, ...], rate: float,
    without: tuple[str, ...], profile: str | None, foreign: bool, fail_below: float | None,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
) -> int:  # fmt: skip
    """Play JOURNAL again with something changed, and tell what would have become of its requests.

    JOURNAL is what `clockwork serve --journal` or `clockwork simulate --journal` wrote. Without a change it
    is only decided again. All changes count at once, from the first request of each run on.
    """
    from clockwork_serve.apps.learned import machine_of, read_zoo
    from clockwork_serve.sim.what_if import AskedWorld
    from clockwork_serve.sim.what_if import what_if as play
    from clockwork_serve.telemetry.journal import journal_bytes

    path = Path(journal)
    asked = AskedWorld(

        devices=_devices(devices), policy=policy, slos=_slos(slos), rate=rate, without_tenants=without,
        profiles=None if profile is None else read_zoo(profile, foreign=foreign, here=machine_of(path)),
    )  # fmt: skip
    total = 2 * journal_bytes(path) >> 20
    try:
        with Progress("playing", quiet=as_json) as progress, interruptible() as stopped:

            def tell(done: int, decisions: int) -> None:
                progress.step(min(done >> 20, total), total + 1, f"MiB, {decisions:,} decisions")
                if stopped():
                    raise KeyboardInterrupt  # noqa: TRY301 - raised where it is called

            found = play(path, asked, tell)
    except KeyboardInterrupt:
        note("interrupted: nothing was found so far")
        return INTERRUPTED
    below = (
        fail_below is not None and found.all is not None and 100 * found.all.changed.satisfaction < fail_below
    )
    if as_json:
        show_json({"agrees": found.replayed.agrees, **named(found)})
    else:
        _show(found, asked)
        if below:
            note(f"less than {fail_below:g} % would have been answered in time")
    return 1 if below or found.replayed.difference is not None else 0


def _devices(text: str | None) -> int:
    if text is not None and not re.fullmatch(r"[+-][1-9]\d?", text):
        raise ConfigError(f"devices: expected +N or -N, N from 1 to 99; found {text!r:.40}; correct it")
    return int(text or 0)


def _slos(given: tuple[str, ...]) -> dict[str, int]:
    found = {}
    for one in given:
        match = re.fullmatch(r"(.+)=(\d{1,9}(?:\.\d{1,6})?)", one)
        if match is None or not ms(float(match[2])):
            raise ConfigError(f"slo_ms: expected MODEL=MS, found {one!r:.80}; correct it")
        found[match[1]] = ms(float(match[2]))
    return found


def _show(found: WhatIf, asked: AskedWorld) -> None:
    for line in replay_lines(found.replayed):
        say(line)
    if found.all is None:
        return
    columns = ("model", ">requests", ">then", ">in time", ">then", ">p99 ms", ">then")
    show_table(columns, [_row(found.all), *map(_row, found.models[:SHOWN])])
    if len(found.tenants) > 1 or any(one.name for one in found.tenants):
        show_table(("tenant", *columns[1:]), [_row(one) for one in found.tenants[:SHOWN]])
    say(f"answered only with the change: {_ids(found.gained)}")
    say(f"answered only without it: {_ids(found.lost)}")
    if found.left_out or found.added:
        say(f"{counted(found.left_out, 'request')} left out, {found.added:,} more of them")
    if found.first is None:
        say("the same: no decision differs")
    else:
        say(f"the first decision that differs, {found.first_after_s:.6f} s after the first request")
        for side, effects in (("recorded", found.first.recorded), ("found", found.first.found)):
            words = [_words(one, found.first.now_ns) for one in effects[:SHOWN]]
            say(f"    {side:<8} {', '.join(words) or 'nothing'}")
    rests = ", ".join(f"{count:,} {what}" for what, count in sorted(found.rests.items(), reverse=True))
    say(f"durations of the answers that were executed: {rests or 'none'}")


def _words(effect: ControllerEffect, now_ns: int) -> str:
    """What was decided, in words; --json has all of it."""
    from clockwork_serve.messages import Answer, Infer, Load, Unload

    match effect:
        case Infer():
            what = f"run {effect.model} on {effect.device} for {counted(len(effect.calls), 'request')}"
            what += f" in a batch of {effect.batch}"
        case Load() | Unload():
            what = f"{'load' if isinstance(effect, Load) else 'unload'} {effect.model} on {effect.device}"
        case Answer():
            return f"answer {effect.request_id} with {effect.outcome}"
        case _:
            return f"{effect.__struct_config__.tag}"
    wait_ns = effect.window.earliest_ns - now_ns
    return f"{what}, {f'not before {to_ms(wait_ns):.3f} ms later' if wait_ns > 0 else 'at once'}"


def _row(one: Compared) -> list[str]:
    was, then = one.recorded, one.changed
    return [
        one.name or "(none)", f"{was.requests:,}", f"{then.requests:,}", share(was.satisfaction),
        share(then.satisfaction), _p99(was), _p99(then),
    ]  # fmt: skip


def _p99(side: WorldSide) -> str:
    return "-" if side.p99_ms is None else f"{side.p99_ms:.2f}"


def _ids(requests: ChangedRequests) -> str:
    more = ", ..." if requests.count > len(requests.first) else ""
    return f"{requests.count:,}" + (f" ({', '.join(requests.first)}{more})" if requests.first else "")
