"""A call of gRPC's core: when its messages count as arrived."""

from __future__ import annotations

import time
from typing import cast

from clockwork_serve.serve.grpc.call import GrpcCall, Method, SilentCalls
from clockwork_serve.serve.grpc.core import CoreCall, CoreTransport
from clockwork_serve.units import NS_PER_S, ms


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
