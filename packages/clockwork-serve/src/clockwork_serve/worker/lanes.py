"""The queue of a lane, and the job that runs on it.

A *job* is an action or a chore (preparing or retiring a code). Actions are queued by the start of their
window and then by arrival, chores in a queue of their own. The next job runs until it is finished, or is
dropped (refused, or no longer wanted).
"""

from __future__ import annotations

from collections import deque
from typing import Final

from clockwork_serve.messages import Action
from clockwork_serve.units import NS_PER_MS
from clockwork_serve.worker.events import Prepare, Retire
from clockwork_serve.worker.pages import HeldCode, HeldExtent

Work = Action | Prepare | Retire

REST_MAX_NS: Final = 2 * NS_PER_MS
REST_SHARE: Final = 8
"""Before a chore, a lane stays free for the duration of its last job divided by ``REST_SHARE``, at most
``REST_MAX_NS``: time for the controller to learn that a code is ready, and to send its LOAD before the next
code is prepared."""
CHORE_PATIENCE_NS: Final = 500 * NS_PER_MS
"""A chore goes before actions after it has waited for this long, and no chore ended meanwhile."""


class LaneJob:
    """One piece of work for a lane, with the ``code`` it uses and the weights it moves or reads (``held``).

    ``owed``: its Result is still to be sent. ``held`` is set when the job starts; for an INFER as soon as its
    weights claim their pages, and from then on it counts as their reader. ``action_id`` is 0 for chores;
    ``earliest_ns`` orders the queue.
    """

    __slots__ = ("action_id", "code", "earliest_ns", "held", "owed", "work")

    def __init__(
        self, work: Work, code: HeldCode | None, action_id: int = 0, held: HeldExtent | None = None
    ) -> None:
        self.work = work
        self.code = code
        self.action_id = action_id
        self.owed = False
        self.held = held
        self.earliest_ns = 0


class LaneQueue:
    """One lane: at most one running job, and the queued ones."""

    __slots__ = (
        "_chore_ended_ns", "_chore_runs", "_ended_ns", "actions", "chores", "queued_wake_ns", "running",
        "started_ns", "wake_ns",
    )  # fmt: skip

    def __init__(self) -> None:
        self.running: LaneJob | None = None
        self.wake_ns: int | None = None
        """When the lane, if it is free, must be processed again; None: not before the next event."""
        self.queued_wake_ns: int | None = None
        """The last ``wake_ns`` in the worker's heap of wake-ups, if it is still there; set by ``Worker``."""
        self.actions: list[LaneJob] = []
        """All and only queued actions, by earliest start, then arrival. They are few, and nearly all arrive
        in that order: cheaper than a heap."""
        self.chores: deque[tuple[int, LaneJob]] = deque()
        """All and only queued chores, with the instant at which each was queued."""
        self.started_ns = 0  # when the last job started
        self._ended_ns = 0
        self._chore_runs = False
        self._chore_ended_ns = 0  # when the last chore ended

    def __len__(self) -> int:
        return len(self.actions) + len(self.chores)

    def push(self, job: LaneJob, earliest_ns: int) -> None:
        """Queue an action."""
        job.earliest_ns = earliest_ns
        actions = self.actions
        at = len(actions)
        while at > 0 and actions[at - 1].earliest_ns > earliest_ns:
            at -= 1
        actions.insert(at, job)

    def push_chore(self, job: LaneJob, now_ns: int) -> None:
        """Queue a chore."""
        self.chores.append((now_ns, job))

    def turn(self, now_ns: int) -> LaneJob | None:
        """The next job, if one may start now; if not, sets ``wake_ns``.

        Actions go before chores, so that a LOAD does not wait for all codes of a new worker; but no chore
        waits for ever (``CHORE_PATIENCE_NS``).
        """
        first = self.actions[0] if self.actions else None
        due = first is not None and first.earliest_ns <= now_ns
        self.wake_ns = first.earliest_ns if first is not None and not due else None
        if self.chores:
            since_ns, chore = self.chores[0]
            chore_from_ns = self.chore_from_ns
            rested = now_ns >= chore_from_ns and not due
            if rested or now_ns >= max(since_ns, self._chore_ended_ns) + CHORE_PATIENCE_NS:
                self.wake_ns = None
                return chore
            if not due and (self.wake_ns is None or chore_from_ns < self.wake_ns):
                self.wake_ns = chore_from_ns
        return first if due else None

    @property
    def chore_from_ns(self) -> int:
        """The instant from which the lane, if it is free, may start a chore."""
        return self._ended_ns + min(REST_MAX_NS, (self._ended_ns - self.started_ns) // REST_SHARE)

    def start(self, job: LaneJob, now_ns: int) -> None:
        """Start the job that ``turn`` returned."""
        assert self.running is None, f"{self.running} still runs"
        self._chore_runs = self.drop(job)
        self.running = job
        self.started_ns = now_ns

    def drop(self, job: LaneJob) -> bool:
        """Remove the job that ``turn`` returned from its queue; true if it is a chore."""
        if self.actions and self.actions[0] is job:
            self.actions.pop(0)
            return False
        assert self.chores and self.chores[0][1] is job, f"{job.work} is not next"
        self.chores.popleft()
        return True

    def drop_all(self) -> list[LaneJob]:
        """Remove and return all queued jobs, actions first."""
        jobs = self.queued()
        self.actions.clear()
        self.chores.clear()
        self.wake_ns = None
        return jobs

    def finish(self, now_ns: int) -> LaneJob:
        """The running job ended."""
        job = self.running
        assert job is not None, "nothing runs on this lane"
        self.running = None
        self._ended_ns = now_ns
        if self._chore_runs:
            self._chore_ended_ns = now_ns
        return job

    def queued(self) -> list[LaneJob]:
        """All queued jobs, actions first."""
        return self.actions + [job for _, job in self.chores]

    def check(self) -> None:
        """Assert that each job is in one place, and the order of actions."""
        jobs = [*self.queued(), *([] if self.running is None else [self.running])]
        assert len({id(job) for job in jobs}) == len(jobs), "a job is queued twice, or while it runs"
        assert self.running is None or self.wake_ns is None, "a busy lane needs no wake-up"
        times = [job.earliest_ns for job in self.actions]
        assert times == sorted(times), "queued out of order"
