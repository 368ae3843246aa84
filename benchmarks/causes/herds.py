"""Clients that are refused at one instant would return at one, and be too old for large batches."""

from __future__ import annotations

from typing import Final

from benchmarks.causes.cases import Case, Found, Given, simulated
from clockwork_serve.sim import Cluster
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario

SLO_MS: Final = 8.2
WARM_S, WARMUP_S = 1.0, 1.5
"""Weights are loaded at a loose SLO first: no LOAD meets the tight one."""
RETURNS_MS: Final = (0.3, 1.0, 5.0, 20.0)
CLUSTER: Final = Cluster(devices=2)


def _scenario(given: Given, return_ms: float) -> Scenario:
    clients = LoadTable(
        name="clients", models=("model",), arrivals="closed", concurrency=64, slo_ms=SLO_MS, start_s=WARM_S,
        retry_ms=return_ms,
    )  # fmt: skip
    warm = LoadTable(
        name="warm", models=("model",), arrivals="fixed", rate_rps=150.0, slo_ms=250.0, stop_s=WARM_S
    )
    return Scenario(
        name="herds", seconds=WARMUP_S + given.seconds(2, 1), warmup_s=WARMUP_S, loads=(clients, warm),
        models=(ModelSet(name="model", kind="resnet50_v2", copies=4),),
    )  # fmt: skip


def _worst(given: Given) -> Found:
    """The fewest good answers a second of any time after which clients return."""
    found = {ms: simulated(_scenario(given, ms), CLUSTER, given).good_rps for ms in RETURNS_MS}
    return Found(min(found.values()), None, ", ".join(f"{ms:g} ms {rps:.0f}" for ms, rps in found.items()))


CASES: Final = (
    Case(
        "herds", "4 models x 64 clients on 2 devices, SLO 8.2 ms, back 0.3 to 20 ms after a refusal",
        asked=1189, before=925, play=_worst,
        note="good answers a second, the worst of all times; a sketch reached 1,189 at 1 ms",
    ),
)  # fmt: skip
