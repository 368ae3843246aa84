"""A network between two TCP programs, controlled by a test: it delays, cuts, heals and resets.

What is cut is not lost: TCP sends it again, so it comes after the cut has healed. A cut tells nobody.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Way:
    """One direction, of all connections."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    delay_s: float = 0.0
    bytes: int = 0


class Proxy:
    """Listens on ``port`` of 127.0.0.1, and forwards to ``target``. Its methods are for any thread."""

    def __init__(self, target: int, host: str = "127.0.0.1") -> None:
        self.target = target
        self.host = host
        self.port = 0
        self.connections = 0  # so far
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._thread.start()
        self._do(self._start())

    def close(self) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, *, there: bool = True, back: bool = True) -> None:
        """Hold all data to the target (``there``) and from it (``back``), without closing a connection."""
        self._do(self._open(there=not there, back=not back))

    def heal(self) -> None:
        """Forward data again, and first what was held."""
        self._do(self._open(there=True, back=True))

    def delay(self, seconds: float, *, there: bool = True, back: bool = True) -> None:
        """Delay all data from now on by so long."""
        if there:
            self.there.delay_s = seconds
        if back:
            self.back.delay_s = seconds

    def reset(self) -> None:
        """Reset all connections, at both sides."""
        self._do(self._reset())

    async def _start(self) -> None:
        self.there, self.back = Way(), Way()
        await self._open(there=True, back=True)
        self._server = await asyncio.start_server(self._forward, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        await self._reset()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _open(self, *, there: bool, back: bool) -> None:
        for way, opened in ((self.there, there), (self.back, back)):
            (way.open.set if opened else way.open.clear)()

    async def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            # A cut network answers no new connection either: what is said first waits.
            far_reader, far_writer = await asyncio.open_connection(self.host, self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(far_writer)
        for way, source, sink in ((self.there, reader, far_writer), (self.back, far_reader, writer)):
            held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)
            for work in (_take(way, source, held), self._give(way, sink, held)):
                task = self._loop.create_task(work)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _give(
        self, way: Way, sink: asyncio.StreamWriter, held: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        with suppress(OSError):
            while True:
                due_s, data = await held.get()
                await asyncio.sleep(max(0.0, due_s - self._loop.time()))
                await way.open.wait()
                if not data:
                    break
                way.bytes += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()
        self._writers.discard(sink)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)


async def _take(way: Way, source: asyncio.StreamReader, held: asyncio.Queue[tuple[float, bytes]]) -> None:
    data = b"?"
    while data:
        try:
            data = await source.read(1 << 16)
        except OSError:
            data = b""
        await held.put((asyncio.get_running_loop().time() + way.delay_s, data))


@contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    made = Proxy(target)
    made.start()
    try:
        yield made
    finally:
        made.close()
