"""Devices of unequal speed, known from profiles or not: each is used for what it can do."""

from __future__ import annotations

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.tables import DeviceGroup
from clockwork_serve.workload.zoo import Zoo

SLO_MS = 10.0
"""Alone, a request takes 2.7 ms on the fast devices and 8.2 ms on the slow one."""


def in_time(rate_rps: float, *, profiled: bool) -> tuple[float, int]:
    """The share answered in time by devices 1, 2, 3 and 1 times as slow, and how many were late."""
    made = Scenario(
        name="unequal", seconds=5.0, warmup_s=2.0,
        models=(ModelSet(name="m", kind="resnet50_v2", copies=12),),
        loads=(LoadTable(name="l", models=("m",), arrivals="poisson", rate_rps=rate_rps, slo_ms=SLO_MS),),
    )  # fmt: skip
    groups = tuple(DeviceGroup(slower=slower, profiled=profiled) for slower in (1, 2, 3, 1))
    tally = Simulation(
        workload=build(made, seed=1), zoo=Zoo.read("v100"), cluster=Cluster(devices=4, groups=groups),
        config=ControllerConfig(expected_devices=4), seed=1, checks=True,
    ).run()  # fmt: skip
    return tally.total().satisfaction, tally.total().late


@pytest.mark.parametrize("profiled", [True, False])
@pytest.mark.parametrize(("rate_rps", "wanted"), [(800, 0.985), (1400, 0.81), (2000, 0.61)])
def test_unequal_devices_serve_what_they_can(rate_rps: float, wanted: float, profiled: bool) -> None:
    found, late = in_time(rate_rps, profiled=profiled)
    assert found >= wanted
    assert late <= 5, "a slow device is found out at once"
