"""A prediction held against what a running server did with the same requests at the same instants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve.apps.plan.report import PlanQuestion
from clockwork_serve.apps.simulate import play
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Answer, ControllerEffect, ControllerEvent, Outcome, Request
from clockwork_serve.units import NS_PER_S, to_ms

NEAR: Final = 0.05
"""A prediction is near if the goodput of each model is off by at most this share, or by one request."""

Ends = dict[tuple[int, str], tuple[bool, int]]
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

    @property
    def good(self) -> bool:
        """Whether all was near enough, and the measurement is worth something."""
        return not self.invalid and self.total.near and all(model.near for model in self.models)

    def to_json(self) -> bytes:
        """Indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)


class _Ends:
    """Watches a simulation: how each request ends."""

    def __init__(self, hop_ns: int) -> None:
        self._hop_ns = hop_ns
        self._open: dict[str, Request] = {}
        self.found: Ends = {}

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Note what one step brought."""
        self._open.update((event.request_id, event) for event in events if isinstance(event, Request))
        for effect in effects:
            if isinstance(effect, Answer):
                request, ended_ns = self._open.pop(effect.request_id), now_ns + self._hop_ns
                good = effect.outcome is Outcome.OK and ended_ns <= request.deadline_ns
                name = request.model.rpartition("/")[0]
                self.found[request.arrival_ns, name] = (good, ended_ns - request.arrival_ns)


def predicted_ends(asked: PlanQuestion) -> Ends:
    """Simulate the scenario as it is, with the first seed."""
    question = asked.simulated()
    ends = _Ends(question.constants.network.gateway_ns)
    play(question.simulation(watchers=[ends], stretches=False))
    return ends.found


def measured_ends(scenario: str, url: str, *, seed: int, traces: str | None) -> tuple[Ends, str]:
    """Play a scenario on a server by the load generator of clockwork-lab; why that is invalid, if it is.

    Raises :class:`ConfigError` where that is not installed, or the server lacks a model.
    """
    try:
        plan, run = (import_module(f"clockwork_lab.bench.{name}") for name in ("plan", "run"))
    except ModuleNotFoundError:
        raise ConfigError(
            "check: expected clockwork-lab, which sends requests, to be installed; found none; "
            "pip install 'clockwork-serve[lab]'"
        ) from None
    load: Any = plan.make_plan(scenario, plan.Options(url=url, seed=seed, traces=traces))
    ran = run.run(load)
    table = ran.records.table
    latency_ns = table["last_ns"] - table["scheduled_ns"]
    good = (table["end"] == run.ANSWERED) & (latency_ns <= table["slo_ns"])
    names = [name for name, _ in load.schedule.workload.models]
    columns = (table["scheduled_ns"], table["model"], good, latency_ns)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(due, names[model]): (in_time, took) for due, model, in_time, took in rows}, ran.report.invalid


def check_report(
    asked: PlanQuestion, predicted: Ends, measured: Ends, *, url: str, invalid: str
) -> CheckReport:
    """Hold both against each other: requests that both know, and that came after the warm-up."""
    scenario = asked.scenario
    from_ns, seconds = round(scenario.warmup_s * NS_PER_S), scenario.seconds - scenario.warmup_s
    keys = [key for key in predicted if key in measured and key[0] >= from_ns]
    by_model: dict[str, list[tuple[int, str]]] = {}
    for key in keys:
        by_model.setdefault(key[1], []).append(key)
    said = Counter((predicted[key][0], measured[key][0]) for key in keys)
    return CheckReport(
        scenario=scenario.name, url=url, devices=scenario.cluster.devices,
        total=_sides("all", keys, predicted, measured, seconds),
        models=tuple(_sides(name, by_model[name], predicted, measured, seconds) for name in sorted(by_model)),
        both=said[True, True], neither=said[False, False], only_predicted=said[True, False],
        only_measured=said[False, True], invalid=invalid,
        unmatched=sum(key[0] >= from_ns for key in predicted.keys() ^ measured.keys()),
    )  # fmt: skip


def _sides(
    name: str, keys: Sequence[tuple[int, str]], predicted: Ends, measured: Ends, seconds: float
) -> Sides:
    good = [[side[key][1] for key in keys if side[key][0]] for side in (predicted, measured)]
    ours, theirs = (len(each) for each in good)
    return Sides(
        name=name, requests=len(keys), predicted_rps=ours / seconds, measured_rps=theirs / seconds,
        predicted_ms=_quantiles_ms(good[0]), measured_ms=_quantiles_ms(good[1]),
        off=(ours - theirs) / max(1, theirs), near=abs(ours - theirs) <= max(NEAR * theirs, 1),
    )  # fmt: skip


def _quantiles_ms(took_ns: list[int]) -> tuple[float, float] | None:
    if not took_ns:
        return None
    p50, p99 = np.quantile(took_ns, (0.5, 0.99), method="inverted_cdf")
    return to_ms(int(p50)), to_ms(int(p99))
