"""A link that can be cut: it forwards bytes between clients and a server, and can reset all connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Self


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
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
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
