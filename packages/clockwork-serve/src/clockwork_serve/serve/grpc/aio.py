"""The fallback transport: grpcio's public server on an event loop, ``grpc.aio``.

It is used where grpcio's private part is not what ``core`` expects, and enforces the same limits: gRPC sees
all methods as streams, so that calls are rejected before a message is read, and silent ones are ended. It
differs in what a call costs (docs/operate/operations.md), and in this:

- A call takes two tasks. What blocks the loop also blocks the acceptance of calls. Of those that begin
  meanwhile gRPC queues as many as its options say, and rejects others as RESOURCE_EXHAUSTED.
- The arrival of a message is derived from gaps of the loop, not from gaps of a thread of gRPC's own. A
  message that waits for some turns of a busy loop, none of which is a gap, counts from when it is read.
- A call whose path is not UTF-8 ends the acceptance of others (grpcio 1.85 decodes it outside of any
  handler). The port is opened again at once, and open calls go on; calls that begin in those milliseconds
  fail.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import grpc
import grpc.aio

from clockwork_serve.serve.grpc.arrivals import (
    BEAT_S,
    GAP_NS,
    IDLE_AFTER,
    IDLE_BEAT_S,
    IDLE_GAP_NS,
    ArrivalTimes,
)
from clockwork_serve.serve.grpc.call import (
    NO_DEADLINE_S,
    Aborted,
    Admit,
    Admitted,
    Delivery,
    Failure,
    GrpcCall,
    Metadata,
    SilentCalls,
    details,
)

REOPEN_S: Final = 10.0  # how long to try to open a closed port again: gRPC closes it in a thread of its own
_REOPEN_EVERY_S: Final = 0.005
_FOREVER_S: Final = 1e6
_log = logging.getLogger(__name__)

Ending = tuple[bytes | None, Failure, Delivery | None]
"""The only message, if any; the status; the delivery that decides whether the message is still good."""


class AioTransport(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """A server of ``grpc.aio``. All its methods are streams of bytes: calls can be rejected unread."""

    def __init__(
        self, options: Sequence[tuple[str, Any]], admit: Admit, silence: SilentCalls[GrpcCall],
        clock: Callable[[], int],
    ) -> None:  # fmt: skip
        self._options = tuple(options)
        self._admit = admit
        self._silence = silence
        self.clock = clock
        self._arrivals = ArrivalTimes(clock())
        self._quiet = 0  # beats without a message
        self._limit_ns = GAP_NS
        self._loop = asyncio.get_running_loop()
        self._beats: asyncio.TimerHandle | None = None
        self._server = self._make_server()
        self._address = ""
        self._credentials: grpc.ServerCredentials | None = None
        self._ended: dict[grpc.aio.Server, asyncio.Task[None]] = {}  # those with open calls
        self._reopening: asyncio.Task[None] | None = None
        self._reopened = False  # logged once
        self._on_error = self._loop.get_exception_handler()

    def listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Open a port, and return its number. Raises :class:`OSError` if it cannot be opened."""
        try:
            port: int = (
                self._server.add_insecure_port(address)
                if credentials is None
                else self._server.add_secure_port(address, credentials)
            )
        except RuntimeError as error:
            raise OSError(str(error)) from None
        self._address = f"{address.rpartition(':')[0]}:{port}"
        self._credentials = credentials
        self._arrivals.listens(address, port)
        return port

    async def start(self) -> None:
        """Accept calls."""
        await self._server.start()
        self._loop.set_exception_handler(self._on_loop_error)
        self._beat()

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls, let open ones complete for ``grace_s``, then cancel them."""
        if self._reopening is not None:
            self._reopening.cancel()
        await asyncio.gather(*(server.stop(grace_s) for server in (self._server, *self._ended)))
        await asyncio.gather(*self._ended.values())
        self._arrivals.close()
        if self._beats is not None:
            self._beats.cancel()
            self._beats = None
            self._loop.set_exception_handler(self._on_error)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Begin a call; called by gRPC."""
        path: str = handler_call_details.method
        metadata: Metadata = handler_call_details.invocation_metadata
        try:
            admitted = self._admit(path, metadata)
        except Aborted as aborted:
            return grpc.stream_stream_rpc_method_handler(partial(_reject, aborted))
        return grpc.stream_stream_rpc_method_handler(AioCall(self, admitted, metadata, self._silence).serve)

    def message_read(self, call: GrpcCall) -> None:
        """A message of the call was just read."""
        now_ns = self.clock()
        self._arrivals.beat(now_ns, self._limit_ns)
        self._quiet = 0
        awaited = call.method.on_open is None
        call.note_arrival(self._arrivals.arrival_ns(now_ns, call.peer, awaited=awaited), now_ns)

    def _make_server(self) -> grpc.aio.Server:
        return grpc.aio.server(handlers=(self,), options=self._options)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, UnicodeDecodeError) and _raised_by_grpc(error):
            if self._reopening is None:
                self._reopening = loop.create_task(self._reopen())
        elif self._on_error is None:
            loop.default_exception_handler(context)
        else:
            self._on_error(loop, context)

    async def _reopen(self) -> None:
        """Replace a server that accepts no more calls by another on the same port."""
        if not self._reopened:
            _log.warning(
                "a call whose path is not UTF-8 closed the port of gRPC; it is opened again, each time"
            )
        self._reopened = True
        old = self._server
        self._ended[old] = self._loop.create_task(self._drain(old))
        end_s = self._loop.time() + REOPEN_S
        while True:
            self._server = self._make_server()
            try:
                self.listen(self._address, self._credentials)
                break
            except OSError as error:
                if self._loop.time() > end_s:
                    broken = RuntimeError(f"{self._address}: {error}")
                    message = "the port of gRPC cannot be opened again"
                    self._loop.call_exception_handler({"message": message, "exception": broken})
                    return
                await asyncio.sleep(_REOPEN_EVERY_S)
        self._reopening = None  # first, for the port may be closed again as soon as it serves
        await self._server.start()

    async def _drain(self, server: grpc.aio.Server) -> None:
        await server.stop(_FOREVER_S)
        del self._ended[server]

    def _beat(self) -> None:
        self._arrivals.beat(self.clock(), self._limit_ns)
        self._quiet += 1
        idle = self._quiet > IDLE_AFTER
        self._limit_ns = IDLE_GAP_NS if idle else GAP_NS
        self._beats = self._loop.call_later(IDLE_BEAT_S if idle else BEAT_S, self._beat)


def _raised_by_grpc(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "_cygrpc" in frames[-1].filename


async def _reject(aborted: Aborted, _: object, context: Any) -> None:
    """End a call before any message is read."""
    _set_status(context, (aborted.code, aborted.text, aborted.trailers))


def _set_status(context: Any, status: Failure) -> None:
    """The status that gRPC sends when the call's coroutine returns."""
    code, text, trailers = status
    context.set_code(code)
    context.set_details(details(text).decode())
    context.set_trailing_metadata(trailers)


class AioCall(GrpcCall):
    """A call of ``grpc.aio``: its coroutine waits for the response or status, and then sends it."""

    __slots__ = ("_context", "_ending", "_handler", "_peer", "_reads", "_transport")

    def __init__(
        self, transport: AioTransport, admitted: Admitted, metadata: Metadata, silence: SilentCalls[GrpcCall]
    ) -> None:
        super().__init__(admitted, metadata, NO_DEADLINE_S, silence, transport.clock)
        self._transport = transport
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._reads = False  # whether its coroutine waits for a message, not for the ending
        self._handler: asyncio.Task[Any] | None = None
        self._context: Any = None
        self._peer = ""

    async def serve(self, _: object, context: Any) -> None:
        """Handle the call; gRPC cancels this if the client leaves or its deadline passes."""
        self._context = context
        self._peer = context.peer()  # later the call may not exist any more
        left_s = context.time_remaining()
        if left_s is not None:
            self.deadline_s = time.time() + left_s
        try:
            if self.method.on_open is None:
                await self._read_only_message()
            else:
                self.open()
            await self._end(*await self._ending)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def peer(self) -> str:
        """The client's address, as gRPC writes it."""
        return self._peer

    async def _read_only_message(self) -> None:
        self._silence.begin(self)
        self._handler = asyncio.current_task()
        self._reads = True
        try:
            message = await self._next_message()
        except asyncio.CancelledError:
            if not self._ending.done():
                raise
            # Cancelled by us, because the call was terminated.
            assert self._handler is not None
            self._handler.uncancel()
            return
        finally:
            self._reads = False
            self._handler = None
        self.handle_message(message)

    async def _end(self, message: bytes | None, status: Failure, delivery: Delivery | None) -> None:
        failure = None if delivery is None else delivery.failure()
        if failure is not None:
            message, status, delivery = None, failure, None
        _set_status(self._context, status)
        try:
            if message is not None:
                await self._context.write(message)
        finally:
            if delivery is not None:
                delivery.on_sent()

    async def _next_message(self) -> bytes | None:
        message = await self._context.read()
        if message is grpc.aio.EOF:
            return None
        self._transport.message_read(self)
        found: bytes = message
        return found

    async def _send_message(self, message: bytes) -> None:
        await self._context.write(message)

    def _send_reply(self, message: bytes, trailers: Metadata, delivery: Delivery | None) -> None:
        self._finish((message, (grpc.StatusCode.OK, "", trailers), delivery))

    def _send_status(self, code: grpc.StatusCode, text: str, trailers: Metadata) -> None:
        self._finish((None, (code, text, trailers), None))
        if self._reads:
            assert self._handler is not None
            self._handler.cancel()

    def _finish(self, ending: Ending) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)
