"""What is to be simulated: a scenario, and what the caller changes of it. It runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct, structs

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Profile
from clockwork_serve.sim import Cluster, Constants, Simulation, read_constants
from clockwork_serve.sim.simulation import Watcher
from clockwork_serve.units import MIB, NS_PER_S
from clockwork_serve.workload.scenario import Scenario, check_kinds, read_scenario
from clockwork_serve.workload.stream import Workload, build
from clockwork_serve.workload.tables import ClusterTable, FieldError
from clockwork_serve.workload.zoo import Zoo

MINUTE_S = 60.0
SHORT_S = 120.0
"""Scenarios up to this length are looked at second by second, longer ones minute by minute."""


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
        self,
        *,
        truth: dict[str, Profile] | None = None,
        watchers: Sequence[Watcher] = (),
        checks: bool = False,
    ) -> Simulation:
        """The simulation that answers it, at its start.

        ``truth``: how long things really take, by kind of model, where that is not what the table says.
        ``checks``: the whole system is checked after every step.
        """
        return Simulation(
            workload=self.workload,
            zoo=self.zoo,
            cluster=self.cluster,
            config=self.config,
            seed=self.seed,
            constants=self.constants,
            truth=truth,
            watchers=watchers,
            bucket_ns=round(self.stretch_s * NS_PER_S),
            faults=self.scenario.faults,
            checks=checks,
        )


def ask(
    path: str | Path,
    *,
    config: ControllerConfig,
    seed: int = 1,
    zoo: str | None = None,
    devices: int | None = None,
    traces: str | Path | None = None,
) -> SimulationQuestion:
    """Read a scenario and make it ready.

    ``zoo`` and ``devices`` stand in for those of the scenario's cluster; ``traces`` is the folder of its
    trace files (None: beside the scenario). Raises :class:`ConfigError`, which names file, line and field
    where a file is wrong.
    """
    scenario = read_scenario(path)
    table = _cluster_table(scenario, zoo, devices)
    try:
        scenario = structs.replace(scenario, cluster=table)
    except FieldError as error:
        raise scenario.wrong(error.field, error.what) from None
    models = _zoo(scenario, given=zoo is not None)
    check_kinds(scenario, models.models)
    workload = build(scenario, seed, None if traces is None else Path(traces))
    cluster = cluster_of(table)
    _check_memory(scenario, cluster, models, workload)
    return SimulationQuestion(
        scenario=scenario,
        workload=workload,
        zoo=models,
        cluster=cluster,
        config=structs.replace(config, expected_devices=cluster.devices),
        constants=read_constants(),
        seed=seed,
    )


def cluster_of(table: ClusterTable) -> Cluster:
    """The devices that a scenario names; without ``memory_mib``, with the memory of the paper's."""
    usual = Cluster()
    page_bytes = table.page_mib * MIB
    memory_bytes = usual.pages * usual.page_bytes if table.memory_mib is None else table.memory_mib * MIB
    return Cluster(
        devices=table.devices,
        devices_per_worker=table.devices_per_worker,
        pages=memory_bytes // page_bytes,
        page_bytes=page_bytes,
        lanes_share=table.lanes_share,
    )


def _cluster_table(scenario: Scenario, zoo: str | None, devices: int | None) -> ClusterTable:
    """The scenario's cluster with the caller's changes; a zoo's file is looked for beside the scenario."""
    table = scenario.cluster
    if zoo is None and table.zoo.endswith(".csv") and scenario.source is not None:
        table = structs.replace(table, zoo=str(Path(scenario.source.file).parent / table.zoo))
    changes = {"zoo": zoo, "devices": devices}
    try:
        return ClusterTable(
            **{**structs.asdict(table), **{k: v for k, v in changes.items() if v is not None}}
        )
    except FieldError as error:
        name = "devices" if error.field == "devices_per_worker" else error.field
        raise ConfigError(f"--{name}: {error}") from None


def _zoo(scenario: Scenario, *, given: bool) -> Zoo:
    name = scenario.cluster.zoo
    try:
        return Zoo.read(name)
    except ConfigError as error:
        if given or name.endswith(".csv"):
            raise
        raise scenario.wrong("cluster.zoo", str(error).removeprefix("zoo: ")) from None


def _check_memory(scenario: Scenario, cluster: Cluster, zoo: Zoo, workload: Workload) -> None:
    """Every model fits on a device: one that does not would never be answered."""
    for kind in dict.fromkeys(kind for _, kind in workload.models):
        needed = -(-zoo[kind].weights_bytes // cluster.page_bytes)
        if needed > cluster.pages:
            mib = -(-needed * cluster.page_bytes // MIB)
            raise scenario.wrong(
                "cluster.memory_mib",
                f"expected at least {mib} for {kind}, found {cluster.pages * cluster.page_bytes // MIB} "
                "in whole pages; raise it, or remove that kind",
            )
