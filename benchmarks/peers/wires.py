"""How requests travel: HTTP/1.1 on connections kept alive, or gRPC; it neither plans requests nor judges answers."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, cast

from benchmarks.peers.peer import HOST, Answer, Protocol, Request

NO_ANSWER: Final = Answer(-1, {}, b"")
CHANNELS: Final = 4


class Wire(ABC):
    """Sends requests; each answer comes once."""

    @abstractmethod
    async def ask(self, model: str, patience_s: float) -> tuple[Answer, int]:
        """The answer, and when the request was sent. ``NO_ANSWER`` if none came in time or the server hung up."""

    @abstractmethod
    async def close(self) -> None:
        """End it."""


def http_message(request: Request, port: int, model: str) -> bytes:
    """The whole message."""
    lines = [f"POST {request.path} HTTP/1.1", f"Host: {HOST}:{port}"]
    lines += [f"{name}: {value}" for name, value in request.headers]
    head = "\r\n".join([*lines, f"Content-Length: {len(request.body)}", "", ""])
    return head.replace("{model}", model).encode() + request.body


class _Connection(asyncio.Protocol):
    """One socket with at most one request out."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._received = bytearray()
        self._head: tuple[int, dict[str, str], int] | None = None

    @property
    def open(self) -> bool:
        """Whether it can be used."""
        return self.transport is not None and not self.transport.is_closing() and self._answer is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self.transport = cast("asyncio.Transport", transport)

    def send(self, message: bytes) -> asyncio.Future[Answer]:
        """Send a request."""
        future = self._answer = asyncio.get_running_loop().create_future()
        if self.transport is None or self.transport.is_closing():
            self._end(NO_ANSWER)
        else:
            self.transport.write(message)
        return future

    def data_received(self, data: bytes) -> None:
        """Collect a response."""
        self._received += data
        if self._head is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head = _head(bytes(self._received[:end]), end + 4)
        status, headers, at = self._head
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = _chunks(self._received, at)
        else:
            end = at + int(headers.get("content-length", 0))
            body = bytes(self._received[at:end]) if len(self._received) >= end else None
        if body is not None:
            self._end(Answer(status, headers, body))

    def connection_lost(self, exc: Exception | None) -> None:
        """A request that was out gets no answer."""
        self._end(NO_ANSWER)

    def _end(self, answer: Answer) -> None:
        self._received.clear()
        self._head = None
        future, self._answer = self._answer, None
        if future is not None and not future.done():
            future.set_result(answer)


def _chunks(received: bytearray, at: int) -> bytes | None:
    """A body in chunks that begins there; None while it is not whole."""
    parts = []
    while (end := received.find(b"\r\n", at)) >= 0:
        length = int(received[at:end].split(b";")[0], 16)
        if len(received) < end + 2 + length + 2:
            return None
        if not length:
            return b"".join(parts)
        parts.append(bytes(received[end + 2 : end + 2 + length]))
        at = end + 2 + length + 2
    return None


def _head(head: bytes, at: int) -> tuple[int, dict[str, str], int]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return int(first.split()[1]), {name.lower(): value.strip() for name, value in pairs}, at


class Http(Wire):
    """Takes the connection that has been idle for the shortest, or makes one."""

    def __init__(self, request: Request, port: int, models: tuple[str, ...]) -> None:
        self._port = port
        self._messages: dict[str, bytes] = {}
        # One buffer serves all models where nothing but the head differs; it is joined once for each.
        for model in models:
            self._messages[model] = http_message(request, port, model)
        self._idle: deque[_Connection] = deque()
        self.made = 0

    async def ask(self, model: str, patience_s: float) -> tuple[Answer, int]:
        """See :class:`Wire`."""
        connection = self._taken()
        try:
            async with asyncio.timeout(patience_s):
                if connection is None:
                    loop = asyncio.get_running_loop()
                    _, connection = await loop.create_connection(_Connection, HOST, self._port)
                    self.made += 1
                sent_ns = time.monotonic_ns()
                answer = await connection.send(self._messages[model])
        except (TimeoutError, OSError):
            if connection is not None and connection.transport is not None:
                connection.transport.abort()
            return NO_ANSWER, time.monotonic_ns()
        if answer.headers.get("connection", "").lower() == "close" and connection.transport is not None:
            connection.transport.close()
        self._idle.append(connection)
        return answer, sent_ns

    def _taken(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return None

    async def close(self) -> None:
        """See :class:`Wire`."""
        for connection in self._idle:
            if connection.transport is not None:
                connection.transport.abort()


class Grpc(Wire):
    """A few channels, taken in turn; messages are made beforehand."""

    def __init__(self, request: Request, port: int) -> None:
        import grpc.aio

        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
        self._messages: Mapping[str, bytes] = request.messages
        self._channels = [
            grpc.aio.insecure_channel(f"{HOST}:{port}", options=options) for _ in range(CHANNELS)
        ]
        self._calls: deque[Any] = deque(channel.unary_unary(request.path) for channel in self._channels)

    async def ask(self, model: str, patience_s: float) -> tuple[Answer, int]:
        """See :class:`Wire`. Who has no more patience hangs up, which is not told to the server beforehand."""
        import grpc

        self._calls.rotate(1)
        sent_ns = time.monotonic_ns()
        call = self._calls[0](self._messages[model])
        try:
            async with asyncio.timeout(patience_s):
                return Answer(0, {}, await call), sent_ns
        except TimeoutError:
            call.cancel()
            return NO_ANSWER, sent_ns
        except grpc.RpcError as error:
            code, words = error.code(), str(error.details())  # type: ignore[attr-defined]
            return Answer(int(code.value[0]), {}, words.encode()), sent_ns

    async def close(self) -> None:
        """See :class:`Wire`."""
        for channel in self._channels:
            await channel.close()


def wire(protocol: Protocol, request: Request, port: int, models: tuple[str, ...]) -> Wire:
    """To a server's port."""
    return Http(request, port, models) if protocol == "http" else Grpc(request, port + 1)
