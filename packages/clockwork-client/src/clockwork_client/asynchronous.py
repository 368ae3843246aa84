"""``AsyncClient``: the calls of the protocol with await, any number at once on one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from clockwork_client import calls
from clockwork_client.base import LOAD_TIMEOUT_S, ClientBase
from clockwork_client.blocking import is_stale
from clockwork_client.calls import (
    Call,
    Inputs,
    ModelMetadata,
    ModelState,
    ModelStatistics,
    Patience,
    Result,
    ServerMetadata,
    T,
)
from clockwork_client.datatypes import Buffer, Parameter
from clockwork_client.errors import Disconnected, Expired, NotServing, ServingError
from clockwork_client.pool import Pool
from clockwork_client.wire import Address, Malformed, Response, ResponseReader

if TYPE_CHECKING:
    import ssl


# ------------------------------------------------------------
# One connection of the asynchronous client: a request, then its response. It knows no deadline.


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


# ------------------------------------------------------------
# ``AsyncClient``: the same calls with await, any number at once on one event loop.


class AsyncClient(ClientBase):
    """A client for one event loop; settings as of :class:`Client`.

    Whoever cancels a call closes its connection: the server cancels the request and frees its place.
    """

    def _set_up(self, connections: int) -> None:
        self._places = asyncio.Semaphore(connections)
        self._pool: Pool[AsyncConnection] = Pool()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; calls in flight end with :class:`Disconnected`."""
        self._closed = True
        idle, busy = self._pool.close()
        for connection in (*idle, *busy):
            connection.abort()
        await asyncio.sleep(0)  # the loop closes their sockets

    async def infer(  # noqa: PLR0913 - what a request may say
        self,
        model: str,
        inputs: Inputs,
        *,
        slo_ms: float | None = None,
        version: str = "",
        outputs: Sequence[str] | None = None,
        parameters: Mapping[str, Parameter] | None = None,
        request_id: str = "",
        datatypes: Mapping[str, str] | None = None,
        retries: int = 0,
        timeout_s: float | None = None,
    ) -> Result:
        """Ask a model, as :meth:`Client.infer`. Raises :class:`ServingError`."""
        call = calls.infer(
            model, inputs, version=version, outputs=outputs, parameters=parameters, request_id=request_id,
            datatypes=datatypes,
        )  # fmt: skip
        self._fits(model, version, inputs, outputs)
        return await self._do(call, self._patience(time.monotonic(), timeout_s, slo_ms, retries))

    async def live(self) -> bool:
        """Whether the server answers at all."""
        return await self._is(calls.health("live"))

    async def ready(self) -> bool:
        """Whether the server serves."""
        return await self._is(calls.health("ready"))

    async def model_ready(self, model: str, version: str = "") -> bool:
        """Whether a model can be asked now."""
        return await self._is(calls.model_ready(model, version))

    async def metadata(self) -> ServerMetadata:
        """Who serves."""
        return await self._ask(calls.metadata())

    async def model_metadata(self, model: str, version: str = "") -> ModelMetadata:
        """A model's inputs and outputs. They are remembered, and :meth:`infer` checks by them."""
        return self._learn(model, version, await self._ask(calls.model_metadata(model, version)))

    async def models(self) -> list[ModelState]:
        """Every version of every model in the server's repository."""
        return await self._ask(calls.models())

    async def statistics(self, model: str = "", version: str = "") -> list[ModelStatistics]:
        """What a model did so far; all models if none is named."""
        return await self._ask(calls.statistics(model, version))

    async def load(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Serve a model of the repository, or serve it anew. It may have to be compiled first."""
        self._forget(model)
        await self._ask(calls.control(model, "load"), timeout_s)

    async def unload(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Serve a model no more."""
        self._forget(model)
        await self._ask(calls.control(model, "unload"), timeout_s)

    # Inside

    async def _is(self, call: Call[bool]) -> bool:
        try:
            return await self._ask(call)
        except (NotServing, Expired, Disconnected):
            return False

    async def _ask(self, call: Call[T], timeout_s: float | None = None) -> T:
        return await self._do(call, self._patience(time.monotonic(), timeout_s))

    async def _do(self, call: Call[T], patience: Patience) -> T:
        while True:
            try:
                return call.read(await self._attempt(call, patience))
            except ServingError as error:
                error.request_id = error.request_id or call.id
                wait_s = patience.wait_s(error, time.monotonic())
                if wait_s is None:
                    raise
            await _sleep(wait_s)

    async def _attempt(self, call: Call[T], patience: Patience) -> Response:
        now = time.monotonic()
        until = patience.start(now)
        try:
            async with asyncio.timeout(until - now), self._places:
                return await self._exchange(call, patience)
        except TimeoutError:
            raise self._no_answer() from None

    async def _exchange(self, call: Call[T], patience: Patience) -> Response:
        try:
            connection = await self._take()
        except OSError as error:
            raise self._unreachable(error) from None
        keep = False
        try:
            message = self._message(call, patience, time.monotonic())
            response = await connection.exchange(message)
            keep = response.keep_alive
        except OSError as error:
            raise self._broken(error) from None
        finally:
            # However it ends, a call that is cancelled too.
            if not self._pool.give_back(connection, time.monotonic(), keep=keep):
                connection.abort()
        return response

    async def _take(self) -> AsyncConnection:
        connection, dropped = self._pool.take(time.monotonic())
        for each in dropped:
            each.abort()
        if connection is None:
            connection = await AsyncConnection.open(self._address, self._tls)
            if not self._pool.add(connection):
                connection.abort()
                raise ConnectionAbortedError("this client, closed")
        return connection


async def _sleep(seconds: float) -> None:
    """Not a moment less: uvloop's timers may be a millisecond early."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:  # noqa: ASYNC110 - it waits for nothing but time
        await asyncio.sleep(left)
