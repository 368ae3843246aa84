"""An HTTP server that does what a script says with each inference, and counts what it did: the oracle.

A script gets the number of the inference, from 0, and its model, and says one of

    "ok", "never" (no answer), "reset", "garbage" (not HTTP), "chunked", "close" (answers, then closes),
    "until_end" (a body that ends with the connection), "interim" (a 100 first), "bytewise",
    "twice" (answers two times)
    ("twice", seconds)   the second answer after a while
    ("ok", seconds)   the answer after a while
    (status, reason)  a refusal with that reason; (status, reason, retry_after_ms) says when to come back
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Action = Any
Script = Callable[[int, str], Action]
INPUTS = [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
ANSWER = b'{"model_name":"m","outputs":[]}'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass
class Played:
    """What a server did. ``url``: where it is; ``done``: actions by what they were; ``heads`` of inferences.

    ``at_s``: when each inference came. ``pause`` (from, to), seconds after the first inference: meanwhile the
    whole server does nothing.
    """

    url: str = ""
    done: Counter[Any] = field(default_factory=Counter)
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    asked: int = 0
    pause: tuple[float, float] | None = None
    connections: int = 0


class _Server:
    def __init__(self, script: Script, models: dict[str, Any], played: Played, early: int) -> None:
        self.script, self.models, self.played, self.early = script, models, played, early
        self.writers: list[asyncio.StreamWriter] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        self.played.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n")[0].decode().split()
        found = _LENGTH.search(head)
        length = int(found[1]) if found else 0
        if method == "GET":
            self._tell(path, writer)
            return True
        early = bool(self.early and length > self.early)
        if not early:
            self.played.bodies.append(await reader.readexactly(length))
        number, self.played.asked = self.played.asked, self.played.asked + 1
        self.played.heads.append(head)
        self.played.at_s.append(time.monotonic())
        if self.played.pause is not None:
            since = time.monotonic() - self.played.at_s[0]
            if self.played.pause[0] <= since < self.played.pause[1]:
                time.sleep(self.played.pause[1] - since)  # noqa: ASYNC251 - that is the point
        action = self.script(number, path.split("/")[-2] if path.endswith("/infer") else path)
        goes_on = await self._act(action, writer)
        self.played.done[action] += 1
        if early:
            await reader.readexactly(length)
        return goes_on

    def _tell(self, path: str, writer: asyncio.StreamWriter) -> None:
        model = path.rsplit("/", 1)[-1]
        if model in self.models:
            body, status = json.dumps({"name": model, "inputs": self.models[model]}).encode(), b"200 OK"
        else:
            body, status = b'{"error":"unknown model"}', b"404 No"
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))

    async def _act(self, action: Action, writer: asyncio.StreamWriter) -> bool:
        match action:
            case "ok":
                writer.write(OK)
            case ("ok", seconds):
                await asyncio.sleep(seconds)
                writer.write(OK)
            case ("twice", seconds):
                writer.write(OK)
                await asyncio.sleep(seconds)
                writer.write(OK)
            case (status, reason, *more):
                said = {"error": f"no, for {status} reasons", "reason": reason}
                if more:
                    said["retry_after_ms"] = more[0]
                body = json.dumps(said).encode()
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
            case "never":
                return True
            case "twice":
                writer.write(OK + OK)
            case "reset":
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                writer.transport.abort()
                return False
            case "garbage":
                writer.write(b"hello there, this is no HTTP at all\r\n\r\n")
            case "chunked":
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
                await asyncio.sleep(0.002)
                writer.write(b"2\r\nde\r\n0\r\n\r\n")
            case "close":
                writer.write(OK.replace(b"\r\nContent", b"\r\nConnection: close\r\nContent"))
                return False
            case "until_end":
                writer.write(b"HTTP/1.0 200 OK\r\n\r\nabc")
                return False
            case "interim":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
            case "bytewise":
                for at in range(len(OK)):
                    writer.write(OK[at : at + 1])
                    await asyncio.sleep(0)
            case _:
                raise AssertionError(action)
        return True


@contextmanager
def scripted(
    script: Script = lambda number, model: "ok",
    *,
    models: dict[str, Any] | None = None,
    early: int = 0,
    tls: ssl.SSLContext | None = None,
    pause: tuple[float, float] | None = None,
) -> Iterator[Played]:
    """A server for the duration of the block. ``early``: it refuses larger bodies before it reads them."""
    played = Played(pause=pause)
    server = _Server(script, {"m": INPUTS} if models is None else models, played, early)
    ready = threading.Event()
    stop: list[Callable[[], object]] = []

    async def main() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls, backlog=1024)
        host, port = listening.sockets[0].getsockname()
        played.url = f"{'https' if tls else 'http'}://{'localhost' if tls else host}:{port}"
        stop.append(lambda: loop.call_soon_threadsafe(over.set))
        ready.set()
        await over.wait()
        await asyncio.sleep(0.02)  # asyncio trips over who comes as it stops to listen
        listening.close()
        for _ in range(3):  # a connection may have been accepted that nobody has served yet
            await asyncio.sleep(0.02)
            for writer in server.writers:
                writer.transport.abort()
            await asyncio.gather(*server.tasks, return_exceptions=True)
            waiting = (writer.wait_closed() for writer in server.writers)
            await asyncio.gather(*waiting, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield played
    finally:
        stop[0]()
        thread.join(60)
        assert not thread.is_alive()
