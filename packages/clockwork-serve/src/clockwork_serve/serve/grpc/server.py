"""A gRPC server on an event loop: methods by path, implemented as callbacks, coroutines or streams."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.grpc.call import Aborted, Admitted, GrpcCall, Metadata, Method, SilentCalls

if TYPE_CHECKING:
    from clockwork_serve.serve.grpc.core import CoreTransport

SWEEP_S: Final = 5.0  # the longest interval between checks for clients that send nothing
SUPPORTED_GRPCIO: Final = ">=1.66,<1.86"
"""The versions of grpcio whose core is known to do as ``core`` expects; ``pyproject.toml`` requires these."""
_PENDING: Final = 20_000
"""Calls that gRPC may queue until they are accepted; it rejects others at once, as RESOURCE_EXHAUSTED. By its
own limit, a thousand, it rejects some whenever a busy machine delays this process by part of a second."""
_PENDING_OPTIONS: Final = (
    ("grpc.server.max_pending_requests", _PENDING),
    ("grpc.server.max_pending_requests_hard_limit", _PENDING),
)
AccessCheck = Callable[[str, Metadata], str]
"""Checks access by path and metadata, and returns the client's identity. Raises :class:`Aborted`. It is
called in the transport's own thread."""

_log = logging.getLogger(__name__)


def callback(path: str, parse: Callable[[bytes], Any], answer: Callable[[GrpcCall, Any], None]) -> Method:
    """One request, one response: ``answer`` replies when it can."""
    return Method(path, parse, on_message=answer)


def coroutine(
    path: str, parse: Callable[[bytes], Any], encode: Callable[[Any], bytes],
    answer: Callable[[Any, GrpcCall], Awaitable[Any]],
) -> Method:  # fmt: skip
    """One request, one response, which ``answer`` returns."""

    async def answered(call: GrpcCall, request: Any) -> None:
        call.reply(encode(await answer(request, call)))

    return Method(path, parse, on_message=lambda call, request: _run(call, partial(answered, call, request)))


def stream(
    path: str, parse: Callable[[bytes], Any], encode: Callable[[Any], bytes],
    answer: Callable[[AsyncIterator[Any], GrpcCall], AsyncIterator[Any]],
) -> Method:  # fmt: skip
    """Any number of requests and responses."""

    async def answered(call: GrpcCall) -> None:
        async with aclosing(answer(_Messages(call), call)) as responses:  # type: ignore[type-var] # a generator
            async for response in responses:
                await call.send(encode(response))
        call.finish()

    return Method(path, parse, on_open=lambda call: _run(call, partial(answered, call)))


class GrpcServer:
    """Serves methods. After the access check, calls of unknown methods end as UNIMPLEMENTED.

    Calls whose client is to send a message, and does not for ``silent_s``, end as DEADLINE_EXCEEDED.
    """

    def __init__(
        self, methods: Iterable[Method], options: Sequence[tuple[str, Any]],
        access_check: AccessCheck | None = None, clock: Callable[[], int] = time.monotonic_ns,
        silent_s: float = math.inf,
    ) -> None:  # fmt: skip
        self._methods = {method.path: method for method in methods}
        self._access_check = access_check
        self._options = options
        self._clock = clock
        self._silence: SilentCalls[GrpcCall] = SilentCalls(silent_s)
        self._sweep: asyncio.TimerHandle | None = None
        self._transport: CoreTransport | None = None

    async def listen(self, address: str, credentials: Any = None) -> int:
        """Accept connections; the port (chosen if 0). Raises :class:`OSError` if it cannot be opened.

        Raises :class:`ConfigError` if the installed grpcio is not one whose core can be driven.
        """
        make = await _checked_transport()
        transport = make((*_PENDING_OPTIONS, *self._options), self._admit, self._silence, self._clock)
        port = transport.listen(address, credentials)
        await transport.start()
        self._transport = transport
        if self._silence.limit_s < math.inf:
            self._end_silent()
        return port

    async def close(self, grace_s: float) -> None:
        """Accept no more, let open calls complete for ``grace_s``, then cancel them."""
        if self._sweep is not None:
            self._sweep.cancel()
        if self._transport is not None:
            await self._transport.stop(grace_s)

    def _end_silent(self) -> None:
        limit_s = self._silence.limit_s
        text = f"no message was received for {limit_s:g} s (stream_s); call again when there is one to send"
        for call in self._silence.overdue():
            call.terminate(grpc.StatusCode.DEADLINE_EXCEEDED, text)
        self._sweep = asyncio.get_running_loop().call_later(min(SWEEP_S, limit_s / 4), self._end_silent)

    def _admit(self, path: str, metadata: Metadata) -> Admitted:
        # In the thread in which the transport accepts calls.
        try:
            identity = "" if self._access_check is None else self._access_check(path, metadata)
        except Aborted:
            raise
        except Exception:  # noqa: BLE001 - a bug that one call triggers must not end all others
            _log.exception("admitting a call failed", extra={"method": path})
            raise Aborted(grpc.StatusCode.INTERNAL, "it failed; see the server's log") from None
        method = self._methods.get(path)
        if method is None:
            raise Aborted(grpc.StatusCode.UNIMPLEMENTED, f"{path}: this server has no such method")
        return method, identity


async def _checked_transport() -> type[CoreTransport]:
    try:
        # Imported here, because another grpcio may lack what it needs.
        from clockwork_serve.serve.grpc import core

        await core.check_grpcio()
    except ImportError as error:
        why = f"which cannot be imported from: {error}"
    except core.Unexpected as error:
        why = str(error)
    else:
        return core.CoreTransport
    raise ConfigError(
        f"grpcio: expected one whose core this server can drive, found {grpc.__version__}, {why}; "
        f"install grpcio{SUPPORTED_GRPCIO}, or serve without gRPC (grpc_port = off)"
    )


class _Messages:
    """All requests of a call, in order."""

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
    """Handle a call in a task, which is cancelled with the call."""

    async def body() -> None:
        try:
            await work()
        except Aborted as aborted:
            call.fail(aborted.code, aborted.text, aborted.trailers)
        except Exception:  # noqa: BLE001 - a bug that one call triggers must not end all others
            call.fail_internally()

    call.task = asyncio.get_running_loop().create_task(body())
    call.task.add_done_callback(call.answered)
    call.on_cancel = call.task.cancel
