"""Acts of clients: they vanish, drip, flood, are cut off; what honest ones notice is measured elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from clockwork_serve.units import MIB
from qa.faults.stage import Stage, made
from qa.hostile import http as hostile_http
from qa.hostile.traffic import Count, Slow, attack

_RST = struct.pack("ii", 1, 0)


def _connected(stage: Stage) -> socket.socket:
    return socket.create_connection(("127.0.0.1", stage.server.http_port), 5)


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    client.close()


@made
def vanish(
    stage: Stage, share: float, answer_s: float = 0.0, *, times: int = 60, reset: bool = False
) -> None:
    """Clients that send that share of a request, wait so long, and are gone."""
    message = stage.infer("m0", 0.0)
    stage.mark()
    for _ in range(times):
        with contextlib.suppress(OSError):
            client = _connected(stage)
            client.sendall(message[: int(len(message) * share)])
            stage.sleep(answer_s)
            if reset:
                _reset(client)
            client.close()


def storm(stage: Stage) -> None:
    """Connections that are reset as soon as they stand, as fast as one client can."""
    stage.mark()
    end, count = time.monotonic() + 1.0, 0
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            _reset(_connected(stage))
            count += 1
    stage.notes.append(f"{count} connections reset")


@made
def attacks(stage: Stage, *makers: Callable[[random.Random], object], seconds: float = 1.0) -> None:
    """Hostile requests of these kinds, one after the other."""
    dice = random.Random(1)
    stage.mark()
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        attack(stage.server.http_port, dice.choice(makers)(dice))  # type: ignore[arg-type]
        count += 1
    stage.notes.append(f"{count} hostile requests")


def slowloris(stage: Stage) -> None:
    """Heads and bodies that come a byte at a time."""
    count = Count()
    port = stage.server.http_port
    starts = (
        b"GET /v2 HTTP/1.1\r\nA: ",
        b"POST /v2/models/m0/infer HTTP/1.1\r\nContent-Length: 5000\r\n\r\n",
    )
    slow = [Slow(port, starts[number % 2], b"0123456789") for number in range(200)]
    stage.mark()
    end = time.monotonic() + 2.0
    try:
        while time.monotonic() < end:
            for each in slow:
                each.step(count)
                time.sleep(0.002)
    finally:
        for each in slow:
            each.close()
    stage.notes.append(f"{len(slow)} slow connections")


@contextlib.contextmanager
def _many(stage: Stage, count: int) -> Iterator[list[socket.socket]]:
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):
                client = socket.socket()
                client.settimeout(0.5)
                held.append(client)
                client.connect(("127.0.0.1", stage.server.http_port))
        yield held
    finally:
        for client in held:
            client.close()


@made
def flood(stage: Stage, count: int) -> None:
    """So many connections that say nothing."""
    stage.mark()
    with _many(stage, count) as held:
        stage.notes.append(f"{len(held)} connections held")
        stage.sleep(1.0)


def no_descriptors(stage: Stage) -> None:
    """The gateway may open no more files; clients go on connecting; then it may again."""
    pid = stage.server.pid("gateway-0")
    used = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    stage.mark()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 10, before[1]))
    with _many(stage, 60):
        stage.sleep(1.0)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    stage.mark()


def body_half_read(stage: Stage) -> None:
    """The gateway is killed while it reads eight bodies of 8 MiB; their clients must hear of it."""
    head = b"POST /v2/models/m0/infer HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (8 * MIB)
    clients = [_connected(stage) for _ in range(8)]
    try:
        for client in clients:
            client.sendall(head + bytes(4 * MIB))
        stage.kill("gateway-0")
        silent = 0
        for client in clients:
            client.settimeout(2)
            try:
                client.recv(1)
            except TimeoutError:
                silent += 1
            except OSError:
                continue
        if silent:
            stage.wrong.append(f"{silent} of 8 connections of the killed gateway heard nothing")
    finally:
        for client in clients:
            client.close()


def link_cut(stage: Stage) -> None:
    """The proxy between generator and server resets every connection, three times."""
    for number in range(3):
        if number:
            stage.sleep(0.4)
        now_ns = time.monotonic_ns()
        stage.mark()
        stage.notes.append(f"{stage.extra['proxy'].cut()} connections cut")
        stage.resets.append((now_ns, time.monotonic_ns()))


@made
def at_once(stage: Stage, *killed: str) -> None:
    """The gateway dies in the middle of a request of another client, who must hear of it."""
    with _connected(stage) as client:
        client.sendall(stage.infer("m0", 0.0)[:40])
        for name in killed:
            stage.kill(name, signal.SIGKILL)
        client.settimeout(2)
        with contextlib.suppress(OSError):
            if client.recv(1):
                stage.wrong.append("half a request was answered")


def reading_stops(stage: Stage) -> None:
    """Clients ask for pages of metrics, sixty at a time, and read nothing."""
    stage.mark()
    port = int(stage.server.facts["metrics"].rpartition(":")[2].partition("/")[0])
    held = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(5)]
    try:
        for client in held:
            client.settimeout(0.2)
            with contextlib.suppress(OSError):
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n" * 60)
        stage.sleep(1.0)
    finally:
        for client in held:
            client.close()


HEADER_BOMBS = (hostile_http.huge_headers, hostile_http.long_targets, hostile_http.bombs)
ANY = tuple(hostile_http.ATTACKS)

# ------------------------------------------------------------
# A link that can be cut: it passes bytes on, and can reset all connections.


class Proxy:
    """On a port of its own, in a thread of its own, while the block lasts."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024), self._loop
        ).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> int:
        """Reset every connection, on both sides; how many clients had one."""
        return asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    async def _cut(self) -> int:
        count = len(self._writers) // 2
        for writer in self._writers:
            if not writer.is_closing():
                found = writer.get_extra_info("socket")
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
                writer.transport.abort()
        return count

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        passing: list[asyncio.Task[None]] = []
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there, to = await asyncio.open_connection("127.0.0.1", self._to)
            self._writers |= {writer, to}
            passing = [asyncio.ensure_future(_pass_on(*way)) for way in ((reader, to), (there, writer))]
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await asyncio.gather(*passing)
            self._writers -= {writer, to}
            to.close()
        for each in passing:
            each.cancel()
        await asyncio.gather(*passing, return_exceptions=True)
        writer.close()
        self._tasks.discard(task)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
