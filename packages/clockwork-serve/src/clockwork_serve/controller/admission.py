"""Admission: whether an arriving request is queued, and the replies to admission queries."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import ServedModel, level
from clockwork_serve.controller.feasibility import Feasibility
from clockwork_serve.controller.life import READY
from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.controller.record import Record
from clockwork_serve.messages import AdmissionQuery, AdmissionReply, Outcome, Reason, Request, SoonestEnd
from clockwork_serve.units import NS_PER_MS

# ------------------------------------------------------------
# Rejections that need no estimate: unknown model, draining, quarantine, too many rows, queue full.


DRAINING: Final = "the server is shutting down"

Refusal = tuple[Request, Outcome, Reason, str, int]
"""A request that is not admitted: its outcome, reason and message, and the retry advice in ns (0: none)."""


def queue_full(model: ServedModel) -> str:
    """The message for a full queue."""
    return f"{model.waiting} requests wait for this model already"


def refusal(
    request: Request, model: ServedModel | None, quarantine: Quarantine, now_ns: int, *, draining: bool
) -> Refusal | None:
    """Why a request is not admitted on arrival: the first reason that applies; None: it is queued.

    Called for each request. What needs the schedule (``Backlog``) or is paid for (``tenants``) comes after.
    """
    if model is None:
        outcome, reason, why = (
            Outcome.INVALID, Reason.UNKNOWN_MODEL, f"model {request.model!r} is not served",
        )  # fmt: skip
    elif draining:
        outcome, reason, why = Outcome.REJECTED, Reason.DRAINING, DRAINING
    elif model.quarantined:
        outcome, reason, why = Outcome.FAILED, Reason.QUARANTINED, quarantine.reason(model, now_ns)
    elif request.rows != 1 and not model.fits(request.rows):  # every model takes one
        why = f"batch: expected 1 to {model.model.batch_sizes[-1]}; found {request.rows}"
        outcome, reason = Outcome.INVALID, Reason.BAD_INPUT
    elif model.waiting >= model.queue_limit:
        outcome, reason, why = Outcome.REJECTED, Reason.QUEUE_FULL, queue_full(model)
    else:
        return None
    return request, outcome, reason, why, 0


# ------------------------------------------------------------
# Load shedding by backlog: whether a new request is infeasible because of those queued before it.
#
# ``feasibility`` watches only the head of each queue: a request behind it is rejected once it is the head and
# infeasible, shortly before its deadline. Under overload most requests would only wait to be rejected. So an
# arriving request is compared with its model's backlog: the requests that are due before it take at least
# ``pace_ns`` each, with all capable devices running the best batches. Under overload this sheds the requests
# with the latest deadlines, which have the most time to be sent elsewhere.


LONG: Final = 2
"""A lane is overloaded once its busy period is longer than this many SLOs."""
SPARE: Final = 4
SPARE_NS: Final = 10 * NS_PER_MS
"""On an overloaded lane, this fraction of the SLO (1 / ``SPARE``), at most ``SPARE_NS``, must remain: a
response planned for the last moment is late if anything is slower than planned, and a shorter queue keeps the
lane as busy."""
FRESH_NS: Final = 10 * NS_PER_MS
"""A pace that is older than this is computed again."""


class Backlog(Record):
    """Rejects arriving requests by their model's backlog; keeps ``pace_ns`` of models up to date."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief

    def find_pace(self, model: ServedModel, now_ns: int) -> None:
        """Compute the device time per request in the best batch, divided by the number of capable devices."""
        best_ns, model.batch = 0.0, 1
        for residency in model.residencies.values():
            if residency.state == READY and model.main is not None:
                for batch in residency.code.batches("", model.main.sizes):
                    each_ns = batch.samples.median_ns / batch.count
                    if not best_ns or each_ns < best_ns:
                        best_ns, model.batch = each_ns, batch.count
        model.pace_at_ns = now_ns
        model.pace_ns = int(best_ns / max(1, self._belief.capable_devices(model.code.backend)))

    def refusal(self, request: Request, model: ServedModel, now_ns: int) -> Refusal | None:
        """The rejection of an arriving request, with a retry slot; None if it may be feasible."""
        shortage_ns, why = self.shortage(request, model, request.priority, now_ns)
        if shortage_ns <= 0:
            return None
        slot_ns = now_ns + shortage_ns
        for residency in model.residencies.values():
            slot_ns = residency.device.retry_slots.slot_ns(slot_ns, model.pace_ns, now_ns)
            break
        return request, Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, why, slot_ns - now_ns

    def shortage(self, request: Request, model: ServedModel, priority: int, now_ns: int) -> tuple[int, str]:
        """By how much, in ns, it would at least be late, and the message; 0 or less if it may be feasible.

        Worth calling where ``model.waiting * model.pace_ns`` is more than half of the remaining time.
        """
        if now_ns - model.pace_at_ns > FRESH_NS:
            self.find_pace(model, now_ns)
        if not model.pace_ns:
            return 0, ""
        due_ns = self._belief.due_ns(request)
        start_ns = now_ns
        sole = model.sole
        if sole is not None and self._belief.capable_devices(model.code.backend) == 1:
            lane = sole.device.exec
            start_ns = lane.available_ns(now_ns)
            slo_ns = request.slo_ns
            if now_ns - lane.busy_since_ns > LONG * slo_ns:
                due_ns -= min(slo_ns // SPARE, SPARE_NS)
        ahead, urgency = 0, level(priority)
        for queue in model.queues.values():
            if queue.level <= urgency:
                dues = queue.dues
                ahead += len(dues) if dues and dues[-1] <= due_ns else bisect_right(dues, due_ns)
        # A batch less one waits even without a backlog: the policy chooses by which batches can be filled.
        before = ahead + 1 if model.batch == 1 else ahead + 1 - model.batch
        shortage_ns = start_ns + before * model.pace_ns - due_ns
        missed_by = f"{shortage_ns / NS_PER_MS:.1f} ms"
        return shortage_ns, f"the deadline would be missed by {missed_by}: {ahead} requests are due before it"


# ------------------------------------------------------------
# Admission queries: whether a request of which only the head has arrived would be rejected now, so that the
# gateway need not receive its body.
#
# The reply is no promise: a request that would be admitted now may be rejected once it is complete.


def admission_reply(
    announced: AdmissionQuery, belief: Belief, feasibility: Feasibility, now_ns: int, *, draining: bool
) -> AdmissionReply:
    """The reply to a gateway's query: without a reason, the request would be admitted now."""
    model = belief.models.get(announced.model)
    if model is None or model.quarantined:
        return _reply(announced)
    if draining:
        return _reply(announced, Reason.DRAINING, DRAINING)
    if model.waiting >= model.queue_limit:
        return _reply(announced, Reason.QUEUE_FULL, queue_full(model))
    account = belief.tenants.accounts.get(announced.tenant)
    if account is not None:
        shortage = belief.tenants.shortage(account, model, belief.cost_ns(model, 1), now_ns)
        if shortage is not None:
            wait_ns, message = shortage
            return _reply(announced, Reason.TENANT_QUOTA, message, wait_ns)
    if model.main is None or not belief.config.reject_infeasible:
        return _reply(announced)
    due_ns = belief.due_ns(announced)
    finish = feasibility.earliest_finish(model.main, due_ns, now_ns)
    if finish is None:
        return _reply(announced)
    given_ns = due_ns + belief.slack_ns - announced.arrival_ns
    retry_after_ns, message = feasibility.retry_advice(model.main, finish, due_ns, given_ns, now_ns)
    return _reply(announced, Reason.WOULD_MISS_DEADLINE, message, retry_after_ns)


def _reply(
    announced: AdmissionQuery, reason: Reason = Reason.NONE, message: str = "", retry_after_ns: int = 0
) -> AdmissionReply:
    return AdmissionReply(
        announced_id=announced.announced_id, gateway=announced.gateway, reason=reason, message=message,
        retry_after_ns=retry_after_ns,
    )  # fmt: skip


# ------------------------------------------------------------
# A summary for gateways: what queries would find infeasible, without a query for each request.


def soonest_ends(
    keys: Iterable[str], belief: Belief, feasibility: Feasibility, now_ns: int
) -> dict[str, SoonestEnd]:
    """By model key, of these ``keys``: when a request that joins its main queue last could end.

    One that is due sooner would be rejected by ``admission_reply``.
    """
    found: dict[str, SoonestEnd] = {}
    if belief.config.reject_infeasible:
        for key in keys:
            model = belief.models.get(key)
            if model is not None and not model.quarantined and model.main is not None:
                soonest = feasibility.soonest_end(model.main, now_ns)
                if soonest is not None:
                    found[key] = soonest
    return found
