"""The live page through a gateway: what readers ask on the metrics port goes to the observer's socket.

A gateway knows nothing of the page. It has checked who asks, passes on the target of a GET and, for who may
see one tenant's requests alone, that tenant's name; and gives back what comes, piece by piece where it does
not end. A reader who does not read makes the observer wait, not memory grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from clockwork_serve.serve.http.exchange import HttpExchange, byte_count
from clockwork_serve.serve.http.responses import HttpResponse, error_response
from clockwork_serve.serve.transport import OBSERVER_SOCKET
from clockwork_serve.units import KIB, MIB

ANSWER_BYTES: Final = 32 * MIB
"""The longest answer that is passed on whole: a window of many devices has a few MiB."""
READ_BYTES: Final = 64 * KIB
UNREAD_BYTES: Final = 256 * KIB
"""What a reader may leave unread of a stream before no more of it is read here."""
ANSWER_S: Final = 20.0
POLL_S: Final = 0.05
READERS: Final = 64  # relayed requests and streams at once
_OWN: Final = (b"content-length", b"connection", b"content-type")
_ABSENT: Final = (
    "the live page: expected this server's observer to run; found none; is the setting live_page on, and "
    "journal not off?"
)


class PageRelay:
    """Passes requests on to the observer of a server."""

    def __init__(self, run_dir: str) -> None:
        self._path = str(Path(run_dir) / OBSERVER_SOCKET)
        self._readers = 0

    async def answer(self, exchange: HttpExchange, target: bytes, tenant: str | None) -> None:
        """Respond to an exchange with what the observer says."""
        if self._readers >= READERS:
            exchange.respond(error_response(429, "too many readers of the live page; close some"))
            return
        self._readers += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=READ_BYTES)
        except (OSError, TimeoutError):
            self._readers -= 1
            exchange.respond(error_response(503, _ABSENT))
            return
        whose = b"" if tenant is None else b"Clockwork-Tenant: %s\r\n" % tenant.encode()
        try:
            writer.write(
                b"GET %s HTTP/1.1\r\nHost: observer\r\n%sConnection: close\r\n\r\n" % (target, whose)
            )
            await self._pass_on(exchange, reader)
        except (OSError, ValueError, IndexError, EOFError, asyncio.LimitOverrunError):
            exchange.respond(error_response(502, "the observer's answer broke off"))
        finally:
            self._readers -= 1
            writer.close()

    async def _pass_on(self, exchange: HttpExchange, reader: asyncio.StreamReader) -> None:
        async with asyncio.timeout(ANSWER_S):
            head = await reader.readuntil(b"\r\n\r\n")
        status, *lines = head[:-4].split(b"\r\n")
        fields = [line.partition(b":") for line in lines]
        own = {name.lower(): value.strip() for name, _, value in fields if name.lower() in _OWN}
        kept = b"".join(b"%s:%s\r\n" % (name, value) for name, _, value in fields if name.lower() not in _OWN)
        code, kind = int(status.split(b" ")[1]), own.get(b"content-type", b"text/plain")
        if (length := own.get(b"content-length")) is not None:
            size = byte_count(length)
            if size is None or size > ANSWER_BYTES:
                exchange.respond(error_response(502, "the observer's answer is too long"))
                return
            async with asyncio.timeout(ANSWER_S):
                body = await reader.readexactly(size)
            exchange.respond(HttpResponse(code, (body,), kind, kept))
            return
        stream: asyncio.Future[asyncio.WriteTransport] = asyncio.get_running_loop().create_future()
        follow: Callable[[asyncio.WriteTransport], None] = stream.set_result
        exchange.respond(HttpResponse(code, (), kind, kept, follow if exchange.method == b"GET" else None))
        if exchange.method != b"GET":
            return
        while not exchange.abandoned and not (await asyncio.wait({stream}, timeout=ANSWER_S))[0]:
            pass
        if not exchange.abandoned:
            await _pour(exchange, reader, stream.result())


async def _pour(
    exchange: HttpExchange, reader: asyncio.StreamReader, transport: asyncio.WriteTransport
) -> None:
    """Write what comes to a reader of a stream, as fast as he reads, until one of the two ends."""
    try:
        while not exchange.abandoned:
            if transport.get_write_buffer_size() > UNREAD_BYTES:
                await asyncio.sleep(POLL_S)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    data = await reader.read(READ_BYTES)
                if not data or exchange.abandoned:
                    return
                transport.write(data)
    finally:
        if not exchange.abandoned:
            transport.close()
