"""Live figures during a run: counts since its start, rates and quantiles of the last interval."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np
from msgspec import Struct

from clockwork_lab.bench.crew import Crew
from clockwork_lab.bench.plan import Plan
from clockwork_lab.bench.records import ANSWERED, End
from clockwork_serve.units import NS_PER_MS, NS_PER_S

EVERY_S: Final = 0.25


class Moment(Struct, frozen=True, kw_only=True):
    """A sample of the run. Quantiles are in ms, None if there were no requests.

    ``asked``: requests due so far; ``out``: those of them that are in flight. Rates are over the last
    interval.
    """

    at_s: float
    seconds: float
    warming: bool
    stopping: bool
    asked: int
    out: int
    good: int
    late: int
    others: dict[str, int]
    reasons: dict[str, int]
    asked_rps: float
    good_rps: float
    p50_ms: float | None
    p99_ms: float | None
    lateness_p99_ms: float | None
    bars: tuple[float, ...]
    """Satisfaction in each of the last intervals, the newest last."""


class Live:
    """Reads the senders' rows as they end."""

    def __init__(self, plan: Plan, crew: Crew) -> None:
        self._plan, self._crew = plan, crew
        self._good = self._late = self._over = 0
        self._ends: Counter[End] = Counter()
        self._asked, self._then_s = 0, 0.0
        self._bars: list[float] = []

    def sample(self, *, stopping: bool) -> Moment:
        """The state now, with rates since the previous call."""
        latencies, lateness = [], []
        good_before, over_before = self._good, self._over
        asked = 0
        for process in self._crew.processes:
            new = process.new_rows()
            asked += process.due
            if not new.size:
                continue
            due, sent, last, slo, status = (
                process.rows.array(name)[new]
                for name in ("scheduled_ns", "sent_ns", "last_ns", "slo_ns", "status")
            )
            self._over += new.size
            answered = status == ANSWERED
            latency = (last - due)[answered]
            good = int(np.count_nonzero(latency <= slo[answered]))
            self._good += good
            self._late += latency.size - good
            latencies.append(latency)
            lateness.append((sent - due)[sent > 0])
            for code, count in enumerate(np.bincount(status, minlength=2).tolist()):
                if code != ANSWERED and count:
                    self._ends[process.ends[code]] += count
        at_s = (time.monotonic_ns() - self._crew.start_ns) / NS_PER_S
        span_s = max(1e-3, at_s - self._then_s)
        asked_rps, self._asked, self._then_s = (asked - self._asked) / span_s, asked, at_s
        if self._over > over_before:
            self._bars = [*self._bars[-59:], (self._good - good_before) / (self._over - over_before)]
        others: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for end, count in self._ends.items():
            others[end.kind.name.lower()] += count
            reasons[end.reason or end.kind.name.lower()] += count
        quantiles = _quantiles(latencies)
        return Moment(
            at_s=max(0.0, at_s), seconds=self._plan.schedule.end_ns / NS_PER_S, stopping=stopping,
            warming=at_s * NS_PER_S < self._plan.schedule.warmup_ns, asked=asked, out=asked - self._over,
            good=self._good, late=self._late, others=dict(others), reasons=dict(reasons.most_common(8)),
            asked_rps=asked_rps, good_rps=(self._good - good_before) / span_s, p50_ms=quantiles[0],
            p99_ms=quantiles[1], lateness_p99_ms=_quantiles(lateness)[1], bars=tuple(self._bars),
        )  # fmt: skip


def _quantiles(parts: list[np.ndarray]) -> tuple[float | None, float | None]:
    values = np.concatenate(parts) if parts else np.zeros(0)
    if not values.size:
        return None, None
    p50, p99 = np.quantile(values, (0.5, 0.99)) / NS_PER_MS
    return float(p50), float(p99)


def watch(plan: Plan, crew: Crew, show: Callable[[Moment], None], stopped: Callable[[], bool]) -> bool:
    """Show samples until the run is over; whether it was stopped early."""
    live, stopping = Live(plan, crew), False
    while not crew.over:
        if stopped() and not stopping:
            stopping = True
            crew.stop()
        show(live.sample(stopping=stopping))
        time.sleep(EVERY_S)
    show(live.sample(stopping=stopping))
    return stopping
