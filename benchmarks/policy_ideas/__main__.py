"""What each idea of policy ``default`` is worth: alone, added to ``paper``, and together, taken from all.

    python -m benchmarks.policy_ideas                        every case, two seeds, about 15 minutes
    python -m benchmarks.policy_ideas --case fig8 --seeds 4

The cases are short forms of the experiments of ``clockwork reproduce``, on virtual time, and some where one
GPU or a few cannot hold the weights. All variants get the same requests and the same luck for a seed, so
gains are differences of pairs. It needs the brains as Python: compiled ones cannot be subclassed.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from msgspec import structs

from benchmarks.policy_ideas.variants import (
    CAP,
    IDEAS,
    NOT_KEPT,
    REJECT,
    Variant,
    alone,
    base,
    variants,
    without,
)
from clockwork_lab.reproduce import fig5, fig6, fig7, fig8, fig9
from clockwork_lab.reproduce.figure import SeriesRole
from clockwork_lab.reproduce.players import Player
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.controller import belief
from clockwork_serve.sim import Tally
from clockwork_serve.sim.constants import Cluster
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from harness.report import Outcome, finish, parser, table

STEP_S = 3.0
"""A step of a ramp of SLOs; the published ones last 30 s."""

MATTERS = 0.002
"""A gain below this share of the value is called none, and so is one below the spread over seeds."""

Read = Callable[[Tally], float]


@dataclass(frozen=True, slots=True)
class Case:
    """An experiment: its load, and the goods to be read off; more is better.

    ``floors`` are what ``default`` is to reach in goods that it trades for others; else it is to reach what
    ``paper`` does.
    """

    name: str
    words: str
    devices: int
    bucket_s: float
    scenario: Callable[[FigureRun], Scenario]
    goods: dict[str, Read]
    floors: dict[str, float] = field(default_factory=dict)
    cluster: Cluster | None = None
    """Other devices than the paper's GPUs."""


@dataclass(frozen=True, slots=True)
class Found:
    """One variant in one case: each good by seed, and CPU time of the whole simulation per request."""

    goods: dict[str, list[float]]
    cpu_us: list[float]


def fig5_case(slo_ms: float) -> Case:
    """240 clients in a closed loop on one GPU."""
    warmup_s = fig5.WARM_S + 0.25
    seconds = warmup_s + 1.0

    def scenario(run: FigureRun) -> Scenario:
        return structs.replace(fig5.scenario(slo_ms, seconds), warmup_s=warmup_s)

    return Case(
        f"fig5-{slo_ms:g}ms", f"Fig 5 at {slo_ms:g} ms: 15 models, 240 clients, 1 GPU", 1, seconds,
        scenario,
        {"goodput r/s": lambda tally: tally.goodput_rps(0, round(seconds * 1e9))},
    )  # fmt: skip


def satisfaction(row: int, load: int) -> Read:
    """The share of a stretch's requests that were answered in time, in %."""
    return lambda tally: 100 * tally.rows[row][load].satisfaction


def fig7_case() -> Case:
    """Poisson arrivals on six GPUs, at tight SLOs."""
    return Case(
        "fig7", "Fig 7: 48 models, 2,400 r/s, 6 GPUs; % in time by SLO", fig7.DEVICES, STEP_S,
        lambda run: structs.replace(fig7._scenario(48, 2400, STEP_S), seconds=4 * STEP_S),  # noqa: SLF001
        {"4.4 ms": satisfaction(2, 1), "6.5 ms": satisfaction(3, 1)},
    )  # fmt: skip


def fig8_case() -> Case:
    """Latency-sensitive clients beside batch clients."""
    case = "12 batch clients of 16"

    def scenario(run: FigureRun) -> Scenario:
        return structs.replace(fig8._scenario(case, STEP_S), seconds=5 * STEP_S)  # noqa: SLF001

    def batch(row: int) -> Read:
        return lambda tally: tally.rows[row][fig8.BATCH_LOAD].ok / STEP_S

    return Case(
        "fig8", f"Fig 8: 6 latency-sensitive models at 1,200 r/s beside {case}, 6 GPUs; % in time, batch r/s",
        fig7.DEVICES, STEP_S, scenario,
        {
            "6.5 ms": satisfaction(3, fig8.SENSITIVE_LOAD), "batch at 6.5": batch(3),
            "9.8 ms": satisfaction(4, fig8.SENSITIVE_LOAD), "batch at 9.8": batch(4),
        },
        {"batch at 6.5": fig8.FLOORS[6.53][1], "batch at 9.8": fig8.FLOORS[9.79][1]},
    )  # fmt: skip


def fig6_case(name: str, hour_s: float, from_s: float) -> Case:
    """3,600 models come to share one GPU; counted from ``from_s`` on."""
    lead_s = 1.0

    def rate(load: int) -> Read:
        at, until = round(lead_s + from_s), round(lead_s + hour_s)
        return lambda tally: sum(row[load].ok for row in tally.rows[at:until]) / (until - at)

    return Case(
        name, f"Fig 6 in {hour_s:g} s: 3,600 models come to share 1 GPU beside a busy one; good answers/s",
        1, 1.0, lambda run: fig6._scenario(lead_s, hour_s),  # noqa: SLF001 - the figure's own load
        {"major": rate(fig6.MAJOR), "minor": rate(fig6.MINOR)},
    )  # fmt: skip


def in_time(tally: Tally) -> float:
    """The share of all requests after the warm-up that were answered in time, in %."""
    return 100 * tally.total().satisfaction


def open_case(name: str, words: str, devices: int, scenario: Callable[[FigureRun], Scenario]) -> Case:
    """A case in which each request counts alike."""
    return Case(name, words, devices, 1.0, scenario, {"% in time": in_time})


def zipf(run: FigureRun) -> Scenario:
    """Three times as many models as two GPUs hold, and more requests than their LOADs can follow."""
    load = LoadTable(name="calls", models=("resnet50",), arrivals="poisson", rate_rps=1500.0, slo_ms=100.0,
                popularity="zipf", zipf_s=0.9)  # fmt: skip
    models = (ModelSet(name="resnet50", kind=fig5.KIND, copies=1200),)
    return Scenario(name="zipf", seconds=20.0, warmup_s=5.0, models=models, loads=(load,))


def core(run: FigureRun) -> Scenario:
    """Five times as many models as a core's memory holds, and more requests than it can serve."""
    load = LoadTable(name="calls", models=("net",), arrivals="poisson", rate_rps=700.0, slo_ms=100.0,
                popularity="zipf", zipf_s=0.9)  # fmt: skip
    models = (ModelSet(name="net", kind="mobile_pose_mobilenetv3", copies=100),)
    return Scenario(name="core", seconds=20.0, warmup_s=4.0, models=models, loads=(load,))


def cold(run: FigureRun) -> Scenario:
    """No LOAD is quick enough for the SLO, and none was made before: Fig 7 without its step at leisure."""
    load = LoadTable(name="calls", models=("resnet50",), arrivals="poisson", rate_rps=1200.0, slo_ms=9.8)
    models = (ModelSet(name="resnet50", kind=fig7.KIND, copies=48),)
    return Scenario(name="cold", seconds=5.0, models=models, loads=(load,))


def trace(rate_rps: float, seconds: float, warmup_s: float) -> Callable[[FigureRun], Scenario]:
    """Fig 9's generated trace."""
    return lambda run: fig9.sources(run)[0].scenario(seconds, warmup_s, rate_rps)


def warm(tally: Tally) -> float:
    """The share of good answers whose weights were on some device when the request came, in %."""
    total = tally.total()
    return 100 * (1 - total.cold / max(1, total.ok))


CASES = (
    fig5_case(10.0),
    fig5_case(25.0),
    fig5_case(50.0),
    fig7_case(),
    fig8_case(),
    fig6_case("fig6", 20.0, 0.0),
    open_case("zipf", "Zipf overload: 1,200 models at 1,500 r/s, 2 GPUs that hold 392; SLO 100 ms", 2, zipf),
    open_case("cold", "Cold at a tight SLO: 48 models at 1,200 r/s and 9.8 ms, 6 GPUs", fig7.DEVICES, cold),
    open_case("fig9", "Fig 9 overload: the generated trace at 14,000 r/s, 12 GPUs; SLO 100 ms",
              fig9.DEVICES, trace(14_000.0, 3.0, 1.0)),
)  # fmt: skip

LONGER = (
    Case("core", "A core for LOADs and INFERs: 100 models at 700 r/s, memory for 20; SLO 100 ms", 1, 1.0,
         core, {"% in time": in_time, "% warm": warm}, cluster=Cluster(pages=40, lanes_share=True)),
    fig6_case("fig6-long", 100.0, 50.0),
    Case("fig9-long", "Fig 9: 20 s of the generated trace at 7,000 r/s, 12 GPUs; SLO 100 ms",
         fig9.DEVICES, 1.0, trace(7_000.0, 20.0, 5.0), {"% in time": in_time, "% warm": warm}),
)  # fmt: skip
"""Run if named: the paper has no such core; what is known of models' popularity takes time to matter."""


def play(case: Case, variant: Variant, seeds: Sequence[int]) -> Found:
    """Simulate a case under a variant, once a seed."""
    found = Found({name: [] for name in case.goods}, [])
    for seed in seeds:
        run = FigureRun(seed=seed)
        scenario = case.scenario(run)
        with variant.installed():
            player = Player(name=variant.name, role=SeriesRole.DEFAULT, cap=CAP, config=variant.config)
            gc.collect()
            began = time.process_time()
            tally = run.simulate(
                scenario, player, devices=case.devices, bucket_s=case.bucket_s, cluster=case.cluster
            )
            cpu_s = time.process_time() - began
        found.cpu_us.append(1e6 * cpu_s / sum(count.offered for row in tally.rows for count in row))
        for name, read in case.goods.items():
            found.goods[name].append(read(tally))
    return found


Results = dict[str, Found]
"""By variant."""


@dataclass(frozen=True, slots=True)
class Gain:
    """What one variant has over another in a good: the mean of the pairs, and half their range."""

    mean: float
    spread: float
    of: float
    """The value of the better one."""

    @property
    def matters(self) -> bool:
        """Whether it is more than chance, and not next to nothing."""
        return abs(self.mean) > max(self.spread, MATTERS * self.of)

    def __str__(self) -> str:
        text = f"{self.mean:+.1f}±{self.spread:.1f}"
        return text if self.matters else f"({text})"


def half_range(values: Sequence[float]) -> float:
    """Half the range."""
    return (max(values) - min(values)) / 2


def gain(results: Results, better: str, worse: str, good: str) -> Gain:
    """What ``better`` has over ``worse``."""
    pairs = [results[name].goods[good] for name in (better, worse)]
    differences = [one - other for one, other in zip(*pairs, strict=True)]
    return Gain(fmean(differences), half_range(differences), max(fmean(each) for each in pairs))


def show_case(case: Case, results: Results) -> None:
    """One table: each variant's goods, and what it costs."""
    print(f"\n{case.name}: {case.words}\n")
    rows = [
        [
            name,
            *[f"{fmean(values):.1f} ± {half_range(values):.1f}" for values in found.goods.values()],
            f"{fmean(found.cpu_us):.1f}",
        ]
        for name, found in results.items()
    ]
    print(table(("", *case.goods, "CPU us/request"), rows), flush=True)


def summary(found: dict[str, Results], cases: Sequence[Case]) -> dict[str, dict[str, dict[str, Gain]]]:
    """By idea, ``alone`` and ``together``: the gain in each good of each case."""
    gains: dict[str, dict[str, dict[str, Gain]]] = {}
    for idea in IDEAS:
        pairs = {
            "alone": ("paper", f"paper - {REJECT}")
            if idea.name == REJECT
            else (alone(idea).name, base(idea)),
            "together": ("default", without(idea.name).name),
        }
        gains[idea.name] = {
            how: {
                f"{case.name} {good}": gain(found[case.name], better, worse, good)
                for case in cases
                for good in case.goods
            }
            for how, (better, worse) in pairs.items()
        }
    for name in NOT_KEPT:
        gains[name] = {
            "on default": {
                f"{case.name} {good}": gain(found[case.name], f"default, {name}", "default", good)
                for case in cases
                for good in case.goods
            }
        }
    return gains


def show_summary(gains: dict[str, dict[str, dict[str, Gain]]]) -> None:
    """One table: a row for each idea alone and together, a column for each good."""
    print(
        "\nGains, mean ± half the range over seeds; in brackets: not more than chance, or next to nothing\n"
    )
    goods = list(
        dict.fromkeys(good for ways in gains.values() for by_good in ways.values() for good in by_good)
    )
    rows = [
        [name, how, *[str(by_good[good]) for good in goods]]
        for name, ways in gains.items()
        for how, by_good in ways.items()
    ]
    print(table(("idea", "", *goods), rows))


def judge(outcome: Outcome, found: dict[str, Results], cases: Sequence[Case]) -> None:
    """Each case: ``default`` is no worse than ``paper``, or than its floor."""
    for case in cases:
        results = found[case.name]
        for good in case.goods:
            paper, ours = (fmean(results[name].goods[good]) for name in ("paper", "default"))
            floor = case.floors.get(good, paper)
            whose = "" if good in case.floors else "paper's "
            outcome.judge(
                f"{case.name} {good}", asked=f">= {whose}{floor:.1f}", found=f"{ours:.1f}", good=ours >= floor
            )


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument(
        "--case", choices=[case.name for case in (*CASES, *LONGER)], action="append", help="only these"
    )
    options.add_argument("--seeds", type=int, default=2, help="so many, from --seed on")
    given = options.parse_args()
    if not belief.__file__.endswith(".py"):
        sys.exit("the brains are compiled: run it with a Python that has them as source")
    cases = [case for case in (*CASES, *LONGER) if case.name in given.case] if given.case else list(CASES)
    seeds = range(given.seed, given.seed + given.seeds)
    found: dict[str, Results] = {}
    for case in cases:
        found[case.name] = {one.name: play(case, one, seeds) for one in variants()}
        show_case(case, found[case.name])
    gains = summary(found, cases)
    show_summary(gains)
    outcome = Outcome("benchmarks.policy_ideas")
    judge(outcome, found, cases)
    outcome.figures = {"seeds": list(seeds), "cases": _figures(found), "gains": _figures(gains)}
    return finish(outcome, given.json)


def _figures(value: Any) -> Any:
    """For JSON: records as dicts."""
    if isinstance(value, Found):
        return {"goods": value.goods, "cpu_us_per_request": value.cpu_us}
    if isinstance(value, Gain):
        return {"mean": value.mean, "spread": value.spread, "matters": value.matters}
    return {key: _figures(each) for key, each in value.items()}


if __name__ == "__main__":
    sys.exit(main())
