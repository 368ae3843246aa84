"""Direct reads: what is available of a body is read or discarded at once, and no byte after it."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from clockwork_serve.serve.gateway.timing import AT_ONCE, PROBE_BYTES, BodySocket, DiscardedBody
from clockwork_serve.units import MIB, ms


class Stub:
    """The parts of a transport that are used."""

    def __init__(self, sock: socket.socket, *, encrypted: bool = False) -> None:
        self._extra: dict[str, Any] = {"socket": sock, "sslcontext": object() if encrypted else None}

    def get_extra_info(self, name: str) -> Any:
        return self._extra[name]


class Endless(BodySocket):
    """There is always more to read."""

    def __init__(self) -> None:
        self._socket, self._plain = None, True

    def _receive(self, room: memoryview, how: int = 0) -> int:
        return max(1, len(room) - 7)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


def unwanted(sock: socket.socket, left: int, *, encrypted: bool = False) -> DiscardedBody:
    return DiscardedBody(source(sock, encrypted=encrypted), memoryview(bytearray(MIB)), left)


def source(sock: socket.socket, *, encrypted: bool = False) -> BodySocket:
    return BodySocket(cast("asyncio.Transport", Stub(sock, encrypted=encrypted)))


def test_available_bytes_are_discarded_and_later_ones_kept(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    rest = unwanted(ours, 100_000)
    theirs.sendall(bytes(60_000))
    assert ours.recv_into(rest.room()) == PROBE_BYTES
    assert not rest.received(PROBE_BYTES)
    assert rest.left == 40_000
    theirs.sendall(bytes(40_000) + b"next")
    assert rest.received(ours.recv_into(rest.room()))
    assert ours.recv(100) == b"next"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux notes when bytes are received")
def test_how_long_the_first_unread_byte_waits_is_the_kernel_s_word(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    ours.setblocking(False)
    one = source(ours)
    one.note_receipts()
    time.sleep(0.02)  # the kernel begins to note a little later
    assert one.waited_ns() == 0, "nothing is there"
    theirs.sendall(bytes(100_000))
    time.sleep(0.2)
    before_s = time.monotonic()
    theirs.sendall(b"more")

    waited_ns = one.waited_ns()

    assert waited_ns is not None and ms(200) <= waited_ns <= ms(
        200 + 1000 * (time.monotonic() - before_s) + 1000
    )
    assert len(ours.recv(4096)) == 4096, "it is still there"
    one.close()
    assert one.waited_ns() is None


def test_over_tls_the_socket_does_not_say_what_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    ours.setblocking(False)
    one = source(ours, encrypted=True)
    one.note_receipts()

    assert one.waited_ns() is None, "its layer may hold bytes that it read meanwhile"
    one.close()


def test_the_socket_stays_open(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    rest = unwanted(ours, 10_000)
    theirs.sendall(bytes(10_000))
    assert rest.received(ours.recv_into(rest.room()))
    theirs.sendall(b"more")
    assert ours.recv(100) == b"more"


def test_over_tls_nothing_is_discarded_directly(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    rest = unwanted(ours, 100_000, encrypted=True)
    theirs.sendall(bytes(50_000))
    assert len(rest.room()) == 100_000
    assert not rest.received(20_000)
    assert rest.left == 80_000


def test_available_bytes_of_a_body_are_read(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    room = bytearray(50_000)
    assert source(ours).read(memoryview(room)) == 0
    theirs.sendall(b"x" * 30_000)
    assert source(ours).read(memoryview(room)) == 30_000
    theirs.sendall(b"y" * 20_000 + b"next")
    assert source(ours).read(memoryview(room)[30_000:]) == 20_000
    assert room == b"x" * 30_000 + b"y" * 20_000
    assert ours.recv(100) == b"next"


def test_bytes_queued_at_the_sender_are_read_too(pair: tuple[socket.socket, socket.socket]) -> None:
    """The sender's kernel has all of it, and sends on while this end reads."""
    ours, theirs = pair
    body = bytes(range(256)) * 4096
    theirs.setblocking(False)
    sent = theirs.send(body)
    room = bytearray(sent)
    reader = source(ours)
    first = reader.read(memoryview(room))
    assert first == min(sent, AT_ONCE)
    assert first + reader.read(memoryview(room)[first:]) == sent > 500_000
    assert room == body[:sent]


def test_a_client_that_keeps_sending_does_not_block_others() -> None:
    ends = Endless()
    assert ends.read(memoryview(bytearray(3 * AT_ONCE))) == AT_ONCE


def test_over_tls_nothing_is_read_directly(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(b"secret")
    assert source(ours, encrypted=True).read(memoryview(bytearray(10))) == 0
    assert ours.recv(100) == b"secret"


def test_a_disconnect_is_left_to_the_loop(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
    theirs.close()
    assert source(ours).read(memoryview(bytearray(10))) == 0
