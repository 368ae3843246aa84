"""Classes of priority share batches, and the most urgent goes first where it cannot wait."""

from __future__ import annotations

from typing import Final

from msgspec import structs

from benchmarks.causes.cases import ZOO, Case, Found, Given, calls, copies, simulated
from benchmarks.causes.sketches import Sketch
from clockwork_serve.sim import Cluster
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.stream import build

PRIORITIES: Final = (1, 8, 15)
RATE_RPS: Final = 1500
CLUSTER: Final = Cluster(devices=2)


def _scenario(given: Given) -> Scenario:
    loads = [
        structs.replace(calls(RATE_RPS / len(PRIORITIES), 50), name=f"class {priority}", priority=priority)
        for priority in PRIORITIES
    ]
    return copies("resnet50_v2", 12, given.seconds(30, 10), *loads)


def _all(given: Given) -> Found:
    made = _scenario(given)
    played = simulated(made, CLUSTER, given)
    sketch = Sketch("edf", by_class=True).serve(build(made, given.seed), ZOO, CLUSTER.devices)
    by_class = ", ".join(f"{count.satisfaction:.4f}" for count in played.tally.loads)
    return Found(played.in_time, sketch.in_time, f"by class {by_class}")


def _urgent(given: Given) -> Found:
    return Found(simulated(_scenario(given), CLUSTER, given).tally.loads[0].satisfaction)


CASES: Final = (
    Case(
        "classes", "12 models and three classes on 2 devices, 1,500 r/s, SLO 50 ms", asked=0.85, before=0.579,
        play=_all,
    ),
    Case("classes-urgent", "the most urgent class of these", asked=0.999, before=1.0, play=_urgent),
)  # fmt: skip
