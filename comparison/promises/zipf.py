"""More models than memory: what it costs in goodput that four fifths of the models are not there."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from comparison.promises.loads import MOBILENET, names, steady
from comparison.promises.question import Figures, Question, Row, Runs, at_least, column, paired, percent
from comparison.promises.rig import Rig

MODELS: Final = 100
MEMORY_MIB: Final = 200
"""20 models."""
NEAR: Final = 0.95
"""Of what the server could answer with all models in memory: less would not show what LOADs cost."""
SECONDS: Final = 24
ZIPF: Final[dict[str, Any]] = {"popularity": "zipf", "zipf_s": 0.9}


def measure(rig: Rig, variant: str, repeat: int) -> Figures:
    """One server with memory for all, or for a fifth."""
    limit = rig.limit(MOBILENET, MODELS, repeat, **ZIPF)
    rate = NEAR * limit
    memory = None if variant == "resident" else MEMORY_MIB
    with rig.serving(MOBILENET, names(MODELS), memory_mib=memory) as serving:
        loads, cold = serving.loads(), serving.cold_starts()
        with serving.apart():
            played = serving.play(steady(MOBILENET, MODELS, rate, seconds=SECONDS, **ZIPF), repeat)
        loads, cold = serving.loads() - loads, serving.cold_starts() - cold
    counted = played.counted
    return {
        **serving.slot, "limit_per_s": limit, "rate_rps": rate, "good_per_s": played.good_per_s,
        "in_time_share": float(np.mean(played.in_time(counted))), "loads": loads, "cold_starts": cold,
        "cold_share": cold / max(1, played.count("ok")),
        "loads_per_s": loads / serving.slot["seconds"], "generator": played.generator,
    }  # fmt: skip


def rows(runs: Runs) -> list[Row]:
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


QUESTION: Final = Question(
    "zipf", "100 models by Zipf's law, memory for 20", ("resident", "paged"), measure, rows
)
