"""How long before a deadline plans end: by what share of the errors of prediction."""

from __future__ import annotations

from typing import Final

from benchmarks.causes.cases import Case, calls, copies, share_in_time
from benchmarks.causes.sketches import Sketch
from clockwork_serve.sim import Cluster
from clockwork_serve.workload.scenario import Scenario


def _scenario(seconds: float) -> Scenario:
    return copies("resnet50_v2", 12, seconds, calls(2400, 4.35))


CASES: Final = (
    Case(
        "slack", "12 models on 6 devices, 2,400 r/s at 4.35 ms", asked=0.84, before=0.829,
        note="0.1 ms of slack is worth 2 %", play=share_in_time(
            _scenario, Cluster(devices=6), (Sketch("edf"), Sketch("yield-greedy"))
        ),
    ),
)  # fmt: skip
