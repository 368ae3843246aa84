"""Which requests were infeasible: an oracle that evaluates a run afterwards.

One device runs one batch at a time; a batch of n requests of one model takes ``batch_ns(n)``. For a request
that was sent at ``t`` it knows what had been admitted: all requests that were sent at least ``ahead_ns``
before it, were served in time in the end, and had not begun to run at ``t``. Requests that were rejected in
the end, or served too late, are ignored.

A request is infeasible if the device, after the batch that it runs at ``t``, cannot execute this one and
those of the admitted that are due at most ``grace_ns`` after this one's deadline, even in full batches: for
each model as few as hold its requests. These simplifications make fewer requests infeasible: that each of the
admitted has its own deadline, those due later, other arrivals meanwhile, overhead, and network delays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. ``began_ns`` is when its execution began; None: it never did, or was answered too late."""

    model: str
    sent_ns: int
    deadline_ns: int
    began_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What the oracle takes for granted."""

    batch_ns: Callable[[int], int]
    batch_max: int
    ahead_ns: int = 2_000_000
    grace_ns: int = 5_000_000


def infeasible(requests: Sequence[Asked], busy: Sequence[tuple[int, int]], rules: Rules) -> list[bool]:
    """Of each request, in their order. ``busy``: beginning and end of all executions."""
    assert all(one.sent_ns <= other.sent_ns for one, other in pairwise(requests))
    runs = sorted(busy)
    found, first, run = [], 0, 0
    for row, request in enumerate(requests):
        now_ns = request.sent_ns
        while run < len(runs) and runs[run][1] <= now_ns:
            run += 1
        free_ns = runs[run][1] if run < len(runs) and runs[run][0] < now_ns else now_ns
        # Whoever is before `first` has begun, or never does.
        while first < row and not _waits(requests[first], now_ns):
            first += 1
        waiting = Counter(
            one.model
            for one in requests[first:row]
            if _waits(one, now_ns)
            and one.sent_ns + rules.ahead_ns <= now_ns
            and one.deadline_ns <= request.deadline_ns
        )
        waiting[request.model] += 1
        found.append(free_ns + work_ns(waiting, rules) > request.deadline_ns + rules.grace_ns)
    return found


def _waits(request: Asked, now_ns: int) -> bool:
    return request.began_ns is not None and request.began_ns >= now_ns


def work_ns(waiting: Counter[str], rules: Rules) -> int:
    """The least time in which so many requests of each model can be executed."""
    total = 0
    for count in waiting.values():
        full, rest = divmod(count, rules.batch_max)
        total += full * rules.batch_ns(rules.batch_max) + (rules.batch_ns(rest) if rest else 0)
    return total
