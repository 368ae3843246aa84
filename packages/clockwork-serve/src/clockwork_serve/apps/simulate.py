"""A scenario on virtual time: what is simulated, how it is run, and how it went, in numbers.

Seconds, milliseconds and shares (0 to 1) as the names of fields say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, structs

from clockwork_serve import __version__
from clockwork_serve.apps.learned import delays_beside, is_journal, read_zoo
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ClockworkError, ConfigError
from clockwork_serve.messages import Profile
from clockwork_serve.sim import Cluster, Constants, Simulation, Tally, read_constants
from clockwork_serve.sim.simulation import Watcher
from clockwork_serve.sim.tally import Busy, Count, DurationHistogram
from clockwork_serve.units import MIB, NS_PER_S, to_ms
from clockwork_serve.workload.scenario import Scenario, check_kinds, read_scenario
from clockwork_serve.workload.stream import Workload, build
from clockwork_serve.workload.tables import ClusterTable, FieldError, LoadTable
from clockwork_serve.workload.zoo import FILES, Zoo

# ------------------------------------------------------------
# What is to be simulated: a scenario, and what the caller changes of it.


MINUTE_S = 60.0
SHORT_S = 120.0  # scenarios up to this length are looked at second by second, longer ones minute by minute


class SimulationQuestion(Struct, frozen=True, kw_only=True):
    """A scenario made ready for one run; ``scenario`` has the caller's changes in it."""

    scenario: Scenario
    workload: Workload
    zoo: Zoo
    cluster: Cluster
    config: ControllerConfig
    constants: Constants
    seed: int

    @property
    def stretch_s(self) -> float:
        """The length of the stretches that the run is cut into, to see when it breaks."""
        return 1.0 if self.scenario.seconds <= SHORT_S else MINUTE_S

    def simulation(
        self, *, truth: dict[str, Profile] | None = None, watchers: Sequence[Watcher] = (),
        checks: bool = False, stretches: bool = True,
    ) -> Simulation:  # fmt: skip
        """The simulation that answers it, at its start.

        ``truth``: how long things really take, by kind of model, where that is not what the table says.
        ``checks``: the whole system is checked after every step. ``stretches``: they are counted, too.
        """
        return Simulation(
            workload=self.workload, zoo=self.zoo, cluster=self.cluster, config=self.config, seed=self.seed,
            constants=self.constants, truth=truth, watchers=watchers,
            bucket_ns=round(self.stretch_s * NS_PER_S) if stretches else 0, faults=self.scenario.faults,
            checks=checks,
        )  # fmt: skip


def ask(
    path: str | Path, *, config: ControllerConfig, seed: int = 1, zoo: str | None = None,
    devices: int | None = None, traces: str | Path | None = None, foreign: bool = False,
    constants: Constants | None = None,
) -> SimulationQuestion:  # fmt: skip
    """Read a scenario and make it ready.

    ``zoo`` and ``devices`` stand in for those of the scenario's cluster; ``traces`` is the folder of its
    trace files (None: beside the scenario). ``foreign``: a profile of another machine will do. ``constants``:
    delays and noise; None: those of the journal that is the table, if it is one, else the usual ones. Raises
    :class:`ConfigError`, which names file, line and field where a file is wrong.
    """
    scenario, models = read_with_zoo(path, zoo=zoo, devices=devices, foreign=foreign)
    constants = constants or delays_beside(scenario.cluster.zoo)
    question = question_of(scenario, models, config=config, seed=seed, traces=traces, constants=constants)
    _check_memory(scenario, question.cluster, models, question.workload)
    return question


def read_with_zoo(
    path: str | Path, *, zoo: str | None = None, devices: int | None = None, foreign: bool = False
) -> tuple[Scenario, Zoo]:
    """A scenario with the caller's changes, and its models' table; as in :func:`ask`."""
    scenario = read_scenario(path)
    table = _cluster_table(scenario, zoo, devices)
    try:
        scenario = structs.replace(scenario, cluster=table)
    except FieldError as error:
        raise scenario.wrong(error.field, error.what) from None
    models = _zoo(scenario, given=zoo is not None, foreign=foreign)
    check_kinds(scenario, models.models)
    return scenario, models


def question_of(
    scenario: Scenario, zoo: Zoo, *, config: ControllerConfig, seed: int, traces: str | Path | None = None,
    constants: Constants | None = None,
) -> SimulationQuestion:  # fmt: skip
    """A scenario made ready. Raises :class:`ConfigError` for what only shows now, as a broken trace."""
    cluster = cluster_of(scenario.cluster)
    return SimulationQuestion(
        scenario=scenario, workload=build(scenario, seed, None if traces is None else Path(traces)),
        zoo=zoo, cluster=cluster, config=structs.replace(config, expected_devices=cluster.devices),
        constants=constants or read_constants(), seed=seed,
    )  # fmt: skip


def cluster_of(table: ClusterTable) -> Cluster:
    """The devices that a scenario names; without ``memory_mib``, with the memory of the paper's."""
    usual = Cluster()
    page_bytes = table.page_mib * MIB
    memory_bytes = usual.pages * usual.page_bytes if table.memory_mib is None else table.memory_mib * MIB
    return Cluster(
        devices=table.devices, devices_per_worker=table.devices_per_worker, groups=table.groups,
        pages=memory_bytes // page_bytes, page_bytes=page_bytes, lanes_share=table.lanes_share,
    )  # fmt: skip


def _cluster_table(scenario: Scenario, zoo: str | None, devices: int | None) -> ClusterTable:
    """The scenario's cluster with the caller's changes; a zoo's file is looked for beside the scenario."""
    table = scenario.cluster
    if zoo is None and scenario.source is not None:
        beside = Path(scenario.source.file).parent / table.zoo
        if table.zoo.endswith(FILES) or is_journal(beside):
            table = structs.replace(table, zoo=str(beside))
    changes = {"zoo": zoo, "devices": devices}
    try:
        return ClusterTable(
            **{**structs.asdict(table), **{k: v for k, v in changes.items() if v is not None}}
        )
    except FieldError as error:
        name = "devices" if error.field == "devices_per_worker" else error.field
        raise ConfigError(f"--{name}: {error}") from None


def _zoo(scenario: Scenario, *, given: bool, foreign: bool) -> Zoo:
    name = scenario.cluster.zoo
    try:
        return read_zoo(name, foreign=foreign)
    except ConfigError as error:
        if given or name.endswith(FILES) or is_journal(name):
            raise
        raise scenario.wrong("cluster.zoo", str(error).removeprefix("zoo: ")) from None


def _check_memory(scenario: Scenario, cluster: Cluster, zoo: Zoo, workload: Workload) -> None:
    """Every model fits on a device: one that does not would never be answered."""
    pages = max(cluster.pages_of(group) for group in cluster.each())
    for kind in dict.fromkeys(kind for _, kind in workload.models):
        needed = -(-zoo[kind].weights_bytes // cluster.page_bytes)
        if needed > pages:
            mib = -(-needed * cluster.page_bytes // MIB)
            raise scenario.wrong(
                "cluster.memory_mib",
                f"expected at least {mib} for {kind}, found {pages * cluster.page_bytes // MIB} "
                "in whole pages; raise it, or remove that kind",
            )


# ------------------------------------------------------------
# Lets a simulation run while somebody watches and may stop it. It changes nothing of its course.


Tell = Callable[[float, float], None]  # told (simulated seconds, seconds that it took)


class CheckFailed(ClockworkError):
    """The machines contradicted themselves or one another; the message says when and how."""


class Played(Struct, frozen=True, kw_only=True):
    """How far a run came: the axis' time in ns, the seconds it took, and whether it was stopped early.

    ``faults`` counts those that hit something, by kind.
    """

    tally: Tally
    reached_ns: int
    took_s: float
    cut: bool
    faults: dict[str, int]


class _Stopped(Exception):
    """Somebody wants no more of it."""


def play(
    simulation: Simulation, *, tell: Tell = lambda simulated_s, took_s: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Played:  # fmt: skip
    """Run to the end, or until ``stopped()``, which is asked now and then.

    Raises :class:`CheckFailed` when a machine contradicts itself.
    """
    began = time.monotonic()

    def pulse(now_ns: int) -> None:
        tell(now_ns / NS_PER_S, time.monotonic() - began)
        if stopped():
            raise _Stopped

    cut = False
    try:
        simulation.run(pulse=pulse)
    except _Stopped:
        cut = True
    except AssertionError as error:
        raise CheckFailed(
            f"a machine contradicts itself at {simulation.now_ns / NS_PER_S:.9f} s: {error!r}"
        ) from error
    faults = simulation.faults
    return Played(
        tally=simulation.tally, reached_ns=simulation.now_ns, took_s=time.monotonic() - began, cut=cut,
        faults={} if faults is None else dict(sorted(faults.executed.items())),
    )  # fmt: skip


# ------------------------------------------------------------
# How a simulation went, as records: what ``--json`` writes; docs/use/simulate.md explains the fields.
#
# Requests sent during the warm-up are left out.


class Latency(Struct, frozen=True, kw_only=True):
    """Quantiles in ms, at most 1.6 % too long; None where there was nothing to measure."""

    count: int
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    max_ms: float | None


class LoadReport(Struct, frozen=True, kw_only=True):
    """What became of one load. Rates are over the part of ``measured_s`` in which the load was on.

    ``satisfaction``: None where none ended. ``late``: executed, but answered after the deadline. ``refused``:
    every other end but a good answer, by outcome and reason. ``open``: no answer yet, where the run was cut.
    ``cold``: in time, after a LOAD.
    """

    name: str
    arrivals: str
    slo_ms: float | None
    offered: int
    offered_rps: float
    in_time: int
    goodput_rps: float
    satisfaction: float | None
    late: int
    refused: dict[str, int]
    open: int
    cold: int
    mean_batch: float | None
    answers: Latency  # answers in time
    refusals: Latency  # all others: how long a client waited to hear that it gets nothing in time


class DeviceReport(Struct, frozen=True, kw_only=True):
    """What the devices did, all together; busy shares are of their time."""

    devices: int
    exec_busy: float
    load_busy: float
    infers: int
    loads: int
    unloads: int
    refused: int


class Stretch(Struct, frozen=True, kw_only=True):
    """One stretch of the run, by when requests were sent, all loads together."""

    from_s: float
    offered: int
    in_time: int
    late: int
    refused: int
    satisfaction: float


class FirstBreak(Struct, frozen=True, kw_only=True):
    """The first whole stretch after the warm-up in which some request was not answered in time.

    ``load`` is the load that suffered most.
    """

    from_s: float
    to_s: float
    satisfaction: float
    load: str
    load_satisfaction: float


class Report(Struct, frozen=True, kw_only=True):
    """All of it."""

    version: str
    scenario: str
    setup: dict[str, Any]
    seconds: float
    warmup_s: float
    measured_s: float
    reached_s: float
    cut: bool
    took_s: float
    loads: tuple[LoadReport, ...]
    devices: DeviceReport
    faults: dict[str, int]
    first_break: FirstBreak | None
    stretch_s: float
    stretches: tuple[Stretch, ...]

    def to_json(self) -> bytes:
        """Indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)


def report(question: SimulationQuestion, played: Played) -> Report:
    """How it went."""
    scenario, tally = question.scenario, played.tally
    reached_s = played.reached_ns / NS_PER_S
    until_s = min(reached_s, scenario.seconds)
    return Report(
        version=__version__, scenario=scenario.name, setup=_setup(question), seconds=scenario.seconds,
        warmup_s=scenario.warmup_s, measured_s=max(0.0, until_s - scenario.warmup_s), reached_s=reached_s,
        cut=played.cut, took_s=played.took_s, faults=played.faults, stretch_s=question.stretch_s,
        loads=tuple(
            _load(load, count, load.active_s(scenario.warmup_s, until_s))
            for load, count in zip(scenario.loads, tally.loads, strict=True)
        ),
        devices=_devices(tally.busy, question.cluster.devices, reached_s - scenario.warmup_s),
        first_break=_first_break(question, played), stretches=_stretches(question, played),
    )  # fmt: skip


def _setup(question: SimulationQuestion) -> dict[str, Any]:
    """What was simulated, for whoever wants to do it again."""
    scenario, cluster = question.scenario, question.cluster
    source = scenario.source
    kinds = [question.zoo[kind] for _, kind in question.workload.models]
    return {
        "file": source.file if source else None, "seed": question.seed, "policy": question.config.policy,
        "max_batch": question.config.max_batch, "zoo": scenario.cluster.zoo, "devices": cluster.devices,
        "devices_per_worker": cluster.devices_per_worker, "lanes_share": cluster.lanes_share,
        "memory_mib": cluster.pages * cluster.page_bytes / MIB, "page_mib": cluster.page_bytes / MIB,
        "groups": [structs.asdict(group) for group in cluster.groups],
        "models": len(kinds), "kinds": len({row.kind for row in kinds}),
        "weights_mib": sum(row.weights_bytes for row in kinds) / MIB,
        "workload": list(question.workload.notes), "constants": list(question.constants.lines()),
    }  # fmt: skip


def _load(load: LoadTable, count: Count, on_s: float) -> LoadReport:
    return LoadReport(
        name=load.name, arrivals=load.arrivals, slo_ms=load.slo_ms, offered=count.offered,
        offered_rps=count.offered / on_s if on_s else 0.0, in_time=count.ok,
        goodput_rps=count.ok / on_s if on_s else 0.0, late=count.late,
        satisfaction=count.satisfaction if count.ended else None,
        refused=dict(sorted(count.others.items())), open=count.offered - count.ended, cold=count.cold,
        mean_batch=count.batch_sum / count.ok if count.ok else None,
        answers=_latency(count.answered), refusals=_latency(count.refused),
    )  # fmt: skip


def _latency(histogram: DurationHistogram) -> Latency:
    values = [
        to_ms(histogram.quantile_ns(share)) if histogram.count else None for share in (0.5, 0.99, 0.999, 1.0)
    ]
    return Latency(
        count=histogram.count, p50_ms=values[0], p99_ms=values[1], p999_ms=values[2], max_ms=values[3]
    )


def _devices(busy: Busy, devices: int, seconds: float) -> DeviceReport:
    all_ns = devices * seconds * NS_PER_S
    return DeviceReport(
        devices=devices, exec_busy=busy.exec_ns / all_ns if all_ns > 0 else 0.0,
        load_busy=busy.load_ns / all_ns if all_ns > 0 else 0.0, infers=busy.infers, loads=busy.loads,
        unloads=busy.unloads, refused=busy.refused,
    )  # fmt: skip


def _stretches(question: SimulationQuestion, played: Played) -> tuple[Stretch, ...]:
    found = []
    for at, row in enumerate(played.tally.rows):
        ok, late = sum(count.ok for count in row), sum(count.late for count in row)
        ended = sum(count.ended for count in row)
        found.append(
            Stretch(
                from_s=at * question.stretch_s,
                offered=sum(count.offered for count in row),
                in_time=ok,
                late=late,
                refused=ended - ok - late,
                satisfaction=ok / ended if ended else 1.0,
            )
        )
    return tuple(found)


def _first_break(question: SimulationQuestion, played: Played) -> FirstBreak | None:
    length_s = question.stretch_s
    for at, row in enumerate(played.tally.rows):
        from_s = at * length_s
        worst = min(range(len(row)), key=lambda index: row[index].satisfaction)
        if from_s >= question.scenario.warmup_s and row[worst].satisfaction < 1:
            ended = sum(count.ended for count in row)
            return FirstBreak(
                from_s=from_s, to_s=min(from_s + length_s, question.scenario.seconds),
                satisfaction=sum(count.ok for count in row) / ended,
                load=question.scenario.loads[worst].name, load_satisfaction=row[worst].satisfaction,
            )  # fmt: skip
    return None
