"""The journal of a run that asks for more memory and time than there are, for two tenants."""

from __future__ import annotations

from pathlib import Path

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.telemetry import Journal, head_of
from clockwork_serve.units import MIB
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.tables import TenantTable
from clockwork_serve.workload.zoo import Zoo


def journal_of(path: Path) -> Path:
    """Run it and write its journal."""
    scenario = Scenario(
        name="overload", seconds=2.0,
        models=tuple(ModelSet(name=name, kind="resnet50_v2", copies=4) for name in ("a", "b")),
        loads=tuple(
            LoadTable(
                name=name, models=(name,), arrivals="poisson", rate_rps=650.0, slo_ms=slo_ms, tenant=name
            )
            for name, slo_ms in (("a", 50.0), ("b", 80.0))
        ),
        tenants=(TenantTable(name="a", burst_s=1.0), TenantTable(name="b", burst_s=1.0)),
    )  # fmt: skip
    config = ControllerConfig(expected_devices=2)
    journal = Journal(path, head_of(config))
    Simulation(
        workload=build(scenario, 1), zoo=Zoo.read("v100"), seed=1, config=config,
        cluster=Cluster(devices=2, pages=15, page_bytes=16 * MIB), watchers=[journal],
    ).run()  # fmt: skip
    journal.close()
    return path
