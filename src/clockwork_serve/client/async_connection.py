"""One connection of the asynchronous client: a request, then its response. It knows no deadline."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from clockwork_serve.client.connection import is_stale
from clockwork_serve.client.wire import Address, Malformed, Response, ResponseReader
from clockwork_serve.oip.records import Buffer

if TYPE_CHECKING:
    import ssl


class AsyncConnection(asyncio.BufferedProtocol):
    """Use :meth:`open`. ``exchange`` raises OSError; whoever cancels it must :meth:`abort`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = ResponseReader()
        self._waiting: asyncio.Future[Response] | None = None
        self.idle_since = 0.0

    @classmethod
    async def open(cls, address: Address, tls: ssl.SSLContext | None) -> AsyncConnection:
        """Connect. Raises OSError."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, address.host, address.port, ssl=tls)
        return connection

    @property
    def stale(self) -> bool:
        """Whether the server closed it while it was idle."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return True
        return is_stale(transport.get_extra_info("socket").fileno())

    async def exchange(self, message: tuple[Buffer, ...]) -> Response:
        """Send a request; its response."""
        transport = self._transport
        if transport is None:
            raise ConnectionResetError("the server closed it")
        self._reader.expect()
        self._waiting = self._loop.create_future()
        try:
            if len(message) == 1:
                transport.write(message[0])
            else:
                transport.writelines(message)
            return await self._waiting
        finally:
            self._waiting = None

    def abort(self) -> None:
        """Give it up at once; the server takes a request in flight for cancelled."""
        if self._transport is not None:
            self._transport.abort()

    # What the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Some of the response came."""
        waiting = self._waiting
        if waiting is None or waiting.done():
            self.abort()  # nobody asked
            return
        try:
            response = self._reader.received(nbytes)
        except Malformed as error:
            waiting.set_exception(error)
            return
        if response is not None:
            waiting.set_result(response)

    def eof_received(self) -> bool:
        """The server closed its side."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._transport = None
        if self._waiting is not None and not self._waiting.done():
            error = exc if isinstance(exc, OSError) else ConnectionResetError("the server closed it")
            self._waiting.set_exception(error)
