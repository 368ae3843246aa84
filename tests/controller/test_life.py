"""The life-cycle tables are whole: every state is reached, every step leads to a state of the table."""

from __future__ import annotations

import pytest

from clockwork_serve.controller.life import (
    REQUEST_LIFE,
    WEIGHTS_LIFE,
    RequestState,
    RequestStep,
    WeightsState,
)
from clockwork_serve.controller.queues import ServedModel, Waiter
from clockwork_serve.messages import Request
from tests.controller.honest import CODE, model


@pytest.mark.parametrize(
    ("life", "first"), [(REQUEST_LIFE, RequestState.WAITING), (WEIGHTS_LIFE, WeightsState.LOADING)]
)
def test_every_state_is_reached(life, first) -> None:  # type: ignore[no-untyped-def]
    reached, frontier = {first}, [first]
    while frontier:
        for after in life[frontier.pop()].values():
            if after not in reached:
                reached.add(after)
                frontier.append(after)
    assert reached == set(life)


def test_a_step_that_is_not_in_the_table_is_a_bug_with_its_story() -> None:
    queue = ServedModel(model("a"), CODE, 1).queue("", 1, alone=False, order=2)
    request = Request(request_id="r1", gateway="g", model="a/1", arrival_ns=0, deadline_ns=9)
    waiter = Waiter(request, 9, 1, queue)
    with pytest.raises(AssertionError, match="r1: release while waiting"):
        waiter.step(RequestStep.RELEASE)
