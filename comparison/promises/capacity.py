"""What 100 % is: the most answers in time a second that a server gives on a staircase of rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from comparison.promises.loads import EMULATED, MOBILENET, SLO_MS, Played, poisson, scenario

STEP_S: Final = 4.0
SETTLE_S: Final = 1.0
"""Of each step, not counted: what the step before left in queues."""
STEPS: Final[Mapping[str, Sequence[float]]] = {
    MOBILENET: (250, 300, 350, 400, 450, 500),
    EMULATED: (60, 80, 100, 130, 170, 220),
}
"""Requests a second: from what is easy to what is too much."""


def staircase(kind: str, copies: int, **more: Any) -> str:
    """A scenario with one load for each step."""
    loads = [
        poisson(
            ["m"], rate, SLO_MS[kind], **more, name=f"step {number}", start_s=number * STEP_S,
            stop_s=(number + 1) * STEP_S,
        )
        for number, rate in enumerate(STEPS[kind])
    ]  # fmt: skip
    return scenario("staircase", [("m", kind, copies)], loads, seconds=STEP_S * len(loads), warmup_s=0)


def top(played: Played) -> dict[str, Any]:
    """The best step: ``per_s`` answers in time, and what each step gave."""
    steps = []
    for number, name in enumerate(played.head["loads"]):
        rows = played.of(name)
        rows = rows[rows["scheduled_ns"] >= (number * STEP_S + SETTLE_S) * 1e9]
        seconds = STEP_S - SETTLE_S
        good = float(np.count_nonzero(played.in_time(rows)))
        steps.append({"asked_per_s": len(rows) / seconds, "good_per_s": good / seconds})
    return {"per_s": max(step["good_per_s"] for step in steps), "steps": steps}
