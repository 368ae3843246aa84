"""Isolation: what a hot model's p99 suffers while others are loaded and unloaded beside it."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from comparison.peers.clockwork.adapter import Clockwork
from comparison.peers.measure import CLIENT_CORE, SERVER_CORE
from comparison.peers.peer import Setup
from comparison.promises.loads import MOBILENET, SLO_MS, ages_ns, names, poisson, quantile_ms, scenario
from comparison.promises.question import (
    Figures,
    Question,
    Row,
    Runs,
    at_least,
    at_most,
    column,
    paired,
    percent,
)
from comparison.promises.rig import Rig

OTHERS: Final = 100
HOT_RPS: Final = 100
COMERS_RPS: Final = 25
MEMORY_MIB: Final = 200
"""20 models."""
SECONDS, WARMUP_S = 30, 4


class Free(Clockwork):
    """This server as it is started on several cores: without ``chrt``, which is for one."""

    def command(self, setup: Setup) -> list[str]:
        """From ``clockwork`` on."""
        return list(super().command(setup))[3:]


FREE: Final = Free()


def text(variant: str) -> str:
    """``alone``: the hot model only; else the others are asked for too, in turn."""
    loads: list[dict[str, Any]] = [poisson(["hot"], HOT_RPS, SLO_MS[MOBILENET], name="hot")]
    if variant != "alone":
        comers = poisson(["m"], COMERS_RPS, SLO_MS[MOBILENET], name="comers", arrivals="fixed")
        loads.append(comers)
    models = [("hot", MOBILENET, 1), ("m", MOBILENET, OTHERS)]
    return scenario(f"hot, {variant}", models, loads, seconds=SECONDS + WARMUP_S, warmup_s=WARMUP_S)


def measure(rig: Rig, variant: str, repeat: int) -> Figures:
    """``loads``: memory for 20, so that each of the others has to come; ``resident``: all are there."""
    memory = MEMORY_MIB if variant == "loads" else None
    models = ["hot", *names(OTHERS)]
    cores = (SERVER_CORE, CLIENT_CORE)
    with rig.serving(MOBILENET, models, memory_mib=memory, asked=FREE, cores=cores) as serving:
        before = serving.loads()
        with serving.apart():
            played = serving.play(text(variant), repeat)
        loads = serving.loads() - before
    hot = played.of("hot")
    answered = hot[played.is_end(hot, "ok")]
    found: Figures = {
        **serving.slot,
        "p50_ms": quantile_ms(ages_ns(answered), 0.5), "p99_ms": quantile_ms(ages_ns(answered), 0.99),
        "in_time_share": float(np.mean(played.in_time(hot))), "loads": loads,
        "loads_per_s": loads / (SECONDS + WARMUP_S), "generator": played.generator,
    }  # fmt: skip
    if variant != "alone":
        found["comers_in_time_share"] = float(np.mean(played.in_time(played.of("comers"))))
    return found


def rows(runs: Runs) -> list[Row]:
    """p99 beside p99 of the same repeat."""

    def worse(one: Figures, other: Figures) -> float:
        both = one["p99_ms"] and other["p99_ms"]
        return float(100 * (one["p99_ms"] / other["p99_ms"] - 1)) if both else math.nan

    return [
        Row("p99 while others come and go: more than with the same requests and no LOADs",
            paired(runs, "loads", "resident", worse), "{:+.0f} %", at_most(10)),
        Row("LOADs meanwhile", column(runs, "loads", "loads_per_s"), "{:.1f}/s", at_least(20)),
        Row("p99 while others come and go", column(runs, "loads", "p99_ms"), "{:.1f} ms"),
        Row("p99 with the same requests, all in memory", column(runs, "resident", "p99_ms"), "{:.1f} ms"),
        Row("p99 alone", column(runs, "alone", "p99_ms"), "{:.1f} ms"),
        Row("in time of those that come", percent(runs, "loads", "comers_in_time_share"), "{:.1f} %"),
    ]  # fmt: skip


QUESTION: Final = Question(
    "hot", "A hot model beside 100 that come and go", ("resident", "loads", "alone"), measure, rows
)
