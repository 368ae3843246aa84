"""A prediction held against what a running server did with the same requests at the same instants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct, structs

from clockwork_serve.apps.plan.report import PlanQuestion
from clockwork_serve.apps.simulate import SimulationQuestion, play
from clockwork_serve.errors import ConfigError, install_advice
from clockwork_serve.messages import Answer, ControllerEffect, ControllerEvent, Outcome, Request
from clockwork_serve.telemetry.top import Reading
from clockwork_serve.units import MIB, NS_PER_S, counted, to_ms
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.tables import DeviceGroup, FieldError

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
    ``invalid``: why the measurement proves nothing, if so. ``differs``: in what the devices that were there,
    and that the prediction is for, are not the scenario's, in words.
    """

    scenario: str
    url: str
    devices: int
    differs: tuple[str, ...] = ()
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


# ------------------------------------------------------------
# The devices of a running server, and a scenario on them.


class ServerDevices(Struct, frozen=True, kw_only=True):
    """Devices of a server that are alike; ``kind`` is what selects their profiles."""

    kind: str
    count: int
    memory_mib: int
    page_mib: int

    def __str__(self) -> str:
        return f"{counted(self.count, 'device')} of kind {self.kind} with {self.memory_mib:,} MiB for weights"


def server_devices(metrics: Reading) -> tuple[ServerDevices, ...]:
    """Those that are there now, by its metrics. Raises :class:`ConfigError` where these tell of none."""
    up = {labels.get("device") for labels, value in metrics.get("device_up", ()) if value}
    pages = {
        labels.get("device"): int(value)
        for labels, value in metrics.get("device_pages", ())
        if labels.get("state") == "all"
    }
    alike = Counter(
        (labels.get("kind", ""), pages.get(labels.get("device"), 0) * int(value), int(value))
        for labels, value in metrics.get("device_page_bytes", ())
        if labels.get("device") in up
    )
    if not alike:
        raise ConfigError(
            "check: expected a server whose metrics tell of devices that are there, found none; wait until "
            "they have joined, or say with --devices how many to predict for"
        )
    return tuple(
        ServerDevices(kind=kind, count=count, memory_mib=max(1, memory // MIB), page_mib=max(1, page // MIB))
        for (kind, memory, page), count in sorted(alike.items())
    )


def on_server(scenario: Scenario, there: Sequence[ServerDevices]) -> tuple[Scenario, list[str]]:
    """The scenario on a server's devices, and in what they are not the scenario's, in words.

    A group of the scenario that has the name of a kind says how fast it is. Raises :class:`ConfigError`.
    """
    table = scenario.cluster
    named = {group.name: group for group in table.groups if group.name is not None}
    slower = {one.kind: named[one.kind].slower if one.kind in named else 1.0 for one in there}
    groups = tuple(
        DeviceGroup(devices=one.count, slower=slower[one.kind], memory_mib=one.memory_mib) for one in there
    )
    page_mib = max(one.page_mib for one in there)
    try:
        cluster = structs.replace(
            table, devices=sum(one.count for one in there), devices_per_worker=1, page_mib=page_mib,
            groups=groups,
        )  # fmt: skip
        return structs.replace(scenario, cluster=cluster), _differences(scenario, there)
    except FieldError as error:
        raise scenario.wrong(
            error.field, f"{error.what}; the server has {', '.join(map(str, there))}"
        ) from None


def _differences(scenario: Scenario, there: Sequence[ServerDevices]) -> list[str]:
    table = scenario.cluster
    total = sum(one.count for one in there)
    found = []
    if total != table.devices:
        found.append(f"the server has {counted(total, 'device')}, the scenario {table.devices:,}")
    groups = {group.name: group for group in table.groups if group.name is not None}
    unequal = len(there) > 1 or any(group.slower != 1 for group in table.groups)
    for one in there:
        group = groups.get(one.kind)
        if group is not None and group.devices != one.count:
            found.append(f"the server has {one}, the scenario {group.devices:,}")
        memory_mib = table.memory_mib if group is None or group.memory_mib is None else group.memory_mib
        if memory_mib is not None and memory_mib != one.memory_mib:
            found.append(f"a device of kind {one.kind} has {one.memory_mib:,} MiB, not {memory_mib:,}")
        if group is None and (groups or unequal):
            found.append(
                f"the scenario has no [[cluster.groups]] named {one.kind!r}, which is taken to be as fast as "
                f"{table.zoo} says"
            )
    kinds = {one.kind for one in there}
    found += [f"the server has no {name!r}" for name in groups if name not in kinds]
    return found


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


def measured_ends(
    scenario: str, url: str, *, seed: int, traces: str | None,
    headers: Sequence[tuple[str, str]] = (), ca: str | None = None,
) -> tuple[Ends, str]:  # fmt: skip
    """Play a scenario on a server by the load generator of clockwork-lab; why that is invalid, if it is.

    ``headers`` are sent with each request; ``ca`` is a file of authorities, None: the system's. Raises
    :class:`ConfigError` where that is not installed, or the server lacks a model.
    """
    try:
        plan, run = (import_module(f"clockwork_lab.bench.{name}") for name in ("plan", "run"))
    except ModuleNotFoundError:
        raise ConfigError(
            "check: expected clockwork-lab, which sends requests, to be installed; found none; "
            f"{install_advice('clockwork-lab')}"
        ) from None
    options = plan.Options(url=url, seed=seed, traces=traces, headers=tuple(headers), ca=ca)
    load: Any = plan.make_plan(scenario, options)
    ran = run.run(load)
    table = ran.records.table
    latency_ns = table["last_ns"] - table["scheduled_ns"]
    good = (table["end"] == run.ANSWERED) & (latency_ns <= table["slo_ns"])
    names = [name for name, _ in load.schedule.workload.models]
    columns = (table["scheduled_ns"], table["model"], good, latency_ns)
    ends: Ends = {}
    for due_ns, model, in_time, took_ns in zip(*(column.tolist() for column in columns), strict=True):
        _add(ends, due_ns, names[model], (in_time, took_ns))
    return ends, ran.report.invalid


def check_report(
    asked: PlanQuestion, predicted: Ends, measured: Ends, *, url: str, invalid: str,
    differs: Sequence[str] = (),
) -> CheckReport:  # fmt: skip
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
        scenario=scenario.name, url=url, devices=scenario.cluster.devices, differs=tuple(differs),
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
