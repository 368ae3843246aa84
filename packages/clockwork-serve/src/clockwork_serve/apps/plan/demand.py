"""Kinds of devices, what a scenario asks of them minute by minute, and what follows before any simulation.

Bounds are of two sorts: what no set of devices can beat, by which sets are left out, and a guess of how much
is needed, by which the search chooses where to begin. A guess decides nothing.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct, structs

from clockwork_serve.apps.plan.search import Mix
from clockwork_serve.apps.simulate import SimulationQuestion
from clockwork_serve.config.values import Unfit, size
from clockwork_serve.errors import ConfigError
from clockwork_serve.sim.tally import MINUTE_NS
from clockwork_serve.units import MIB, NS_PER_S, to_ms
from clockwork_serve.workload.scenario import Scenario, Source
from clockwork_serve.workload.tables import (
    DeviceGroup,
    FieldError,
    lines_of,
    require_between,
    require_text,
    require_within,
    unfit,
)
from clockwork_serve.workload.zoo import ZooModel

MINUTE_S: Final = 60.0
KINDS_MAX: Final = 5
MIXES_MAX: Final = 100_000
NOWHERE: Final = int(np.iinfo(np.int64).max)
"""For a model that no device holds."""
BUSY: Final = 0.8
"""A guess: the share of their time that devices can use for what must be in time."""
LOADING: Final = 0.7
"""A guess: the same of their load lanes."""

Ints = npt.NDArray[np.int64]

# ------------------------------------------------------------
# Kinds of devices.


class DeviceKind(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of device that can be had, at most ``at_most`` of it (None: as many as are planned with).

    ``memory``: for weights, of each, as ``16GiB`` (None: the scenario's). ``speed``: how many times as fast
    as the profile everything is there. ``price``: of one, in any unit.
    """

    name: str
    memory: str | int | None = None
    speed: float = 1.0
    price: float = 1.0
    at_most: int | None = None

    def __post_init__(self) -> None:
        """Check the fields. Raises :class:`FieldError`."""
        require_text(self, ("name",))
        require_between(self, ("speed",), 0.01, 100.0)
        require_between(self, ("price",), 1e-6, 1e9)
        require_within(self, ("at_most",), 1, 10_000)
        try:
            self.memory_mib  # noqa: B018 - it raises
        except Unfit as error:
            raise unfit("memory", error.expected, self.memory, error.remedy) from None

    @property
    def memory_mib(self) -> int | None:
        """Whole MiB of it."""
        return None if self.memory is None else size(MIB)(self.memory) // MIB


def read_kinds(file: str) -> tuple[DeviceKind, ...]:
    """The tables ``[[kind]]`` of a TOML file. Raises :class:`ConfigError`: file, line, field."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"kinds: expected a TOML file of [[kind]], found {file}: {error}; correct it"
        ) from None
    source = Source(file=file, lines=lines_of(text))
    rows, known = values.get("kind"), ", ".join(DeviceKind.__struct_fields__)
    if not isinstance(rows, list) or len(values) > 1 or not 0 < len(rows) <= KINDS_MAX:
        found = ", ".join(values) or "nothing"
        raise source.at("kind", f"expected 1 to {KINDS_MAX} tables [[kind]] alone, found {found}; correct it")
    kinds: list[DeviceKind] = []
    for at, row in enumerate(rows):
        try:
            kinds.append(msgspec.convert(row, DeviceKind))
        except FieldError as error:
            raise source.at(f"kind[{at}].{error.field}", error.what) from None
        except msgspec.ValidationError as error:
            raise source.at(f"kind[{at}]", f"expected {known}; found: {error}; correct it") from None
        if kinds[at].name in [kind.name for kind in kinds[:at]]:
            raise source.at(f"kind[{at}].name", f"expected each name once, found {kinds[at].name!r} again")
    return tuple(kinds)


def kinds_of(scenario: Scenario) -> tuple[DeviceKind, ...]:
    """The kinds of a scenario's own cluster: one, or one for each of its groups."""
    table = scenario.cluster
    if not table.groups:
        return (DeviceKind(name="device"),)
    if len(table.groups) > KINDS_MAX:
        raise scenario.wrong("cluster.groups", f"expected at most {KINDS_MAX} to plan with; give --kinds")
    return tuple(
        DeviceKind(
            name=group.name or f"group {at}", speed=1 / group.slower, price=group.price,
            memory=None if group.memory_mib is None else f"{group.memory_mib}MiB", at_most=group.at_most,
        )
        for at, group in enumerate(table.groups, start=1)
    )  # fmt: skip


def with_devices(scenario: Scenario, kinds: Sequence[DeviceKind], mix: Mix) -> Scenario:
    """The scenario on so many devices of each kind."""
    table, total = scenario.cluster, sum(mix)
    groups = tuple(
        DeviceGroup(devices=count, slower=1 / kind.speed, memory_mib=kind.memory_mib)
        for kind, count in zip(kinds, mix, strict=True)
        if count
    )
    if all(group.slower == 1 and group.memory_mib is None for group in groups):
        groups = ()
    workers = table.devices_per_worker if total % table.devices_per_worker == 0 else 1
    cluster = structs.replace(table, devices=total, devices_per_worker=workers, groups=groups)
    return structs.replace(scenario, cluster=cluster)


# ------------------------------------------------------------
# Deadlines.


def with_slo(scenario: Scenario, slo_ms: float) -> Scenario:
    """The scenario with another SLO for all loads that have one; for all loads if none has one."""
    every = all(load.slo_ms is None for load in scenario.loads)
    loads = [
        structs.replace(load, slo_ms=slo_ms, slo_ramp=None) if every or load.slo_ms is not None else load
        for load in scenario.loads
    ]
    return structs.replace(scenario, loads=tuple(loads))


def with_slack(scenario: Scenario, factor: float) -> Scenario:
    """The scenario with all SLOs so many times as long."""

    def times(value: float | None) -> float | None:
        return None if value is None else value * factor

    loads = []
    for load in scenario.loads:
        ramp = load.slo_ramp
        if ramp is not None:
            ramp = structs.replace(ramp, add=times(ramp.add), until=times(ramp.until))
        loads.append(structs.replace(load, slo_ms=times(load.slo_ms), slo_ramp=ramp))
    return structs.replace(scenario, loads=tuple(loads))


# ------------------------------------------------------------
# Demand by minute.


def may_miss(target: float, requests: int) -> int:
    """How many of so many requests may miss, if that share is to be in time."""
    return math.floor((1 - target) * requests + 1e-6)


class PlanMinutes(Struct, frozen=True):
    """The minutes in which the target is to be met, after the warm-up; what is left belongs to the last."""

    from_ns: int
    count: int
    last_s: float

    @staticmethod
    def of(scenario: Scenario) -> PlanMinutes:
        """Of a scenario; one that is shorter than a minute counts as one."""
        counted_s = scenario.seconds - scenario.warmup_s
        count = max(1, int(counted_s // MINUTE_S))
        return PlanMinutes(round(scenario.warmup_s * NS_PER_S), count, counted_s - (count - 1) * MINUTE_S)

    def seconds(self, minute: int) -> float:
        """How long it is."""
        return MINUTE_S if minute < self.count - 1 else self.last_s


@dataclass(slots=True)
class Demand:
    """What the open loads with an SLO ask for, and what that says of sets of devices."""

    kinds: tuple[DeviceKind, ...]
    offered: tuple[int, ...]
    """Requests by minute."""
    allowed: tuple[int, ...]
    """How many of them may miss."""
    least_devices: int
    """The scenario's faults hit so many."""
    least_speed: float
    """No devices whose speeds add up to less meet the target."""
    unable: frozenset[tuple[int, ...]]
    """Kinds of which no number meets the target: models do not fit, or are too slow there."""
    likely_speed: float
    """A guess of the sum of speeds that is needed."""
    held_bytes: Ints
    """Bytes of the first n models, the most popular first, in the busiest minute."""
    cold_s: npt.NDArray[np.float64]
    """Seconds that LOADs of all others take then, if each of their requests needs one; one more element."""
    memory_bytes: tuple[int, ...]
    """Of a device of each kind."""

    def able(self, mix: Mix) -> bool:
        """Whether no bound excludes that the set meets the target."""
        kinds = tuple(at for at, count in enumerate(mix) if count)
        enough = sum(mix) >= self.least_devices and self.speed(mix) >= self.least_speed
        return enough and kinds not in self.unable

    def speed(self, mix: Mix) -> float:
        """The sum of speeds."""
        return sum(kind.speed * count for kind, count in zip(self.kinds, mix, strict=True))

    def memory(self, mix: Mix) -> int:
        """The sum of memory for weights, in bytes."""
        return sum(each * count for each, count in zip(self.memory_bytes, mix, strict=True))

    def price(self, mix: Mix) -> float:
        """The sum of prices."""
        return sum(kind.price * count for kind, count in zip(self.kinds, mix, strict=True))

    def guess(self, mix: Mix) -> float:
        """How much of what is needed the set probably has: 1 is enough."""
        speed = self.speed(mix)
        enough = speed / self.likely_speed if self.likely_speed else math.inf
        cold_s = float(self.cold_s[np.searchsorted(self.held_bytes, self.memory(mix), side="right")])
        return min(enough, LOADING * speed * MINUTE_S / cold_s) if cold_s else enough

    def covers(self, one: Mix, other: Mix) -> bool:
        """Whether ``one`` can do all that ``other`` can: in each kind, or in speed, memory and fastest."""

        def strength(mix: Mix) -> tuple[float, ...]:
            fastest = max(kind.speed for kind, count in zip(self.kinds, mix, strict=True) if count)
            return self.speed(mix), self.memory(mix), fastest

        pairs = zip(one, other, strict=True), zip(strength(one), strength(other), strict=True)
        return any(all(mine >= theirs for mine, theirs in each) for each in pairs)

    def mixes(self, most: int) -> list[Mix]:
        """All sets that may do, the cheapest first. Raises :class:`ConfigError` if they are too many."""
        ranges = [range(min(most, kind.at_most or most) + 1) for kind in self.kinds]
        if math.prod(len(each) for each in ranges) > MIXES_MAX:
            raise ConfigError(
                f"kind: expected at most {MIXES_MAX:,} sets of devices, found more; give at_most for each "
                "kind, or a smaller --max-devices"
            )
        found = [mix for mix in product(*ranges) if 0 < sum(mix) <= most and self.able(mix)]
        return sorted(found, key=self.rank)

    def rank(self, mix: Mix) -> tuple[float, int, Mix]:
        """The order of sets: by price, then by number."""
        return self.price(mix), sum(mix), mix


def demand_of(question: SimulationQuestion, kinds: tuple[DeviceKind, ...], target: float) -> Demand:
    """Go through the arrivals once. Raises :class:`ConfigError` if no number of devices does."""
    scenario, minutes = question.scenario, PlanMinutes.of(question.scenario)
    rows = [question.zoo[kind] for _, kind in question.workload.models]
    wanted = np.array([load.slo_ms is not None for load in scenario.loads])
    if not wanted.any():
        raise scenario.wrong(
            "loads[0].slo_ms",
            "expected an SLO in at least one [[loads]] table, found none (those of single requests in a "
            "trace do not count here); give all loads one by --slo-ms",
        )
    floors = _floors(question, kinds, rows)
    every = floors[tuple(range(len(kinds)))]
    counts = np.zeros((minutes.count, len(rows)), np.int64)
    short = {some: np.zeros(minutes.count, np.int64) for some in floors}
    worst, slo_max_ns = _tightest_client(question, every), 0
    for arrivals in question.workload.open():
        times, loads = np.array(arrivals.times_ns, np.int64), np.array(arrivals.loads)
        chosen = np.flatnonzero(wanted[loads] & (times >= minutes.from_ns))
        if not chosen.size:
            continue
        models, slos = np.array(arrivals.models)[chosen], np.array(arrivals.slos_ns, np.int64)[chosen]
        at = np.minimum((times[chosen] - minutes.from_ns) // MINUTE_NS, minutes.count - 1)
        np.add.at(counts, (at, models), 1)
        for some, floor in floors.items():
            short[some] += np.bincount(at[slos < floor[models]], minlength=minutes.count)
        place = int(np.argmax(every[models] - slos))
        model, slo_ns = int(models[place]), int(slos[place])
        worst = max(worst, (int(every[model]) - slo_ns, int(loads[chosen[place]]), model, slo_ns))
        slo_max_ns = max(slo_max_ns, int(slos.max()))
    offered = tuple(counts.sum(axis=1).tolist())
    if not any(offered) and not question.workload.closed:
        raise scenario.wrong("warmup_s", "expected requests with an SLO after it, found none; shorten it")
    allowed = tuple(may_miss(target, each) for each in offered)
    unable = frozenset(some for some, found in short.items() if (found > np.array(allowed)).any())
    if tuple(range(len(kinds))) in unable or _tightest_client(question, every)[0] > 0:
        raise _impossible(question, _memory_bytes(question, kinds), worst)
    return Demand(
        kinds=kinds, offered=offered, allowed=allowed, least_devices=_hit_by_faults(scenario), unable=unable,
        memory_bytes=_memory_bytes(question, kinds),
        **_needs(question, rows, counts, allowed, slo_max_ns / NS_PER_S),
    )  # fmt: skip


def _needs(
    question: SimulationQuestion, rows: Sequence[ZooModel], counts: Ints, allowed: Sequence[int],
    longest_s: float,
) -> dict[str, Any]:  # fmt: skip
    """What follows from how often each model is asked in each minute."""
    minutes, most = PlanMinutes.of(question.scenario), question.config.max_batch
    one_s = np.array([row.infer_ns[1] for row in rows]) / NS_PER_S
    best_s = np.array([min(row.infer_ns[n] / n for n in row.batch_sizes(most)) for row in rows]) / NS_PER_S
    spans_s = np.array([minutes.seconds(at) for at in range(minutes.count)])
    work_s = np.maximum(0, counts @ best_s - np.array(allowed) * float(best_s.max()))
    busiest = counts[int(np.argmax(counts.sum(axis=1)))]
    order = np.argsort(-busiest, kind="stable")
    order = order[busiest[order] > 0]
    load_s = (busiest * np.array([row.load_ns for row in rows]) / NS_PER_S)[order]
    return {
        "least_speed": float((work_s / (spans_s + longest_s)).max()),
        "likely_speed": float((counts @ np.sqrt(one_s * best_s) / (BUSY * spans_s)).max()),
        "held_bytes": np.array([row.weights_bytes for row in rows], np.int64)[order].cumsum(),
        "cold_s": np.append(load_s[::-1].cumsum()[::-1], 0.0),
    }


def _memory_bytes(question: SimulationQuestion, kinds: tuple[DeviceKind, ...]) -> tuple[int, ...]:
    cluster = question.cluster
    groups = [DeviceGroup(memory_mib=kind.memory_mib) for kind in kinds]
    return tuple(cluster.pages_of(group) * cluster.page_bytes for group in groups)


def _floors(
    question: SimulationQuestion, kinds: tuple[DeviceKind, ...], rows: Sequence[ZooModel]
) -> dict[tuple[int, ...], Ints]:
    """By the kinds that a set has: the shortest SLO, in ns, that each model can be answered in."""
    network, page = question.constants.network, question.cluster.page_bytes
    way_ns = 2 * (network.gateway_ns + network.worker_ns)
    exec_ns = np.array([row.infer_ns[1] for row in rows])
    weights = np.array([-(-row.weights_bytes // page) * page for row in rows])
    alone = [
        np.where(weights <= memory, (exec_ns / kind.speed).astype(np.int64) + way_ns, NOWHERE)
        for kind, memory in zip(kinds, _memory_bytes(question, kinds), strict=True)
    ]
    return {
        some: np.minimum.reduce([alone[at] for at in some])
        for many in range(1, len(kinds) + 1)
        for some in combinations(range(len(kinds)), many)
    }


def _tightest_client(question: SimulationQuestion, floor: Ints) -> tuple[int, int, int, int]:
    """Of closed loads: by how much an SLO is too short (below 0: it is not), load, model, the SLO; in ns."""
    found = [
        (
            int(floor[model]) - closed.slo.at(closed.start_ns),
            closed.load,
            model,
            closed.slo.at(closed.start_ns),
        )
        for closed in question.workload.closed
        for model in closed.models
        if question.scenario.loads[closed.load].slo_ms is not None
    ]
    return max(found, default=(-NOWHERE, 0, 0, 0))


def _impossible(
    question: SimulationQuestion, memory_bytes: Sequence[int], worst: tuple[int, int, int, int]
) -> ConfigError:
    """Why not even all kinds together could meet the target: the request that is furthest from it."""
    gap_ns, load, model, slo_ns = worst
    name, kind = question.workload.models[model]
    what = f"no number of these devices does: model {name} ({kind})"
    if gap_ns + slo_ns == NOWHERE:
        needed, most = -(-question.zoo[kind].weights_bytes // MIB), max(memory_bytes) // MIB
        return question.scenario.wrong(
            "cluster.memory_mib",
            f"{what} has weights of {needed} MiB; expected a device that holds them, found at most {most} "
            "MiB; give it more memory, or plan with a larger kind",
        )
    least_ms, found_ms = to_ms(gap_ns + slo_ns), to_ms(slo_ns)
    return question.scenario.wrong(
        f"loads[{load}].slo_ms",
        f"{what} takes {least_ms:.4g} ms at batch 1 on the fastest of them, with messages; expected an SLO "
        f"of at least that, found {found_ms:.4g}; raise it, or plan with a kind that is "
        f"{least_ms / found_ms:.3g} times as fast",
    )


def _hit_by_faults(scenario: Scenario) -> int:
    """The fewest devices that a scenario's faults can hit."""
    each = scenario.cluster.devices_per_worker
    return max(
        [1, *[max((fault.device or 0) + 1, (fault.worker or 0) * each + 1) for fault in scenario.faults]]
    )
