"""Deadlines and retries of one call, on a clock that the test advances."""

from __future__ import annotations

import math

import pytest

from clockwork_client import Expired, Invalid, Rejected
from clockwork_client.calls import CallTimeout


def call_timeout(timeout_s=10.0, slo_ms=None, grace_s=0.1, retries=0):
    return CallTimeout(100.0, timeout_s, slo_ms, grace_s, retries)


def refusal(retry_after_s):
    return Rejected("later", retry_after_s=retry_after_s)


def test_without_an_slo_only_the_timeout_counts_and_no_deadline_is_sent():
    call = call_timeout()

    assert call.start(101.0) == 110.0
    assert call.remaining_ms(105.0) is None


def test_an_slo_bounds_the_wait_of_the_client_too():
    assert call_timeout(slo_ms=20).start(100.0) == pytest.approx(100.12)
    assert call_timeout(slo_ms=20, grace_s=0).start(100.0) == pytest.approx(100.02)


def test_the_timeout_is_above_the_slo():
    call = call_timeout(timeout_s=0.05, slo_ms=1000)

    assert call.start(100.0) == 100.05
    assert call.remaining_ms(100.0) == pytest.approx(50)


def test_the_remaining_time_is_sent_to_the_server():
    call = call_timeout(slo_ms=20)
    call.start(100.0)

    assert call.remaining_ms(100.005) == pytest.approx(15)


def test_nothing_is_sent_once_nothing_is_left():
    call = call_timeout(slo_ms=20)
    call.start(100.0)

    with pytest.raises(Expired, match="nothing was sent"):
        call.remaining_ms(100.02)


def test_another_attempt_has_its_slo_anew():
    call = call_timeout(slo_ms=20, retries=1)
    call.start(100.0)
    call.start(105.0)

    assert call.remaining_ms(105.0) == pytest.approx(20)


def test_no_retries_unless_asked_for():
    assert call_timeout().wait_s(refusal(0.001), 100.0) is None


def test_it_waits_what_the_server_said_and_so_often():
    call = call_timeout(retries=2)

    assert [call.wait_s(refusal(wait_s), 100.0) for wait_s in (0.5, 0.25, 0.1)] == [0.5, 0.25, None]


def test_it_never_waits_where_the_server_did_not_say_how_long():
    assert call_timeout(retries=5).wait_s(refusal(None), 100.0) is None


def test_it_does_not_wait_in_vain():
    call = call_timeout(retries=5)

    assert call.wait_s(refusal(2.0), 108.0) is None
    assert call.wait_s(refusal(1.9), 108.0) == 1.9


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"slo_ms": 0}, "slo_ms"), ({"slo_ms": -1}, "slo_ms"), ({"slo_ms": math.nan}, "slo_ms"),
        ({"slo_ms": 1e9}, "slo_ms"), ({"timeout_s": 0}, "timeout_s"), ({"timeout_s": math.inf}, "timeout_s"),
        ({"retries": -1}, "retries"),
    ],
)  # fmt: skip
def test_what_is_no_limit_is_named(settings, field):
    with pytest.raises(Invalid) as caught:
        call_timeout(**settings)

    assert caught.value.field == f"parameter '{field}'"
