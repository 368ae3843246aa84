"""The response of an HTTP connection to arbitrary bytes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

from clockwork_serve.config import Settings
from clockwork_serve.serve.gateway.access import AccessControl
from clockwork_serve.serve.gateway.settings import SMALL_READ_BYTES, GatewayConfig
from clockwork_serve.serve.http.connection import HttpConnection
from clockwork_serve.serve.http.exchange import HttpExchange
from clockwork_serve.serve.http.reading import RoundRobin
from clockwork_serve.serve.http.responses import json_response
from clockwork_serve.serve.http.routes import Route
from clockwork_serve.units import KIB


class Loop:
    """An event loop that runs scheduled callbacks when :meth:`turn` is called."""

    def __init__(self) -> None:
        self.soon: list[Any] = []

    def call_soon(self, work: Any) -> None:
        self.soon.append(work)

    def call_later(self, delay_s: float, work: Any) -> None:
        """Timers never fire here."""

    def turn(self) -> None:
        due, self.soon = self.soon, []
        for work in due:
            work()


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.closing = self.eof = False
        self.reading = True

    def get_extra_info(self, name: str) -> Any:
        return None

    def write(self, data: bytes) -> None:
        assert not self.closing
        self.written += data

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closing = True


class Host:
    """Answers every request at once with what was parsed of it."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.config = GatewayConfig(run_dir="", name="g0", settings=Settings(max_body=200_000))
        self.access = AccessControl(self.config)
        self.tick_s = 0.0
        self.arriving_bytes = 0
        self.received = bytearray(256 * KIB)
        self.buffer = memoryview(self.received)
        self.small_buffer = self.buffer[:SMALL_READ_BYTES]
        self.readers = RoundRobin(self.loop)  # type: ignore[arg-type] # of a test
        self.refused = RoundRobin(self.loop, 4)  # type: ignore[arg-type] # of a test
        none = SimpleNamespace(withdraw=lambda name: None, must_wait=lambda name: False)
        turns = SimpleNamespace(before_ns=0, begin=lambda: None, clock=lambda: 1, noting=True)
        self.gateway: Any = SimpleNamespace(
            drop_body=lambda exchange: None,
            admission_queries=none,
            batching=False,
            rng=Random(1),
            turns=turns,
        )
        self.held: list[Any] = []

    def opened(self, connection: HttpConnection) -> None:
        pass

    def asked(self, connection: HttpConnection) -> None:
        pass

    def count_disconnect(self, limit: str) -> None:
        pass

    def find_route(self, url: bytes) -> Route:
        return Route(b"POST", None, url.decode("latin-1"))

    def body_buffer(self, exchange: HttpExchange, length: int) -> memoryview:
        return np.empty(length, np.uint8).data

    def room(self, nbytes: int) -> memoryview:
        return np.empty(nbytes, np.uint8).data

    def query_admission(self, exchange: HttpExchange, arrived_ns: Callable[[], int]) -> None:
        pass

    def dispatch(self, exchange: HttpExchange) -> None:
        understood = {
            "method": exchange.method,
            "length": exchange.header_length,
            "body": hash(bytes(exchange.content)),
        }
        exchange.respond(json_response(understood))


def answers(pieces: list[bytes]) -> bytes:
    """What a connection writes for these pieces; ``|`` where it closed its side."""
    host, transport = Host(), Transport()
    connection = HttpConnection(host)  # type: ignore[arg-type]
    connection.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces:
        rest = piece
        while rest and not transport.closing:
            assert transport.reading
            room = connection.get_buffer(-1)
            count = min(len(room), len(rest))
            assert count > 0
            room[:count] = rest[:count]
            rest = rest[count:]
            connection.buffer_updated(count)
            host.loop.turn()
    assert host.arriving_bytes >= 0
    return bytes(transport.written) + (b"|" if transport.closing or transport.eof else b"")
