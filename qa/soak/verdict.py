"""What a soak promises, held against what was found. It asks nothing of the server."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from harness.report import Outcome
from qa.soak.load import Ends
from qa.soak.watch import Held, Quiet, growth_kib, leaked, lives

REQUESTS_PER_HOUR: Final = 1_000_000
GROWTH_KIB: Final = 5 * 1024
THREADS: Final = 2
"""gRPC's core adds one to a gateway's pool, once or twice, when all of it are busy; a leak has more."""
WARM_SHARE: Final = 0.25
WARM_LEGS: Final = 5
"""Quiet moments of this first share of a soak, at least those after each scenario came once, and the first of
each process, are warm-up."""
POINTS_MIN: Final = 3
"""Of a life after its warm-up, or nothing is said of it."""
OVER_SHARE: Final = 1e-4
"""A machine of two cores that does all of this stands still for 40 ms now and then."""
DRIFT_MAX: Final = 2.0
DRIFT_FLOOR_MS: Final = 0.5
"""Errors as small as this are one: the histogram's buckets are coarse."""


@dataclass(slots=True)
class Findings:
    """All that a soak found."""

    seconds: float = 0.0
    ends: Ends = field(default_factory=Ends)
    honest: Counter[str] = field(default_factory=Counter)
    quiets: list[Quiet] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    over: int = 0
    """Good answers that came after their clients had been told that their deadline was over."""
    faults: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    ended: list[str] = field(default_factory=list)
    """Processes that ended by themselves."""
    tracebacks: list[str] = field(default_factory=list)
    cut: bool = False

    @property
    def requests(self) -> int:
        """Of the generator and of clients that check answers."""
        return self.ends.asked + sum(self.honest.values())

    def warm(self) -> list[Quiet]:
        """The quiet moments after the warm-up."""
        return self.quiets[max(WARM_LEGS, round(len(self.quiets) * WARM_SHARE)) :]


@dataclass(slots=True)
class Growth:
    """The worst of a process's lives."""

    lives: int = 0
    kib: int = 0
    files: int = 0
    threads: int = 0


def growths(quiets: list[Quiet]) -> dict[str, Growth]:
    """By process: how much it grew after its warm-up, in the worst of its lives."""
    found: dict[str, Growth] = {}
    for name, own in lives(quiets, warm_points=1).items():
        growth = found.setdefault(name, Growth())
        for life in own:
            if len(life) >= POINTS_MIN:
                growth.lives += 1
                growth.kib = max(growth.kib, growth_kib([one.own_kib for one in life]))
                growth.files = max(growth.files, _leaked(life, "files"))
                growth.threads = max(growth.threads, _leaked(life, "threads"))
    return found


def _leaked(life: list[Held], what: str) -> int:
    return leaked([int(getattr(one, what)) for one in life])


def drift(quiets: list[Quiet], server: str) -> tuple[float, float]:
    """The usual error of predictions in the first third and in the last: medians of p50, in ms."""
    found = [one.error_ms[f"{server} p50"] for one in quiets if f"{server} p50" in one.error_ms]
    if not found:
        return 0.0, 0.0
    third = max(1, len(found) // 3)
    first, last = sorted(found[:third]), sorted(found[-third:])
    return first[len(first) // 2], last[len(last) // 2]


def conclude(found: Findings) -> Outcome:
    """The promises."""
    outcome = Outcome("qa.soak")
    rate = found.requests / found.seconds * 3600 if found.seconds else 0.0
    outcome.judge(
        f"requests in {found.seconds / 60:.1f} minutes, for each hour", asked=f">= {REQUESTS_PER_HOUR:,}",
        found=f"{found.requests:,}: {rate:,.0f}", good=rate >= REQUESTS_PER_HOUR,
    )  # fmt: skip
    kinds = Counter(one.partition(":")[0].partition(" of ")[0] for one in found.violations)
    outcome.judge(
        "violations: lost, twice, wrong, late counted good, books", asked="0",
        found=f"{len(found.violations)} {dict(kinds) if kinds else ''}".strip(), good=not found.violations,
    )  # fmt: skip
    outcome.judge(
        "good answers that came 40 ms after the deadline or later", asked=f"<= {OVER_SHARE:.2%}",
        found=f"{found.over} of {found.ends.good:,}", good=found.over <= OVER_SHARE * found.ends.good,
    )  # fmt: skip
    warm = found.warm()
    for name, growth in sorted(growths(warm).items()):
        if growth.lives:
            outcome.judge(
                f"{name}: growth after warm-up, worst of {growth.lives}",
                asked=f"<= {GROWTH_KIB // 1024} MiB, 0 files, {THREADS} threads",
                found=f"{growth.kib / 1024:+.1f} MiB, {growth.files} files, {growth.threads} threads",
                good=growth.kib <= GROWTH_KIB and not growth.files and growth.threads <= THREADS,
            )
    more = leaked([one.segments for one in warm]) if warm else 0
    outcome.judge("segments of shared memory leaked", asked="0", found=str(more), good=not more)
    _judge_drift(outcome, warm)
    outcome.judge(
        "processes that ended by themselves", asked="none", found=", ".join(found.ended) or "none",
        good=not found.ended,
    )  # fmt: skip
    outcome.judge(
        "tracebacks in logs", asked="0", found=str(len(found.tracebacks)), good=not found.tracebacks
    )
    if len(warm) < POINTS_MIN:
        outcome.invalid = (
            f"{len(warm)} quiet moments after the warm-up tell nothing of growth: let it run longer"
        )
    elif found.cut:
        outcome.invalid = "it was stopped before its end"
    outcome.figures = figures(found)
    return outcome


def _judge_drift(outcome: Outcome, warm: list[Quiet]) -> None:
    for server in ("cpu", "emulated"):
        before, after = drift(warm, server)
        outcome.judge(
            f"{server}: usual error of predictions, first third and last",
            asked=f"<= {DRIFT_MAX:g} times, or {DRIFT_FLOOR_MS:g} ms",
            found=f"{before:.2f} ms, {after:.2f} ms",
            good=after <= max(DRIFT_FLOOR_MS, DRIFT_MAX * before),
        )  # fmt: skip


def figures(found: Findings) -> dict[str, Any]:
    """Numbers for the record."""
    ends = found.ends
    return {
        "seconds": round(found.seconds), "requests": found.requests, "good": ends.good, "late": ends.late,
        "over": found.over,
        "failed": ends.failed, "lost_with_a_killed_gateway": ends.lost,
        "reasons": dict(ends.reasons.most_common(20)), "honest": dict(found.honest.most_common(20)),
        "faults": dict(found.faults), "changes": dict(found.changes), "violations": found.violations[:50],
        "ended": found.ended, "tracebacks": found.tracebacks[:20],
        "growth": {
            name: [one.kib, one.files, one.threads]
            for name, one in growths(found.warm()).items()
            if one.lives
        },
    }  # fmt: skip
