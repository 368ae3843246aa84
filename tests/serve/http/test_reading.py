"""Which connection is read next: where many are refused, a few of them in each turn of the loop."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from clockwork_serve.serve.http.connection import HttpConnection
from clockwork_serve.serve.http.exchange import HttpExchange
from clockwork_serve.serve.http.reading import ReadControl, RoundRobin
from clockwork_serve.serve.http.responses import error_response
from tests.serve.http.any_bytes import Host, Loop, Transport


class Read:
    """A connection."""

    def __init__(self, readers: RoundRobin, refused: RoundRobin) -> None:
        self.transport = Transport()
        self.fed: list[bytes] = []
        turns: Any = SimpleNamespace(before_ns=0, begin=lambda: None, clock=lambda: 1, noting=True)
        transport: Any = self.transport
        self.control = ReadControl(transport, readers, refused, self.feed, turns, 0)

    def feed(self, data: memoryview) -> None:
        self.fed.append(bytes(data))


def some(loop: Loop, count: int, at_once: int = 4) -> list[Read]:
    readers, refused = RoundRobin(loop), RoundRobin(loop, at_once)  # type: ignore[arg-type] # of a test
    return [Read(readers, refused) for _ in range(count)]


def test_of_those_who_were_refused_a_few_are_read_in_each_turn_and_in_order() -> None:
    loop = Loop()
    reads = some(loop, 10)
    for one in reads:
        one.control.rest()
    assert not any(one.transport.reading for one in reads)

    counts = []
    for _ in range(3):
        loop.turn()
        counts.append([one.transport.reading for one in reads].index(False) if len(counts) < 2 else 10)

    assert counts == [4, 8, 10] and all(one.transport.reading for one in reads)
    assert loop.soon == []


def test_who_is_refused_again_waits_once_behind_the_others() -> None:
    loop = Loop()
    one, other = some(loop, 2, at_once=1)
    one.control.rest()
    one.control.rest()
    other.control.rest()

    loop.turn()
    assert (one.transport.reading, other.transport.reading) == (True, False)
    one.control.rest()
    loop.turn()
    assert (one.transport.reading, other.transport.reading) == (False, True)
    loop.turn()
    assert one.transport.reading and loop.soon == []


def test_nothing_resumes_one_that_rests_before_its_turn_and_a_paused_one_stays_paused() -> None:
    loop = Loop()
    first, one = some(loop, 2, at_once=1)
    first.control.rest()
    one.control.rest()
    one.control.set_paused(pause=True)
    one.control.set_paused(pause=False)
    assert not one.transport.reading
    one.control.keep(memoryview(b"kept"))
    loop.turn()
    assert not one.transport.reading and one.fed == []
    one.control.set_paused(pause=True)
    loop.turn()
    assert not one.transport.reading and one.fed == []
    one.control.set_paused(pause=False)
    loop.turn()
    assert one.transport.reading and one.fed == [b"kept"]


def test_what_was_kept_came_before_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    one, other = some(loop, 2)
    told: list[int | None] = []
    for each in (one, other):
        monkeypatch.setattr(type(each.control.source), "waited_ns", lambda _: 0)
        monkeypatch.setattr(type(each.control.arrival), "rested", lambda _, waited_ns: told.append(waited_ns))
        each.control.rest()
    one.control.keep(memoryview(b"kept"))

    loop.turn()
    loop.turn()

    assert one.fed == [b"kept"]
    assert told == [0], "of the other one alone"


def test_one_that_closed_meanwhile_is_passed_over() -> None:
    loop = Loop()
    one, other = some(loop, 2, at_once=1)
    one.control.rest()
    other.control.rest()
    one.transport.closing = True
    loop.turn()
    loop.turn()
    assert (one.transport.reading, other.transport.reading) == (False, True)


def test_the_others_go_on_although_one_raises() -> None:
    loop = Loop()
    line = RoundRobin(loop, 2)  # type: ignore[arg-type] # of a test
    done: list[int] = []

    def fails() -> None:
        raise ValueError("of a connection")

    line.add(fails)
    for at in range(3):
        line.add(lambda at=at: done.append(at))  # type: ignore[misc]
    with pytest.raises(ValueError, match="of a connection"):
        loop.turn()
    loop.turn()
    loop.turn()
    assert done == [0, 1, 2] and loop.soon == []


async def test_on_a_real_loop_each_gets_its_turn() -> None:
    line, done = RoundRobin(asyncio.get_running_loop(), 2), []
    for at in range(5):
        line.add(lambda at=at: done.append(at))  # type: ignore[misc]
    await asyncio.sleep(0.05)
    assert done == [0, 1, 2, 3, 4]


class Refuses(Host):
    """Refuses every request at once."""

    status = 429

    def dispatch(self, exchange: HttpExchange) -> None:
        exchange.respond(error_response(self.status, "no"))


@pytest.mark.parametrize("status", [400, 429, 504])
def test_a_client_that_is_refused_is_read_again_when_it_is_its_turn(status: int) -> None:
    host: Any = Refuses()
    host.status = status
    ask = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"
    transports: list[Any] = [Transport() for _ in range(5)]
    for transport in transports:
        connection = HttpConnection(host)
        connection.connection_made(transport)
        connection.get_buffer(-1)[: len(ask)] = ask
        connection.buffer_updated(len(ask))
    assert all(b" %d " % status in transport.written for transport in transports)
    assert not any(transport.reading for transport in transports)

    host.loop.turn()

    assert [transport.reading for transport in transports] == [True] * 4 + [False]
