"""Which weights are evicted: those of a cool model's only copy, or those of a hot one's second."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from benchmarks.causes.cases import ZOO, Case, Found, Given, calls, copies, share_in_time
from benchmarks.causes.sketches import Sketch
from clockwork_serve.sim import Cluster
from clockwork_serve.units import MIB
from clockwork_serve.workload.scenario import Scenario

MODELS: Final = 60


def halves(model: int, _: int) -> tuple[int, ...]:
    """Each of two devices has every second model for ever."""
    return (model % 2,)


def _scenario(kind: str, rate_rps: float, slo_ms: float, seconds: float) -> Scenario:
    return copies(kind, MODELS, seconds, calls(rate_rps, slo_ms, zipf_s=0.7))


def _play(kind: str, rate_rps: float, slo_ms: float) -> Callable[[Given], Found]:
    sketches = (Sketch("edf", homes=halves), Sketch("yield-greedy", homes=halves))
    pages = MODELS // 2 * -(-ZOO[kind].weights_bytes // (16 * MIB))
    return share_in_time(
        partial(_scenario, kind, rate_rps, slo_ms), Cluster(devices=2, pages=pages), sketches
    )


CASES: Final = tuple(
    Case(
        f"eviction-{at}", f"60 {kind} (Zipf), 2 devices that hold 30 each, {rate} r/s at {slo:g} ms",
        asked=asked, before=before, play=_play(kind, rate, slo), note=note,
    )
    for at, (kind, rate, slo, asked, before, note) in enumerate((
        ("winograd_resnet18_v2", 2200, 6.0, 0.94, 0.787, ""),
        ("resnet50_v1", 600, 8.0, 0.95, 0.782, "harder than the first, where halves reach .919"),
        ("resnet18_v1", 1500, 3.8, 0.84, 0.744, ""),
        ("resnet152_v2", 250, 19.5, 0.85, 0.733, "not the first case: .772 then, where halves reach .790"),
    ))
)  # fmt: skip
"""A LOAD takes longer than the SLO. The first cases are known by their figures only: kinds, rates and SLOs
here give about the same before, and about the same with halves."""
