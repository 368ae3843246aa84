"""What a server sends to those who ask it: our client, and the load generator."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import numpy as np

from clockwork_client import calls
from clockwork_client.errors import Invalid, ServingError
from clockwork_client.wire import Address, Malformed, Response, ResponseReader
from clockwork_lab.bench import server as bench_server
from clockwork_lab.bench.messages import Message, Undecodable, decode
from clockwork_lab.bench.records import Ends
from clockwork_lab.bench.sender import LoadConnection
from clockwork_lab.bench.wire_grpc import GrpcLoadConnection, PreparedCalls
from clockwork_lab.bench.wire_http import HttpLoadConnection, PreparedRequests
from clockwork_serve.errors import ClockworkError
from tests.fuzz import mutators
from tests.fuzz.engine import Target


def _client_http(data: bytes) -> None:
    """A byte for how it is cut, then what a server sends."""
    step, stream, reader = 1 + (data[0] if data else 0), data[1:], ResponseReader()
    while stream:
        room = reader.get_buffer()
        part = stream[: min(step, len(room))]
        room[: len(part)] = part
        stream = stream[len(part) :]
        if reader.received(len(part)) is not None:
            reader.expect()


_X = {"x": np.zeros(2, np.float32)}
_CALLS = (
    calls.infer("m", _X), calls.metadata(), calls.model_metadata("m", "1"), calls.models(),
    calls.statistics("m", ""), calls.control("m", "load"), calls.health("ready"),
)  # fmt: skip


def _client_answers(data: bytes) -> None:
    """Two bytes for the call and the status, two for the length of the JSON (0: none is told), the body."""
    data = data.ljust(4, b"\0")
    call, status = _CALLS[data[0] % len(_CALLS)], (200, 400, 429, 503, 504, 500)[data[1] % 6]
    length, body = int.from_bytes(data[2:4], "little"), data[4:]
    headers = {"inference-header-content-length": str(length)} if length else {}
    call.read(Response(status, headers, body, keep_alive=True))


class _NoSocket(LoadConnection):
    """What is written is thrown away."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.dead = False
        self.is_established = True
        self.rest = None
        self.fd = -1
        self.sock: Any = SimpleNamespace(sendmsg=lambda parts: sum(map(len, parts)), send=len)

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        self.dead = True


class _Http(HttpLoadConnection, _NoSocket):
    pass


class _Grpc(GrpcLoadConnection, _NoSocket):
    pass


class _Run:
    """A sender that only remembers."""

    def __init__(self, prepared: Any) -> None:
        self.prepared = prepared
        self.start_ns, self.tls, self.family = 0, None, socket.AF_INET
        self.sent, self.first, self.nbytes = [0] * 9, [0] * 9, [0] * 9
        self.dirty: list[Any] = []
        self.idle: list[Any] = []
        self.trailers: dict[bytes, Any] = {}
        self.unexpected_bytes = 0
        self.over: dict[int, int] = {}
        self.ends = Ends(lambda code, end: None)

    def free(self, connection: Any) -> None:
        pass

    def refused(self, why: str) -> None:
        pass

    def may_retry(self, row: int) -> bool:
        return row == 3

    def requeue(self, row: int) -> None:
        pass

    def unexpected_response(self, nbytes: int) -> None:
        assert nbytes > 0

    def ended(self, row: int, code: int, now_ns: int, nbytes: int, wait_ns: int | None) -> None:
        assert row not in self.over, "it ended twice"
        self.over[row] = code


_MESSAGE = Message(head=b"POST / HTTP/1.1\r\n\r\n", lead=b"12345", body=0)
_BODIES = [bytes(100_000)]


def _feed(connection: Any, data: bytes) -> None:
    step, stream = 1 + (data[0] if data else 0), data[1:]
    for at in range(0, len(stream), step):
        if connection.dead:
            return
        connection.data_received(stream[at : at + step])
        connection.flush()


def _bench_http(data: bytes) -> None:
    run = _Run(PreparedRequests([_MESSAGE], _BODIES))
    connection = _Http(run)
    connection.send(0, 0)
    _feed(connection, data)
    if not connection.dead:
        connection.lost("closed")
    assert 0 in run.over


def _bench_http2(data: bytes) -> None:
    run = _Run(PreparedCalls([_MESSAGE], _BODIES))
    connection = _Grpc(run)
    for row in range(1, 5):
        connection.send(row, 0)
    _feed(connection, data)
    if not connection.dead:
        connection.lost("closed")


def _addresses(data: bytes) -> None:
    url = data.decode(errors="replace")
    for protocol in bench_server.PROTOCOLS:
        try:
            str(bench_server.ServerAddress.of(url, protocol))
        except ClockworkError as error:
            assert "url: expected" in str(error)  # noqa: PT017 - the next reader is to have its turn
    Address.of(url, None, "agent").message("GET", "/", b"", ())


_STREAM = mutators.headed(1, mutators.text)

TARGETS = (
    Target("client_http", _client_http, (Malformed,), _STREAM),
    Target("client_answers", _client_answers, (ServingError,), mutators.headed(4, mutators.as_json)),
    Target("bench_http", _bench_http, (), _STREAM),
    Target("bench_http2", _bench_http2, (), mutators.headed(1, mutators.http2)),
    Target("hpack", decode, (Undecodable,), mutators.raw),
    Target("addresses", _addresses, (Invalid, ClockworkError), mutators.text),
)
