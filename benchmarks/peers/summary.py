"""What the records of a run say, and the median of several runs; it measures nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, Final

from benchmarks.peers.play import Record
from benchmarks.report import quantile

NS_PER_MS: Final = 1e6
NOISY_OTHERS: Final = 0.05
"""Share of the two cores that others may use in a run that counts as undisturbed."""
NOISY_LAG_MS: Final = 5.0
"""How late the load generator may be (p99) in such a run."""
NOISY_OVERSLEEP_MS: Final = 2.0
"""How much longer than asked the emulated device may take (p99)."""
FEW: Final = 20
"""Fewer values than that have no p99."""


def in_time(record: Record) -> bool:
    """Whether it was answered well until its deadline, counted from when it should have been sent."""
    return record.end == "ok" and record.done_ns - record.due_ns <= record.slo_ns


def figures(records: Iterable[Record], *, seconds: float, warmup_s: float, loads: Sequence[str]) -> dict[str, Any]:
    """Of the counted requests: those due after the warm-up."""
    counted = [one for one in records if one.due_ns >= warmup_s * 1e9]
    found = _figures(counted, seconds - warmup_s)
    if len(loads) > 1:
        found["by_load"] = {
            name: _figures([one for one in counted if one.load == index], seconds - warmup_s)
            for index, name in enumerate(loads)
        }
    return found


def _figures(counted: Sequence[Record], seconds: float) -> dict[str, Any]:
    good = [one for one in counted if in_time(one)]
    answered = [one for one in counted if one.end == "ok"]
    refused = [one for one in counted if one.end in {"rejected", "expired", "failed"}]
    ends = Counter(one.end for one in counted)
    asked = len(counted)
    return {
        "asked": asked,
        "asked_per_s": asked / seconds,
        "in_time": len(good),
        "in_time_per_s": len(good) / seconds,
        "in_time_share": len(good) / asked if asked else math.nan,
        "late": len(answered) - len(good),
        "rejected": ends["rejected"],
        "expired": ends["expired"],
        "failed": ends["failed"],
        "wrong": ends["wrong"],
        "unanswered": ends["none"],
        "p50_ms": _ms((one.done_ns - one.due_ns for one in answered), 0.5),
        "p99_ms": _ms((one.done_ns - one.due_ns for one in answered), 0.99),
        "no_p50_ms": _ms((one.done_ns - one.due_ns for one in refused), 0.5),
        "no_p99_ms": _ms((one.done_ns - one.due_ns for one in refused), 0.99),
        "lag_p99_ms": _ms((one.sent_ns - one.due_ns for one in counted), 0.99),
    }


def _ms(durations_ns: Iterable[int], share: float) -> float | None:
    values = list(durations_ns)
    return quantile(values, share) / NS_PER_MS if len(values) >= (FEW if share > 0.9 else 1) else None


def device(lines: Iterable[str]) -> dict[str, float]:
    """What the emulated device did, by its log: rows in the order of executions."""
    rows, over_ms, executions = 0, [], 0
    for line in lines:
        count, wanted_ms, took_ms = line.split()
        executions += 1
        rows += int(count)
        over_ms.append(float(took_ms) - float(wanted_ms))
    if not executions:
        return {}
    return {
        "executions": executions, "rows": rows, "mean_batch": rows / executions,
        "oversleep_p50_ms": quantile(over_ms, 0.5), "oversleep_p99_ms": quantile(over_ms, 0.99),
    }  # fmt: skip


def noise(result: dict[str, Any]) -> list[str]:
    """What disturbed a run, in words; empty if nothing did."""
    found = []
    if result["others_share"] > NOISY_OTHERS:
        found.append(f"others used {result['others_share']:.0%} of the two cores")
    lag_ms = result["figures"].get("lag_p99_ms") or 0.0
    if lag_ms > NOISY_LAG_MS:
        found.append(f"requests left {lag_ms:.1f} ms late (p99)")
    oversleep_ms = result.get("device", {}).get("oversleep_p99_ms", 0.0)
    if oversleep_ms > NOISY_OVERSLEEP_MS:
        found.append(f"the emulated device took {oversleep_ms:.1f} ms too long (p99)")
    return found


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, least and most of what there is; None of nothing."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    if not there:
        return None
    return {"median": median(there), "least": min(there), "most": max(there)}
