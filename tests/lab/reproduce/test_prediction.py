"""Errors of prediction, from a journal written by hand."""

from __future__ import annotations

import pytest

from clockwork_lab.reproduce.fig10 import Errors, errors_of, tail
from clockwork_serve.messages import Action, Infer, Load, Result, Status
from clockwork_serve.telemetry.journal import Step
from clockwork_serve.units import ms, us
from tests.telemetry.stories import infer, load, unload

NETWORK_NS = us(200)


def sent(at_ms: float, *actions: Action) -> Step:
    return Step(ms(at_ms), (), actions)


def came(action: Infer | Load, from_ms: float, to_ms: float, status: Status = Status.OK) -> Step:
    result = Result(
        action_id=action.action_id,
        device=action.device,
        status=status,
        started_ns=ms(from_ms),
        ended_ns=ms(to_ms),
    )
    return Step(ms(to_ms) + NETWORK_NS, (result,), ())


def test_an_action_that_ran_as_told_has_no_error():
    action = infer(1, "r", expected_ms=10)
    found = errors_of([sent(1, action), came(action, 1.2, 11.2)], NETWORK_NS)["INFER"]

    assert (found.duration_ns, found.completion_ns, found.took_ns) == ([0], [0], [ms(10)])


def test_measured_minus_predicted():
    late, soon = load(1, expected_ms=4), load(2, expected_ms=4)
    steps = [sent(0, late), came(late, 0.5, 5.5), sent(10, soon), came(soon, 10.2, 13.2)]
    found = errors_of(steps, NETWORK_NS)["LOAD"]

    assert found.duration_ns == [ms(1), -ms(1)]
    assert found.completion_ns == [ms(1.3), -ms(1)]
    assert found.shares() == [pytest.approx(0.2), pytest.approx(-1 / 3)]


def test_an_action_that_waits_behind_another_ends_after_it():
    first, second = infer(1, "a", expected_ms=10), infer(2, "b", expected_ms=5)
    steps = [sent(0, first, second), came(first, 0.2, 12.2), came(second, 12.2, 17.2)]
    found = errors_of(steps, NETWORK_NS)["INFER"]

    assert found.duration_ns == [ms(2), 0]
    assert found.completion_ns == [ms(2), ms(2)]


def test_what_was_refused_or_is_out_or_was_not_sent_does_not_count():
    refused, out, stranger = infer(1, "a"), infer(2, "b"), infer(9, "c")
    steps = [
        sent(0, refused, out, unload(3)), came(refused, 0.2, 0.2, Status.TOO_LATE), came(stranger, 0, 1),
    ]  # fmt: skip

    assert all(not found.took_ns for found in errors_of(steps, NETWORK_NS).values())


def test_tails_count_the_other_sign_as_nothing_and_leave_out_what_they_cannot_tell():
    errors = [-ms(1)] * 50 + [ms(2)] * 50

    assert tail(errors, over=True) == [(99.0, 1.0), (100.0, 1.0)]
    assert tail(errors, over=False) == [(99.0, 2.0), (100.0, 2.0)]
    assert [share for share, _ in tail(errors * 20, over=True)] == [99.0, 99.9, 100.0]
    assert tail([], over=True) == []


def test_in_hindsight_a_duration_is_that_of_those_of_its_size_before_and_after_it() -> None:
    steady = [10, 11, 10, 11, 10, 11]
    errors = Errors(took_ns=[*steady, 20, *steady, 200, 200], batches=[1] * 13 + [2] * 2)
    shares = errors.shares_in_hindsight()
    assert shares[6] == (20 - 10.5) / 20
    assert all(abs(share) <= 0.1 for share in shares[:6] + shares[7:])
