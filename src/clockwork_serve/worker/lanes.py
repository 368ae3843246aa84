"""What waits for a lane and what runs on it, in order. It judges no window.

A *job* waits in its lane's queue, by the instant from which it may start and then by arrival; it runs, or is
dropped (refused, or no longer wanted).

    QUEUED --start--> RUNNING --finish--> ENDED
       +------drop--------------------------> ENDED
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from heapq import heappop, heappush

from clockwork_serve.messages import Action
from clockwork_serve.worker.codes import HeldCode
from clockwork_serve.worker.events import Prepare, Retire
from clockwork_serve.worker.pages import Held

Work = Action | Prepare | Retire


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
        self.wake_ns: int | None = None
        """When the lane, if it is free, must be looked at again; None: an event will tell."""
        self._heap: list[tuple[int, int, Job]] = []
        """All and only queued jobs: (earliest start, arrival, job)."""
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, job: Job, earliest_ns: int) -> None:
        """Queue a job."""
        self._arrivals += 1
        heappush(self._heap, (earliest_ns, self._arrivals, job))

    def head(self) -> tuple[int, Job] | None:
        """The next job and its earliest start."""
        if not self._heap:
            return None
        earliest_ns, _, job = self._heap[0]
        return earliest_ns, job

    def start(self) -> Job:
        """Run the next job."""
        assert self.running is None, f"{self.running} still runs"
        job = heappop(self._heap)[2]
        job.step(JobStep.START)
        self.running = job
        return job

    def drop(self) -> Job:
        """Take the next job out; it will not run."""
        job = heappop(self._heap)[2]
        job.step(JobStep.DROP)
        return job

    def finish(self) -> Job:
        """The running job ended."""
        job = self.running
        assert job is not None, "nothing runs on this lane"
        job.step(JobStep.FINISH)
        self.running = None
        return job

    def queued(self) -> list[Job]:
        """All jobs that wait, in no order."""
        return [job for _, _, job in self._heap]

    def check(self) -> None:
        """Assert that the states of jobs are those of where they are."""
        assert all(job.state is JobState.QUEUED for job in self.queued())
        assert self.running is None or self.running.state is JobState.RUNNING
        assert self.running is None or self.wake_ns is None, "a busy lane needs no wake-up"
