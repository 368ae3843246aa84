"""Crowds that take all connections and ask nothing, from real sockets: who asks is answered."""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from clockwork_serve.serve import accepting
from clockwork_serve.serve.http import server
from tests.serve.certificates import certificates
from tests.serve.flood import HELLO, flooded
from tests.serve.gateway.running import RunningGateway, running_gateway, until
from tests.serve.http.requests import get

ASK = get("/v2/health/live").replace(b"close", b"keep-alive")
HALF_A_HEAD = b"POST /v2/models/any/infer HTTP/1.1\r\nContent-Le"
HALF_A_BODY = b"POST /v2/models/any/infer HTTP/1.1\r\nContent-Length: 8000\r\n\r\n{"
ROOM = 50


def asks(gateway: RunningGateway, context: ssl.SSLContext | None = None) -> bytes:
    """The begin of the answer to a new client."""
    with ExitStack() as stack:
        client: socket.socket = stack.enter_context(gateway.connect())
        if context is not None:
            client = stack.enter_context(context.wrap_socket(client, server_hostname="localhost"))
        client.sendall(ASK)
        return client.recv(15)


@pytest.mark.parametrize(
    "words", [b"", HALF_A_HEAD, HALF_A_BODY], ids=["silent", "half a head", "half a body"]
)
def test_who_asks_is_answered_while_others_take_all_connections(tmp_path: Path, words: bytes) -> None:
    with (
        running_gateway(tmp_path, max_connections=ROOM) as found,
        flooded(found.http_port, addresses=10, connections=4 * ROOM, words=words),
    ):
        found.until(lambda: found.servers.gateway.connections >= ROOM)
        time.sleep(0.5)
        assert [asks(found) for _ in range(20)] == [b"HTTP/1.1 200 OK"] * 20


@pytest.mark.parametrize("words", [b"", HELLO], ids=["silent", "half a hello"])
def test_who_shakes_hands_is_answered_while_others_take_all_connections(tmp_path: Path, words: bytes) -> None:
    files = certificates(tmp_path)
    context = ssl.create_default_context(cafile=files.ca)
    with (
        running_gateway(tmp_path, max_connections=ROOM, **files.tls_settings()) as found,
        flooded(found.http_port, addresses=10, connections=4 * ROOM, words=words),
    ):
        (acceptor,) = found.servers.http._servers
        assert isinstance(acceptor, server.TlsAcceptor)
        found.until(lambda: len(acceptor._handshaking) >= ROOM)
        time.sleep(0.5)
        assert [asks(found, context) for _ in range(20)] == [b"HTTP/1.1 200 OK"] * 20


def test_who_has_asked_nothing_for_long_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "QUIET_S", 0.1)
    with running_gateway(tmp_path, max_connections=2) as found, ExitStack() as stack:
        asked = [stack.enter_context(found.connect()) for _ in range(2)]
        for client in asked:
            client.sendall(ASK)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")
        found.until(lambda: len(found.servers.http._strangers) == 2)
        until(lambda: asks(found) == b"HTTP/1.1 200 OK")
        found.until(lambda: found.servers.gateway.connections == 1)
        (left,) = found.servers.http._connections
        assert left._transport is not None
        address = left._transport.get_extra_info("peername")
        (stayed,) = [client for client in asked if client.getsockname() == address]
        stayed.sendall(ASK)
        assert stayed.recv(1000).startswith(b"HTTP/1.1 200 OK")


def test_who_asks_now_and_then_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "PATIENCE_S", 0.0)
    with running_gateway(tmp_path, max_connections=2) as found, found.connect() as asking:
        silent = found.connect()
        for _ in range(5):
            asking.sendall(ASK)
            assert asking.recv(1000).startswith(b"HTTP/1.1 200 OK")
            with found.connect() as another:
                another.sendall(ASK)
                assert another.recv(1000).startswith(b"HTTP/1.1 200 OK")
        with silent:
            assert not silent.recv(1), "it made room"
