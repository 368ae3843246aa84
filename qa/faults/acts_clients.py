"""Acts of clients: they vanish, drip, flood, are cut off; what honest ones notice is measured elsewhere."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator

from clockwork_serve.units import MIB
from qa.faults.stage import Act, Stage
from qa.hostile import http as hostile_http
from qa.hostile.traffic import Slow, attack

_RST = struct.pack("ii", 1, 0)


def _connected(stage: Stage) -> socket.socket:
    return socket.create_connection(("127.0.0.1", stage.server.http_port), 5)


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    client.close()


def vanish(share: float, answer_s: float = 0.0, *, times: int = 60, reset: bool = False) -> Act:
    """Clients that send that share of a request, wait so long, and are gone."""

    def act(stage: Stage) -> None:
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

    return act


def storm(stage: Stage) -> None:
    """Connections that are reset as soon as they stand, as fast as one client can."""
    stage.mark()
    end, count = time.monotonic() + 1.0, 0
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            _reset(_connected(stage))
            count += 1
    stage.notes.append(f"{count} connections reset")


def attacks(*makers: Callable[[random.Random], object], seconds: float = 1.0) -> Act:
    """Hostile requests of these kinds, one after the other."""

    def act(stage: Stage) -> None:
        dice = random.Random(1)
        stage.mark()
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            attack(stage.server.http_port, dice.choice(makers)(dice))  # type: ignore[arg-type]
            count += 1
        stage.notes.append(f"{count} hostile requests")

    return act


def slowloris(stage: Stage) -> None:
    """Heads and bodies that come a byte at a time."""
    from qa.hostile.traffic import Count

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


def flood(count: int) -> Act:
    """So many connections that say nothing."""

    def act(stage: Stage) -> None:
        stage.mark()
        with _many(stage, count) as held:
            stage.notes.append(f"{len(held)} connections held")
            stage.sleep(1.0)

    return act


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


def at_once(*killed: str) -> Act:
    """The gateway dies in the middle of a request of another client, who must hear of it."""

    def act(stage: Stage) -> None:
        with _connected(stage) as client:
            client.sendall(stage.infer("m0", 0.0)[:40])
            for name in killed:
                stage.kill(name, signal.SIGKILL)
            client.settimeout(2)
            with contextlib.suppress(OSError):
                if client.recv(1):
                    stage.wrong.append("half a request was answered")

    return act


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
