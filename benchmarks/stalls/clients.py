"""Clients with their own clocks, in a process of their own; their own delays are subtracted.

``python -m benchmarks.stalls.clients PLAN``: HTTP and gRPC by plain sockets and one epoll. It is separate
from ``harness.lean_load`` because its time measurements must not be disturbed. A response's time is from when
its request began to be sent until the kernel had the end of the response (``TCP_INFO``), less the client's
own delay: a socket that is ready now became so at the last poll at the earliest.
"""

from __future__ import annotations

import gc
import json
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_lab.bench.messages import Maker, Message, Tensor, decode
from clockwork_lab.bench.server import ServerAddress
from clockwork_serve.units import NS_PER_MS
from harness.grpc_load import ENABLE_PUSH, HEADER_TABLE, Connection
from harness.http_load import infer_message
from harness.lean_load import http_answer

CHANNELS: Final = 4
_STATUS: Final = {"0": "200", "8": "429", "4": "504"}
"""Of gRPC, as HTTP says it."""
LAST_S: Final = 30.0
"""How long answers are waited for after the end."""
_quiet_ms: Final = struct.Struct("I").unpack_from
_QUIET_AT: Final = 56


class Plan(Struct, frozen=True, kw_only=True):
    """``connections`` in a closed loop that ask again ``retry_ms`` after a refusal; or ``per_s`` requests.

    ``floats`` are in the model's input ``x``; the models are ``m0`` and so on. ``authority``: the file of the
    certificates' authority, where the server has TLS (stock clients only).
    """

    protocol: str
    address: str
    models: int
    floats: int
    slos_ms: tuple[int, ...]
    seconds: float
    per_s: float = 0.0
    connections: int = 0
    retry_ms: float = 1.0
    seed: int = 1
    authority: str = ""


class Seen(Struct, array_like=True):
    """One request: when it began and ended (0: it never did), for how long the client was late itself."""

    slo_ms: int
    begun_ns: int
    ended_ns: int = 0
    own_ns: int = 0
    status: str = ""

    @property
    def took_ms(self) -> float:
        """Less what the client owes to itself."""
        return (self.ended_ns - self.begun_ns - self.own_ns) / NS_PER_MS


def _came_ns(of: socket.socket, now_ns: int) -> int:
    """When the kernel had the last bytes of a connection."""
    info = of.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
    return now_ns - int(_quiet_ms(info, _QUIET_AT)[0]) * NS_PER_MS


class _Connection:
    """One socket: what is still to be sent, and what was received of the answer."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)  # noqa: FBT003 - the socket's own word
        self.message: memoryview = memoryview(b"")
        self.received = b""
        self.seen: Seen | None = None
        self.touched_ns = 0
        self.writing = False
        self.due_ns = 0


class HttpClients:
    """See :class:`Plan`."""

    def __init__(self, plan: Plan) -> None:
        self.seen: list[Seen] = []
        self._plan = plan
        self._dice = random.Random(plan.seed)
        host, _, port = plan.address.rpartition(":")
        self._address = (host, int(port))
        data = np.zeros(plan.floats, np.float32).tobytes()
        self._messages = {
            (model, slo_ms): memoryview(
                infer_message(
                    f"http://{plan.address}",
                    f"m{model}",
                    [("x", "FP32", _shape(plan.floats), data)],
                    slo_ms=slo_ms,
                )
            )
            for model in range(plan.models)
            for slo_ms in plan.slos_ms
        }
        self._poll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._idle: deque[_Connection] = deque()
        self._polled_ns = 0
        self._number = 0
        self._begin_s = 0.0

    def run(self) -> None:
        """Until the time is over and all have their answers."""
        plan = self._plan
        begin = time.monotonic()
        end, last = begin + plan.seconds, begin + plan.seconds + LAST_S
        self._begin_s = begin
        for _ in range(plan.connections):
            self._idle.append(self._connect())
        while (now := time.monotonic()) < last and (
            now < end or any(one.seen for one in self._open.values())
        ):
            if now < end:
                self._begin_due(now)
            polled_ns = time.monotonic_ns()
            ready = self._poll.poll(0.001)
            for fd, what in ready:
                self._touch(self._open[fd], what)
            self._polled_ns = polled_ns

    def _connect(self) -> _Connection:
        connection = _Connection(self._address)
        self._open[connection.socket.fileno()] = connection
        self._poll.register(connection.socket.fileno(), select.EPOLLIN)
        return connection

    def _begin_due(self, now_s: float) -> None:
        if self._plan.connections:
            now_ns = time.monotonic_ns()
            for _ in range(len(self._idle)):
                connection = self._idle.popleft()
                if connection.due_ns <= now_ns:
                    self._begin(connection)
                else:
                    self._idle.append(connection)
            return
        while self._number < (now_s - self._begin_s) * self._plan.per_s:
            try:
                connection = self._idle.popleft() if self._idle else self._connect()
            except OSError:  # no gateway is there
                self._number += 1
                now_ns = time.monotonic_ns()
                self.seen.append(Seen(self._dice.choice(self._plan.slos_ms), now_ns, now_ns, 0, "reset"))
                continue
            self._begin(connection)

    def _begin(self, connection: _Connection) -> None:
        self._number += 1
        model = connection.socket.fileno() % self._plan.models
        slo_ms = self._dice.choice(self._plan.slos_ms)
        connection.message = self._messages[model, slo_ms]
        now_ns = time.monotonic_ns()
        connection.seen = Seen(slo_ms, now_ns)
        connection.touched_ns = now_ns
        self.seen.append(connection.seen)
        self._send(connection, now_ns)

    def _send(self, connection: _Connection, now_ns: int) -> None:
        try:
            sent = connection.socket.send(connection.message)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._end(connection)
            return
        if connection.seen is not None and not connection.seen.ended_ns:
            # It copies, and may lose its core meanwhile: what is sent is sent when that is over.
            connection.touched_ns = time.monotonic_ns()
            connection.seen.own_ns += connection.touched_ns - now_ns
        connection.message = connection.message[sent:]
        writing = bool(connection.message)
        if writing != connection.writing:
            connection.writing = writing
            self._poll.modify(
                connection.socket.fileno(), select.EPOLLIN | (select.EPOLLOUT if writing else 0)
            )

    def _touch(self, connection: _Connection, what: int) -> None:
        now_ns = time.monotonic_ns()
        seen = connection.seen
        if what & select.EPOLLOUT:
            if seen is not None and not seen.ended_ns:
                seen.own_ns += now_ns - max(self._polled_ns, connection.touched_ns)
            connection.touched_ns = now_ns
            self._send(connection, now_ns)
        if what & ~select.EPOLLOUT:
            self._receive(connection, now_ns)
        if seen is not None and seen.ended_ns and not connection.message:
            connection.seen = None
            refused = seen.status != "200"
            connection.due_ns = now_ns + int(self._plan.retry_ms * NS_PER_MS) if refused else 0
            self._idle.append(connection)

    def _receive(self, connection: _Connection, now_ns: int) -> None:
        try:
            got = connection.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            got = b""
        if not got:
            self._end(connection)
            return
        connection.received += got
        answer = http_answer(connection.received)
        if answer is None:
            return
        connection.received = b""
        seen = connection.seen
        if seen is None or seen.ended_ns:
            raise AssertionError("an answer that nobody asked for")
        seen.ended_ns = max(_came_ns(connection.socket, now_ns), self._polled_ns, seen.begun_ns)
        seen.status = str(answer[0])

    def _end(self, connection: _Connection) -> None:
        fd = connection.socket.fileno()
        self._poll.unregister(fd)
        del self._open[fd]
        connection.socket.close()
        connection.seen = None
        with suppress(ValueError):
            self._idle.remove(connection)
        if self._plan.connections:
            self._idle.append(self._connect())


class _Calls:
    """One connection of gRPC, and the calls that are open on it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._connection = Connection(address, {HEADER_TABLE: 0, ENABLE_PUSH: 0})
        self.socket = self._connection.socket
        self.open: dict[int, Seen] = {}

    def begin(self, seen: Seen, message: Message, body: bytes) -> None:
        """Send a call. OSError once the gateway has ended."""
        self.open[self._connection.next_stream] = seen
        self._connection.begin((message.head, message.lead + body))

    def receive(self) -> list[tuple[Seen, str]]:
        """Calls that ended, and how. OSError once the gateway has ended."""
        ended = []
        for one in self._connection.read():
            seen = self.open.pop(one.stream, None)
            code = "reset" if one.trailers is None else decode(one.trailers).get("grpc-status", "none")
            if seen is not None:
                ended.append((seen, _STATUS.get(code, code)))
        return ended


class GrpcClients:
    """Open loop only, over a few connections, as channels do it."""

    def __init__(self, plan: Plan) -> None:
        self.seen: list[Seen] = []
        self._plan = plan
        self._dice = random.Random(plan.seed)
        maker = Maker(ServerAddress.of(plan.address, "grpc"), (), "header")
        tensor = Tensor("x", "FP32", _shape(plan.floats), np.zeros(plan.floats, np.float32).tobytes())
        self._messages = {
            (model, slo_ms): maker.grpc(f"m{model}", [tensor], slo_ms * NS_PER_MS, 0)
            for model in range(plan.models)
            for slo_ms in plan.slos_ms
        }
        self._bodies = maker.bodies
        host, _, port = plan.address.rpartition(":")
        self._address = (host, int(port))
        self._poll = select.epoll()
        self._calls: list[_Calls | None] = [self._connected() for _ in range(CHANNELS)]

    def run(self) -> None:
        """Until the time is over and all have their answers."""
        plan, number = self._plan, 0
        begin = time.monotonic()
        end, polled_before_ns = begin + plan.seconds, time.monotonic_ns()
        while (now := time.monotonic()) < end + LAST_S and (
            now < end or any(one is not None and one.open for one in self._calls)
        ):
            while now < end and number < (now - begin) * plan.per_s:
                self._begin(number)
                number += 1
            polled_ns = time.monotonic_ns()
            by_fd = {calls.socket.fileno(): calls for calls in self._calls if calls is not None}
            for fd, _ in self._poll.poll(0.001):
                self._receive(by_fd[fd], polled_before_ns)
            polled_before_ns = polled_ns

    def _receive(self, calls: _Calls, polled_before_ns: int) -> None:
        came_ns = _came_ns(calls.socket, time.monotonic_ns())
        try:
            ended = calls.receive()
        except OSError:
            self._lose(calls)
            return
        for seen, status in ended:
            seen.ended_ns = max(came_ns, polled_before_ns, seen.begun_ns)
            seen.status = status

    def _connected(self) -> _Calls | None:
        """A new connection, if anybody accepts it now."""
        try:
            calls = _Calls(self._address)
        except OSError:
            return None
        self._poll.register(calls.socket.fileno(), select.EPOLLIN)
        return calls

    def _lose(self, calls: _Calls) -> None:
        """The gateway has ended, and with it what it was asked."""
        for seen in calls.open.values():
            seen.ended_ns, seen.status = time.monotonic_ns(), "reset"
        self._poll.unregister(calls.socket.fileno())
        calls.socket.close()
        self._calls[self._calls.index(calls)] = None

    def _begin(self, number: int) -> None:
        slo_ms = self._dice.choice(self._plan.slos_ms)
        message = self._messages[number % self._plan.models, slo_ms]
        begun_ns = time.monotonic_ns()
        seen = Seen(slo_ms, begun_ns)
        self.seen.append(seen)
        calls = self._calls[number % CHANNELS]
        if calls is None:
            calls = self._calls[number % CHANNELS] = self._connected()
        if calls is None:
            seen.ended_ns, seen.status = time.monotonic_ns(), "reset"
            return
        try:
            calls.begin(seen, message, self._bodies[message.body])
        except OSError:
            self._lose(calls)
        seen.own_ns = time.monotonic_ns() - begun_ns


def _shape(floats: int) -> tuple[int, ...]:
    return (1, 3, 224, 224) if floats == 3 * 224 * 224 else (1, floats)


def main() -> int:
    """Play the plan in ``argv[1]``; what was seen goes to standard output."""
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    kinds: dict[str, Callable[[Plan], HttpClients | GrpcClients]] = {"http": HttpClients, "grpc": GrpcClients}
    clients = kinds[plan.protocol](plan)
    gc.collect()
    gc.freeze()
    gc.disable()
    clients.run()
    sys.stdout.write(json.dumps([msgspec.to_builtins(one) for one in clients.seen]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
