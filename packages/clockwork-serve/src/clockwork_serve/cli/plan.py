"""``clockwork plan``: how many devices a scenario needs (``apps.plan``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clockwork_serve.cli.options import (
    STDOUT,
    output_option,
    setting_options,
    settings_from,
    traces_option,
    write_output,
)
from clockwork_serve.cli.screen import INTERRUPTED, Progress, interruptible, say, show_table
from clockwork_serve.cli.simulate import delays_option, measured, rate, share
from clockwork_serve.config.table import default_cache
from clockwork_serve.units import counted, plain

if TYPE_CHECKING:
    from clockwork_serve.apps.plan.demand import DeviceKind
    from clockwork_serve.apps.plan.report import MixReport, PlanQuestion, PlanReport, SeedSpread
    from clockwork_serve.workload.scenario import Scenario
    from clockwork_serve.workload.zoo import Zoo

NO_ANSWER = 1
_STEPS = 100  # of the progress bar, for each simulation
_OWN = ("slo_ms", "kinds_file", "max_devices", "zoo", "foreign", "traces")

_GAINS: tuple[tuple[str, Callable[[float], str], str], ...] = (
    ("{} in time", share, "in_time"), ("p99 {} ms", lambda ms: f"{ms:.1f}", "p99_ms"),
    ("{} cold starts", lambda cold: f"{cold:,.0f}", "cold"),
    ("{} r/s of loads without an SLO", rate, "background_rps"),
)  # fmt: skip
"""What more devices may change: in words, how the number is shown, the field of a ``MixReport``."""


@click.command()
@click.argument("scenario", metavar="SCENARIO")
@click.option(
    "--slo-ms", type=click.FloatRange(0.001, 86_400_000), metavar="MS",
    help="SLO of every load that has one, or of all if none has. [default: the scenario's]",
)  # fmt: skip
@click.option(
    "--target", type=click.FloatRange(0, 100, min_open=True), default=99.9, metavar="PERCENT",
    help="Share to be in time in every minute. [default: 99.9]",
)  # fmt: skip
@click.option(
    "--kinds", "kinds_file", metavar="FILE",
    help="TOML file of tables [[kind]]: name, speed, price, memory, at_most. [default: the scenario's]",
)  # fmt: skip
@click.option(
    "--max-devices", type=click.IntRange(1, 10_000), default=64, metavar="N", help="At most. [default: 64]"
)
@click.option(
    "--seeds", type=click.IntRange(1, 100), default=1, metavar="N",
    help="So many seeds must meet the target, and give error bars. [default: 1]",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, 1 << 31), default=1, metavar="N", help="The first. [default: 1]"
)
@click.option("--zoo", metavar="NAME|FILE", help="Table of models, instead of the scenario's.")
@click.option("--foreign-profile", "foreign", is_flag=True, help="--zoo may be measured on another machine.")
@delays_option
@traces_option
@click.option("--jobs", type=click.IntRange(1, 1024), metavar="N", help="Processes. [default: one a core]")
@output_option("json", "Write the plan as JSON to FILE; - is standard output.")
@setting_options("policy", "max_batch", "cache", "slack_ms")
def plan(
    *, scenario: str, json_file: str | None, jobs: int | None, config: str | None, seeds: int, seed: int,
    target: float, delays: str | None, **given: Any,
) -> int:  # fmt: skip
    """Find the fewest devices, or the cheapest, that serve SCENARIO in time.

    Simulates as `clockwork simulate` does, a few times. Finished simulations are kept in the cache: the same
    question is answered at once, and an interrupted plan goes on. Exits with 1 if no number of devices up to
    --max-devices does; with 2 if none could; 130 after Ctrl-C, with what was found.
    """
    from clockwork_serve.apps.learned import delays_beside
    from clockwork_serve.apps.plan.report import PlanQuestion
    from clockwork_serve.serve.supervisor.config import controller_config

    own = {name: given.pop(name) for name in _OWN}
    settings = settings_from(None, config, given, needs_repository=False)
    text, models, kinds = _read(scenario, **own)
    asked = PlanQuestion(
        scenario=text, zoo=models, kinds=kinds, target=target / 100, seeds=tuple(range(seed, seed + seeds)),
        config=controller_config(settings), traces=own["traces"], most=own["max_devices"],
        constants=measured(delays) or delays_beside(text.cluster.zoo),
    )  # fmt: skip
    kept = settings.cache or default_cache(os.environ)
    return _plan(asked, Path(scenario), kept, jobs or len(os.sched_getaffinity(0)), json_file)


def _plan(asked: PlanQuestion, scenario: Path, cache: str, jobs: int, json_file: str | None) -> int:
    """Plan and show it; the exit status."""
    from clockwork_serve.apps.plan.report import make_plan
    from clockwork_serve.apps.plan.runs import PlanRuns

    kept = Path(cache) / "plans" / f"{scenario.stem}.jsonl"
    with Progress("planning", quiet=json_file == STDOUT) as progress, interruptible() as stopped:

        def tell(done: float, of: int, speed: float) -> None:
            text = f"{counted(of, 'simulation')}, {speed:,.0f} times real time"
            progress.step(round(done * _STEPS), of * _STEPS, text)

        with PlanRuns(kept, jobs, tell=tell, stopped=stopped) as runs:
            made = make_plan(asked, runs)
    if json_file != STDOUT:
        _show(made, jobs, kept)
    write_output(json_file, made.to_json())
    return INTERRUPTED if made.cut else 0 if made.answer is not None else NO_ANSWER


def _read(
    scenario: str, *, slo_ms: float | None, kinds_file: str | None, max_devices: int, zoo: str | None,
    foreign: bool, traces: str | None,
) -> tuple[Scenario, Zoo, tuple[DeviceKind, ...]]:  # fmt: skip
    """The scenario, its models and the kinds of devices that the command line asks for."""
    from clockwork_serve.apps.plan.demand import kinds_of, read_kinds, with_slo
    from clockwork_serve.apps.simulate import read_with_zoo

    found, models = read_with_zoo(scenario, zoo=zoo, foreign=foreign)
    kinds = kinds_of(found) if kinds_file is None else read_kinds(kinds_file)
    return found if slo_ms is None else with_slo(found, slo_ms), models, kinds


# ------------------------------------------------------------
# A plan for people. It computes nothing that is not in the report.


def _show(made: PlanReport, processes: int, kept: Path) -> None:
    for line in asked_lines(made):
        say(line)
    say("")
    say(answer(made))
    if made.mixes:
        show_table(columns(made), [mix_row(mix, made) for mix in made.mixes])
    for line in plan_lines(made):
        say(line)
    before = f", {made.reused} of them made before ({kept})" if made.reused else ""
    cores = counted(processes, "process")
    say(f"took {made.took_s:.1f} s for {counted(made.simulations, 'simulation')}{before}; {cores}")
    if made.cut:
        say("INTERRUPTED: this is what was found so far; the same command goes on from here")


def asked_lines(made: PlanReport) -> list[str]:
    """What was asked."""
    setup = made.setup
    counted_s = setup["seconds"] - setup["warmup_s"]
    slos = ", ".join(
        f"{name} {'no SLO' if slo is None else f'{plain(slo)} ms'}" for name, slo in setup["slos_ms"].items()
    )
    kinds = "; ".join(_kind(kind, f"{setup['memory_mib']:g}MiB") for kind in made.kinds)
    seeds = ", ".join(map(str, setup["seeds"]))
    return [
        f"{made.scenario}: {counted_s:g} s counted, {rate(made.offered_rps)} requests a second with an SLO",
        f"  SLOs       {slos}",
        f"  target     {100 * made.target:g} % in time in every minute; seed {seeds}",
        f"  devices    {kinds}; models of {setup['zoo']}, policy {setup['policy']}",
        *[f"  workload   {line}" for line in setup["workload"]],
    ]


def _kind(kind: DeviceKind, memory: str) -> str:
    facts = [
        "as the profile says" if kind.speed == 1 else f"{kind.speed:g} times as fast as the profile",
        f"{kind.memory or memory} for weights",
        *([] if kind.price == 1 else [f"price {kind.price:g}"]),
        *([] if kind.at_most is None else [f"at most {kind.at_most}"]),
    ]
    return f"{kind.name}: {', '.join(facts)}"


def answer(made: PlanReport) -> str:
    """The answer, in one line."""
    if made.answer is None:
        return "NO ANSWER YET" if made.cut else f"NO: not even {_most(made)}"
    sure = "AT MOST " if made.cut else ""
    price = "" if made.answer.price == made.answer.total else f", for {made.answer.price:g}"
    return f"{sure}{named(made.answer)}{price}"


def _most(made: PlanReport) -> str:
    return counted(made.most, "device") if made.fewer is None else named(made.fewer)


def named(mix: MixReport) -> str:
    """A set of devices in words."""
    return _set(mix.devices)


def _set(devices: dict[str, int]) -> str:
    if list(devices) == ["device"]:
        return counted(devices["device"], "device")
    return " + ".join(f"{count} x {kind}" for kind, count in devices.items())


def columns(made: PlanReport) -> tuple[str, ...]:
    """The names of a table's columns."""
    price = (">price",) if any(kind.price != 1 for kind in made.kinds) else ()
    other = (">others r/s",) if any(mix.background_rps.most for mix in made.mixes) else ()
    return (
        "devices", *price, ">in time", ">worst minute", ">goodput r/s", *other, ">p99 ms", ">executing",
        ">loading", ">cold starts", "enough",
    )  # fmt: skip


def mix_row(mix: MixReport, made: PlanReport) -> list[str]:
    """A row under them."""
    cells = {
        "devices": named(mix), ">price": f"{mix.price:g}", ">in time": _spread(mix.in_time, share),
        ">worst minute": _spread(mix.worst_minute, share), ">goodput r/s": _spread(mix.goodput_rps, rate),
        ">others r/s": _spread(mix.background_rps, rate),
        ">p99 ms": _spread(mix.p99_ms, lambda ms: f"{ms:.1f}"),
        ">executing": _spread(mix.exec_busy, _percent), ">loading": _spread(mix.load_busy, _percent),
        ">cold starts": _spread(mix.cold, lambda cold: f"{cold:,.0f}"),
        "enough": "yes" if mix.met else "no: stopped when it had missed" if mix.stopped else "no",
    }  # fmt: skip
    return [cells[name] for name in columns(made)]


def _spread(found: SeedSpread, text: Callable[[float], str]) -> str:
    least, most = text(found.least), text(found.most)
    return least if least == most else f"{least} to {most}"


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def plan_lines(made: PlanReport) -> list[str]:
    """What breaks with one device less, what one more would buy, what slacker SLOs would save."""
    lines = []
    if not made.mixes and not made.cut:
        lines.append(
            f"the work alone, in the largest batches, takes {made.least_speed:.1f} devices of speed 1"
        )
    if made.answer is None and made.fewer is not None and made.fewer.in_time.most == 0:
        lines.append(
            "nothing is ever begun: SLOs are too short for batch 1 and the controller's own slack_ms"
        )
    if (broke := made.breaks) is not None:
        worst = (
            f"; worst load {broke.load}: {share(broke.load_share)}" if len(made.setup["slos_ms"]) > 1 else ""
        )
        lines.append(
            f"with {_set(broke.devices)} it breaks first from {broke.from_s:g} to {broke.to_s:g} s: "
            f"{share(broke.share)} in time{worst}; {broke.missed:,} requests miss:"
        )
        for cause in broke.causes:
            models = ", ".join(f"{model} {count:,}" for model, count in cause.models.items())
            lines.append(
                f"  {cause.requests:,}: {cause.cause} ({models}{', ...' if len(cause.models) > 4 else ''})"
            )
    if made.slack_saves is not None and made.fewer is not None:
        would = "would do" if made.slack_saves else "would still not do"
        lines.append(f"with SLOs {made.slacker:g} times as long, {named(made.fewer)} {would}")
    if made.answer is not None and made.more is not None:
        lines.append(f"with {named(made.more)}: {_gain(made.answer, made.more)}")
    if made.quota:
        lines.append(
            f"{made.quota:,} requests are refused by their tenants' quotas, which no device changes; they "
            "are not counted"
        )
    return lines


def _gain(now: MixReport, then: MixReport) -> str:
    """What differs, as far as it shows."""
    facts = []
    for text, shown, field in _GAINS:
        after, before = (shown(getattr(mix, field).mean) for mix in (then, now))
        if after != before:
            facts.append(text.format(f"{after} instead of {before}"))
    return ", ".join(facts) or "nothing is better"
