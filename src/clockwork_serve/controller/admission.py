"""Why a request is not admitted at all: words and reasons; who asks answers it."""

from __future__ import annotations

from typing import Final

from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.controller.queues import ServedModel
from clockwork_serve.messages import Outcome, Reason, Request

DRAINING: Final = "the server is shutting down"

Refusal = tuple[Request, Outcome, Reason, str, int]
"""A request that was not admitted, how it ends, and when a like one may come again (0: no advice)."""


def queue_full(model: ServedModel) -> str:
    """Why no more requests may wait for it."""
    return f"{model.waiting} requests wait for this model already"


def refusal(
    request: Request, model: ServedModel | None, quarantine: Quarantine, now_ns: int, *, draining: bool
) -> Refusal:
    """The first reason that holds; one does."""
    if model is None:
        outcome, reason, why = (
            Outcome.INVALID, Reason.UNKNOWN_MODEL, f"model {request.model!r} is not served",
        )  # fmt: skip
    elif draining:
        outcome, reason, why = Outcome.REJECTED, Reason.DRAINING, DRAINING
    elif model.quarantined:
        outcome, reason, why = Outcome.FAILED, Reason.QUARANTINED, quarantine.reason(model, now_ns)
    elif not model.fits(request.rows):
        why = f"batch: expected 1 to {model.model.batch_sizes[-1]}; found {request.rows}"
        outcome, reason = Outcome.INVALID, Reason.BAD_INPUT
    else:
        outcome, reason, why = Outcome.REJECTED, Reason.QUEUE_FULL, queue_full(model)
    return request, outcome, reason, why, 0
