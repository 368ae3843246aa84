"""The exact number of requests that could have been served: equal jobs on one lane.

A job may start at its arrival or later, runs ``service_ns`` without interruption, alone, and must end by its
deadline. This calculation is independent of the server's code.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Job:
    """A request as the oracle sees it; times in ns on one axis."""

    arrival_ns: int
    deadline_ns: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """What the lane was seen to do: jobs ``names`` from ``start_ns`` to ``end_ns``."""

    start_ns: int
    end_ns: int
    names: frozenset[str]


def hopeless_at(job: Job, runs: Sequence[Run], service_ns: int) -> int:
    """The first instant at which nothing could have answered ``job`` in time, given what the lane had done.

    ``runs`` are all that the lane did, in order. The instant is the start of the run of others that ends too
    late for the job to follow, or the last instant at which it could have started; not before its arrival.
    """
    last_start_ns = job.deadline_ns - service_ns
    for run in runs:
        if run.start_ns > last_start_ns:
            break
        if run.end_ns > max(last_start_ns, job.arrival_ns) and job.name not in run.names:
            return max(job.arrival_ns, run.start_ns)
    return max(job.arrival_ns, last_start_ns)


def could_join(job: Job, served: Collection[Job], service_ns: int, near: int = 20) -> bool:
    """Whether someone who knew the future could have answered all of ``served`` and ``job`` too, in time.

    Only the served jobs that arrived within ``near`` service times are looked at, so a yes may be too kind
    to the job, never too harsh.
    """
    reach_ns = near * service_ns
    close = [one for one in served if abs(one.arrival_ns - job.arrival_ns) <= reach_ns]
    return feasible([*close, job], service_ns)


def feasible(jobs: Iterable[Job], service_ns: int) -> bool:
    """Whether all jobs can be answered in time (Garey, Johnson, Simons, Tarjan 1981: forbidden regions).

    Going back through the arrivals, the jobs that arrive from one on are packed backwards from each
    deadline. Where they leave less than one service time after that arrival, no job may start just before
    it.
    """
    order = sorted(jobs, key=lambda job: job.arrival_ns)
    deadlines = sorted({job.deadline_ns for job in order})
    latest: dict[int, int] = {}  # by deadline: the latest start of the jobs seen that must end by it
    forbidden: list[tuple[int, int]] = []  # open intervals in which nothing may start, latest first
    for index in range(len(order) - 1, -1, -1):
        job = order[index]
        for deadline_ns in deadlines[bisect_left(deadlines, job.deadline_ns) :]:
            start_ns = latest.get(deadline_ns, deadline_ns) - service_ns
            latest[deadline_ns] = _outside(start_ns, forbidden)
        if index and order[index - 1].arrival_ns == job.arrival_ns:
            continue
        tightest_ns = min(latest.values())
        if tightest_ns < job.arrival_ns:
            return False
        if tightest_ns < job.arrival_ns + service_ns:
            forbidden.append((tightest_ns - service_ns, job.arrival_ns))
    return True


def _outside(start_ns: int, forbidden: Sequence[tuple[int, int]]) -> int:
    for low_ns, high_ns in forbidden:
        if low_ns < start_ns < high_ns:
            start_ns = low_ns
    return start_ns


@dataclass(frozen=True, slots=True)
class _State:
    """The lane is free at ``now_ns`` after ``count`` jobs; ``pending`` have arrived and can still be met.

    ``waited`` tells that it came about by waiting, not by the end of a job.
    """

    now_ns: int
    count: int
    pending: frozenset[int]
    waited: bool


def most_in_time(jobs: Iterable[Job], service_ns: int) -> int:
    """How many jobs can be answered in time at best, by someone who knew all of them from the start; exact.

    Two facts keep the search small. Of the jobs that wait, starting the one with the earliest deadline is as
    good as any other (equal jobs can be exchanged), so the only choice is to start it or to wait for the
    next arrival. And one state outdoes another that is not earlier if the waiting jobs it lacks are no more
    than it is ahead. A state that came about by waiting is compared with those of its instant alone: an
    earlier one that could wait as well might count on this very state.
    """
    order = sorted(job for job in jobs if job.deadline_ns - job.arrival_ns >= service_ns)
    if not order:
        return 0
    arrivals = [job.arrival_ns for job in order]
    queue = [(arrivals[0], 0, 0)]
    states = {
        0: _State(
            arrivals[0], 0, _waiting(order, arrivals, frozenset(), -1, arrivals[0], service_ns), waited=False
        )
    }
    kept: list[_State] = []
    best, serial = 0, 0
    while queue:
        _, _, key = heapq.heappop(queue)
        state = states.pop(key)
        best = max(best, state.count)
        recent = [other for other in kept[-64:] if other.now_ns == state.now_ns or not state.waited]
        if any(_outdoes(other, state, arrivals) for other in reversed(recent)):
            continue
        kept.append(state)
        for after in _steps(state, order, arrivals, service_ns):
            serial += 1
            states[serial] = after
            heapq.heappush(queue, (after.now_ns, -after.count, serial))
    return best


def _steps(state: _State, order: Sequence[Job], arrivals: Sequence[int], service_ns: int) -> list[_State]:
    """Start the most urgent waiting job, or wait for the next arrival if that comes before it would end."""
    steps = []
    ahead = bisect_right(arrivals, state.now_ns)
    next_ns = arrivals[ahead] if ahead < len(arrivals) else None
    if state.pending:
        first = min(state.pending, key=lambda index: (order[index].deadline_ns, index))
        end_ns = state.now_ns + service_ns
        rest = state.pending - {first}
        waiting = _waiting(order, arrivals, rest, state.now_ns, end_ns, service_ns)
        steps.append(_State(end_ns, state.count + 1, waiting, waited=False))
    if next_ns is not None and (not state.pending or next_ns < state.now_ns + service_ns):
        waiting = _waiting(order, arrivals, state.pending, state.now_ns, next_ns, service_ns)
        steps.append(_State(next_ns, state.count, waiting, waited=True))
    return steps


def _waiting(
    order: Sequence[Job],
    arrivals: Sequence[int],
    rest: frozenset[int],
    since_ns: int,
    now_ns: int,
    service_ns: int,
) -> frozenset[int]:
    """``rest`` and the arrivals in (since, now], as far as they can still be met."""
    fresh = range(bisect_right(arrivals, since_ns), bisect_right(arrivals, now_ns))
    return frozenset(index for index in (*rest, *fresh) if order[index].deadline_ns >= now_ns + service_ns)


def _outdoes(other: _State, state: _State, arrivals: Sequence[int]) -> bool:
    """Whether ``other``, which is not later, can do whatever ``state`` can, and be no worse off."""
    ahead = other.count - state.count
    if ahead < 0:
        return False
    known = bisect_left(arrivals, other.now_ns + 1)
    missing = sum(1 for index in state.pending if index < known and index not in other.pending)
    return missing <= ahead
