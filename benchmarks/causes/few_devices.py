"""Where there is little to do, few devices do it."""

from __future__ import annotations

from typing import Final

from msgspec import structs

from benchmarks.causes.cases import WARMUP_S, Case, Found, Given, calls, copies, simulated
from clockwork_serve.sim import Cluster

DEVICES: Final = 8
RUSH_RPS: Final = 5500
"""Of more requests during the warm-up, so that each device has the weights."""
IDLE: Final = 0.02
"""A device that is occupied for less of the time could be taken away."""


def play(given: Given) -> Found:
    """How many of the devices are used."""
    rush = structs.replace(calls(RUSH_RPS, 25), name="rush", stop_s=WARMUP_S / 2)
    scenario = copies("resnet50_v1", 1, given.seconds(20, 8), calls(1500, 25), rush)
    played = simulated(scenario, Cluster(devices=DEVICES), given)
    batch = played.tally.total().batch_sum / (played.tally.total().ok or 1)
    shares = " ".join(f"{share:.2f}" for share in played.busy)
    more = f"in time {played.in_time:.5f}, batch {batch:.1f}, busy {shares}"
    used = sum(share > IDLE for share in played.busy)
    return Found(used if played.in_time >= 0.9999 else DEVICES, more=more)


CASES: Final = (
    Case(
        "few-devices", "1,500 r/s of one model at 25 ms on eight devices: how many are used", asked=4,
        before=8, at_most=True, play=play, note="counts as all eight if more than 0.01 % is lost",
    ),
)  # fmt: skip
