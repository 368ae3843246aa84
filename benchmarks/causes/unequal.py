"""Devices that are not equally fast: what each is given, by its own time, estimates and slack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from benchmarks.causes.cases import Case, Found, Given, calls, copies, share_in_time
from benchmarks.causes.sketches import Sketch
from clockwork_serve.sim import Cluster
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.tables import DeviceGroup

SLOWER: Final = (1.0, 2.0, 3.0, 1.0)
SLO_MS: Final = 10.0
"""On the slowest device a request alone takes 8.2 ms."""


def _scenario(rate_rps: float, seconds: float) -> Scenario:
    return copies("resnet50_v2", 12, seconds, calls(rate_rps, SLO_MS))


def _play(rate_rps: float, *, profiled: bool) -> Callable[[Given], Found]:
    groups = tuple(DeviceGroup(slower=slower, profiled=profiled) for slower in SLOWER)
    sketches = (Sketch("edf", speeds=SLOWER), Sketch("yield-greedy", speeds=SLOWER))
    return share_in_time(partial(_scenario, rate_rps), Cluster(devices=4, groups=groups), sketches)


CASES: Final = tuple(
    Case(
        f"unequal-{rate}{'' if profiled else '-unknown'}",
        f"12 models on devices 1, 2, 3, 1 times as slow, {rate} r/s at {SLO_MS:g} ms",
        asked=asked, before=before, play=_play(rate, profiled=profiled),
        note="" if profiled else "no profile tells",
    )
    for profiled, cases in (
        (False, ((800, 0.99, 0.876), (1400, 0.81, 0.712), (2000, 0.61, 0.530))),
        (True, ((800, 0.99, 0.876), (2000, 0.61, 0.530))),
    )
    for rate, asked, before in cases
)  # fmt: skip
