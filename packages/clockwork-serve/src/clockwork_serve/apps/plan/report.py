"""A plan: the cheapest devices that meet the target, what is around them, and what breaks with one less.

All of it follows from the question and its seeds; how many processes make the simulations changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from clockwork_serve import __version__
from clockwork_serve.apps.plan.demand import (
    MINUTE_S,
    Demand,
    DeviceKind,
    PlanMinutes,
    demand_of,
    with_devices,
    with_slack,
)
from clockwork_serve.apps.plan.runs import CauseCount, PlanJob, PlanRun, PlanRuns
from clockwork_serve.apps.plan.search import Mix, MixSearch
from clockwork_serve.apps.simulate import SimulationQuestion, question_of
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.sim import Constants
from clockwork_serve.units import MIB, NS_PER_S
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.zoo import Zoo

SLACKER: Final = 2.0
"""By what SLOs are multiplied to see whether that would save a device."""


class PlanQuestion(Struct, frozen=True, kw_only=True):
    """What is asked: ``target`` is the share in time of every minute, ``most`` the most devices looked at.

    ``constants``: delays and noise, if they are not the usual ones.
    """

    scenario: Scenario
    zoo: Zoo
    kinds: tuple[DeviceKind, ...]
    target: float
    seeds: tuple[int, ...]
    config: ControllerConfig
    traces: str | None = None
    most: int = 64
    constants: Constants | None = None

    def simulated(self) -> SimulationQuestion:
        """The scenario as it is, with the first seed."""
        return question_of(
            self.scenario, self.zoo, config=self.config, seed=self.seeds[0], traces=self.traces,
            constants=self.constants,
        )  # fmt: skip


class SeedSpread(Struct, frozen=True):
    """A number by seeds: the least, the mean, the most."""

    least: float
    mean: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> SeedSpread:
        """Of at least one value."""
        return SeedSpread(min(values), sum(values) / len(values), max(values))


class MixReport(Struct, frozen=True, kw_only=True):
    """One set of devices. Shares and rates are of the loads with an SLO, ``background_rps`` of all others.

    ``met``: in every minute of every seed that was simulated. ``stopped``: a simulation that missed beyond
    repair was stopped; its numbers are of the time until then. ``worst_minute``: the least share of a minute.
    """

    devices: dict[str, int]
    price: float
    met: bool
    stopped: bool
    seeds: int
    in_time: SeedSpread
    worst_minute: SeedSpread
    goodput_rps: SeedSpread
    background_rps: SeedSpread
    p99_ms: SeedSpread
    exec_busy: SeedSpread
    load_busy: SeedSpread
    cold: SeedSpread
    minutes: tuple[float, ...]
    """Share of each minute, the least of all seeds."""

    @property
    def total(self) -> int:
        """How many devices."""
        return sum(self.devices.values())


class PlanBreak(Struct, frozen=True, kw_only=True):
    """What goes wrong with one device less: the first minute below the target, and why requests miss.

    ``load``: the one that suffers most. ``causes`` are of the whole run, by the first seed that misses.
    """

    devices: dict[str, int]
    from_s: float
    to_s: float
    share: float
    load: str
    load_share: float
    missed: int
    causes: tuple[CauseCount, ...]


class PlanReport(Struct, frozen=True, kw_only=True):
    """All of it. ``answer`` is None where no set of at most ``most`` devices met the target.

    ``requests``: how many were simulated after the warm-up, in all simulations together. ``slack_saves``:
    whether one device less would do if SLOs were ``slacker`` times as long; None: not tried.
    """

    version: str
    scenario: str
    setup: dict[str, Any]
    target: float
    most: int
    kinds: tuple[DeviceKind, ...]
    offered_rps: float
    least_speed: float
    answer: MixReport | None
    fewer: MixReport | None
    more: MixReport | None
    mixes: tuple[MixReport, ...]
    breaks: PlanBreak | None
    slacker: float
    slack_saves: bool | None
    quota: int
    simulations: int
    requests: int
    reused: int
    took_s: float
    cut: bool

    def to_json(self) -> bytes:
        """Indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)


_Wanted = tuple[Mix, int, float]
"""A set, a seed, and by what SLOs are multiplied."""


class _Interrupted(Exception):
    """Somebody wants no more of it."""


class _Planner:
    """The simulations of one question, and what was found."""

    def __init__(self, asked: PlanQuestion, demand: Demand, runs: PlanRuns) -> None:
        self._asked, self.demand, self._runs = asked, demand, runs
        self.minutes = PlanMinutes.of(asked.scenario)
        self._found: dict[_Wanted, PlanRun] = {}
        self.best: Mix | None = None
        self._search = MixSearch(demand.mixes(asked.most), demand.guess, demand.covers)
        # How many come to closed loads is not known beforehand, so nothing can be called beyond repair.
        closed = any(load.arrivals == "closed" and load.slo_ms is not None for load in asked.scenario.loads)
        self._allowed = None if closed else demand.allowed

    def play(self, whole: Sequence[_Wanted], cut: Sequence[_Wanted] = ()) -> list[PlanRun]:
        """Simulate to the end, and until the target is missed. Raises :class:`_Interrupted`."""
        asked = self._asked
        jobs = [
            PlanJob(
                scenario=with_slack(with_devices(asked.scenario, asked.kinds, mix), slack), zoo=asked.zoo,
                seed=seed, config=asked.config, traces=asked.traces, constants=asked.constants,
                allowed=None if at < len(whole) else self._allowed,
            )
            for at, (mix, seed, slack) in enumerate([*whole, *cut])
        ]  # fmt: skip
        runs = self._runs.play(jobs)
        found = [run for run in runs if run is not None]
        self._found.update(
            (each, run) for each, run in zip([*whole, *cut], runs, strict=True) if run is not None
        )
        if len(found) < len(runs):
            raise _Interrupted
        return found

    def search(self) -> None:
        """Find the cheapest set that meets the target with every seed; ``best`` is it."""
        target, (first, *others) = self._asked.target, self._asked.seeds
        while True:
            while mixes := self._search.next():
                runs = self.play((), [(mix, first, 1.0) for mix in mixes])
                for mix, run in zip(mixes, runs, strict=True):
                    self._search.record(mix, met=run.met(target), needed=run.needed(target))
                self.best = self._search.best
            if self.best is None:
                return
            runs = self.play([(self.best, seed, 1.0) for seed in others])
            if all(run.met(target) for run in runs):
                return
            self._search.record(self.best, met=False)
            self.best = self._search.best

    def surroundings(self) -> None:
        """One device less, to its end; one more; one less with slacker SLOs."""
        seeds, fewer, more = self._asked.seeds, self.fewer(), self.more()
        around = [mix for mix in (fewer, more) if mix is not None]
        slack = [] if fewer is None else [(fewer, seeds[0], SLACKER)]
        self.play([(mix, seed, 1.0) for mix in around for seed in seeds], slack)

    def fewer(self) -> Mix | None:
        """The answer without one of its slowest devices; without an answer, the largest set tried."""
        if self.best is None:
            tried = [mix for mix, _, slack in self._found if slack == 1]
            return max(tried, key=lambda mix: (self.demand.guess(mix), mix), default=None)
        if sum(self.best) == self.demand.least_devices:
            return None
        present = [at for at, count in enumerate(self.best) if count]
        least = min(present, key=lambda at: (self._asked.kinds[at].speed, at))
        return tuple(count - (at == least) for at, count in enumerate(self.best))

    def more(self) -> Mix | None:
        """The answer and one more device of the cheapest kind that there is."""
        if self.best is None or sum(self.best) >= self._asked.most:
            return None
        kinds = self._asked.kinds
        free = [at for at, kind in enumerate(kinds) if kind.at_most is None or self.best[at] < kind.at_most]
        if not free:
            return None
        least = min(free, key=lambda at: (kinds[at].price, at))
        return tuple(count + (at == least) for at, count in enumerate(self.best))

    def runs(self, mix: Mix, slack: float = 1.0) -> list[PlanRun]:
        """What was found of a set so far, by seeds."""
        return [run for (each, _, factor), run in self._found.items() if each == mix and factor == slack]

    def mix_report(self, mix: Mix | None) -> MixReport | None:
        """A set's numbers; None where there are none."""
        runs = [] if mix is None else self.runs(mix)
        if mix is None or not runs:
            return None
        asked = self._asked
        counted_s = asked.scenario.seconds - asked.scenario.warmup_s
        urgent = [load.slo_ms is not None for load in asked.scenario.loads]

        def rate(run: PlanRun, *, slo: bool) -> float:
            return (
                sum(load.in_time for load, has in zip(run.loads, urgent, strict=True) if has == slo)
                / counted_s
            )

        return MixReport(
            devices=self.named(mix), price=self.demand.price(mix), seeds=len(runs),
            met=all(run.met(asked.target) for run in runs), stopped=any(run.stopped for run in runs),
            in_time=SeedSpread.of([sum(run.in_time) / max(1, sum(run.ended)) for run in runs]),
            worst_minute=SeedSpread.of([min(run.shares) for run in runs]),
            goodput_rps=SeedSpread.of([rate(run, slo=True) for run in runs]),
            background_rps=SeedSpread.of([rate(run, slo=False) for run in runs]),
            p99_ms=SeedSpread.of([
                max([load.answers.p99_ms or 0.0
                     for load, has in zip(run.loads, urgent, strict=True) if has], default=0.0)
                for run in runs
            ]),
            exec_busy=SeedSpread.of([run.devices.exec_busy for run in runs]),
            load_busy=SeedSpread.of([run.devices.load_busy for run in runs]),
            cold=SeedSpread.of([sum(load.cold for load in run.loads) for run in runs]),
            minutes=tuple(min(each) for each in zip(*(run.shares for run in runs), strict=True)),
        )  # fmt: skip

    def named(self, mix: Mix) -> dict[str, int]:
        """A set by the names of its kinds."""
        return {kind.name: count for kind, count in zip(self._asked.kinds, mix, strict=True) if count}

    def breaks(self) -> PlanBreak | None:
        """What one device less breaks."""
        mix, target = self.fewer(), self._asked.target
        missing = [run for run in ([] if mix is None else self.runs(mix)) if not run.met(target)]
        if mix is None or not missing:
            return None
        run = missing[0]
        minute = run.broken(target)[0]
        from_s = self.minutes.from_ns / NS_PER_S + minute * MINUTE_S
        urgent = [
            (load.satisfaction, load.name)
            for load, table in zip(run.loads, self._asked.scenario.loads, strict=True)
            if table.slo_ms is not None and load.satisfaction is not None
        ]
        least, worst = min(urgent)
        return PlanBreak(
            devices=self.named(mix), from_s=from_s, to_s=from_s + self.minutes.seconds(minute),
            share=run.shares[minute], load=worst, load_share=least,
            missed=sum(run.ended) - sum(run.in_time), causes=run.causes,
        )  # fmt: skip

    def requests(self) -> int:
        """How many were simulated after the warm-up, in all simulations that were shown."""
        return sum(load.offered for run in self._found.values() for load in run.loads)

    def tried(self) -> list[MixReport]:
        """All sets that were simulated, the cheapest first."""
        mixes = sorted({mix for mix, _, slack in self._found if slack == 1}, key=self.demand.rank)
        return [made for mix in mixes if (made := self.mix_report(mix)) is not None]


def make_plan(asked: PlanQuestion, runs: PlanRuns) -> PlanReport:
    """Plan. Raises :class:`ConfigError` if no number of devices can do, which is known without a simulation.

    If it is interrupted, ``cut`` says so, and the rest is what was found until then.
    """
    began = time.monotonic()
    question = asked.simulated()
    demand = demand_of(question, asked.kinds, asked.target)
    planner = _Planner(asked, demand, runs)
    cut = False
    try:
        planner.search()
        planner.surroundings()
    except _Interrupted:
        cut = True
    fewer = planner.fewer()
    slack = [] if fewer is None else planner.runs(fewer, SLACKER)
    return PlanReport(
        version=__version__, scenario=asked.scenario.name, setup=_setup(asked, question),
        target=asked.target, most=asked.most, kinds=asked.kinds,
        offered_rps=sum(demand.offered) / (asked.scenario.seconds - asked.scenario.warmup_s),
        least_speed=demand.least_speed, answer=planner.mix_report(planner.best),
        fewer=planner.mix_report(fewer), more=planner.mix_report(planner.more()),
        mixes=tuple(planner.tried()), breaks=planner.breaks(), slacker=SLACKER,
        slack_saves=slack[0].met(asked.target) if slack else None,
        quota=max((run.quota for run in planner.runs(fewer)), default=0) if fewer else 0,
        simulations=runs.made + runs.reused, reused=runs.reused, requests=planner.requests(),
        took_s=time.monotonic() - began, cut=cut,
    )  # fmt: skip


def _setup(asked: PlanQuestion, question: SimulationQuestion) -> dict[str, Any]:
    """All that decides the plan, for whoever wants to make it again."""
    scenario, cluster = asked.scenario, question.cluster
    return {
        "file": scenario.source.file if scenario.source else None,
        "seeds": list(asked.seeds), "policy": asked.config.policy, "max_batch": asked.config.max_batch,
        "zoo": scenario.cluster.zoo, "memory_mib": cluster.pages * cluster.page_bytes / MIB,
        "seconds": scenario.seconds, "warmup_s": scenario.warmup_s,
        "slos_ms": {load.name: load.slo_ms for load in scenario.loads},
        "workload": list(question.workload.notes), "constants": list(question.constants.lines()),
    }  # fmt: skip
