"""Fairness: how the worst of 15 models fares when the server is nine tenths full."""

from __future__ import annotations

from typing import Final

import numpy as np

from comparison.promises import capacity
from comparison.promises.loads import EMULATED, MOBILENET, Played, names, steady
from comparison.promises.question import Figures, Question, Row, Runs, at_least, column, percent
from comparison.promises.rig import Rig

KINDS: Final = {"mobilenet": MOBILENET, "emulated": EMULATED}
MODELS: Final = 15
LOAD: Final = 0.9
SECONDS: Final = 30


def shares(played: Played) -> list[float]:
    """What share of its requests each model answered in time, of those that were asked for it."""
    counted = played.counted
    good = played.in_time(counted)
    found = []
    for model in range(len(played.head["models"])):
        mine = counted["model"] == model
        if mine.any():
            found.append(float(np.mean(good[mine])))
    return found


def measure(rig: Rig, variant: str, repeat: int) -> Figures:
    """The staircase first, then nine tenths of its best step, on the same server."""
    kind = KINDS[variant]
    with rig.serving(kind, names(MODELS)) as serving:
        limit = capacity.top(serving.play(capacity.staircase(kind, MODELS), repeat))
        rate = LOAD * limit["per_s"]
        with serving.apart():
            played = serving.play(steady(kind, MODELS, rate, seconds=SECONDS), repeat)
    by_model = shares(played)
    return {
        **serving.slot, "limit": limit, "limit_per_s": limit["per_s"], "rate_rps": rate, "shares": by_model,
        "worst_share": min(by_model), "mean_share": float(np.mean(by_model)),
        "ratio": min(by_model) / max(1e-9, float(np.mean(by_model))), "generator": played.generator,
    }  # fmt: skip


def rows(runs: Runs) -> list[Row]:
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


QUESTION: Final = Question("worst", "15 models at 90 % load", tuple(KINDS), measure, rows)
