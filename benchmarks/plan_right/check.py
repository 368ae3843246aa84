"""A prediction held against what a running server did with the same requests at the same instants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
from msgspec import Struct

from clockwork_lab.bench import plan, run
from clockwork_lab.bench.records import ANSWERED
from clockwork_serve.apps.plan.report import PlanQuestion
from clockwork_serve.apps.simulate import SimulationQuestion, play
from clockwork_serve.messages import Answer, ControllerEffect, ControllerEvent, Outcome, Request
from clockwork_serve.units import NS_PER_S, to_ms

NEAR: Final = 0.05
"""A prediction is near if the goodput of each model is off by at most this share, or by one request."""

_End = tuple[bool, int]
Ends = dict[tuple[int, str], _End]
"""By when a request was due, from the start of the run, and its model: whether in time; its latency in ns."""


class Sides(Struct, frozen=True, kw_only=True):
    """The same requests, predicted and measured. Quantiles are of answers in time; None: there is none.

    ``off``: by which share too much goodput was predicted.
    """

    name: str
    requests: int
    predicted_rps: float
    measured_rps: float
    predicted_ms: tuple[float, float] | None
    """p50 and p99."""
    measured_ms: tuple[float, float] | None
    off: float
    near: bool


class CheckReport(Struct, frozen=True, kw_only=True):
    """How far a prediction was off. ``both`` ... ``only_measured``: who said that requests were in time.

    ``unmatched``: requests that one side alone knows, as those of closed loads, which come when they like.
    ``invalid``: why the measurement proves nothing, if so.
    """

    scenario: str
    url: str
    devices: int
    total: Sides
    models: tuple[Sides, ...]
    both: int
    neither: int
    only_predicted: int
    only_measured: int
    unmatched: int
    invalid: str


class _Ends:
    """Watches a simulation: how each request ends."""

    def __init__(self, hop_ns: int) -> None:
        self._hop_ns = hop_ns
        self._open: dict[str, tuple[Request, tuple[int, str]]] = {}
        self.found: Ends = {}

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Note what one step brought."""
        for event in events:
            if isinstance(event, Request) and event.request_id not in self._open:
                key = _add(self.found, event.arrival_ns, event.model.rpartition("/")[0], (False, 0))
                self._open[event.request_id] = event, key
        for effect in effects:
            if isinstance(effect, Answer):
                request, key = self._open.pop(effect.request_id)
                ended_ns = now_ns + self._hop_ns
                good = effect.outcome is Outcome.OK and ended_ns <= request.deadline_ns
                self.found[key] = (good, ended_ns - request.arrival_ns)


def _add(ends: Ends, due_ns: int, model: str, end: _End) -> tuple[int, str]:
    """Add a request. Of those that come at one instant, as closed loads' do, each is a nanosecond later."""
    while (due_ns, model) in ends:
        due_ns += 1
    ends[due_ns, model] = end
    return due_ns, model


# ------------------------------------------------------------
# The two sides.


def predicted_ends(question: SimulationQuestion) -> Ends:
    """Simulate it."""
    ends = _Ends(question.constants.network.gateway_ns)
    play(question.simulation(watchers=[ends], stretches=False))
    return ends.found


def measured_ends(scenario: str, url: str, *, seed: int) -> tuple[Ends, str]:
    """Play a scenario on a server by the load generator of clockwork-lab; why that is invalid, if it is.

    Raises :class:`ConfigError` where the server lacks a model.
    """
    load = plan.make_plan(scenario, plan.Options(url=url, seed=seed))
    ran = run.run(load)
    table = ran.records.table
    latency_ns = table["last_ns"] - table["scheduled_ns"]
    good = (table["end"] == ANSWERED) & (latency_ns <= table["slo_ns"])
    names = [name for name, _ in load.schedule.workload.models]
    columns = (table["scheduled_ns"], table["model"], good, latency_ns)
    ends: Ends = {}
    for due_ns, model, in_time, took_ns in zip(*(column.tolist() for column in columns), strict=True):
        _add(ends, due_ns, names[model], (in_time, took_ns))
    return ends, ran.report.invalid


def check_report(
    asked: PlanQuestion, predicted: Ends, measured: Ends, *, url: str, invalid: str
) -> CheckReport:
    """Hold both against each other: all requests that came after the warm-up, and each that both know."""
    scenario = asked.scenario
    from_ns, seconds = round(scenario.warmup_s * NS_PER_S), scenario.seconds - scenario.warmup_s
    sides = [{key: end for key, end in side.items() if key[0] >= from_ns} for side in (predicted, measured)]
    by_model: dict[str, tuple[list[_End], list[_End]]] = {}
    for at, side in enumerate(sides):
        for (_, name), end in side.items():
            by_model.setdefault(name, ([], []))[at].append(end)
    keys = sides[0].keys() & sides[1].keys()
    said = Counter((predicted[key][0], measured[key][0]) for key in keys)
    return CheckReport(
        scenario=scenario.name, url=url, devices=scenario.cluster.devices,
        total=_sides("all", [side.values() for side in sides], seconds),
        models=tuple(_sides(name, ends, seconds) for name, ends in sorted(by_model.items())),
        both=said[True, True], neither=said[False, False], only_predicted=said[True, False],
        only_measured=said[False, True], invalid=invalid,
        unmatched=len(sides[0].keys() ^ sides[1].keys()),
    )  # fmt: skip


def _sides(name: str, ends: Sequence[Collection[_End]], seconds: float) -> Sides:
    good = [[took_ns for in_time, took_ns in side if in_time] for side in ends]
    ours, theirs = (len(each) for each in good)
    return Sides(
        name=name, requests=len(ends[1]), predicted_rps=ours / seconds, measured_rps=theirs / seconds,
        predicted_ms=_quantiles_ms(good[0]), measured_ms=_quantiles_ms(good[1]),
        off=(ours - theirs) / max(1, theirs), near=abs(ours - theirs) <= max(NEAR * theirs, 1),
    )  # fmt: skip


def _quantiles_ms(took_ns: list[int]) -> tuple[float, float] | None:
    if not took_ns:
        return None
    p50, p99 = np.quantile(took_ns, (0.5, 0.99), method="inverted_cdf")
    return to_ms(int(p50)), to_ms(int(p99))
