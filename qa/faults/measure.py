"""The load of one row, and from every request's record to the row's figures. It judges nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from clockwork_lab.bench.job import SenderMessage
from clockwork_lab.bench.plan import Options, make_plan
from clockwork_lab.bench.records import Kind, Records
from clockwork_lab.bench.run import Crew
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from qa.faults.result import SLACK_MS, Ends, Goodput, Result
from qa.faults.stage import Setup

DRAIN_S = 6.0
"""After the last request: who has no answer by then has none."""


@dataclass(slots=True)
class Played:
    """All requests, and what the generator says of itself. ``start_ns``: of CLOCK_MONOTONIC."""

    records: Records
    messages: list[SenderMessage]
    start_ns: int


def scenario(setup: Setup, seconds: float, quiet: tuple[float, float] | None) -> str:
    """As TOML; ``quiet``: from when until when nothing is sent."""
    spans = [(0.0, seconds)] if quiet is None else [(0.0, quiet[0]), (quiet[1], seconds)]
    lines = ['name = "faults"', f"seconds = {seconds}"]
    for name in setup.models:
        lines += ["[[models]]", f'name = "{name}"', 'kind = "any"']
    for number, (start, stop) in enumerate(spans):
        lines += [
            "[[loads]]", f'name = "load{number}"', f"models = {list(setup.models)}".replace("'", '"'),
            'arrivals = "poisson"', f"rate_rps = {setup.rate_rps}", f"slo_ms = {setup.slo_ms}",
            f"start_s = {start}", f"stop_s = {stop}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def play(
    url: str, text: str, folder: Path, seed: int, *, began: Callable[[int], None], stopped: Callable[[], bool]
) -> Played:
    """Send it all; ``began`` is told the instant of the run's start, and may not wait.

    Raises what :func:`make_plan` and :class:`Crew` raise.
    """
    path = folder / "scenario.toml"
    path.write_text(text)
    plan = make_plan(path, Options(url=url, seed=seed, drain_s=DRAIN_S, max_lateness_ms=1e6))
    with Crew(plan) as crew:
        crew.begin()
        began(crew.start_ns)
        stopping = False
        while not crew.over:
            for process in crew.processes:
                process.poll()
            if stopped() and not stopping:
                stopping = True
                crew.stop()
            time.sleep(0.02)
        messages = [process.final for process in crew.processes if process.final is not None]
        return Played(crew.records(), messages, crew.start_ns)


def lateness_ms(played: Played) -> float:
    """How late the generator itself sent, p99; waiting for a connection is part of it."""
    table = played.records.table
    late = (table["sent_ns"] - table["scheduled_ns"])[table["sent_ns"] > 0]
    return float(np.quantile(late, 0.99)) / 1e6 if late.size else 0.0


# ------------------------------------------------------------
# Figures.

WARM_NS: Final = 400 * NS_PER_MS
"""At the start of the load: what is cold then is no fault's doing."""
WINDOW_REQUESTS: Final = 20
WINDOW_NS: Final = 300 * NS_PER_MS
STEP_NS: Final = 50 * NS_PER_MS
WHOLE: Final = 0.9
AFTER_DEATH_NS: Final = 30 * NS_PER_MS
"""What was sent on a connection before its end was seen was in flight too."""

Bools = np.ndarray[Any, np.dtype[np.bool_]]


class Seen:
    """All requests of a run, and when something was done: ``marks`` and ``resets`` of CLOCK_MONOTONIC.

    ``again_ns``: when requests came again, if none did while it was done.
    """

    def __init__(
        self, played: Played, marks: Sequence[int], resets: Sequence[tuple[int, int]], again_ns: int = 0
    ) -> None:
        table = played.records.table
        self.due, self.sent, self.last, self.slo = (
            table[name].astype(np.int64) for name in ("scheduled_ns", "sent_ns", "last_ns", "slo_ns")
        )
        self.kinds = played.records.kinds
        self._words = [end.reason for end in played.records.ends]
        self._codes = table["end"]
        self.answered: Bools = self.kinds == Kind.ANSWERED
        self.good: Bools = self.answered & (self.last - self.due <= self.slo)
        self.end_ns = int(self.due.max()) if self.due.size else 0
        self.marks = [mark - played.start_ns for mark in marks]
        at = self.marks or [self.end_ns]
        self.first_ns, self.last_mark_ns = max(at[0], again_ns), max(at[-1], again_ns)
        self.before_ns = at[0]
        self.resets = [(start - played.start_ns, end - played.start_ns) for start, end in resets]

    def share(self, start_ns: int, end_ns: int) -> float:
        """Good of what was due between two instants; 1 if nothing was."""
        here = (self.due >= start_ns) & (self.due < end_ns)
        asked = int(np.count_nonzero(here))
        return int(np.count_nonzero(self.good & here)) / asked if asked else 1.0

    def per_s(self, start_ns: int, end_ns: int) -> float:
        """Good answers to what was due between two instants, a second."""
        here = (self.due >= start_ns) & (self.due < end_ns)
        return float(np.count_nonzero(self.good & here)) / max(1e-9, (end_ns - start_ns) / NS_PER_S)

    def in_flight(self) -> Bools:
        """Requests that were out at a killed gateway, or on a link that was cut, at that instant."""
        found = np.zeros(self.due.size, np.bool_)
        for start, end in self.resets:
            out = (self.sent > 0) & (self.sent <= end + AFTER_DEATH_NS)
            found |= out & ((self.last >= start) | (self.last == 0))
        return found

    def first_good_ms(self, mark_ns: int | None = None) -> float | None:
        """From an instant (that of the first thing done) to the first good answer to a request due later."""
        start = self.first_ns if mark_ns is None else mark_ns
        later = self.last[self.good & (self.due >= start)]
        return None if not later.size else float(later.min() - start) / NS_PER_MS

    def whole_ms(self) -> float | None:
        """From the last thing done to the last request missed before goodput stayed at 90 % of what it was.

        0 if it never left that, None if it did not come back.
        """
        wanted = WHOLE * self.share(WARM_NS, self.before_ns)
        rate = self.due.size / max(1, self.end_ns)
        window = max(WINDOW_NS, round(WINDOW_REQUESTS / max(rate, 1e-12)))
        starts = range(self.last_mark_ns, self.end_ns - window, STEP_NS)
        below = [start for start in starts if self.share(start, start + window) < wanted]
        if not below:
            return 0.0
        if below[-1] == starts[-1]:
            return None
        missed = self.due[~self.good & (self.due < below[-1] + window)]
        return float(missed.max() - self.last_mark_ns) / NS_PER_MS

    def reasons(self) -> dict[str, int]:
        """What was said beside answers, by words."""
        counted = Counter(self._codes[~self.answered].tolist())
        return {
            f"{Kind(int(self.kinds[self._codes == code][0])).name.lower()}: {self._words[code]}".rstrip(
                ": "
            ): n
            for code, n in counted.most_common()
        }

    def no_connection(self) -> Bools:
        """Requests for which there was none."""
        codes = [at for at, words in enumerate(self._words) if words.startswith("no connection")]
        never = (self.kinds == Kind.OPEN) & (self.sent == 0)
        none: Bools = never | ((self.kinds == Kind.BROKEN) & np.isin(self._codes, codes))
        return none


def fill(result: Result, seen: Seen, played: Played) -> None:
    """All that requests tell."""
    kinds, took = seen.kinds, seen.last - seen.sent
    over = took > seen.slo + round(SLACK_MS * NS_PER_MS)
    flying, refused = seen.in_flight(), seen.no_connection()
    reset = (kinds == Kind.RESET) & flying
    lost = ((kinds == Kind.OPEN) | (kinds == Kind.RESET) | (kinds == Kind.BROKEN)) & ~refused & ~reset

    def count(which: Bools) -> int:
        return int(np.count_nonzero(which))

    result.ends = Ends(
        sent=seen.due.size, good=count(seen.good), late=count(seen.answered & ~seen.good),
        rejected=count(kinds == Kind.REJECTED), expired=count(kinds == Kind.EXPIRED),
        failed=count(kinds == Kind.FAILED), reset=count(reset), refused=count(refused), lost=count(lost),
    )  # fmt: skip
    result.in_flight = count(flying)
    result.late_as_good = count(seen.answered & over)
    told = (kinds == Kind.REJECTED) | (kinds == Kind.EXPIRED) | (kinds == Kind.FAILED)
    result.overdue = count(told & over)
    result.reasons = seen.reasons()
    result.twice = sum(one.unexpected for one in played.messages)
    result.sent_late_ms = lateness_ms(played)
    result.first_good_ms, result.whole_ms = seen.first_good_ms(), seen.whole_ms()
    result.back_ms = [seen.first_good_ms(mark) for mark in seen.marks]
    split = max(seen.last_mark_ns, seen.first_ns + NS_PER_S)
    spans = ((WARM_NS, seen.before_ns), (seen.first_ns, split), (split, max(seen.end_ns, split + 1)))
    before, during, after = spans
    result.goodput = Goodput(
        per_s=(seen.per_s(*before), seen.per_s(*during), seen.per_s(*after)),
        share=(seen.share(*before), seen.share(*during), seen.share(*after)),
    )
