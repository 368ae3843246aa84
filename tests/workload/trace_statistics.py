"""Statistics of a table of calls per minute, one row per function; they describe and judge nothing."""

from __future__ import annotations

import numpy as np

COLD_MINUTES = 10
RARE_CALLS_PER_MINUTE = 0.1


def statistics(counts: np.ndarray, first: int = 0) -> dict[str, float]:
    """Shares, rarity, idleness, clock peaks, cold minutes and Fano factors of functions that have any call.

    ``first``: the minute of the clock of the first column.
    """
    counts = counts[counts.sum(axis=1) > 0]
    functions, minutes = counts.shape
    volumes = np.sort(counts.sum(axis=1))[::-1]
    per_h = volumes / (minutes / 60)
    active = counts > 0
    by_minute = active.sum(axis=0)
    clock = np.array([by_minute[(np.arange(minutes) + first) % 60 == minute].mean() for minute in range(60)])
    clock /= np.median(clock)
    load = np.argsort(-counts.sum(axis=1), kind="stable")[round(functions * 0.01) :]
    below = counts[load].sum(axis=0)
    weight = np.array([below[(np.arange(minutes) + first) % 60 == minute].mean() for minute in range(60)])
    weight /= np.median(weight)
    means = counts.mean(axis=1)
    fano = (counts.var(axis=1) / means)[means >= RARE_CALLS_PER_MINUTE]
    return {
        "top 1 %": volumes[: round(functions * 0.01)].sum() / volumes.sum(),
        "top 10 %": volumes[: round(functions * 0.1)].sum() / volumes.sum(),
        "mean rate per function": volumes.sum() / functions / minutes / 60,
        "at most 1/h": (per_h <= 1).mean(),
        "at most 10/h": (per_h <= 10).mean(),
        "at most 1/min": (per_h <= 60).mean(),
        "at most 1/s": (per_h <= 3600).mean(),
        "per h p50": np.percentile(per_h, 50),
        "per h p75": np.percentile(per_h, 75),
        "per h p90": np.percentile(per_h, 90),
        "per h p99": np.percentile(per_h, 99),
        "idle function-minutes": 1 - active.mean(),
        "active in a mean minute": by_minute.mean() / functions,
        "active in at most 1 % of minutes": (active.mean(axis=1) <= 0.01).mean(),
        "active at :00": clock[0],
        "active at :05": clock[5],
        "active at :15": clock[15],
        "active at :30": clock[30],
        "load at :00 below the top 1 %": weight[0],
        "load at :30 below the top 1 %": weight[30],
        "cold function-minutes": cold(active) / active.sum(),
        "fano p10": np.percentile(fano, 10),
        "fano p50": np.percentile(fano, 50),
        "fano p90": np.percentile(fano, 90),
        "fano p99": np.percentile(fano, 99),
    }


def cold(active: np.ndarray) -> int:
    """Active minutes that follow more than ten idle ones, as every function's first is taken to."""
    found = 0
    for row in active:
        gaps = np.diff(np.flatnonzero(row), prepend=-COLD_MINUTES - 1)
        found += int((gaps > COLD_MINUTES).sum())
    return found


def fano_of_arrivals(times_ns: np.ndarray, window_s: float, seconds: float) -> float:
    """Variance over mean of the counts of arrivals in windows of that length."""
    windows = int(seconds / window_s)
    counts = np.bincount((times_ns / 1e9 / window_s).astype(np.int64), minlength=windows)[:windows]
    return float(counts.var() / counts.mean())
