"""How a request ended, in words for its client: as the controller says, or as the gateway found by itself."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import Answer, Outcome, Reason, Request
from clockwork_serve.oip import OK, InferCall, Served, reason_of_error, status_of, status_of_error
from clockwork_serve.serve.gateway_inquiry import Ending, Inquiry
from clockwork_serve.serve.gateway_slots import Slot
from clockwork_serve.units import NS_PER_MS

ROOM_RETRY_NS: Final = 50 * NS_PER_MS
"""When to come again if there is no room: about as long as most requests hold a slot."""


TIMELY: Final = frozenset({Outcome.OK, Outcome.REJECTED})
"""What is worth something only in time: after its deadline a request has expired, whatever became of it."""


class Pending(Struct):
    """A request without the controller's answer; ``inquiry`` is None once its client needs nothing.

    ``request`` is what the controller was sent.
    """

    inquiry: Inquiry | None
    served: Served
    call: InferCall
    slot: Slot
    request: Request
    slo_ns: int = 0  # where it is not the one that was asked for
    expired: bool = False  # ended here, for the controller did not
    asked_again: bool = False  # of a second controller, for the first one died

    @property
    def deadline_ns(self) -> int:
        """When it is to be answered at the latest."""
        return self.request.deadline_ns


def ending_of(pending: Pending, answer: Answer) -> Ending:
    """How the controller says that a request ended."""
    outcome, reason = answer.outcome, answer.reason
    status = OK if outcome is Outcome.OK else status_of(outcome, reason)
    ending = Ending(
        outcome, reason, status, answer.message, answer.request_id, pending.served,
        pending.call, answer.retry_after_ns,
    )  # fmt: skip
    if answer.batch:
        ending.parameters = {
            "queue_ms": answer.queue_ns // 1000 / 1000,
            "exec_ms": answer.exec_ns // 1000 / 1000,
            "expected_ms": answer.expected_ns // 1000 / 1000,
            "batch_size": answer.batch,
            "cold_start": answer.cold,
        }
        if pending.slo_ns:
            ending.parameters["slo_ms"] = pending.slo_ns / NS_PER_MS
    if outcome in TIMELY:
        ending.deadline_ns = pending.request.deadline_ns
    if outcome is Outcome.OK:
        ending.outputs = pending.slot.outputs(answer.outputs)
    return ending


def wrong(error: InvalidRequest, request_id: str = "", served: Served | None = None) -> Ending:
    """How a request ends that is not what it should be."""
    reason = reason_of_error(error)
    return Ending(Outcome.INVALID, reason, status_of_error(error), str(error), request_id, served)


def too_late(request_id: str, outcome: Outcome, call: InferCall | None) -> Ending:
    """How a request ends whose answer, of that outcome, could not be given to its client in time."""
    message = "the gateway could give its answer to the client only after the deadline"
    reason = Reason.LATE if outcome is Outcome.OK else Reason.NONE
    ending = own_ending(Outcome.EXPIRED, reason, message, request_id)
    ending.call = call
    return ending


def own_ending(
    outcome: Outcome, reason: Reason, message: str, request_id: str = "", pending: Pending | None = None
) -> Ending:
    """How a request ends by the gateway's own finding."""
    ending = Ending(outcome, reason, status_of(outcome, reason), message, request_id)
    if pending is not None:
        ending.served, ending.call = pending.served, pending.call
    return ending


def crowded(request_id: str, pending: Pending, waited_ns: int) -> Ending:
    """How a request ends that could not even be told to the controller."""
    waited = f"{waited_ns / NS_PER_MS:.1f} ms"
    return no_room(
        request_id, pending, f"more requests come than the server can plan; this one waited {waited}"
    )


def no_room(request_id: str, pending: Pending, message: str) -> Ending:
    """How a request ends for which there is no room on the way to the controller."""
    ending = own_ending(Outcome.REJECTED, Reason.QUEUE_FULL, message, request_id, pending)
    ending.retry_after_ns = ROOM_RETRY_NS
    return ending
