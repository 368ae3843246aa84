"""Arrival times, by polls that found nothing and by the kernel: never later because the loop was held up."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import threading
import time
from functools import partial
from typing import cast

import pytest

from clockwork_serve.messages import Answer, Request
from clockwork_serve.serve.gateway.timing import (
    IDLE_AFTER,
    NEAR_NS,
    PEEK_NS,
    AcceptQueue,
    Arrival,
    BodySocket,
    LoopTurns,
)
from clockwork_serve.units import ms
from tests.serve.gateway.running import RunningGateway
from tests.serve.http.requests import IDENT_JSON, INFER, post
from tests.timing import Timing

TICK_NS = ms(10)
"""The resolution of the kernel's value, at a hundred ticks a second."""


class FakeTurns:
    """``before_ns`` and the clock are set by the test."""

    def __init__(self) -> None:
        self.before_ns = self.now_ns = ms(1000)
        self.turns = 0
        self.noting = False

    def clock(self) -> int:
        return self.now_ns

    def begin(self) -> None:
        self.turns += 1

    def turn(self, now_ms: int) -> None:
        """A poll that found this socket empty, and then it is so late."""
        self.before_ns, self.now_ns = self.now_ns, ms(now_ms)


class FakeSource:
    """A kernel that reports when bytes were received last, or does not."""

    quiet: int | None = None
    waited: int | None = None

    def quiet_ns(self) -> int | None:
        return self.quiet

    def waited_ns(self) -> int | None:
        return self.waited


class Connection:
    def __init__(self) -> None:
        self.turns, self.source = FakeTurns(), FakeSource()
        self.arrival = Arrival(
            cast("BodySocket", self.source), cast("LoopTurns", self.turns), self.turns.before_ns
        )
        self.turns.turn(1001)
        self.turns.turn(1002)

    def read(
        self, now_ms: int, quiet_ms: int | None = None, *, first: bool = True, kept: bool = False,
        full: bool = False,
    ) -> None:  # fmt: skip
        self.turns.now_ns = ms(now_ms)
        self.source.quiet = None if quiet_ms is None else ms(quiet_ms)
        self.arrival.read(first=first, kept=kept, full=full)


def test_bytes_arrived_after_the_last_poll_that_found_none() -> None:
    connection = Connection()
    connection.turns.turn(2000)  # polled at 1002, and held up since
    assert connection.arrival.of_single_read() == ms(1002)
    connection.read(2000)
    assert connection.arrival.arrived_ns == connection.arrival.oldest_ns == ms(1002)


def test_the_kernel_s_value_is_used_if_it_is_later() -> None:
    connection = Connection()
    connection.turns.turn(2000)
    connection.source.quiet = ms(400)
    assert connection.arrival.of_single_read() == ms(1600)
    connection.source.quiet = ms(4000)
    assert connection.arrival.of_single_read() == ms(1002)
    connection.read(2000, 300)
    assert (connection.arrival.arrived_ns, connection.arrival.oldest_ns) == (ms(1700), ms(1002))


def test_the_kernel_s_value_is_about_bytes_that_may_have_come_after_a_full_buffer() -> None:
    connection = Connection()
    connection.turns.turn(2000)
    connection.read(2000, 300, full=True)
    assert connection.arrival.arrived_ns == ms(1002)


def test_while_it_rested_nothing_came_before_the_first_byte_that_waits() -> None:
    connection = Connection()
    connection.arrival.pause()
    connection.turns.turn(1100)
    connection.arrival.rested(ms(60))
    connection.arrival.resume()
    connection.read(1110, 1, full=True)
    assert connection.arrival.arrived_ns == ms(1040)


@pytest.mark.parametrize("again", [False, True])
def test_of_several_that_came_during_a_rest_the_first_may_have_come_at_its_beginning(*, again: bool) -> None:
    connection = Connection()
    connection.arrival.pause()
    connection.turns.turn(1100)
    connection.arrival.rested(ms(60))  # the kernel keeps segments as one, with the time of the last
    connection.arrival.resume()
    if again:
        connection.arrival.pause()
        connection.arrival.resume()
    connection.read(1110, 1)
    assert connection.arrival.oldest_ns == ms(1001)


def test_what_is_not_known_of_a_rest_makes_nothing_younger() -> None:
    for waited_ns in (None, ms(5000)):
        connection = Connection()
        connection.arrival.pause()
        connection.turns.turn(1100)
        connection.arrival.rested(waited_ns)
        connection.arrival.resume()
        connection.read(1110, 1, full=True)
        assert connection.arrival.arrived_ns == ms(1001)


def test_a_recent_poll_is_precise_enough() -> None:
    connection = Connection()
    connection.source.quiet = 0
    connection.turns.now_ns = connection.turns.before_ns + NEAR_NS
    assert connection.arrival.of_single_read() == connection.turns.before_ns


def test_bytes_that_wait_are_asked_for_unless_a_poll_was_just_before() -> None:
    connection = Connection()
    for recent_ns, found_ns in ((PEEK_NS, 0), (PEEK_NS + 1, PEEK_NS + 1 - 1000)):
        connection.turns.now_ns = connection.turns.before_ns + recent_ns
        connection.source.waited = 1000
        connection.arrival.peek()
        assert connection.arrival.of_single_read() == connection.turns.before_ns + found_ns
        connection.arrival.peek()
        connection.arrival.read(first=True)
        assert connection.arrival.arrived_ns == connection.turns.before_ns + found_ns
        assert connection.arrival.oldest_ns == connection.turns.before_ns, "others may have come before"
        connection.source.quiet = None
        connection.turns.turn(1100)
        connection.turns.turn(1200)
        connection.read(1300)
        assert connection.arrival.arrived_ns == ms(1100), "what was received before says nothing of this read"


def test_a_clock_that_is_set_makes_no_request_older_than_the_last_poll_nor_one_that_was_not_asked_for() -> (
    None
):
    connection = Connection()
    connection.turns.turn(2000)
    connection.source.waited = ms(5000)
    connection.arrival.peek()
    assert connection.arrival.of_single_read() == ms(1002)
    connection.source.waited = None  # over TLS
    connection.arrival.peek()
    connection.source.quiet = ms(400)
    assert connection.arrival.of_single_read() == ms(1600)
    connection.source.waited = 0
    connection.arrival.peek()
    connection.read(2000, 300, kept=True)
    assert connection.arrival.arrived_ns == ms(1002)


def test_bytes_that_arrive_while_reading_is_paused_count_as_waiting() -> None:
    connection = Connection()
    connection.arrival.pause()
    since_ns = connection.turns.before_ns
    for now_ms in (1100, 1200, 1300):
        connection.turns.turn(now_ms)
    connection.arrival.pause()  # again, for another reason
    assert connection.arrival.bound() == since_ns
    connection.arrival.resume()
    connection.turns.now_ns = ms(1310)
    assert connection.arrival.of_single_read() == since_ns, "no poll has looked since"
    connection.turns.turn(1400)
    connection.turns.turn(1500)
    assert connection.arrival.bound() == ms(1400)


def test_a_new_connection_may_have_waited_since_the_last_poll() -> None:
    turns = FakeTurns()
    arrival = Arrival(cast("BodySocket", FakeSource()), cast("LoopTurns", turns), ms(500))
    turns.before_ns, turns.now_ns = ms(999), ms(1001)
    assert arrival.of_single_read() == ms(500)


def test_connections_queued_for_acceptance_count_from_when_the_queue_was_empty() -> None:
    """The loop accepts one in a turn."""
    turns = FakeTurns()
    queue = AcceptQueue(cast("LoopTurns", turns))
    turns.before_ns, turns.now_ns = ms(100), ms(900)  # it was held up
    assert queue.since_ns() == ms(100)
    for now_ms in (910, 920):
        turns.turn(now_ms)
        assert queue.since_ns() == ms(100), "they may have come with the first"
    turns.turn(930)
    turns.turn(940)
    assert queue.since_ns() == ms(930)


def test_of_a_long_body_only_its_waiting_time_counts() -> None:
    connection = Connection()
    connection.turns.turn(1050)
    connection.read(1050, 40)  # it waited from 1010 on
    connection.turns.turn(1100)
    connection.turns.turn(1300)
    connection.read(1300, 0, first=False)  # its client took its time: came just now
    connection.turns.turn(1400)
    connection.read(1400, 90, first=False)  # came at 1310
    assert connection.arrival.arrived_ns == ms(1400 - 40 - 0 - 90)


def test_a_body_read_in_pieces_by_a_busy_loop_arrived_with_its_head() -> None:
    """A client waits for space in our receive buffer: its next bytes arrive as soon as some were read."""
    connection = Connection()
    connection.turns.turn(1050)
    connection.read(1050, 40)
    for now_ms in (1100, 1150, 1200):
        connection.turns.turn(now_ms)
        connection.read(now_ms, 49, first=False)
    assert connection.arrival.arrived_ns == ms(1010 + 3)


def test_the_kernel_s_value_is_not_used_for_kept_bytes() -> None:
    connection = Connection()
    connection.arrival.pause()
    since_ns = connection.turns.before_ns
    connection.turns.turn(1100)
    connection.read(1100, 0, kept=True)
    assert connection.arrival.arrived_ns == since_ns


async def test_the_loop_polls_between_two_instants() -> None:
    beats: list[int] = []
    turns = LoopTurns(on_beat=lambda: beats.append(1))
    begun_ns = time.monotonic_ns()
    while len(beats) < 5:  # it beats while nothing happens
        await asyncio.sleep(0.001)
    assert begun_ns <= turns.before_ns <= time.monotonic_ns()
    held_ns = time.monotonic_ns()
    while time.monotonic_ns() < held_ns + ms(20):
        pass
    turns.begin()
    await asyncio.sleep(0)
    assert turns.before_ns <= held_ns, "the last whole poll was before"
    turns.close()


async def test_an_idle_loop_beats_less_often() -> None:
    instants: list[int] = []
    turns = LoopTurns(on_beat=lambda: instants.append(time.monotonic_ns()))
    while len(instants) < IDLE_AFTER + 4:
        await asyncio.sleep(0.2)
    assert instants[-1] - instants[-2] > ms(15)
    turns.close()


# With sockets


def hold_up(gateway: RunningGateway, seconds: float) -> None:
    """Have the loop do nothing for so long, beginning before this returns."""
    begun = threading.Event()

    def sleep() -> None:
        begun.set()
        time.sleep(seconds)

    gateway.loop.call_soon_threadsafe(sleep)
    assert begun.wait(60)
    time.sleep(0.05)


def only(gateway: RunningGateway) -> Request:
    gateway.until(lambda: gateway.controller.requests)
    (request,) = gateway.controller.requests
    return request


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="this system does not tell when bytes came")
@pytest.mark.parametrize("connected", [True, False])
def test_arrivals_during_a_gap_of_the_loop_are_measured(gateway: RunningGateway, *, connected: bool) -> None:
    client = gateway.connect() if connected else None
    if client is not None:
        client.sendall(post("/v2/health/live", close=False))
        client.recv(1000)
    hold_up(gateway, 0.4)
    begun_ns = time.monotonic_ns()
    client = client or gateway.connect()
    with client:
        client.sendall(post(INFER, IDENT_JSON, "x-slo-ms: 60000"))
        sent_ns = time.monotonic_ns()
        client.recv(1000)
    assert begun_ns - TICK_NS <= only(gateway).arrival_ns <= sent_ns + TICK_NS


@pytest.mark.skipif(sys.platform != "linux", reason="this system does not tell when bytes came")
def test_a_request_to_a_loop_with_little_to_do_has_all_its_time(
    gateway: RunningGateway, timing: Timing
) -> None:
    """Its last poll was for the request before: by polls alone, they came one after the other."""
    early_ns = []
    with gateway.connect() as client:
        for at in range(50):
            time.sleep(0.002)
            sent_ns = time.monotonic_ns()
            client.sendall(post(INFER, IDENT_JSON, "x-slo-ms: 60000", close=False))
            client.recv(1000)
            early_ns.append(sent_ns - gateway.controller.requests[at].arrival_ns)
    with timing.judged():
        assert sorted(early_ns)[40] < ms(0.6), early_ns


def test_of_several_requests_in_one_read_none_counts_as_later(
    gateway: RunningGateway, timing: Timing
) -> None:
    with gateway.connect() as client:
        client.sendall(post("/v2/health/live", close=False))
        client.recv(1000)
        hold_up(gateway, 1.0)
        one = post(INFER, IDENT_JSON, "x-slo-ms: 60000", close=False)
        client.sendall(one)
        sent_ns = time.monotonic_ns()
        time.sleep(0.1)
        client.sendall(one)
        gateway.until(lambda: len(gateway.controller.requests) == 2)
    late_ns = [request.arrival_ns - sent_ns for request in gateway.controller.requests]
    with timing.judged():  # both were sent meanwhile
        assert max(late_ns) <= 0, late_ns


def test_a_request_past_its_deadline_has_expired_and_is_counted(gateway: RunningGateway) -> None:
    before = gateway.do(gateway.servers.gateway.counters)
    hold_up(gateway, 2.0)
    found = gateway.exchange(post(INFER, IDENT_JSON, "x-slo-ms: 20"))
    assert found.startswith(b"HTTP/1.1 504 ")
    assert json.loads(found.partition(b"\r\n\r\n")[2])["outcome"] == "expired"
    assert gateway.controller.requests == []
    counters = gateway.do(gateway.servers.gateway.counters)
    assert counters.received == before.received + 1
    assert counters.outcomes["expired"] == before.outcomes.get("expired", 0) + 1


# Answers


def held_back(gateway: RunningGateway, request: Request) -> Answer | None:
    return gateway.controller.echo(request) if len(gateway.controller.requests) > 1 else None


def test_a_response_held_up_in_a_pipeline_may_be_late(gateway: RunningGateway) -> None:
    """The second of a pipeline is answered in time, but the first is not."""
    gateway.controller.on_request = partial(held_back, gateway)
    with gateway.connect() as client:
        client.sendall(post(INFER, IDENT_JSON, "x-slo-ms: 60000", close=False))
        client.sendall(post(INFER, IDENT_JSON, "x-slo-ms: 1500"))
        gateway.until(lambda: len(gateway.controller.requests) == 2)
        first, second = gateway.controller.requests
        while time.monotonic_ns() <= second.deadline_ns:
            time.sleep(0.01)
        gateway.do(lambda: gateway.controller.send(gateway.controller.echo(first)))
        found = b""
        while got := client.recv(1 << 16):
            found += got
    assert re.findall(rb"HTTP/1.1 (\d+)", found) == [b"200", b"504"]
    assert b'"outcome":"expired","reason":"late"' in found
    gateway.until(lambda: second.request_id in gateway.controller.late)
    assert first.request_id in gateway.controller.in_time
    assert second.request_id not in gateway.controller.in_time


def test_the_delivery_of_each_answer_is_reported(gateway: RunningGateway) -> None:
    assert gateway.exchange(post(INFER, IDENT_JSON)).startswith(b"HTTP/1.1 200 ")
    gateway.controller.on_request = lambda request: None
    with gateway.connect() as client:
        client.sendall(post(INFER, IDENT_JSON, "x-slo-ms: 60000"))
        gateway.until(lambda: len(gateway.controller.requests) == 2)
    gateway.until(lambda: gateway.controller.cancels)
    first, second = gateway.controller.requests
    gateway.do(lambda: gateway.controller.send(gateway.controller.echo(second)))  # its client is gone
    gateway.until(lambda: {first.request_id, second.request_id} <= {*gateway.controller.in_time})
    assert not {first.request_id, second.request_id} & {*gateway.controller.late}
