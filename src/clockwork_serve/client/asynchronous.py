"""``AsyncClient``: the same calls with await, any number at once on one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from clockwork_serve.client import calls
from clockwork_serve.client.answers import ModelMetadata, ModelState, ModelStatistics, Result, ServerMetadata
from clockwork_serve.client.async_connection import AsyncConnection
from clockwork_serve.client.base import LOAD_TIMEOUT_S, ClientBase
from clockwork_serve.client.calls import Call, Inputs, T
from clockwork_serve.client.errors import Disconnected, Expired, NotServing, ServingError
from clockwork_serve.client.patience import Patience
from clockwork_serve.client.pool import Pool
from clockwork_serve.client.wire import Response
from clockwork_serve.oip.records import Parameter


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
