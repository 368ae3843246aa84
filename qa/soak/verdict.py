"""What a soak promises, held against what was found; and what a person sees of it meanwhile."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from harness.report import Outcome
from qa.soak.load import Ends
from qa.soak.watch import Held, Quiet, Watch, growth_kib, leaked, lives

PLAIN_EVERY_S: Final = 10.0
_WIDE: Final = 40
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


# ------------------------------------------------------------
# A live screen on a terminal, a line now and then elsewhere.


class Screen:
    """Shows how it goes on standard error."""

    def __init__(self, seconds: float, watch: Watch, found: Findings) -> None:
        self._seconds, self._watch, self._found = seconds, watch, found
        self.doing = "starting"
        self._first: dict[int, Held] = {}
        self._told = 0.0
        self._live: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, asked: int) -> None:
        """Show it; ``asked`` requests of the leg that is on are not in the findings yet."""
        if self._live is not None:
            self._live.update(self._panel(asked), refresh=True)
        elif time.monotonic() - self._told >= PLAIN_EVERY_S:
            self._told = time.monotonic()
            print(self._line(asked), file=sys.stderr, flush=True)

    def _line(self, asked: int) -> str:
        found = self._found
        own = ", ".join(f"{name} {one.own_kib / 1024:.0f} MiB" for name, one in self._watch.latest.items())
        return (
            f"{self._watch.now_s:.0f} of {self._seconds:.0f} s: {found.requests + asked:,} requests, "
            f"{len(found.violations)} violations; {self.doing}; {own}"
        )

    def _panel(self, asked: int) -> Any:
        from rich.panel import Panel
        from rich.table import Table

        found, now_s = self._found, self._watch.now_s
        done = min(1.0, now_s / self._seconds)
        filled = round(done * _WIDE)
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", justify="right")
        facts.add_column()
        facts.add_row("time", f"{'━' * filled}{'╌' * (_WIDE - filled)} {now_s:.0f} of {self._seconds:.0f} s")
        facts.add_row("now", self.doing)
        total = found.requests + asked
        facts.add_row(
            "requests", f"{total:,}, {total / max(1.0, now_s):,.0f} a second; {found.ends.good:,} good"
        )
        facts.add_row(
            "changes", ", ".join(f"{count} {what}" for what, count in found.changes.items()) or "none"
        )
        facts.add_row(
            "faults", ", ".join(f"{count} {what}" for what, count in found.faults.items()) or "none"
        )
        said = f"[red]{found.violations[-1]}[/red]" if found.violations else "none"
        facts.add_row("violations", f"{len(found.violations)}: {said}" if found.violations else said)
        table = Table(box=None, padding=(0, 2))
        for column in ("process", "MiB", "since seen", "files", "threads"):
            table.add_column(column, justify="left" if column == "process" else "right", style="dim")
        for name, held in self._watch.latest.items():
            first = self._first.setdefault(held.pid, held)
            more = f"{(held.own_kib - first.own_kib) / 1024:+.1f}"
            table.add_row(name, f"{held.own_kib / 1024:.1f}", more, str(held.files), str(held.threads))
        outer = Table.grid(padding=(1, 0))
        outer.add_row(facts)
        outer.add_row(table)
        return Panel(outer, title="soak", border_style="dim")
