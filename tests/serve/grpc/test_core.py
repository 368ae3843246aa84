"""A call of gRPC's core: when its messages count as arrived."""

from __future__ import annotations

import time
from typing import cast

from clockwork_serve.serve.grpc.call import GrpcCall, Method, SilentCalls
from clockwork_serve.serve.grpc.core import AHEAD_BYTES, CoreCall, CoreTransport, ReadAhead
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


def read(ahead: ReadAhead, *messages: bytes, at_ms: int = 150) -> None:
    for message in messages:
        ahead.put(message, ms(at_ms), ms(at_ms))


def test_messages_of_a_stream_keep_their_arrivals_and_their_order() -> None:
    ahead = ReadAhead(FakeCore().clock)
    read(ahead, b"a", at_ms=150)
    read(ahead, b"b", at_ms=160)
    assert ahead.take() == (b"a", ms(150), ms(150))
    assert ahead.take() == (b"b", ms(160), ms(160))
    assert ahead.take() is None


def test_a_stream_is_read_ahead_as_far_as_there_is_room() -> None:
    ahead = ReadAhead(FakeCore().clock)
    read(ahead, b"a")
    assert ahead.reads_on()
    assert not ahead.resumes(), "the thread has requested it already"
    read(ahead, bytes(AHEAD_BYTES))
    assert not ahead.reads_on()
    assert not ahead.resumes(), "there is no room yet"
    ahead.take()
    ahead.take()
    assert ahead.resumes()
    assert not ahead.resumes(), "it is requested once"


def test_a_message_for_which_there_was_no_room_counts_from_the_last_read() -> None:
    core = FakeCore()
    ahead = ReadAhead(core.clock)
    for read_ms, arrival_ms in ((201, 150), (230, 230)):
        read(ahead, bytes(AHEAD_BYTES), at_ms=150)
        assert not ahead.reads_on()
        ahead.take()
        core.now_ns = ms(200)
        assert ahead.resumes()
        read(ahead, b"next", at_ms=read_ms)
        assert ahead.take() == (b"next", ms(arrival_ms), ms(read_ms))


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
