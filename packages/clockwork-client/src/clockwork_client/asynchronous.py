"""``AsyncClient``: the calls of the protocol with await, any number concurrently on one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self, cast

from clockwork_client import calls
from clockwork_client.base import LOAD_TIMEOUT_S, ClientBase, Pool
from clockwork_client.blocking import is_stale
from clockwork_client.calls import (
    CallTimeout,
    ClientCall,
    Inputs,
    ModelMetadata,
    ModelState,
    ModelStatistics,
    Result,
    ServerMetadata,
    T,
)
from clockwork_client.datatypes import Buffer, Parameter
from clockwork_client.errors import Disconnected, Expired, NotServing, ServingError
from clockwork_client.wire import Address, Malformed, Response, ResponseReader

if TYPE_CHECKING:
    import ssl


# ------------------------------------------------------------
# One connection of the asynchronous client: a request, then its response. Its user applies the time limit.


class AsyncConnection(asyncio.BufferedProtocol):
    """Use :meth:`open`. ``exchange`` raises OSError; if it is cancelled, the caller must :meth:`abort`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = ResponseReader()
        self._pending: asyncio.Future[Response] | None = None
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
        """Send a request; return its response."""
        transport = self._transport
        if transport is None:
            raise ConnectionResetError("the server closed it")
        self._reader.expect()
        self._pending = self._loop.create_future()
        try:
            if len(message) == 1:
                transport.write(message[0])
            else:
                transport.writelines(message)
            return await self._pending
        finally:
            self._pending = None

    def abort(self) -> None:
        """Close the connection at once; the server cancels a request in flight."""
        if self._transport is not None:
            self._transport.abort()

    # Callbacks of the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """The buffer to receive the next bytes into."""
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """A part of the response was received."""
        waiting = self._pending
        if waiting is None or waiting.done():
            self.abort()  # bytes that were not requested
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
        """The connection is closed."""
        self._transport = None
        if self._pending is not None and not self._pending.done():
            error = exc if isinstance(exc, OSError) else ConnectionResetError("the server closed it")
            self._pending.set_exception(error)


# ------------------------------------------------------------
# ``AsyncClient``: the same calls with await, any number at once on one event loop.


class AsyncClient(ClientBase):
    """A client for one event loop; settings as of :class:`Client`.

    Cancelling a call closes its connection: the server cancels the request and frees its resources.
    """

    def _set_up(self, connections: int) -> None:
        self._permits = asyncio.Semaphore(connections)
        self._pool: Pool[AsyncConnection] = Pool()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
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
        """Run a model, as :meth:`Client.infer`. Raises :class:`ServingError`."""
        call = calls.infer(
            model, inputs, version=version, outputs=outputs, parameters=parameters, request_id=request_id,
            datatypes=datatypes,
        )  # fmt: skip
        self._check_fits(model, version, inputs, outputs)
        return await self._run(call, self._new_timeout(time.monotonic(), timeout_s, slo_ms, retries))

    async def live(self) -> bool:
        """Whether the server responds at all."""
        return await self._holds(calls.health("live"))

    async def ready(self) -> bool:
        """Whether the server accepts inference requests."""
        return await self._holds(calls.health("ready"))

    async def model_ready(self, model: str, version: str = "") -> bool:
        """Whether a model accepts requests."""
        return await self._holds(calls.model_ready(model, version))

    async def metadata(self) -> ServerMetadata:
        """The server's name, version and extensions."""
        return await self._call(calls.metadata())

    async def model_metadata(self, model: str, version: str = "") -> ModelMetadata:
        """A model's inputs and outputs. They are cached, and :meth:`infer` checks requests against them."""
        return self._remember(model, version, await self._call(calls.model_metadata(model, version)))

    async def models(self) -> list[ModelState]:
        """Every version of every model in the server's repository."""
        return await self._call(calls.models())

    async def statistics(self, model: str = "", version: str = "") -> list[ModelStatistics]:
        """A model's counters; those of all models if none is named."""
        return await self._call(calls.statistics(model, version))

    async def load(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Load a model of the repository, or reload it. It may have to be compiled first."""
        self._forget(model)
        await self._call(calls.control(model, "load"), timeout_s)

    async def unload(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Stop serving a model."""
        self._forget(model)
        await self._call(calls.control(model, "unload"), timeout_s)

    # Internals

    async def _holds(self, call: ClientCall[bool]) -> bool:
        try:
            return await self._call(call)
        except (NotServing, Expired, Disconnected):
            return False

    async def _call(self, call: ClientCall[T], timeout_s: float | None = None) -> T:
        return await self._run(call, self._new_timeout(time.monotonic(), timeout_s))

    async def _run(self, call: ClientCall[T], call_timeout: CallTimeout) -> T:
        while True:
            try:
                return call.read(await self._attempt(call, call_timeout))
            except ServingError as error:
                error.request_id = error.request_id or call.id
                wait_s = call_timeout.wait_s(error, time.monotonic())
                if wait_s is None:
                    raise
            await _sleep(wait_s)

    async def _attempt(self, call: ClientCall[T], call_timeout: CallTimeout) -> Response:
        now = time.monotonic()
        until = call_timeout.start(now)
        try:
            async with asyncio.timeout(until - now), self._permits:
                return await self._exchange(call, call_timeout)
        except TimeoutError:
            raise self._timed_out() from None

    async def _exchange(self, call: ClientCall[T], call_timeout: CallTimeout) -> Response:
        try:
            connection = await self._acquire()
        except OSError as error:
            raise self._unreachable(error) from None
        keep = False
        try:
            message = self._message(call, call_timeout, time.monotonic())
            response = await connection.exchange(message)
            keep = response.keep_alive
        except OSError as error:
            raise self._broken(error) from None
        finally:
            # Also if the call was cancelled.
            if not self._pool.release(connection, time.monotonic(), keep=keep):
                connection.abort()
        return response

    async def _acquire(self) -> AsyncConnection:
        connection, dropped = self._pool.acquire(time.monotonic())
        for each in dropped:
            each.abort()
        if connection is None:
            connection = await AsyncConnection.open(self._address, self._tls)
            if not self._pool.add(connection):
                connection.abort()
                raise ConnectionAbortedError("this client, closed")
        return connection


async def _sleep(seconds: float) -> None:
    """Sleep for at least ``seconds``: timers of uvloop may fire up to a millisecond early."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:  # noqa: ASYNC110 - it waits for a point in time
        await asyncio.sleep(left)
