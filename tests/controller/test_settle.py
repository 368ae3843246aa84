"""What an answer says when something went wrong, and what is tried again."""

from __future__ import annotations

import pytest

from clockwork_serve.messages import Infer, Load, Outcome, Reason, Status
from tests.controller.honest import World, device, model


def failing(kind: type, status: Status, times: int = 1000) -> World:
    """A cold device on which the first ``times`` actions of a kind end badly."""
    world = World()
    world.serve(model("a"))
    world.join(device())
    honest, left = world.reply, [times]

    def reply(action, said, start_ns, end_ns):  # type: ignore[no-untyped-def]
        bad = isinstance(action, kind) and left[0] > 0
        left[0] -= bad
        honest(action, status if bad else said, start_ns, end_ns)

    world.reply = reply  # type: ignore[method-assign]
    return world


@pytest.mark.parametrize(
    ("status", "reason"),
    [(Status.MODEL_RAISED, Reason.MODEL_RAISED), (Status.DEVICE_FAULT, Reason.DEVICE_FAULT)],
)
def test_a_failed_infer_says_why_and_that_it_was_cold(status: Status, reason: Reason) -> None:
    world = failing(Infer, status)
    request_id = world.request("a", slo_ms=500)
    world.run()
    answer = world.answers[request_id]
    assert (answer.outcome, answer.reason, answer.cold) == (Outcome.FAILED, reason, True)
    assert answer.message == f"the worker refused: {status.value}"
    again = world.request("a", slo_ms=500)
    world.run()
    assert not world.answers[again].cold, "the weights are there now"
