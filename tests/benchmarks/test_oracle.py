"""The oracle against trying everything."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.overload.oracle import Job, Run, could_join, feasible, hopeless_at, most_in_time

SERVICE = 10

JOBS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(5, 45)).map(lambda pair: Job(pair[0], pair[0] + pair[1])),
    max_size=6,
)


def tried_feasible(jobs: tuple[Job, ...]) -> bool:
    """By every order of the jobs."""
    for order in itertools.permutations(jobs):
        free = 0
        for job in order:
            free = max(free, job.arrival_ns) + SERVICE
            if free > job.deadline_ns:
                break
        else:
            return True
    return False


def tried_most(jobs: list[Job]) -> int:
    """By every subset, the largest first."""
    for size in range(len(jobs), 0, -1):
        if any(tried_feasible(some) for some in itertools.combinations(jobs, size)):
            return size
    return 0


@given(JOBS)
@settings(max_examples=300, deadline=None)
def test_feasible_agrees_with_every_order(jobs: list[Job]) -> None:
    assert feasible(jobs, SERVICE) == tried_feasible(tuple(jobs))


@given(JOBS)
@settings(max_examples=300, deadline=None)
def test_the_best_agrees_with_every_subset(jobs: list[Job]) -> None:
    assert most_in_time(jobs, SERVICE) == tried_most(jobs)


def test_waiting_for_a_tight_job_can_be_best() -> None:
    slack, tight = Job(0, 40, "slack"), Job(5, 15, "tight")
    assert most_in_time([slack, tight], SERVICE) == 2
    assert feasible([slack, tight], SERVICE)
    assert not feasible([Job(0, 14), tight], SERVICE)


def test_no_jobs_and_impossible_jobs() -> None:
    assert most_in_time([], SERVICE) == 0
    assert most_in_time([Job(0, 9)], SERVICE) == 0
    assert feasible([], SERVICE)


@pytest.mark.parametrize(
    ("job", "runs", "expected"),
    [
        (Job(3, 8, "x"), [], 3),  # never had a chance
        (Job(0, 30, "x"), [], 20),  # the last instant to start
        (Job(0, 30, "x"), [Run(0, 10, frozenset("a")), Run(12, 22, frozenset("b"))], 12),  # b took its place
        (Job(14, 30, "x"), [Run(12, 22, frozenset("b"))], 14),  # lost before it came
        (Job(0, 30, "x"), [Run(0, 10, frozenset("a"))], 20),  # could have followed a
        (Job(0, 30, "x"), [Run(25, 35, frozenset("b"))], 20),  # b came when it was lost already
    ],
)
def test_when_a_job_becomes_hopeless(job: Job, runs: list[Run], expected: int) -> None:
    assert hopeless_at(job, runs, SERVICE) == expected


def test_a_job_could_join_only_if_nobody_else_is_lost() -> None:
    served = [Job(0, 12), Job(5, 25)]
    assert could_join(Job(6, 35), served, SERVICE)
    assert not could_join(Job(6, 28), served, SERVICE)


def test_a_minute_of_overload_is_calculated_in_seconds() -> None:
    rng, now = random.Random(7), 0.0
    jobs = []
    while now < 60_000:
        now += rng.expovariate(6 / 1000)
        jobs.append(Job(int(now * 1e6), int((now + rng.choice((100, 600, 1200))) * 1e6)))
    started = time.process_time()
    best = most_in_time(jobs, 500_000_000)
    assert 100 < best <= 123
    assert time.process_time() - started < 20
