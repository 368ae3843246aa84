"""Handles results and lost actions: responses, retries, unloading of removed models.

Events are recorded as they are taken in, and handled once all of an instant are.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from clockwork_serve.controller.belief import Belief, Sent
from clockwork_serve.controller.cluster import ServedModel, Waiter
from clockwork_serve.controller.life import FAILED, READY, SPENT, WAITING
from clockwork_serve.controller.policies.base import Scheduler
from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.controller.record import Record
from clockwork_serve.messages import Answer, Cause, Infer, Load, Outcome, Reason, Result, Status

GOOD: Final = Status.OK
OK: Final = Outcome.OK

RETRY_STATUSES = frozenset({Status.TOO_EARLY, Status.TOO_LATE, Status.SHUTTING_DOWN})
"""Refused for reasons of time: the requests are planned again, any number of times."""

BELIEF_WRONG = frozenset({Status.WEIGHTS_MISSING, Status.WEIGHTS_CHANGED, Status.IN_USE, Status.UNKNOWN_CODE})
"""The worker's memory differs from belief, which its report corrects (``Takeover.correct``): the requests
are planned again, a few times. So they are where a LOAD found no room; an INFER that has none never will."""

LOAD_ELSEWHERE = frozenset({Status.NO_ROOM, Status.DAMAGED})
"""Another LOAD may succeed, on another device or once the file is there again; it is tried a few times."""

_CAUSES: Final = {
    Status.TOO_EARLY: Cause.DEVICE_SLOWED, Status.TOO_LATE: Cause.DEVICE_SLOWED,
    Status.MODEL_RAISED: Cause.MODEL_FAILED,
}  # fmt: skip
"""Why a promise lost its INFER, by its result; by others, a device or its weights were lost."""

ATTEMPTS_MAX = 3
"""How often one request is planned again because belief was wrong."""


class ResultHandler(Record):
    """Handles the results, losses and removals that were observed."""

    def __init__(self, belief: Belief, scheduler: Scheduler, quarantine: Quarantine) -> None:
        self._belief = belief
        self.scheduler = scheduler
        self._quarantine = quarantine
        self.results: list[tuple[Sent, Result]] = []
        """Results observed and not handled yet; the controller adds them."""
        self._lost: list[tuple[Sent, bool]] = []
        """Actions that were in flight on a lost worker, and whether they may have run when it died."""
        self._retired: dict[ServedModel, None] = {}
        """Removed or quarantined models whose weights may still be on a device."""

    def action_lost(self, sent: Sent, *, ran: bool) -> None:
        """Record an action that was in flight on a lost worker; ``ran``: it may have been running."""
        self._lost.append((sent, ran))
        self._belief.has_pending = True

    def retire(self, model: ServedModel) -> None:
        """Unload a removed model's weights as soon as no INFER reads them."""
        self._retired[model] = None
        self._belief.has_pending = True

    def move_waiters(self, model: ServedModel, ending: list[tuple[Waiter, Outcome, Reason, str]]) -> None:
        """Move waiting requests of a model that was just replaced to its new version, if they fit it."""
        for one in [one for one in ending if one[2] is Reason.NOT_SERVING]:
            waiter = one[0]
            if waiter.state == WAITING and _is_valid_for(waiter, model):
                ending.remove(one)
                self.scheduler.queued(self._belief.move(waiter, model))

    def process(self, now_ns: int) -> None:
        """Handle all results, losses and removals that were observed."""
        quarantine = self._quarantine
        if quarantine.watched:
            for sent, result in self.results:
                if sent.waiters and result.status is GOOD:
                    quarantine.succeeded(sent.action.model)
        for model in quarantine.process(now_ns) if quarantine.has_pending else ():
            self._quarantined(model, now_ns)
        if self.results:
            for sent, result in self.results:
                if result.status is not GOOD:
                    self._handle_failure(sent, result, now_ns)
                elif sent.waiters:
                    self._answer(sent, result, now_ns)
            self.results.clear()
        if self._lost:
            for sent, ran in self._lost:
                self._charge_lost(sent, now_ns, ran=ran)
                for waiter in sent.waiters:
                    self._handle_lost_request(waiter, now_ns, ran=ran)
            self._lost.clear()
        if self._retired:
            self._unload_retired(now_ns)
            self._belief.has_pending = bool(self._retired)

    def _unload_retired(self, now_ns: int) -> None:
        for model in list(self._retired):
            if not model.removed and not model.quarantined:  # it is served again
                del self._retired[model]
                continue
            for residency in list(model.residencies.values()):
                if residency.state == READY and not residency.in_flight:
                    self._belief.send_unload(residency, now_ns)
            if not model.residencies:
                del self._retired[model]

    def _quarantined(self, model: ServedModel, now_ns: int) -> None:
        """Fail all waiting requests of a model that enters quarantine, and have its weights unloaded."""
        message = self._quarantine.reason(model, now_ns)
        for queue in list(model.queues.values()):
            for waiter in list(queue.waiters):
                self._belief.answer(waiter, Outcome.FAILED, Reason.QUARANTINED, message=message)
                self._belief.recheck(queue)
        self._retired[model] = None

    def _answer(self, sent: Sent, result: Result, now_ns: int) -> None:
        """Answer the requests of an INFER that succeeded."""
        started_ns, exec_ns = result.started_ns, result.ended_ns - result.started_ns
        action, outputs = sent.action, result.outputs
        assert isinstance(action, Infer)
        kept = 0
        for at, waiter in enumerate(sent.waiters):
            request = waiter.request
            if waiter.state == SPENT:
                self._belief.release(waiter)
            else:
                promised = waiter.promised_ns >= 0
                answer = Answer(
                    request_id=request.request_id, gateway=request.gateway, outcome=OK, cold=waiter.cold,
                    batch=action.batch, outputs=outputs[at], queue_ns=started_ns - request.arrival_ns,
                    exec_ns=exec_ns, expected_ns=action.expected_ns, promised=promised,
                )  # fmt: skip
                if now_ns > request.deadline_ns:
                    answer = replace(
                        answer, outcome=Outcome.EXPIRED, reason=Reason.LATE,
                        message="the answer came after the deadline",
                        cause=self._belief.break_promise(waiter, Reason.LATE) if promised else Cause.NONE,
                    )  # fmt: skip
                elif promised:
                    kept += 1
                self._belief.finish(waiter, answer)
        if kept:
            sent.device.delays.kept_promises(kept, sent.waiters[0].queue.level)

    def _handle_failure(self, sent: Sent, result: Result, now_ns: int) -> None:
        """Handle an action that the worker refused, or that failed."""
        status = result.status
        if not sent.waiters:
            if isinstance(sent.action, Load):
                self._handle_failed_load(sent, result)
            return
        for waiter in sent.waiters:
            if waiter.state == SPENT:
                self._belief.release(waiter)
            elif self._may_retry(waiter, len(sent.waiters), status):
                alone = status not in RETRY_STATUSES and status not in BELIEF_WRONG
                self._return(waiter, _CAUSES.get(status, Cause.DEVICE_LOST), alone=alone)
            else:
                self._fail(waiter, result, now_ns)

    def _may_retry(self, waiter: Waiter, companions: int, status: Status) -> bool:
        """Whether a request of a refused or failed INFER may be planned again."""
        if waiter.queue.model.removed or waiter.queue.model.quarantined:
            return False
        if status in RETRY_STATUSES:
            return True
        if status in BELIEF_WRONG:
            waiter.retries += 1
            return waiter.retries <= ATTEMPTS_MAX
        return companions > 1  # one of them may be why the others failed

    def _return(self, waiter: Waiter, cause: Cause, *, alone: bool) -> None:
        self._belief.readmit(waiter, cause, alone=alone)
        self.scheduler.queued(waiter.queue)

    def _fail(self, waiter: Waiter, result: Result, now_ns: int) -> None:
        status = result.status
        outcome, reason = Outcome.FAILED, Reason.DEVICE_FAULT
        message = result.message or f"the worker refused: {status.value}"
        if status is Status.MODEL_RAISED:
            reason = Reason.MODEL_RAISED
        elif status in RETRY_STATUSES or status in BELIEF_WRONG:
            if waiter.queue.model.removed:
                outcome, reason, message = Outcome.REJECTED, Reason.NOT_SERVING, "the model was unloaded"
            elif waiter.queue.model.quarantined:
                reason = Reason.QUARANTINED
                message = self._quarantine.reason(waiter.queue.model, now_ns)
        self._finish(waiter, outcome, reason, message)

    def _finish(self, waiter: Waiter, outcome: Outcome, reason: Reason, message: str) -> None:
        """End a request whose INFER is over, and gave no outputs."""
        request = waiter.request
        cause = self._belief.break_promise(waiter, reason) if waiter.promised_ns >= 0 else Cause.NONE
        if cause is not Cause.NONE and outcome is not Outcome.FAILED:
            outcome, reason = Outcome.EXPIRED, Reason.PROMISE_BROKEN
        self._belief.finish(
            waiter,
            Answer(
                request_id=request.request_id, gateway=request.gateway, outcome=outcome, reason=reason,
                cold=waiter.cold, message=message, promised=waiter.promised_ns >= 0, cause=cause,
            ),
        )  # fmt: skip

    def _handle_failed_load(self, sent: Sent, result: Result) -> None:
        residency = sent.residency
        assert residency is not None
        model = residency.model
        if self._belief.devices.get(residency.device.name) is residency.device:
            residency.step(FAILED)
            self._belief.drop(residency)
        status = result.status
        if status not in RETRY_STATUSES and not model.residencies:
            wrong = status in BELIEF_WRONG or status in LOAD_ELSEWHERE
            reason = Reason.MODEL_RAISED if status is Status.MODEL_RAISED else Reason.DEVICE_FAULT
            message = f"its weights could not be loaded: {result.message or status.value}"
            for waiter in [one for queue in model.queues.values() for one in queue.waiters]:
                waiter.retries += wrong
                if not wrong or waiter.retries > ATTEMPTS_MAX:
                    self._belief.answer(waiter, Outcome.FAILED, reason, message=message)
        self._belief.recheck_model(model)

    def action_hung(self, sent: Sent, now_ns: int, *, ran: bool) -> None:
        """Handle an action on a worker that hung; it holds its requests' tensors until it is over."""
        self._charge_lost(sent, now_ns, ran=ran)
        for waiter in sent.waiters:
            if waiter.state != SPENT:
                waiter.tensor_refs += 1
                self._handle_lost_request(waiter, now_ns, ran=ran, how="hung")

    def _charge_lost(self, sent: Sent, now_ns: int, *, ran: bool) -> None:
        """Charge tenants for an action on a lost or hung worker: no result says how long it ran."""
        tenants = self._belief.tenants
        if sent.waiters:
            assert isinstance(sent.action, Infer)
            tenants.measured(sent.waiters, sent.action.expected_ns if ran else 0, now_ns)
        tenants.loaded(sent.action.action_id, now_ns, good=False)

    def _handle_lost_request(self, waiter: Waiter, now_ns: int, *, ran: bool, how: str = "died") -> None:
        """Plan a request again that was in flight on a lost or hung worker, or fail it after ``retries``."""
        if waiter.state == SPENT:
            self._belief.release(waiter)
            return
        model = waiter.queue.model
        reason, message = Reason.WORKER_LOST, f"the worker {how} while it ran this request"
        if model.quarantined:
            reason, message = Reason.QUARANTINED, self._quarantine.reason(model, now_ns)
        elif not model.removed:
            waiter.retries += ran
            if waiter.retries <= self._belief.config.retries:
                self._return(waiter, Cause.DEVICE_LOST, alone=ran)
                return
        self._finish(waiter, Outcome.FAILED, reason, message)


def _is_valid_for(waiter: Waiter, model: ServedModel) -> bool:
    """Whether a request of a replaced model is also valid for the model that replaces it."""
    before = waiter.queue.model
    old, new = before.code, model.code
    return (
        before.key == model.key
        and (old.inputs, old.outputs, old.batched) == (new.inputs, new.outputs, new.batched)
        and before.model.output_bytes >= model.model.output_bytes
        and model.fits(waiter.request.rows)
    )
