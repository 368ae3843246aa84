"""The rest of an unwanted body is dropped where it lies, and nothing behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest

from clockwork_serve.serve.gateway_discard import SIP_BYTES, Unwanted
from clockwork_serve.units import MIB


class Stub:
    """A transport as far as is asked of it."""

    def __init__(self, sock: socket.socket, *, encrypted: bool = False) -> None:
        self._extra: dict[str, Any] = {"socket": sock, "sslcontext": object() if encrypted else None}

    def get_extra_info(self, name: str) -> Any:
        return self._extra[name]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


def unwanted(sock: socket.socket, left: int, *, encrypted: bool = False) -> Unwanted:
    transport = cast("asyncio.Transport", Stub(sock, encrypted=encrypted))
    return Unwanted(transport, memoryview(bytearray(MIB)), left)


def test_all_that_is_there_goes_and_what_follows_stays(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    rest = unwanted(ours, 100_000)
    theirs.sendall(bytes(60_000))
    assert ours.recv_into(rest.room()) == SIP_BYTES
    assert not rest.received(SIP_BYTES)
    assert rest.left == 40_000
    theirs.sendall(bytes(40_000) + b"next")
    assert rest.received(ours.recv_into(rest.room()))
    assert ours.recv(100) == b"next"


def test_the_socket_stays_open(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    rest = unwanted(ours, 10_000)
    theirs.sendall(bytes(10_000))
    assert rest.received(ours.recv_into(rest.room()))
    theirs.sendall(b"more")
    assert ours.recv(100) == b"more"


def test_what_is_encrypted_is_read_as_ever(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    rest = unwanted(ours, 100_000, encrypted=True)
    theirs.sendall(bytes(50_000))
    assert len(rest.room()) == 100_000
    assert not rest.received(20_000)
    assert rest.left == 80_000
