"""The life-cycle tables are whole: every state is reached, every step leads to a state of the table."""

from __future__ import annotations

import pytest

from clockwork_serve.controller.cluster import ServedModel, Waiter
from clockwork_serve.controller.life import (
    LOADING,
    NEVER,
    RELEASE,
    REQUEST_AFTER,
    REQUEST_LIFE,
    REQUEST_STATES,
    REQUEST_STEPS,
    WAITING,
    WEIGHTS_AFTER,
    WEIGHTS_LIFE,
    WEIGHTS_STATES,
    WEIGHTS_STEPS,
)
from clockwork_serve.messages import Request
from tests.controller.honest import CODE, model


@pytest.mark.parametrize(("life", "first"), [(REQUEST_LIFE, WAITING), (WEIGHTS_LIFE, LOADING)])
def test_every_state_is_reached(life, first) -> None:  # type: ignore[no-untyped-def]
    reached, frontier = {first}, [first]
    while frontier:
        for after in life[frontier.pop()].values():
            if after not in reached:
                reached.add(after)
                frontier.append(after)
    assert reached == set(life)


@pytest.mark.parametrize(
    ("life", "states", "steps", "rows"),
    [
        (REQUEST_LIFE, REQUEST_STATES, REQUEST_STEPS, REQUEST_AFTER),
        (WEIGHTS_LIFE, WEIGHTS_STATES, WEIGHTS_STEPS, WEIGHTS_AFTER),
    ],
)
def test_the_rows_by_number_say_what_the_table_says(life, states, steps, rows) -> None:  # type: ignore[no-untyped-def]
    assert len(rows) == len(states) == len(life)
    for state, row in enumerate(rows):
        assert {step: after for step, after in enumerate(row) if after != NEVER} == life[state]
        assert len(row) == len(steps)


def test_a_step_that_is_not_in_the_table_is_a_bug_with_its_story() -> None:
    queue = ServedModel(model("a"), CODE, 1).open("", 1, 2, alone=False)
    request = Request(request_id="r1", gateway="g", model="a/1", arrival_ns=0, deadline_ns=9)
    waiter = Waiter(request, 9, request.slo_ns, 1, queue)
    with pytest.raises(AssertionError, match="r1: release while waiting"):
        waiter.step(RELEASE)
