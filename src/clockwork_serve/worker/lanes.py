"""What waits for a lane and what runs on it, in order. It judges no window.

A *job* is an action or a chore (a code to prepare or to retire). Actions wait in their lane's queue by the
instant from which they may start and then by arrival, chores beside it. A job runs, or is dropped (refused,
or no longer wanted).

    QUEUED --start--> RUNNING --finish--> ENDED
       +------drop--------------------------> ENDED
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from clockwork_serve.messages import Action
from clockwork_serve.units import NS_PER_MS
from clockwork_serve.worker.codes import HeldCode
from clockwork_serve.worker.events import Prepare, Retire
from clockwork_serve.worker.pages import Held

Work = Action | Prepare | Retire

REST_MAX_NS: Final = 2 * NS_PER_MS
REST_SHARE: Final = 8
"""Before it begins a chore a lane stays free for this part of what it did last, at most so long. In that time
the controller hears of a code that is ready, and its LOAD comes before the next code is prepared."""
CHORE_PATIENCE_NS: Final = 500 * NS_PER_MS
"""A chore goes before actions when it has waited for so long, and none was done meanwhile."""


class JobState(enum.Enum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


class JobStep(enum.Enum):
    """What happens to a job."""

    START = "start"
    DROP = "drop"
    FINISH = "finish"


JOB_LIFE: dict[JobState, dict[JobStep, JobState]] = {
    JobState.QUEUED: {JobStep.START: JobState.RUNNING, JobStep.DROP: JobState.ENDED},
    JobState.RUNNING: {JobStep.FINISH: JobState.ENDED},
    JobState.ENDED: {},
}


@dataclass(slots=True)
class Job:
    """One piece of work for a lane. ``code`` is what it uses, ``held`` the weights that it moves or reads.

    ``owed`` tells that a Result is due; it is given exactly once. ``held`` is known once it runs.
    """

    work: Work
    code: HeldCode | None
    owed: bool
    state: JobState = JobState.QUEUED
    held: Held | None = None

    def step(self, step: JobStep) -> None:
        """Move along the life cycle."""
        following = JOB_LIFE[self.state].get(step)
        assert following is not None, f"{self.work}: {step} while {self.state}"
        self.state = following


class LaneQueue:
    """One lane: at most one running job, and those that wait."""

    def __init__(self) -> None:
        self.running: Job | None = None
        self.rested_ns = 0
        """From when on the lane, if it is free, may begin a chore."""
        self.wake_ns: int | None = None
        """When the lane, if it is free, must be looked at again; None: an event will tell."""
        self._actions: list[tuple[int, int, Job]] = []
        """Heap of all and only queued actions: (earliest start, arrival, job)."""
        self._chores: deque[tuple[int, Job]] = deque()
        """All and only queued chores, and since when each waits."""
        self._arrivals = 0
        self._started_ns = 0
        self._chored_ns = 0  # when the last chore ended

    def __len__(self) -> int:
        return len(self._actions) + len(self._chores)

    def push(self, job: Job, earliest_ns: int) -> None:
        """Queue an action."""
        self._arrivals += 1
        heappush(self._actions, (earliest_ns, self._arrivals, job))

    def push_chore(self, job: Job, now_ns: int) -> None:
        """Queue a chore."""
        self._chores.append((now_ns, job))

    def turn(self, now_ns: int) -> Job | None:
        """The job whose turn it is now. If there is none, ``wake_ns`` tells when to look again.

        Actions go before chores, so that a LOAD does not wait for all codes of a new worker; but each chore
        gets its turn at last.
        """
        self.wake_ns = None
        due = bool(self._actions) and self._actions[0][0] <= now_ns
        if self._chores:
            since_ns, chore = self._chores[0]
            rested = now_ns >= self.rested_ns and not due
            if rested or now_ns >= max(since_ns, self._chored_ns) + CHORE_PATIENCE_NS:
                return chore
        if due:
            return self._actions[0][2]
        instants = [self._actions[0][0]] if self._actions else []
        if self._chores:
            instants.append(self.rested_ns)
        self.wake_ns = min(instants, default=None)
        return None

    def start(self, job: Job, now_ns: int) -> None:
        """Run the job whose turn it is."""
        assert self.running is None, f"{self.running} still runs"
        self._take(job)
        job.step(JobStep.START)
        self.running = job
        self._started_ns = now_ns

    def drop(self, job: Job) -> None:
        """Take the job whose turn it is out; it will not run."""
        self._take(job)
        job.step(JobStep.DROP)

    def _take(self, job: Job) -> None:
        if self._chores and self._chores[0][1] is job:
            self._chores.popleft()
        else:
            assert self._actions[0][2] is job, f"{job} is not next"
            heappop(self._actions)

    def drop_all(self) -> list[Job]:
        """Take all jobs out that wait, actions in their order first."""
        jobs = [job for _, _, job in sorted(self._actions)] + [job for _, job in self._chores]
        self._actions.clear()
        self._chores.clear()
        for job in jobs:
            job.step(JobStep.DROP)
        return jobs

    def finish(self, now_ns: int) -> Job:
        """The running job ended."""
        job = self.running
        assert job is not None, "nothing runs on this lane"
        job.step(JobStep.FINISH)
        self.running = None
        if not isinstance(job.work, Action):
            self._chored_ns = now_ns
        self.rested_ns = now_ns + min(REST_MAX_NS, (now_ns - self._started_ns) // REST_SHARE)
        return job

    def queued(self) -> list[Job]:
        """All jobs that wait, in no order."""
        return [job for _, _, job in self._actions] + [job for _, job in self._chores]

    def check(self) -> None:
        """Assert that the states of jobs are those of where they are."""
        assert all(job.state is JobState.QUEUED for job in self.queued())
        assert self.running is None or self.running.state is JobState.RUNNING
        assert self.running is None or self.wake_ns is None, "a busy lane needs no wake-up"
