"""A gRPC server on an event loop: methods by path, as callbacks, coroutines, streams. It knows no service."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final

import grpc
from grpc._cython import cygrpc

from clockwork_serve.serve.grpc.call import Aborted, GrpcCall, Metadata, Method, Silence, details
from clockwork_serve.serve.grpc.core import ENDED, Core

SWEEP_S: Final = 5.0
"""How often it is looked for clients that say nothing."""
Gate = Callable[[str, Metadata], str]
"""Who calls, by path and metadata. Raises :class:`Aborted`. It is called in a thread of the server's own."""

_log = logging.getLogger(__name__)


def callback(path: str, parse: Callable[[bytes], Any], answer: Callable[[GrpcCall, Any], None]) -> Method:
    """One request, one response: ``answer`` replies whenever it can."""
    return Method(path, parse, on_message=answer)


def coroutine(
    path: str,
    parse: Callable[[bytes], Any],
    encode: Callable[[Any], bytes],
    answer: Callable[[Any, GrpcCall], Awaitable[Any]],
) -> Method:
    """One request, one response, which is what ``answer`` returns."""

    async def answered(call: GrpcCall, request: Any) -> None:
        call.reply(encode(await answer(request, call)))

    return Method(path, parse, on_message=lambda call, request: _run(call, partial(answered, call, request)))


def stream(
    path: str,
    parse: Callable[[bytes], Any],
    encode: Callable[[Any], bytes],
    answer: Callable[[AsyncIterator[Any], GrpcCall], AsyncIterator[Any]],
) -> Method:
    """Any number of requests, any number of responses."""

    async def answered(call: GrpcCall) -> None:
        async with aclosing(answer(_Messages(call), call)) as responses:  # type: ignore[type-var] # a generator
            async for response in responses:
                await call.send(encode(response))
        call.finish()

    return Method(path, parse, on_open=lambda call: _run(call, partial(answered, call)))


class GrpcServer:
    """Serves methods. Calls of others end as UNIMPLEMENTED, after the gate.

    So do, as DEADLINE_EXCEEDED, those whose client is to speak and says nothing for ``silent_s``.
    """

    def __init__(
        self, methods: Iterable[Method], options: Sequence[tuple[str, Any]], gate: Gate | None = None,
        clock: Callable[[], int] = time.monotonic_ns, silent_s: float = math.inf,
    ) -> None:  # fmt: skip
        """Raises :class:`ConfigError` if grpcio is not as expected."""
        self._methods = {method.path: method for method in methods}
        self._gate = gate
        self._core = Core(options, self._on_new, clock)
        self._silence: Silence[GrpcCall] = Silence(silent_s)
        self._sweep: asyncio.TimerHandle | None = None

    async def listen(self, address: str, credentials: Any = None) -> int:
        """Accept connections; the port (chosen if 0). Raises :class:`OSError` if it is not to be had."""
        try:
            port = self._core.listen(address, credentials)
        except RuntimeError as error:
            raise OSError(str(error)) from None
        if not port:
            raise OSError(f"{address} cannot be listened at")
        self._core.start()
        if self._silence.limit_s < math.inf:
            self._end_silent()
        return port

    async def close(self, patience_s: float) -> None:
        """Accept no more, let open calls end for a while, then cancel them."""
        if self._sweep is not None:
            self._sweep.cancel()
        await self._core.stop(patience_s)

    def _end_silent(self) -> None:
        limit_s = self._silence.limit_s
        text = f"nothing was said for {limit_s:g} s (stream_s); call again when there is something to say"
        for call in self._silence.overdue():
            call.cut(grpc.StatusCode.DEADLINE_EXCEEDED, text)
        self._sweep = asyncio.get_running_loop().call_later(min(SWEEP_S, limit_s / 4), self._end_silent)

    def _on_new(self, event: Any) -> GrpcCall | None:
        # In the core's thread.
        path = event.call_details.method.decode("utf-8", "replace")
        try:
            call = self._taken(path, event)
            return call if call.begin() else None
        except Aborted as aborted:
            _turn_away(event.call, aborted)
        except Exception:  # noqa: BLE001 - one call that is stumbled over must not end all others
            _log.exception("taking a call failed", extra={"method": path})
            _turn_away(event.call, Aborted(grpc.StatusCode.INTERNAL, "it failed; see the server's log"))
        return None

    def _taken(self, path: str, event: Any) -> GrpcCall:
        identity = "" if self._gate is None else self._gate(path, event.invocation_metadata)
        method = self._methods.get(path)
        if method is None:
            raise Aborted(grpc.StatusCode.UNIMPLEMENTED, f"{path}: this server has no such method")
        return GrpcCall(self._core, event, method, identity, self._silence)


def _turn_away(call: Any, aborted: Aborted) -> None:
    """End a call before anything of it is read."""
    operations = (
        cygrpc.SendInitialMetadataOperation(None, 0),
        cygrpc.ReceiveCloseOnServerOperation(0),
        cygrpc.SendStatusFromServerOperation(
            aborted.trailers, aborted.code.value[0], details(aborted.text), 0
        ),
    )
    call.start_server_batch(operations, (ENDED, None))


class _Messages:
    """All requests of a call, in turn."""

    def __init__(self, call: GrpcCall) -> None:
        self._call = call

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> Any:
        message = await self._call.receive()
        if message is None:
            raise StopAsyncIteration
        return self._call.parsed(message)


def _run(call: GrpcCall, work: Callable[[], Awaitable[None]]) -> None:
    """Have a task answer a call; it ends with it."""

    async def body() -> None:
        try:
            await work()
        except Aborted as aborted:
            call.fail(aborted.code, aborted.text, aborted.trailers)
        except Exception:  # noqa: BLE001 - one call that is stumbled over must not end all others
            call.fail_by_fault()

    call.task = asyncio.get_running_loop().create_task(body())
    call.task.add_done_callback(call.answered)
    call.on_cancel = call.task.cancel
