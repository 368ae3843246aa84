"""Whether a request whose head alone has come would be rejected now: then its body need not come.

A question, no promise: one that is not told so now may be rejected when it is there.
"""

from __future__ import annotations

from typing import Final

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.feasibility import Feasibility
from clockwork_serve.messages import Announced, Hopeless, Reason

DRAINING: Final = "the server is shutting down"


def foretell(
    announced: Announced, belief: Belief, feasibility: Feasibility, now_ns: int, *, draining: bool
) -> Hopeless | None:
    """What to tell the gateway; None if the request may come."""
    model = belief.models.get(announced.model)
    if model is None:
        return None
    if draining:
        return _hopeless(announced, Reason.DRAINING, DRAINING)
    if model.waiting >= model.queue_limit:
        return _hopeless(
            announced, Reason.QUEUE_FULL, f"{model.waiting} requests wait for this model already"
        )
    if model.main is None or not belief.config.reject_infeasible:
        return None
    due_ns = announced.deadline_ns - belief.slack_ns
    hope = feasibility.foretell(model.main, due_ns, now_ns)
    if hope is None:
        return None
    retry_after_ns, message = feasibility.advice(hope, announced.arrival_ns, due_ns, announced.deadline_ns)
    return _hopeless(announced, Reason.WOULD_MISS_DEADLINE, message, retry_after_ns)


def _hopeless(announced: Announced, reason: Reason, message: str, retry_after_ns: int = 0) -> Hopeless:
    return Hopeless(
        announced_id=announced.announced_id, gateway=announced.gateway, reason=reason, message=message,
        retry_after_ns=retry_after_ns,
    )  # fmt: skip
