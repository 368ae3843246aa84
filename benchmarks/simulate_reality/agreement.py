"""Holds real runs against simulated ones: a table of differences, and whether they are small enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.simulate_reality.calibration import Calibration, Delays
from harness.machine import Disturbance
from harness.report import Outcome, percent, quantile, table

GOODPUT_TOLERANCE, P99_TOLERANCE = 0.05, 0.15
"""What is always near enough; else the spread of the real runs decides."""
SEEN = (
    "of capacity", "to controller", "to client", "to idle lane", "from lane", "between actions",
    "times profile", "late",
)  # fmt: skip
OTHERS_MAX, STOLEN_MAX = 0.05, 0.005
"""Shares of one core that others may take before the runs prove nothing."""


@dataclass(slots=True)
class Run:
    """One run, real or not: requests sent after the warm-up."""

    goodput_rps: float
    p50_ms: float
    p99_ms: float
    late: int
    refused: int
    offered: int
    delays: Delays | None = None
    slowness: float = 0.0

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "goodput_rps": self.goodput_rps, "p50_ms": self.p50_ms, "p99_ms": self.p99_ms, "late": self.late,
            "refused": self.refused, "offered": self.offered,
        }  # fmt: skip


@dataclass(slots=True)
class Pair:
    """All runs at one share of the capacity."""

    share: float
    real: list[Run]
    ours: list[Run]


def agrees(real: Sequence[float], ours: Sequence[float], tolerance: float) -> bool:
    """Whether the medians are near enough, or ours lies within the real runs."""
    wanted, found = median(real), median(ours)
    return abs(found - wanted) <= tolerance * wanted or min(real) <= found <= max(real)


def compare(outcome: Outcome, pair: Pair) -> list[list[str]]:
    """Judge one share; two rows of the table of differences."""
    rows = []
    for what, unit, field, tolerance in (
        ("goodput", "r/s", "goodput_rps", GOODPUT_TOLERANCE), ("p99", "ms", "p99_ms", P99_TOLERANCE),
    ):  # fmt: skip
        seen = [float(getattr(one, field)) for one in pair.real]
        told = [float(getattr(one, field)) for one in pair.ours]
        off = median(told) / median(seen) - 1
        outcome.judge(
            f"{what} at {pair.share:g} of capacity", asked=f"within {tolerance:.0%}, or the real runs",
            found=f"{off:+.1%}", good=agrees(seen, told, tolerance),
        )  # fmt: skip
        rows.append(
            [
                f"{pair.share:g}", f"{what} {unit}",
                f"{median(seen):.1f}", f"{min(seen):.1f} to {max(seen):.1f}",
                f"{median(told):.1f}", f"{min(told):.1f} to {max(told):.1f}", f"{off:+.1%}",
            ]
        )  # fmt: skip
    return rows


def seen_row(share: float, runs: Sequence[Run]) -> list[str]:
    """What a real server's world was like at one share: where a difference may come from."""
    parts: dict[str, list[int]] = {"up": [], "down": [], "there": [], "back": [], "turn": []}
    for one in runs:
        assert one.delays is not None
        for name, values in parts.items():
            values.extend(getattr(one.delays, name))
    cells = [
        f"{quantile(values, 0.5) / 1e3:.0f} / {quantile(values, 0.99) / 1e3:.0f}" if values else "-"
        for values in parts.values()
    ]
    late = percent(sum(one.late for one in runs), sum(one.offered for one in runs))
    return [f"{share:g}", *cells, f"{median(one.slowness for one in runs):.3f}", late]


def why_invalid(disturbed: Disturbance) -> str:
    """What disturbed the real runs too much; empty if nothing did."""
    reasons = []
    for name, used_s, most in (
        ("used by others", disturbed.others_s, OTHERS_MAX), ("stolen", disturbed.stolen_s, STOLEN_MAX),
    ):  # fmt: skip
        if used_s > most * disturbed.seconds:
            reasons.append(f"{percent(used_s, disturbed.seconds)} of a core {name}")
    return ", ".join(reasons)


def conclude(
    outcome: Outcome,
    found: Calibration,
    capacity: float,
    pairs: Sequence[Pair],
    disturbed: Disturbance,
) -> None:
    """Print the tables; judge."""
    print("\nthe simulated world, measured at 0.65 of the capacity:")
    for line in found.constants.lines():
        print(f"  {line}")
    slowest = ", ".join(f"{value:.3f}" for value in found.slowness.values())
    print(f"  durations: {slowest} times the profile's, and {found.turn_ns / 1e3:.0f} us between two")
    rows = [row for pair in pairs for row in compare(outcome, pair)]
    head = ("of capacity", "", "real, median", "real runs", "simulated, median", "simulated runs", "off by")
    print(f"\ncapacity {capacity:.1f} r/s\n{table(head, rows)}")
    print("\nwhat the real runs saw (us, p50 / p99; medians):")
    print(table(SEEN, [seen_row(pair.share, pair.real) for pair in pairs]))
    outcome.figures = {
        "capacity_rps": capacity, "constants": list(found.constants.lines()),
        "slowness": list(found.slowness.values()), "between_actions_us": found.turn_ns / 1e3,
        "shares": {
            f"{pair.share:g}": {
                "real": [one.record() for one in pair.real],
                "simulated": [one.record() for one in pair.ours],
            }
            for pair in pairs
        },
        "differences": rows,
        "others_share": disturbed.others_s / disturbed.seconds,
        "stolen_share": disturbed.stolen_s / disturbed.seconds,
    }  # fmt: skip
