"""Deadlines against a plain list: every request that is not over is found in time, in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.cluster import ServedModel, Waiter
from clockwork_serve.controller.deadlines import BUCKET_BITS, Deadlines
from clockwork_serve.controller.life import ANSWER, ANSWERED, SEND
from clockwork_serve.controller.timers import NEVER_NS, Timers
from clockwork_serve.messages import Request
from tests.controller.honest import CODE, model

QUEUE = ServedModel(model("a"), CODE, 1).open("", 1, 2, alone=False)


def waiter(name: str, deadline_ns: int) -> Waiter:
    request = Request(request_id=name, gateway="g", model="a/1", arrival_ns=0, deadline_ns=deadline_ns)
    return Waiter(request, deadline_ns, request.slo_ns, 1, QUEUE)


def test_an_answered_request_needs_no_timer() -> None:
    timers = Timers()
    deadlines = Deadlines(timers)
    early, late = waiter("r1", 10 << BUCKET_BITS), waiter("r2", 20 << BUCKET_BITS)
    deadlines.add(late)
    deadlines.add(early)
    assert deadlines.at_ns == 10 << BUCKET_BITS
    early.step(ANSWER)
    deadlines.correct()
    assert deadlines.at_ns == 20 << BUCKET_BITS
    late.step(ANSWER)
    deadlines.correct()
    assert deadlines.at_ns == NEVER_NS


def test_a_request_that_runs_expires_too() -> None:
    deadlines = Deadlines(Timers())
    one = waiter("r1", 5)
    deadlines.add(one)
    one.step(SEND)
    assert deadlines.passed(4) == []
    assert deadlines.passed(5) == [one]


STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "answer", "look"]), st.integers(0, 3 << BUCKET_BITS)),
    max_size=60,
)


@given(STEPS)
def test_any_history_agrees_with_a_plain_list(steps: list[tuple[str, int]]) -> None:
    timers = Timers()
    deadlines = Deadlines(timers)
    waiting: list[Waiter] = []
    now_ns = count = 0
    for what, number in steps:
        if what == "ask":
            count += 1
            waiting.append(waiter(f"r{count:03}", now_ns + number))
            deadlines.add(waiting[-1])
        elif what == "answer" and waiting:
            waiting.pop(number % len(waiting)).step(ANSWER)
        elif what == "look":
            now_ns += number // 4
            passed = sorted(
                (one.request.deadline_ns, one.request.request_id)
                for one in waiting
                if one.request.deadline_ns <= now_ns
            )
            found = deadlines.passed(now_ns)
            assert [(one.request.deadline_ns, one.request.request_id) for one in found] == passed
            for one in found:
                one.step(ANSWER)
            deadlines.correct()
            waiting = [one for one in waiting if one.state != ANSWERED]
            assert deadlines.at_ns > now_ns
            assert timers.next_ns() == deadlines.at_ns
        deadlines.check(waiting)
        assert all(deadlines.at_ns <= one.request.deadline_ns for one in waiting)
