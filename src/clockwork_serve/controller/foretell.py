"""Whether a request whose head alone has come would be rejected now: then its body need not come.

A question, no promise: one that is not told so now may be rejected when it is there.
"""

from __future__ import annotations

from clockwork_serve.controller.admission import DRAINING, queue_full
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.feasibility import Feasibility
from clockwork_serve.messages import Announced, Foretold, Reason


def foretell(
    announced: Announced, belief: Belief, feasibility: Feasibility, now_ns: int, *, draining: bool
) -> Foretold:
    """What to tell the gateway."""
    model = belief.models.get(announced.model)
    if model is None or model.quarantined:
        return _foretold(announced)
    if draining:
        return _foretold(announced, Reason.DRAINING, DRAINING)
    if model.waiting >= model.queue_limit:
        return _foretold(announced, Reason.QUEUE_FULL, queue_full(model))
    account = belief.tenants.accounts.get(announced.tenant)
    if account is not None:
        shortage = belief.tenants.shortage(account, model, belief.cost_ns(model, 1), now_ns)
        if shortage is not None:
            return _foretold(announced, Reason.TENANT_QUOTA, shortage.message, shortage.retry_after_ns)
    if model.main is None or not belief.config.reject_infeasible:
        return _foretold(announced)
    due_ns = announced.deadline_ns - announced.way_ns - belief.slack_ns
    hope = feasibility.foretell(model.main, due_ns, now_ns)
    if hope is None:
        return _foretold(announced)
    time_ns = announced.deadline_ns - announced.way_ns - announced.arrival_ns
    retry_after_ns, message = feasibility.advise(model.main, hope, due_ns, time_ns, now_ns)
    return _foretold(announced, Reason.WOULD_MISS_DEADLINE, message, retry_after_ns)


def _foretold(
    announced: Announced, reason: Reason = Reason.NONE, message: str = "", retry_after_ns: int = 0
) -> Foretold:
    return Foretold(
        announced_id=announced.announced_id, gateway=announced.gateway, reason=reason, message=message,
        retry_after_ns=retry_after_ns,
    )  # fmt: skip
