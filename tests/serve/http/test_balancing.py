"""Balancing of connections: each goes to the gateway with the fewest, and none is lost."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from clockwork_serve.serve.http.server import (
    STALLED_BEATS,
    BalancerConfig,
    ConnectionBalancer,
    ConnectionCounts,
)
from tests.serve.certificates import certificates
from tests.serve.gateway.running import RunningGateway, running_gateway, until
from tests.serve.http.requests import IDENT_JSON, INFER, Found, post


class Pair:
    """Two gateways' balancers in one process, with the connections that each received."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[ConnectionBalancer] = []
        self.taken: list[list[socket.socket]] = [[], []]
        self.clients: list[socket.socket] = []
        for number in range(2):
            self.start(number)

    def start(self, number: int) -> None:
        self.parts.insert(number, ConnectionBalancer(BalancerConfig(self.folder, "http", 2, number)))
        self.parts[number].begin(lambda accepted, _: self.taken[number].append(accepted))

    def accept(self, number: int) -> bool:
        """A gateway accepts a connection; whether it was passed on."""
        client, accepted = socket.socketpair()
        self.clients.append(client)
        passed = self.parts[number].pass_on(accepted.fileno())
        if passed:
            accepted.close()
        else:
            self.taken[number].append(accepted)
        return passed

    def close(self) -> None:
        for part in self.parts:
            part.close()
        for one in (*self.clients, *self.taken[0], *self.taken[1]):
            one.close()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    with closing(Pair(tmp_path)) as found:
        yield found


async def test_the_gateway_with_more_passes_on_a_live_connection(pair: Pair) -> None:
    passed = [pair.accept(0) for _ in range(6)]
    assert passed == [False, True, False, True, False, True]
    async with asyncio.timeout(60):
        while len(pair.taken[1]) < 3:
            await asyncio.sleep(0.001)
    assert len(pair.taken[0]) == 3
    pair.taken[1][0].sendall(b"yours")
    assert pair.clients[1].recv(10) == b"yours"


async def test_closed_connections_are_counted(pair: Pair) -> None:
    assert not pair.accept(0)
    assert not pair.accept(1)
    pair.parts[0].count_closed()
    assert pair.accept(1)
    assert not pair.accept(1)


async def test_nothing_is_passed_to_a_gateway_that_died(pair: Pair) -> None:
    pair.parts.pop().close()
    assert [pair.accept(0) for _ in range(4)] == [False] * 4


async def test_a_gateway_that_receives_nothing_delays_nothing(pair: Pair) -> None:
    passed = [pair.accept(0) for _ in range(3000)]
    assert any(passed)
    assert not passed[-1]


async def test_nothing_is_passed_to_a_gateway_that_is_stopped(pair: Pair) -> None:
    assert not pair.accept(0)
    assert pair.accept(0)
    timer = pair.parts[1]._timer
    assert timer is not None
    timer.cancel()  # its loop turns no more, and its sockets stay
    async with asyncio.timeout(60):
        while pair.parts[0]._missed_beats[1] < STALLED_BEATS:
            await asyncio.sleep(0.01)
    assert [pair.accept(0) for _ in range(4)] == [False] * 4
    pair.parts[1]._beat()
    assert pair.accept(0), "it gets the next as soon as it turns again"


async def test_a_restarted_gateway_has_none_and_gets_the_next(pair: Pair) -> None:
    for _ in range(4):
        pair.accept(0)
        pair.accept(1)
    dead = pair.parts.pop()
    pair.start(1)  # it died without a word: its socket is still there
    assert [pair.accept(0) for _ in range(5)] == [True, True, True, True, False]
    asyncio.get_running_loop().remove_reader(dead._socket)
    dead._socket.close()


def test_every_gateway_reads_the_same_numbers(tmp_path: Path) -> None:
    tallies = [ConnectionCounts(tmp_path / "tally", 3, number) for number in range(3)]
    tallies[0].count_passed(0)
    tallies[0].count_passed(2)
    tallies[1].count_passed(2)
    tallies[2].count_closed()
    assert [tally.open().tolist() for tally in tallies] == [[1, 0, 1]] * 3
    assert ConnectionCounts(tmp_path / "tally", 3, 2).open().tolist() == [1, 0, 0]


def answered_by(client: socket.socket) -> str:
    client.sendall(post(INFER, IDENT_JSON, close=False))
    received = b""
    while b"\r\n\r\n" not in received:
        part = client.recv(65536)
        assert part, received
        received += part
    found = Found(received)
    assert found.status == 200
    return found.headers["clockwork-request-id"].split("-")[0]


def two_gateways(stack: ExitStack, folder: Path, **fields: object) -> tuple[RunningGateway, RunningGateway]:
    """They listen on one port; each has its own controller."""
    first = stack.enter_context(
        running_gateway(folder, name="g0", reuse_port=True, gateways=2, number=0, **fields)
    )
    port = first.http_port
    second = stack.enter_context(
        running_gateway(folder, name="g1", reuse_port=True, gateways=2, number=1, http_port=port, **fields)
    )
    return first, second


@pytest.mark.parametrize("encrypted", [False, True])
def test_gateways_have_as_many_each_whatever_the_kernel_chose(tmp_path: Path, *, encrypted: bool) -> None:
    files = certificates(tmp_path)
    fields = files.tls_settings() if encrypted else {}
    with ExitStack() as stack:
        gateways = two_gateways(stack, tmp_path, **fields)

        def connect() -> socket.socket:
            client = gateways[0].connect()
            if encrypted:
                context = ssl.create_default_context(cafile=files.ca)
                client = context.wrap_socket(client, server_hostname="localhost")
            return stack.enter_context(client)

        for _ in range(2):
            clients = [connect() for _ in range(10)]
            names = [answered_by(client) for client in clients]
            assert sorted(names) == ["g0"] * 5 + ["g1"] * 5
            assert [gateway.servers.gateway.connections for gateway in gateways] == [5, 5]
            for client in clients:
                client.close()
            until(lambda: not any(gateway.servers.gateway.connections for gateway in gateways))
            sharing = gateways[0].servers.http._balancer
            assert sharing is not None
            until(lambda sharing=sharing: sharing._tally.open().tolist() == [0, 0])


def test_failed_handshakes_do_not_stay_counted(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    with ExitStack() as stack:
        gateways = two_gateways(stack, tmp_path, **files.tls_settings())
        for _ in range(20):
            with gateways[0].connect() as client:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")  # no TLS
                while client.recv(4096):
                    pass
        sharing = gateways[0].servers.http._balancer
        assert sharing is not None
        assert sharing._tally._given.sum() == 20
        until(lambda: sharing._tally.open().tolist() == [0, 0])
