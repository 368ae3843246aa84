"""Admission: whether a request is served, or told no, with the reason and when it may return.

``Controller.decide`` asks here, and nowhere else: about a request that arrived; about one of which only the
head has (an admission query); about the head of a queue that no device with its weights can serve in time any
more; and, where requests are promised, about one that no plan has room for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final, NamedTuple

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import Queue, ServedModel, Waiter, level
from clockwork_serve.controller.estimates import UNIT
from clockwork_serve.controller.feasibility import EarliestFinish, Feasibility
from clockwork_serve.controller.life import READY
from clockwork_serve.controller.placement import usual_cost_ns
from clockwork_serve.controller.promises import Promises
from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.messages import AdmissionQuery, Outcome, Reason, Request, SoonestEnd
from clockwork_serve.units import NS_PER_MS


class Verdict(NamedTuple):
    """A no: how the request ends, and what its client is told."""

    outcome: Outcome
    reason: Reason
    message: str
    retry_after_ns: int = 0
    """How long to wait before a like request could be served; 0: no advice."""


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
FIT: Final = 8
"""A batch fits an SLO if it leaves this part (1 / ``FIT``) of it over."""
WORTH_SAYING_NS: Final = NS_PER_MS // 20
"""A time from which a message says it, in tenths of a millisecond."""
FRESH_NS: Final = 10 * NS_PER_MS
"""A pace that is older than this is computed again."""


class Admission(Record):
    """Gives verdicts, and ends the waiting requests that get one; keeps ``pace_ns`` of models up to date."""

    def __init__(
        self, belief: Belief, feasibility: Feasibility, quarantine: Quarantine, promises: Promises
    ) -> None:
        self._belief = belief
        self._feasibility = feasibility
        self._quarantine = quarantine
        self._tenants, self._accounts = belief.tenants, belief.tenants.accounts
        self._rejects = belief.config.reject_infeasible
        self._promises = promises
        self.draining = False
        """The server is shutting down: nothing more is admitted."""

    def verdict(
        self, asked: Request | AdmissionQuery, model: ServedModel | None, now_ns: int
    ) -> Verdict | None:
        """The first reason to say no to a request for ``model``; None: it is admitted.

        A query's is no promise: what would be admitted now may be rejected once it is complete.
        """
        if model is None:
            message = f"model {asked.model!r} is not served"
            return Verdict(Outcome.INVALID, Reason.UNKNOWN_MODEL, message)
        if self.draining:
            return Verdict(Outcome.REJECTED, Reason.DRAINING, "the server is shutting down")
        if model.quarantined:
            return Verdict(Outcome.FAILED, Reason.QUARANTINED, self._quarantine.reason(model, now_ns))
        request = asked if isinstance(asked, Request) else None
        rows = 1 if request is None else request.rows
        no = None if rows == 1 else self._too_many(model, rows)  # every model takes one
        if no is not None:
            return no
        if model.waiting >= model.queue_limit:
            message = f"{model.waiting} requests wait for this model already"
            return Verdict(Outcome.REJECTED, Reason.QUEUE_FULL, message)
        if request is not None:
            # Only a long queue can make it infeasible. One past its deadline is not rejected: it expires.
            # Plans say more about a backlog than a queue's length does.
            left_ns = request.deadline_ns - now_ns
            if model.waiting * model.pace_ns > left_ns >> 1 >= 0 and not self._promises.asked(request):
                no = self._behind_backlog(request, model, now_ns)
            return self._over_quota(asked, model, rows, now_ns) if no is None and self._accounts else no
        if self._accounts:
            no = self._over_quota(asked, model, rows, now_ns)
        if no is None and model.main is not None and self._rejects:
            return self._infeasible(asked, model.main, now_ns)
        return no

    def _too_many(self, model: ServedModel, rows: int) -> Verdict | None:
        """The verdict on a request of more rows than its model takes, or than any device has room for."""
        if not model.fits(rows):
            message = f"batch: expected 1 to {model.model.batch_sizes[-1]}; found {rows}"
            return Verdict(Outcome.INVALID, Reason.BAD_INPUT, message)
        ((_, size),) = model.sizes(rows, alone=True)
        why = ""
        for device in self._belief.devices.values():
            code = device.codes.get(model.code_id)
            if code is not None:
                why = code.misfits.get(size, "")
                if not why:
                    return None
        return Verdict(Outcome.FAILED, Reason.UNSERVABLE, f"{why}, or ask for fewer rows") if why else None

    def find_pace(self, model: ServedModel, now_ns: int) -> None:
        """Compute the device time per request in the best batch, if all capable devices share the work.

        In the time of the code's first profile; a device that needs three times as much counts a third.
        """
        best_ns, model.batch = 0.0, 1
        for residency in model.residencies.values():
            if residency.state == READY and model.main is not None:
                for batch in residency.code.batches("", model.main.sizes):
                    each_ns = batch.samples.median_ns * UNIT / (batch.count * residency.code.timings.pace)
                    if not best_ns or each_ns < best_ns:
                        best_ns, model.batch = each_ns, batch.count
        model.pace_at_ns = now_ns
        model.pace_ns = int(best_ns / self._belief.capacity(model))

    def _behind_backlog(self, request: Request, model: ServedModel, now_ns: int) -> Verdict | None:
        """The verdict, with a retry slot, if the requests before it leave too little time.

        Worth asking where ``model.waiting * model.pace_ns`` is more than half of the remaining time.
        """
        if now_ns - model.pace_at_ns > FRESH_NS:
            self.find_pace(model, now_ns)
        if not model.pace_ns:
            return None
        due_ns = self._belief.due_ns(request)
        start_ns = now_ns
        sole = model.sole
        if sole is not None and self._belief.capable_devices(model.code.backend) == 1:
            lane = sole.device.exec
            start_ns = lane.available_ns(now_ns)
            slo_ns = request.slo_ns
            if now_ns - lane.busy_since_ns > LONG * slo_ns:
                due_ns -= min(slo_ns // SPARE, SPARE_NS)
        ahead, urgency = 0, level(request.priority)
        for queue in model.queues.values():
            if queue.level <= urgency:
                dues = queue.dues
                ahead += len(dues) if dues and dues[-1] <= due_ns else bisect_right(dues, due_ns)
        # A batch less one waits even without a backlog: the policy chooses by which batches can be filled.
        before = ahead + 1 if model.batch == 1 else ahead + 1 - model.batch
        shortage_ns = start_ns + before * model.pace_ns - due_ns
        message = f"the deadline would be missed by {_ms(shortage_ns)}: {ahead} requests are due before it"
        if shortage_ns <= 0 and max(self._belief.waiting_by_class, default=0) <= urgency:
            shortage_ns = self._too_old_by_ns(request, model, now_ns)
            message = "every device is busy, until it is too late for a batch worth its time"
        if shortage_ns <= 0:
            return None
        slot_ns = now_ns + shortage_ns
        for residency in model.residencies.values():
            slot_ns = residency.device.retry_slots.slot_ns(slot_ns, model.pace_ns, now_ns)
            break
        return Verdict(Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, message, slot_ns - now_ns)

    def _too_old_by_ns(self, request: Request, model: ServedModel, now_ns: int) -> int:
        """By how much a request came too early for the next full batch of its model; 0 or less: it did not.

        The batch is the largest that fits the SLO. Where all lanes are overloaded, whoever waits for them and
        is too old for it then costs others more time than it is worth: those come who are not. If all such
        requests waited until they are infeasible, that is one instant, their clients would return at one,
        and would be too old again. Where a device lacks the weights nothing is said.
        """
        if model.main is None or len(model.residencies) < self._belief.capable_devices(model.code.backend):
            return 0
        slo_ns = request.slo_ns
        soonest_ns = NEVER_NS
        for residency in model.residencies.values():
            lane = residency.device.exec
            if residency.state != READY or now_ns - lane.busy_since_ns <= LONG * slo_ns:
                return 0
            infer_ns = 0
            for batch in residency.code.batches("", model.main.sizes):
                if batch.samples.estimate_ns <= slo_ns - slo_ns // FIT:
                    infer_ns = batch.samples.estimate_ns
            soonest_ns = min(soonest_ns, lane.available_ns(now_ns) + infer_ns)
        return soonest_ns - self._belief.due_ns(request)

    def _over_quota(
        self, asked: Request | AdmissionQuery, model: ServedModel, rows: int, now_ns: int
    ) -> Verdict | None:
        account = self._accounts.get(asked.tenant)
        if account is None:
            return None
        shortage = self._tenants.shortage(account, model, self._belief.cost_ns(model, rows), now_ns)
        if shortage is None:
            return None
        wait_ns, message = shortage
        return Verdict(Outcome.REJECTED, Reason.TENANT_QUOTA, message, wait_ns)

    # Feasibility, and when to return

    def _infeasible(self, query: Request | AdmissionQuery, queue: Queue, now_ns: int) -> Verdict | None:
        """The verdict on a request that would join a queue now, behind those that are due before it."""
        self._belief.forget_stale_delays(query.arrival_ns)
        due_ns = self._belief.due_ns(query)
        finish = self._feasibility.earliest_finish(queue, due_ns, now_ns)
        if finish is None:
            return None
        slack_ns = self._belief.slack_ns
        given_ns = due_ns + slack_ns - query.arrival_ns
        self._feasibility.reset_estimates(queue, finish, due_ns, given_ns, now_ns)
        if finish.rest_ns + slack_ns > given_ns and self._feasibility.later_feasible(
            queue, given_ns - slack_ns
        ):
            return None  # it has no time for a LOAD; the policy sends one only for a request that is here
        return self._miss(queue, query, finish, due_ns, given_ns, now_ns)

    def recheck(self, now_ns: int) -> bool:
        """Reject every infeasible head of the queues to recheck; true if the policy is to schedule again.

        Called by ``Controller.decide`` after the policy.
        """
        belief, feasibility = self._belief, self._feasibility
        if belief.dirty_lanes:
            feasibility.check_lanes(now_ns)
        changed = False
        to_recheck = belief.rechecks
        while to_recheck:
            queue = to_recheck.pop()
            queue.to_recheck = False
            dues = queue.dues
            while dues and not feasibility.feasible(queue, dues[0], now_ns):
                head = queue.waiters[0]
                no = self.hopeless(head, now_ns)
                if no is None:
                    changed = feasibility.mark_slow(queue) or changed
                    break
                belief.answer(
                    head, no.outcome, no.reason, message=no.message, retry_after_ns=no.retry_after_ns
                )
                changed = True
        return changed

    def hopeless(self, head: Waiter, now_ns: int) -> Verdict | None:
        """The verdict on a head that no device with its weights can serve in time; None: a LOAD can help."""
        queue = head.queue
        loadable, soonest = self._feasibility.feasible_after_load(queue, head.due_ns, now_ns)
        if loadable:
            return None
        finish = self._feasibility.best(queue, soonest, now_ns)
        if finish is None and queue.model.unservable:
            return Verdict(Outcome.FAILED, Reason.UNSERVABLE, queue.model.unservable)
        if finish is None:
            message = self._feasibility.why_unservable(queue.model)
            return Verdict(Outcome.REJECTED, Reason.NOT_SERVING, message)
        given_ns = head.slo_ns - head.request.way_ns
        self._feasibility.reset_estimates(queue, finish, head.due_ns, given_ns, now_ns)
        return self._miss(queue, head.request, finish, head.due_ns, given_ns, now_ns)

    def judge(self, now_ns: int) -> bool:
        """Reject requests whose verdict is due and that no plan has room for, though each may be feasible.

        The others whose verdict is due are promised. Called by ``Controller.decide`` after the policy, which
        is to schedule again if this is true: a LOAD was sent, or requests were refused.
        """
        before = len(self._belief.effects)
        for waiter in self._promises.judge(now_ns):
            self._refuse(waiter, now_ns)
        return len(self._belief.effects) > before

    def _refuse(self, waiter: Waiter, now_ns: int) -> None:
        """Reject a request that no plan has room for, and name an SLO that could be promised."""
        queue, request = waiter.queue, waiter.request
        message, retry_after_ns = "no device has its weights, or time to load them before the deadline", 0
        soonest = self._promises.soonest(queue, now_ns)
        if soonest is not None:
            device, end_ns, cost_ns = soonest
            needed_ns = end_ns + request.deadline_ns - waiter.due_ns - request.arrival_ns
            enough_ns = self._promises.slo_ns(needed_ns)
            message = "no promise can be kept by the deadline"
            if enough_ns > waiter.slo_ns:  # else room is left to other requests
                message = f"{message}: an SLO of {enough_ns / NS_PER_MS:.0f} ms could"
            soonest_ns = max(now_ns, now_ns + enough_ns - waiter.slo_ns)
            retry_after_ns = device.retry_slots.slot_ns(soonest_ns, cost_ns, now_ns) - now_ns
        self._belief.answer(
            waiter, Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, message=message,
            retry_after_ns=retry_after_ns,
        )  # fmt: skip
        self._belief.recheck(queue)

    def _miss(
        self, queue: Queue, asked: Request | AdmissionQuery, finish: EarliestFinish, due_ns: int,
        given_ns: int, now_ns: int,
    ) -> Verdict:  # fmt: skip
        """The verdict on an infeasible request; each client that may return has a retry slot.

        There is no advice if no request with ``given_ns`` to its deadline is ever feasible.
        """
        slo_ns, reserve_ns = asked.deadline_ns - asked.arrival_ns, asked.deadline_ns - due_ns
        parts = (
            f"it takes {_ms(finish.rest_ns)}, and {_ms(reserve_ns)} are kept for the way and delays, "
            f"of an SLO of {_ms(slo_ns)}"
        )
        if finish.rest_ns + self._belief.slack_ns > given_ns:
            message = f"the deadline cannot be met: {parts}"
            return Verdict(Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, message)
        shortage_ns, device = finish.end_ns - due_ns, finish.device
        code = device.codes.get(queue.model.code_id) if finish.lane is device.exec else None
        cost_ns = (
            finish.rest_ns if code is None else usual_cost_ns(code.batches(queue.signature, queue.sizes))
        )
        slot_ns = device.retry_slots.slot_ns(now_ns + shortage_ns, cost_ns, now_ns)
        before = _before(finish, now_ns - asked.arrival_ns, now_ns)
        message = f"the deadline would be missed by {_ms(shortage_ns)}: {before}{parts}"
        return Verdict(Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, message, slot_ns - now_ns)

    # A summary for gateways: what queries would find infeasible, without a query for each request

    def soonest_ends(self, keys: Iterable[str], now_ns: int) -> dict[str, SoonestEnd]:
        """By model key, of these ``keys``: when a request that joins its main queue last could end.

        A query about one that is due sooner would be told no.
        """
        found: dict[str, SoonestEnd] = {}
        for key in keys if self._rejects else ():
            model = self._belief.models.get(key)
            if model is not None and not model.quarantined and model.main is not None:
                soonest = self._feasibility.soonest_end(model.main, now_ns)
                if soonest is not None:
                    found[key] = soonest
        return found


def _before(finish: EarliestFinish, age_ns: int, now_ns: int) -> str:
    """What of a request's time is over or waited for; with what it takes and what is kept this adds up."""
    wait_ns = finish.end_ns - finish.rest_ns - now_ns
    over = f"{_ms(age_ns)} are over, " if age_ns >= WORTH_SAYING_NS else ""
    if wait_ns < WORTH_SAYING_NS:
        return over
    name, wait = finish.device.name, _ms(wait_ns)
    return over + (f"{name} is busy for {wait}, " if finish.lane.busy(now_ns) else f"{name} is {wait} away, ")


def _ms(duration_ns: int) -> str:
    """A duration as messages say it."""
    return "less than 0.1 ms" if duration_ns < WORTH_SAYING_NS else f"{duration_ns / NS_PER_MS:.1f} ms"
