"""Which actions are owed a result, and what was decided at this instant. It judges nothing."""

from __future__ import annotations

from typing import Final

from clockwork_serve.messages import Action, Infer, Load, Result, Status
from clockwork_serve.worker.admission import Refusal
from clockwork_serve.worker.events import LaneDone, Prepare, Retire, WorkerEffect
from clockwork_serve.worker.lanes import Job

_OK: Final = Status.OK


class Ledger:
    """Shared by the devices of one worker."""

    def __init__(self) -> None:
        self.effects: list[WorkerEffect] = []
        self.live: set[int] = set()
        """Ids of all and only the jobs that are owed a result."""

    def open(self, job: Job) -> None:
        """A result is owed from now on."""
        assert not job.owed and job.action_id not in self.live
        job.owed = True
        self.live.add(job.action_id)

    def turn_away(self, action: Action, refusal: Refusal, now_ns: int) -> None:
        """The one result of an action that never became a job."""
        self.effects.append(_refused(action, refusal, now_ns))

    def refuse(self, job: Job, refusal: Refusal, now_ns: int) -> None:
        """The one result of a job, given before it ends or instead of its run."""
        if job.owed:
            action = job.work
            assert not isinstance(action, (Prepare, Retire))
            job.owed = False
            self.live.remove(job.action_id)
            self.effects.append(_refused(action, refusal, now_ns))

    def close(self, job: Job, done: LaneDone, status: Status, message: str) -> None:
        """The one result of a job that ran; outputs only if it is good."""
        if not job.owed:
            return
        job.owed = False
        self.live.remove(job.action_id)
        ok = status is _OK
        self.effects.append(
            Result(
                action_id=job.action_id, device=done.device, status=status, started_ns=done.started_ns,
                ended_ns=done.ended_ns, input_ns=done.input_ns, run_ns=done.run_ns, output_ns=done.output_ns,
                outputs=done.outputs if ok else (), message=message, once_ns=done.once_ns,
            )
        )  # fmt: skip


def _refused(action: Action, refusal: Refusal, now_ns: int) -> Result:
    status, message = refusal
    kind = "LOAD" if isinstance(action, Load) else "INFER" if isinstance(action, Infer) else "UNLOAD"
    return Result(
        action_id=action.action_id, device=action.device, status=status, started_ns=now_ns, ended_ns=now_ns,
        message=f"{kind} of {action.model}: {message}",
    )  # fmt: skip
