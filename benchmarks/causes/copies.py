"""Idle memory and load lanes make copies of what is asked for."""

from __future__ import annotations

from typing import Final

from benchmarks.causes.cases import Case, calls, copies, share_in_time
from benchmarks.causes.sketches import Sketch
from clockwork_serve.sim import Cluster

SKETCHES: Final = (Sketch("edf"), Sketch("yield-greedy"))

CASES: Final = (
    Case(
        "copies", "16 models on 4 devices that are 13 % busy, SLO 5 ms", asked=0.9995, before=0.980,
        play=share_in_time(
            lambda seconds: copies("resnet50_v1", 16, seconds, calls(200, 5)),
            Cluster(devices=4), SKETCHES,
        ),
    ),
)  # fmt: skip
