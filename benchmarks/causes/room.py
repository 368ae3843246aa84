"""What it costs to seek room on two devices that are full, where four would hold all that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.causes.cases import Case, Found, Given, simulated
from clockwork_serve.sim import Cluster
from clockwork_serve.workload.scenario import read_scenario

SCENARIO: Final = Path(__file__).parents[2] / "examples" / "scenarios" / "many_customers.toml"


def play(given: Given) -> Found:
    """CPU time of the same scenario with two devices, in that with one."""
    scenario = read_scenario(SCENARIO)
    one, two = (simulated(scenario, Cluster(devices=count), given).cpu_s for count in (1, 2))
    return Found(two / one, more=f"{two:.1f} s, {one:.1f} s with one device")


CASES: Final = (
    Case(
        "room", "many_customers.toml: CPU with two devices, in that with one", asked=1.5, before=5.0,
        at_most=True, play=play,
        note="two devices do 2.1 times as much, in batches and in LOADs",
    ),
)  # fmt: skip
