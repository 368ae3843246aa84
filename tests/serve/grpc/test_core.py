"""Arrival times of gRPC messages, by gaps in the thread of its core."""

from __future__ import annotations

import time
from typing import cast

import pytest

from clockwork_serve.serve.grpc.call import AFTER_NS, GAP_NS, Gaps, GrpcCall, Method, SilentCalls
from clockwork_serve.serve.grpc.core import CoreCall, CoreTransport
from clockwork_serve.units import NS_PER_S, ms


def gaps(*beats_ms: int) -> Gaps:
    found = Gaps(0)
    for beat_ms in beats_ms:
        found.beat(ms(beat_ms))
    return found


def test_without_a_gap_a_message_arrived_when_it_was_read() -> None:
    assert gaps(5, 10, 15).arrival_ns(ms(17)) == ms(17)


def test_a_message_after_a_gap_counts_from_its_start() -> None:
    found = gaps(5, 10, 1010)
    assert found.arrival_ns(ms(1010)) == ms(10)
    found.beat(ms(1015))
    assert found.arrival_ns(ms(1040)) == ms(10), "the core reads what waited in its sockets"
    assert found.arrival_ns(ms(1010) + AFTER_NS[1]) == ms(1010) + AFTER_NS[1]


@pytest.mark.parametrize(("gap_ms", "counts_ms"), [(12, 12), (30, 30), (500, 50)])
def test_a_short_gap_counts_for_a_short_time(gap_ms: int, counts_ms: int) -> None:
    found = gaps(5, 5 + gap_ms)
    end_ns = ms(5 + gap_ms + counts_ms)
    assert found.arrival_ns(end_ns - 1) == ms(5)
    assert found.arrival_ns(end_ns) == end_ns


def test_an_interval_within_the_limit_is_no_gap() -> None:
    found = Gaps(0)
    found.beat(GAP_NS)
    assert found.arrival_ns(GAP_NS) == GAP_NS


def test_two_gaps_with_hardly_anything_between_them_are_one() -> None:
    assert gaps(5, 205, 210, 400).arrival_ns(ms(401)) == ms(5)


class Event:
    """The core's event for a new call."""

    invocation_metadata = ()
    call = None

    class call_details:  # noqa: N801 - the core's own name
        deadline = 1e18


class FakeCore:
    """A clock."""

    now_ns = ms(100)

    def clock(self) -> int:
        return self.now_ns


def call_of(core: FakeCore) -> GrpcCall:
    method = Method("/t/m", bytes)
    return CoreCall(cast("CoreTransport", core), Event(), (method, ""), SilentCalls())


def test_a_message_that_was_there_when_requested_counts_from_the_last_read() -> None:
    core = FakeCore()
    call = call_of(core)
    call._requested_ns = ms(150)
    call.note_arrival(ms(151), ms(151))
    assert call.arrival_ns == ms(100), "since the call began"
    call._requested_ns = ms(160)
    call.note_arrival(ms(190), ms(190))
    assert call.arrival_ns == ms(190), "this one was waited for"


def test_the_only_message_of_a_call_is_requested_at_once() -> None:
    call = call_of(FakeCore())
    call.note_arrival(ms(150), ms(151))
    assert call.arrival_ns == ms(150)


def test_a_client_s_own_deadline_counts_from_its_message_s_arrival() -> None:
    call = call_of(FakeCore())
    call.deadline_s = time.time() + 10
    call.note_arrival(ms(100), ms(150))
    left_s = call.time_allowed(lambda: ms(150) + 5 * NS_PER_S)
    assert left_s is not None
    assert 14 < left_s <= 15
