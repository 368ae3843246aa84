"""The figures of a run's record, and the median of several runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from harness.report import quantile

NS_PER_MS: Final = 1e6
NOISY_OTHERS: Final = 0.05
"""Share of the two cores that others may use in a run that counts as undisturbed."""
NOISY_LATE_MS: Final = 5.0
"""How late the load generator may send (p99) in such a run, where a connection was free."""
NOISY_OVERSLEEP_MS: Final = 2.0
"""How much longer than asked the emulated device may take (p99)."""
WAITING_SHARE: Final = 0.01
"""More requests than that without a free connection: they are late because the server is."""
FEW: Final = 20
"""Fewer values than that have no p99."""
REASONS: Final = 8
HOT: Final = "hot"
"""The load that a table is about where there is one of this name."""

Table = npt.NDArray[Any]


def figures(head: dict[str, Any], table: Table, ends: Sequence[str]) -> dict[str, Any]:
    """Of the counted requests, those due after the warm-up; of each load too if one is ``hot``."""
    counted = table[table["scheduled_ns"] >= head["warmup_ns"]]
    seconds = (head["end_ns"] - head["warmup_ns"]) / 1e9
    found = _figures(counted, ends, seconds)
    if HOT in head["loads"]:
        found["by_load"] = {
            name: _figures(counted[counted["load"] == number], ends, seconds)
            for number, name in enumerate(head["loads"])
        }
    return found


def _figures(counted: Table, ends: Sequence[str], seconds: float) -> dict[str, Any]:
    end = np.array(ends, object)[counted["end"]]
    age_ns = counted["last_ns"] - counted["scheduled_ns"]
    answered = end == "ok"
    in_time = int(np.count_nonzero(answered & (age_ns <= counted["slo_ns"])))
    refused = np.isin(end, ["rejected", "expired", "failed"])
    sent = counted["sent_ns"] > 0
    asked = len(counted)
    return {
        "asked": asked,
        "asked_per_s": asked / seconds,
        "in_time": in_time,
        "in_time_per_s": in_time / seconds,
        "in_time_share": in_time / asked if asked else math.nan,
        "late": int(np.count_nonzero(answered)) - in_time,
        **{kind: int(np.count_nonzero(end == kind)) for kind in ("rejected", "expired", "failed", "none")},
        "p50_ms": _ms(age_ns[answered], 0.5),
        "p99_ms": _ms(age_ns[answered], 0.99),
        "no_p50_ms": _ms(age_ns[refused], 0.5),
        "no_p99_ms": _ms(age_ns[refused], 0.99),
        "sent_late_p99_ms": _ms((counted["sent_ns"] - counted["scheduled_ns"])[sent], 0.99),
    }


def _ms(durations_ns: Table, share: float) -> float | None:
    if len(durations_ns) < (FEW if share > 0.9 else 1):
        return None
    return float(quantile(durations_ns.tolist(), share)) / NS_PER_MS


def reasons(head: dict[str, Any], table: Table) -> list[tuple[str, str, int]]:
    """The ends that most requests had, in the server's words, and how many had them."""
    counts = np.bincount(table["end"], minlength=len(head["ends"])).tolist()
    ranked = sorted(zip(head["ends"], counts, strict=True), key=lambda pair: -pair[1])
    return [(kind, words, count) for (kind, words), count in ranked[:REASONS] if count]


def device(lines: Iterable[str]) -> dict[str, float]:
    """What the emulated device did, by its log: rows in the order of executions."""
    rows, over_ms = [], []
    for line in lines:
        count, wanted_ms, took_ms = line.split()
        rows.append(int(count))
        over_ms.append(float(took_ms) - float(wanted_ms))
    if not rows:
        return {}
    return {
        "executions": len(rows), "rows": sum(rows), "mean_batch": sum(rows) / len(rows),
        "oversleep_p50_ms": quantile(over_ms, 0.5), "oversleep_p99_ms": quantile(over_ms, 0.99),
    }  # fmt: skip


def noise(result: dict[str, Any]) -> list[str]:
    """What disturbed a run, in words; empty if nothing did."""
    found = []
    if result["others_share"] > NOISY_OTHERS:
        found.append(f"others used {result['others_share']:.0%} of the two cores")
    generator = result["generator"]
    late_ms = generator["late_p99_ms"] or 0.0
    waiting = generator["waited_for_connection"] > WAITING_SHARE * result["figures"]["asked"]
    if late_ms > NOISY_LATE_MS and not waiting:
        found.append(f"requests left {late_ms:.1f} ms late (p99)")
    oversleep_ms = result.get("device", {}).get("oversleep_p99_ms", 0.0)
    if oversleep_ms > NOISY_OVERSLEEP_MS:
        found.append(f"the emulated device took {oversleep_ms:.1f} ms too long (p99)")
    return found


def main_figures(result: dict[str, Any]) -> dict[str, Any]:
    """Those that a table shows."""
    found: dict[str, Any] = result["figures"]
    by_load: dict[str, dict[str, Any]] = found.get("by_load", {})
    return by_load.get(HOT, found)


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, least and most of what there is; None of nothing."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    if not there:
        return None
    return {"median": median(there), "least": min(there), "most": max(there)}
