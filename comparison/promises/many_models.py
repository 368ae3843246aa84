"""Many models on one server: when it is full, when memory is short, and when others come and go."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import numpy as np

from comparison.peers.loads import (
    COMERS,
    EMULATED,
    LOADS,
    MEMORY_MIB,
    MOBILENET,
    WARMUP_S,
    Load,
    names,
    steady,
)
from comparison.peers.measure import CLIENT_CORE, SERVER_CORE, Serving
from comparison.peers.peer import Setup
from comparison.peers.record import Played, ages_ns, quantile_ms
from comparison.peers.servers import Clockwork
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
from comparison.promises.rig import Rig, staircase, top
from harness.serving import total


def _loads_and_cold_starts(up: Serving) -> tuple[float, float]:
    """LOADs that went well so far, and good answers that waited for one."""
    metrics = up.metrics()
    loads = total(metrics, "clockwork_actions_total", action="load", status="ok")
    return loads, total(metrics, "clockwork_model_cold_starts_total")


# ------------------------------------------------------------
# Fairness: how the worst of 15 models fares when the server is nine tenths full.

KINDS: Final = {"mobilenet": MOBILENET, "emulated": EMULATED}
SHARING: Final = 15
LOAD: Final = 0.9
SHARING_S: Final = 30


def shares(played: Played) -> list[float]:
    """What share of its requests each model answered in time, of those that were asked for it."""
    counted = played.counted
    good = played.in_time(counted)
    found = []
    for model in range(len(played.head.models)):
        mine = counted["model"] == model
        if mine.any():
            found.append(float(np.mean(good[mine])))
    return found


def measure_worst(rig: Rig, variant: str, repeat: int) -> Figures:
    """The staircase first, then nine tenths of its best step, on the same server."""
    kind = KINDS[variant]
    with rig.serving(kind, names(SHARING)) as up:
        limit = top(up.play(staircase(kind, SHARING), repeat))
        rate = LOAD * limit["per_s"]
        with up.metered():
            played = up.play(steady(kind, SHARING, rate, seconds=SHARING_S), repeat)
    by_model = shares(played)
    return {
        **up.used, "limit": limit, "limit_per_s": limit["per_s"], "rate_rps": rate, "shares": by_model,
        "worst_share": min(by_model), "mean_share": float(np.mean(by_model)),
        "ratio": min(by_model) / max(1e-9, float(np.mean(by_model))), **played.about,
    }  # fmt: skip


def worst_rows(runs: Runs) -> list[Row]:
    """Worst by mean, and what 100 % was."""
    found = []
    for variant, title in (("mobilenet", "MobileNet"), ("emulated", "emulated device")):
        limit = column(runs, variant, "limit_per_s")
        found += [
            Row(f"{title}: in time of the worst of 15 models, by the mean", column(runs, variant, "ratio"),
                "{:.2f}", at_least(0.8)),
            Row(f"{title}: in time, the mean of models", percent(runs, variant, "mean_share"), "{:.1f} %"),
            Row(f"{title}: 100 % load, the most answers in time on a staircase", limit, "{:.0f}/s"),
        ]  # fmt: skip
    return found


WORST: Final = Question("worst", "15 models at 90 % load", tuple(KINDS), measure_worst, worst_rows)


# ------------------------------------------------------------
# More models than memory: what it costs in goodput that four fifths of them are not there.

PAGED: Final = 100
NEAR: Final = 0.95
"""Of what the server could answer with all models in memory: less would not show what LOADs cost."""
PAGED_S: Final = 24
ZIPF: Final[dict[str, Any]] = {"popularity": "zipf", "zipf_s": 0.9}


def measure_zipf(rig: Rig, variant: str, repeat: int) -> Figures:
    """One server with memory for all, or for a fifth."""
    limit = rig.limit(MOBILENET, PAGED, repeat, **ZIPF)
    rate = NEAR * limit
    memory = None if variant == "resident" else MEMORY_MIB
    with rig.serving(MOBILENET, names(PAGED), memory_mib=memory) as up:
        before = _loads_and_cold_starts(up)
        with up.metered():
            played = up.play(steady(MOBILENET, PAGED, rate, seconds=PAGED_S, **ZIPF), repeat)
        loads, cold = np.subtract(_loads_and_cold_starts(up), before).tolist()
    counted = played.counted
    return {
        **up.used, "limit_per_s": limit, "rate_rps": rate, "good_per_s": played.good_per_s,
        "in_time_share": float(np.mean(played.in_time(counted))), "loads": loads, "cold_starts": cold,
        "cold_share": cold / max(1, played.count("ok")),
        "loads_per_s": loads / up.used["seconds"], **played.about,
    }  # fmt: skip


def zipf_rows(runs: Runs) -> list[Row]:
    """Goodput beside goodput of the same requests."""
    ratio = paired(
        runs, "paged", "resident", lambda one, all_: 100 * one["good_per_s"] / max(1e-9, all_["good_per_s"])
    )
    return [
        Row("goodput with memory for 20 of 100 models, of that with all in memory", ratio, "{:.0f} %",
            at_least(85)),
        Row("all in memory: the rate, 95 % of the best step", column(runs, "resident", "rate_rps"),
            "{:.0f}/s"),
        Row("all in memory: answers in time", column(runs, "resident", "good_per_s"), "{:.0f}/s"),
        Row("all in memory: in time", percent(runs, "resident", "in_time_share"), "{:.1f} %"),
        Row("all in memory: the server's core taken", percent(runs, "resident", "server_core_share"),
            "{:.0f} %"),
        Row("memory for 20: answers that waited for a LOAD", percent(runs, "paged", "cold_share"),
            "{:.0f} %"),
        Row("memory for 20: LOADs", column(runs, "paged", "loads_per_s"), "{:.0f}/s"),
        Row("memory for 20: the server's core taken", percent(runs, "paged", "server_core_share"),
            "{:.0f} %"),
    ]  # fmt: skip


ZIPF_QUESTION: Final = Question(
    "zipf", "100 models by Zipf's law, memory for 20", ("resident", "paged"), measure_zipf, zipf_rows
)


# ------------------------------------------------------------
# Isolation: what a hot model's p99 suffers while others are loaded and unloaded beside it.

HOT_S: Final = 30
COMING: Final = replace(LOADS["mobilenet_comers"], seconds=HOT_S + WARMUP_S, memory_mib=None)


class Free(Clockwork):
    """This server as it is started on several cores: without ``chrt``, which is for one."""

    def command(self, setup: Setup) -> list[str]:
        """From ``clockwork`` on."""
        return list(super().command(setup))[3:]


FREE: Final = Free()


def hot_load(variant: str) -> Load:
    """``alone``: the hot model only; else the others are asked for too, in turn."""
    return COMING.without_comers() if variant == "alone" else COMING


def measure_hot(rig: Rig, variant: str, repeat: int) -> Figures:
    """``loads``: memory for 20, so that each of the others has to come; ``resident``: all are there."""
    memory = MEMORY_MIB if variant == "loads" else None
    models = COMING.model_names()
    cores = (SERVER_CORE, CLIENT_CORE)
    with rig.serving(MOBILENET, models, memory_mib=memory, asked=FREE, cores=cores) as up:
        before = _loads_and_cold_starts(up)
        with up.metered():
            played = up.play(hot_load(variant), repeat)
        loads, _ = np.subtract(_loads_and_cold_starts(up), before).tolist()
    hot = played.of("hot")
    answered = hot[played.is_end(hot, "ok")]
    found: Figures = {
        **up.used,
        "p50_ms": quantile_ms(ages_ns(answered), 0.5), "p99_ms": quantile_ms(ages_ns(answered), 0.99),
        "in_time_share": float(np.mean(played.in_time(hot))), "loads": loads,
        "loads_per_s": loads / (HOT_S + WARMUP_S), **played.about,
    }  # fmt: skip
    if variant != "alone":
        found["comers_in_time_share"] = float(np.mean(played.in_time(played.of(COMERS))))
    return found


def hot_rows(runs: Runs) -> list[Row]:
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


HOT: Final = Question(
    "hot", "A hot model beside 100 that come and go", ("resident", "loads", "alone"), measure_hot, hot_rows
)
