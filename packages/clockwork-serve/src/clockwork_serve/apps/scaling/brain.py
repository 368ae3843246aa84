"""Decides how many devices are wanted: up once fewer would not do, down once fewer have done for a while.

It does no I/O and reads no clock. What a number of devices would give is asked of ``judge``; how many would
just do is searched anew at each decision, from the last answer on. So a load that makes a step of any size
is followed in one decision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from clockwork_serve.apps.plan.demand import BUSY
from clockwork_serve.apps.plan.search import MixSearch
from clockwork_serve.apps.scaling.future import Judged
from clockwork_serve.units import NS_PER_S, counted

CALM_NS: Final = 300 * NS_PER_S
"""Fewer devices are wanted once fewer would have done at each decision for so long."""
CHANGES_NS: Final = 600 * NS_PER_S
CHANGES: Final = 2
"""Within that time so many changes, unless the load presses."""
PRESSING: Final = 10.0
"""More are wanted at once if so many times as many would miss as may; else once it is found twice running."""


class ScalingRules(Struct, frozen=True, kw_only=True):
    """What is asked for: the share in time, how long a new device takes to join, and between what numbers."""

    target: float = 0.999
    lead_s: float = 60.0
    least: int = 1
    most: int = 64


class Advice(Struct, frozen=True, kw_only=True):
    """How many devices are wanted, where there are ``now`` so many, and why.

    ``cause`` is a word for machines: ``none``, ``load`` (fewer would miss), ``idle`` (fewer do), ``limit``
    (not even as many as may be had would do). ``gives``: what each number that was looked at would give.
    """

    at_ns: int
    wanted: int
    now: int
    cause: str = "none"
    reason: str = ""
    model: str = ""
    gives: tuple[Judged, ...] = ()


class ScalingBrain:
    """Decides by what it is told; the same calls give the same advice."""

    def __init__(self, rules: ScalingRules) -> None:
        self.rules = rules
        self.wanted = 0
        """By the last advice; 0 before the first."""
        self._likely = 1
        """What just did, the last time."""
        self._needed: deque[tuple[int, int]] = deque()
        """When which number just did, for as long as it counts."""
        self._changes: deque[tuple[int, int]] = deque()
        """When by how many devices the advice changed, for as long as it counts."""
        self._failing = False
        """The last decision found too few, and not pressing."""

    def decide(self, now_ns: int, now: int, judge: Callable[[int], Judged]) -> Advice:
        """The advice where there are ``now`` so many devices; called every few seconds."""
        rules = self.rules
        if not self.wanted:
            self.wanted = self._likely = min(rules.most, max(rules.least, now))
            self._changes.append((now_ns, 0))
        needed, judged = self._search(judge)
        self._likely = needed
        self._forget(now_ns)
        self._needed.append((now_ns, needed))
        before, enough = self.wanted, judged[needed].met(rules.target)
        if needed > before:
            if before not in judged:
                judged[before] = judge(before)
            presses = judged[before].missed > PRESSING * (1 - rules.target) * judged[before].requests
            if presses or (self._failing and len(self._steps()) < CHANGES):
                self._change(now_ns, needed)
            self._failing = True
        else:
            self._failing = False
            calm = max(number for _, number in self._needed)
            if calm < before and self._calm(now_ns):
                self._change(now_ns, calm)
        return self._advice(now_ns, now, before, judged, enough=enough)

    def _search(self, judge: Callable[[int], Judged]) -> tuple[int, dict[int, Judged]]:
        """The least number that meets the target, or the most there may be; and all that was looked at."""
        rules, likely = self.rules, self._likely
        search = MixSearch(
            [(number,) for number in range(rules.least, rules.most + 1)],
            lambda mix: mix[0] / likely, lambda one, other: one[0] >= other[0],
        )  # fmt: skip
        judged: dict[int, Judged] = {}
        while mixes := search.next():
            for (number,) in reversed(mixes):
                found = judged[number] = judge(number)
                met = found.met(rules.target)
                needed = min(1.0, found.busy / BUSY) if met else 1 / max(0.05, found.in_time)
                search.record((number,), met=met, needed=needed)
                if not met:
                    break
        return rules.most if search.best is None else search.best[0], judged

    def _forget(self, now_ns: int) -> None:
        while self._needed and self._needed[0][0] <= now_ns - CALM_NS:
            self._needed.popleft()
        while self._changes and self._changes[0][0] <= now_ns - CHANGES_NS:
            self._changes.popleft()

    def _steps(self) -> list[int]:
        """By how many devices it changed lately, each time."""
        return [by for _, by in self._changes if by]

    def _calm(self, now_ns: int) -> bool:
        """Whether it may go down: nothing changed for a while, and for twice that it did not go up."""
        at_ns, _ = self._changes[-1] if self._changes else (0, 0)
        quiet = not self._changes or at_ns <= now_ns - CALM_NS
        steps = self._steps()
        return quiet and len(steps) < CHANGES and not any(by > 0 for by in steps)

    def _change(self, now_ns: int, wanted: int) -> None:
        self._changes.append((now_ns, wanted - self.wanted))
        self.wanted = wanted

    def _advice(
        self, now_ns: int, now: int, before: int, judged: dict[int, Judged], *, enough: bool
    ) -> Advice:
        wanted = self.wanted
        gives = tuple(judged[number] for number in sorted(judged))
        fewer = [one for one in gives if one.devices < wanted and not one.met(self.rules.target)]
        cause, worst = "none", gives[0]
        if not enough:
            cause, worst = "limit", gives[-1]
        elif wanted < before:
            cause, worst = "idle", next((one for one in gives if one.devices >= wanted), gives[-1])
        elif fewer:
            cause, worst = "load", fewer[-1]
        if worst.missed and cause in {"limit", "load"}:
            reason = (
                f"with {counted(worst.devices, 'device')} {worst.in_time:.2%} of requests would be in time; "
                f"most that miss are for {worst.model}: {worst.cause}"
            )
        else:
            reason = f"with {counted(worst.devices, 'device')} {worst.in_time:.2%} would be in time"
        return Advice(
            at_ns=now_ns, wanted=wanted, now=now, cause=cause, reason=reason, model=worst.model, gives=gives
        )
