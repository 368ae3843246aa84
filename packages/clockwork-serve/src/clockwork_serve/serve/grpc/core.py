"""The transport: grpcio's own core, driven by events. Only this module uses grpcio's private part.

The core is used as grpcio's threaded server uses it, but without the pool of threads: one thread waits for
events, and the loop's thread handles them. That costs half of that server, a third of ``grpc.aio``, and no
thread for a waiting request. The classes are private to grpcio, so :func:`check_grpcio` tests them first.
"""

from __future__ import annotations

import asyncio
import ctypes
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
from grpc._cython import cygrpc

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
    GrpcCall,
    Metadata,
    Method,
    SilentCalls,
    details,
)
from clockwork_serve.units import NS_PER_MS

NEEDED: Final = {
    "CompletionQueue": ("poll", "shutdown"),
    "Server": (
        "add_http2_port", "cancel_all_calls", "destroy", "register_completion_queue", "request_call",
        "shutdown", "start",
    ),
    "ReceiveMessageOperation": ("message",),
    "ReceiveCloseOnServerOperation": ("cancelled",),
    "SendInitialMetadataOperation": (),
    "SendMessageOperation": (),
    "SendStatusFromServerOperation": (),
    "RequestCallEvent": ("call", "call_details", "invocation_metadata", "success", "tag"),
    "BatchOperationEvent": ("batch_operations", "tag"),
    "Call": ("peer", "start_server_batch"),
    "CallDetails": ("deadline", "method"),
}  # fmt: skip
"""What must exist in ``grpc._cython.cygrpc``."""
ACCEPTING: Final = 64
"""Calls that may begin between two rounds of the thread; the core queues more, as its options say."""
EVENTS_MAX: Final = 64  # the most events that are passed to the loop at once
LARGE_BYTES: Final = 64 * 1024  # of messages longer than this, one is handled in a turn of the loop
AHEAD_BYTES: Final = 256 * 1024
"""The most bytes of a stream's messages that are read before its method takes them. A message is dated when
it is read, so it is read when it arrives; what exceeds this waits in the core, and in the client."""
MESSAGE_BYTES: Final = 256  # what a message takes beside its content
AT_ONCE_NS: Final = 2 * NS_PER_MS  # a message that is read this soon after it was requested was there before
CHECK_S: Final = 30.0
"""Timeout of the check at start. It takes 20 ms, unless there is no free core, or grpcio is not as
expected."""

_NEW: Final = "new"
_OPENED: Final = "opened"
_MESSAGE: Final = "message"
_SENT: Final = "sent"
_CLOSED: Final = "closed"
_ENDED: Final = "ended"
_DOWN: Final = "down"
_ACCEPT: Final = (_NEW, None)
_WAKE: Final = (_ENDED, None)
_NOW_S: Final = 0.0
_XDS: Final = False
_NO_FLAGS: Final = 0
_OK: Final = 0
_FOREVER_S: Final = 1e12

Operations = tuple[Any, ...] | Callable[[], tuple[Any, ...]]  # a batch, or what creates it at its start


class CoreTransport:
    """A server of the core, with its thread. ``admit`` is called in that thread, all else in the loop's.

    ``on_broken`` is called in the loop if the core does something unexpected; the default is to call the
    loop's exception handler.
    """

    def __init__(
        self, options: Sequence[tuple[str, Any]], admit: Admit, silence: SilentCalls[GrpcCall],
        clock: Callable[[], int], on_broken: Callable[[BaseException], object] | None = None,
    ) -> None:  # fmt: skip
        self.serving = True  # whether the core may be used; changed by the loop's thread
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options), _XDS)
        self._server.register_completion_queue(self._queue)
        self._admit = admit
        self._silence = silence
        self.clock = clock
        self._on_broken = self._report if on_broken is None else on_broken
        self._arrivals = ArrivalTimes(clock())
        self._loop = asyncio.get_running_loop()
        self._down = asyncio.Event()
        self._events: deque[tuple[str, CoreCall, Any]] = deque()  # events, from the thread to the loop
        self._woken = False  # whether the loop is going to handle them
        self._batches: deque[tuple[Any, Operations, tuple[str, Any]]] = deque()  # batches to start
        self._starting = threading.Lock()  # held to start batches: in order, and not after the end
        self._flushes = False
        self._ending = False  # used by the thread only
        self._accepts = True
        self._broken = False  # whether the thread ended by an error
        self._thread = threading.Thread(target=self._run, name="grpc", daemon=True)

    def listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Open a port, and return its number. Raises :class:`OSError` if it cannot be opened."""
        try:
            port: int = (
                self._server.add_http2_port(address.encode())
                if credentials is None
                else self._server.add_http2_port(address.encode(), credentials._credentials)  # noqa: SLF001
            )
        except RuntimeError as error:
            raise OSError(str(error)) from None
        if not port:
            raise OSError(f"{address} cannot be listened at")
        self._arrivals.listens(address, port)
        return port

    async def start(self) -> None:
        """Accept calls."""
        self._server.start()
        for _ in range(ACCEPTING):
            self._server.request_call(self._queue, self._queue, _ACCEPT)
        self._thread.start()

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls, let open ones complete for ``grace_s``, then cancel them."""
        if not self._thread.is_alive():
            self._arrivals.close()
            if self._broken:
                # The core would block for ever if a queue were freed that still has events: leak it.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._queue))
            return
        self._accepts = False
        self._server.shutdown(self._queue, (_DOWN, None))
        try:
            async with asyncio.timeout(grace_s):
                await self._down.wait()
        except TimeoutError:
            self._server.cancel_all_calls()
            await self._down.wait()
        self.serving = False
        # The core aborts the process if it is used after this.
        with self._starting:
            self._batches.clear()
            self._queue.shutdown()
        await asyncio.to_thread(self._thread.join)
        self._arrivals.close()
        self._server.destroy()

    # In the thread

    def _run(self) -> None:
        try:
            self._poll_events()
        except BaseException as error:  # noqa: BLE001 - it would be lost otherwise
            self._broken = True
            self._loop.call_soon_threadsafe(self._on_broken, error)

    def _poll_events(self) -> None:
        poll, handle, ended = self._queue.poll, self._handle_event, cygrpc.CompletionType.queue_shutdown
        clock, arrivals = self.clock, self._arrivals
        quiet = 0  # rounds without an event
        while True:
            if self._batches:
                self._start_batches()
            now_ns = clock()
            if now_ns - arrivals.last_ns > GAP_NS:
                arrivals.beat(now_ns)
            arrivals.last_ns = now_ns
            idle = quiet >= IDLE_AFTER
            event = poll(time.time() + (IDLE_BEAT_S if idle else BEAT_S))
            now_ns, limit_ns = clock(), IDLE_GAP_NS if idle else GAP_NS
            if now_ns - arrivals.last_ns > limit_ns:
                arrivals.beat(now_ns)
            arrivals.last_ns = now_ns
            quiet = quiet + 1 if event.tag is None else 0
            # All available events go to the loop at once: waking it, and waiting for its lock, costs most.
            for _ in range(EVENTS_MAX):
                if event.tag is None:
                    break
                handle(event)
                # Free what belongs to an ended call before waiting for the next event.
                event = None
                if self._batches:
                    self._start_batches()
                event = poll(_NOW_S)
            over = event.completion_type == ended
            if event.tag is not None:
                handle(event)
            event = None
            # Also in the last round: calls that were cancelled in it must be told.
            if self._events and not self._woken:
                self._wake()
            if over:
                return

    def _handle_event(self, event: Any) -> None:
        kind, call = event.tag
        if kind is _MESSAGE:
            now_ns, arrivals = self.clock(), self._arrivals
            if now_ns - arrivals.last_ns > GAP_NS:
                arrivals.beat(now_ns)
            arrivals.last_ns = now_ns
            message, ahead = event.batch_operations[0].message(), call.ahead
            if ahead is None:
                call.note_arrival(arrivals.arrival_ns(now_ns, call.peer, awaited=True), now_ns)
            else:
                awaited = not ahead.requested_ns
                ahead.put(message, arrivals.arrival_ns(now_ns, call.peer, awaited=awaited), now_ns)
                if message is not None and self.serving and ahead.reads_on():
                    self._batches.append(call.reading())
            self._events.append((_MESSAGE, call, message))
        elif kind is _SENT:
            self._events.append((_SENT, call, None))
        elif kind is _CLOSED:
            if event.batch_operations[0].cancelled():
                self._events.append((_CLOSED, call, None))
        elif kind is _ENDED:
            if call is not None:
                call.on_sent()
        elif kind is _NEW:
            if event.success and not self._ending:
                self._accept(event)
        elif kind is _DOWN:
            self._ending = True
            self._loop.call_soon_threadsafe(self._down.set)

    def _start_batches(self) -> None:
        with self._starting:
            self._start_all()

    def _start_all(self) -> None:
        batches = self._batches
        while batches:
            call, operations, tag = batches.popleft()
            batch = operations if isinstance(operations, tuple) else operations()
            refused = call.start_server_batch(batch, tag)
            assert not refused, f"gRPC's core refused a batch for {tag[0]}: {refused}"

    def _accept(self, event: Any) -> None:
        if self._accepts:
            try:
                self._server.request_call(self._queue, self._queue, _ACCEPT)
            except ValueError:
                self._accepts = False  # the server was shut down at this moment
        path = event.call_details.method.decode("utf-8", "replace")
        try:
            admitted = self._admit(path, event.invocation_metadata)
        except Aborted as aborted:
            _reject(event.call, aborted)
            return
        call = CoreCall(self, event, admitted, self._silence)
        if call.begin():
            self._events.append((_OPENED, call, None))

    def _wake(self) -> None:
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._handle_events)
        except RuntimeError:
            assert self._loop.is_closed()

    # In the loop

    def submit(self, call: Any, operations: Operations, tag: tuple[str, Any]) -> None:
        """Start a batch of a call, together with all others of this turn of the loop."""
        if self.serving:
            self._batches.append((call, operations, tag))
            if not self._flushes:
                self._flushes = True
                self._loop.call_soon(self._flush, call)

    def _flush(self, call: Any) -> None:
        # Several are left to the thread: each one started here would wake it, to contend for Python's lock.
        self._flushes = False
        if len(self._batches) == 1 and self._starting.acquire(blocking=False):
            try:
                self._start_all()
            except Exception as error:  # noqa: BLE001 - the core is not as expected
                self._on_broken(error)
            finally:
                self._starting.release()
        elif self.serving:
            # An empty batch is complete as soon as it starts, which wakes the thread.
            call.start_server_batch((), _WAKE)

    def _handle_events(self) -> None:
        # Set before their number is read: later events wake the loop again.
        self._woken = False
        events = self._events
        for _ in range(len(events)):
            kind, call, found = events.popleft()
            call.on_event(kind, found)
            if kind is _MESSAGE and found is not None and len(found) > LARGE_BYTES and events:
                # Each may take milliseconds: the loop handles other events in between.
                self._woken = True
                self._loop.call_soon(self._handle_events)
                return

    def _report(self, error: BaseException) -> None:
        self._loop.call_exception_handler({"message": "gRPC's core broke", "exception": error})


def _reject(call: Any, aborted: Aborted) -> None:
    """End a call before any message is read."""
    operations = (
        cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),
        cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),
        _status(aborted.code, aborted.text, aborted.trailers),
    )
    call.start_server_batch(operations, _WAKE)


class ReadAhead:
    """Messages of a stream that were read and not yet taken, with when they had arrived and were read.

    The core's thread reads, the loop takes. Each is dated by the thread, which is seldom late: a method that
    is busy with one message would date those behind it too late.
    """

    __slots__ = (
        "_clock", "_lock", "_messages", "_paused", "_put_bytes", "_read_ns", "_taken_bytes", "requested_ns",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._messages: deque[tuple[bytes | None, int, int]] = deque()
        self._read_ns = clock()  # when the latest was read
        self._put_bytes = self._taken_bytes = 0  # each is counted by one thread
        self._lock = threading.Lock()  # of whether it is paused
        self._paused = False
        self.requested_ns = 0  # when the next one was requested, if not as soon as the last one was read

    def put(self, message: bytes | None, arrival_ns: int, now_ns: int) -> None:
        """A message was read. One that was not requested may have waited since the last one was read."""
        if self.requested_ns and now_ns - self.requested_ns < AT_ONCE_NS:
            arrival_ns = min(arrival_ns, self._read_ns)
        self._read_ns, self.requested_ns = now_ns, 0
        self._put_bytes += MESSAGE_BYTES + len(message or b"")
        self._messages.append((message, arrival_ns, now_ns))

    def take(self) -> tuple[bytes | None, int, int] | None:
        """The first of them; None if there is none."""
        if not self._messages:
            return None
        found = self._messages.popleft()
        self._taken_bytes += MESSAGE_BYTES + len(found[0] or b"")
        return found

    def reads_on(self) -> bool:
        """Whether the thread requests the next one at once; else the loop does, once there is room."""
        with self._lock:
            self._paused = self._put_bytes - self._taken_bytes >= AHEAD_BYTES
            return not self._paused

    def resumes(self) -> bool:
        """Whether the loop requests the next one now: there was no room for it before, and there is again."""
        with self._lock:
            if not self._paused or self._put_bytes - self._taken_bytes >= AHEAD_BYTES:
                return False
            self._paused = False
            self.requested_ns = self._clock()
            return True


class CoreCall(GrpcCall):
    """A call of the core. Each batch that it submits to :class:`CoreTransport` ends with an event."""

    __slots__ = (
        "_call", "_delivery", "_initial_metadata_sent", "_received", "_reply", "_sent", "_transport", "ahead",
    )  # fmt: skip

    def __init__(
        self, transport: CoreTransport, event: Any, admitted: Admitted, silence: SilentCalls[GrpcCall]
    ) -> None:
        """Made from an event of the core, in its thread."""
        deadline_s: float = event.call_details.deadline
        if deadline_s > _FOREVER_S:
            deadline_s = NO_DEADLINE_S
        super().__init__(admitted, event.invocation_metadata, deadline_s, silence, transport.clock)
        self._transport = transport
        self._call = event.call
        self._delivery: Delivery | None = None
        self._reply: tuple[bytes, Metadata] | None = None  # until it is passed to the core
        self._initial_metadata_sent = False  # whether initial metadata were sent
        self._received: asyncio.Future[Any] | None = None
        self._sent: asyncio.Future[Any] | None = None
        self.ahead = None if self.method.on_open is None else ReadAhead(transport.clock)  # of a stream

    def begin(self) -> bool:
        """Start the first batches, in the core's thread; whether the loop must be notified at once."""
        start = self._call.start_server_batch
        start((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), (_CLOSED, self))
        if self.ahead is None:
            self._silence.begin(self)
        start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), (_MESSAGE, self))
        return self.ahead is not None

    def reading(self) -> tuple[Any, Operations, tuple[str, Any]]:
        """The batch that reads the next message."""
        return self._call, (cygrpc.ReceiveMessageOperation(_NO_FLAGS),), (_MESSAGE, self)

    def peer(self) -> str:
        """The client's address, as gRPC writes it."""
        found: bytes = self._call.peer()
        return found.decode()

    def on_event(self, kind: str, found: Any) -> None:
        """Handle an event in the loop."""
        if kind is _MESSAGE:
            if self.ahead is None:
                self.handle_message(found)
            else:
                _finish(self._received, None)
        elif kind is _CLOSED:
            self.cancel()
        elif kind is _SENT:
            _finish(self._sent, None)
        else:
            self.open()

    def on_sent(self) -> None:
        """Its end was sent, or cannot be. In the core's thread."""
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            delivery.on_sent()

    async def _next_message(self) -> tuple[bytes | None, int, int]:
        assert self.ahead is not None
        while (found := self.ahead.take()) is None:
            self._received = asyncio.get_running_loop().create_future()
            await self._received
        if self.ahead.resumes():
            self._transport.submit(*self.reading())
        return found

    async def _send_message(self, message: bytes) -> None:
        self._sent = asyncio.get_running_loop().create_future()
        self._start((*self._head(), cygrpc.SendMessageOperation(message, _NO_FLAGS)), _SENT)
        await self._sent

    def _send_reply(self, message: bytes, trailers: Metadata, delivery: Delivery | None) -> None:
        if delivery is None:
            self._start(_replied(message, trailers), _ENDED)
        else:
            self._delivery = delivery
            self._reply = (message, trailers)
            self._start(self._reply_batch, _ENDED)

    def _send_status(self, code: grpc.StatusCode, text: str, trailers: Metadata) -> None:
        self._start((*self._head(), _status(code, text, trailers)), _ENDED)

    def _head(self) -> tuple[Any, ...]:
        if self._initial_metadata_sent:
            return ()
        self._initial_metadata_sent = True
        return (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),)

    def _reply_batch(self) -> tuple[Any, ...]:
        assert self._delivery is not None
        assert self._reply is not None
        reply, self._reply = self._reply, None
        failure = self._delivery.failure()
        if failure is None:
            return _replied(*reply)
        self._delivery = None
        return (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS), _status(*failure))

    def _start(self, operations: Operations, kind: str) -> None:
        self._transport.submit(self._call, operations, (kind, self))


def _status(code: grpc.StatusCode, text: str, trailers: Metadata) -> Any:
    return cygrpc.SendStatusFromServerOperation(trailers, code.value[0], details(text), _NO_FLAGS)


def _replied(message: bytes, trailers: Metadata) -> tuple[Any, ...]:
    return (
        cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),
        cygrpc.SendMessageOperation(message, _NO_FLAGS),
        cygrpc.SendStatusFromServerOperation(trailers, _OK, b"", _NO_FLAGS),
    )


def _finish(waiter: asyncio.Future[Any] | None, found: Any) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(found)


# ------------------------------------------------------------
# Whether grpcio is as expected.


class Unexpected(Exception):
    """grpcio's private part is not as expected; the text continues "found VERSION,"."""


async def check_grpcio(core: Any = cygrpc) -> None:
    """Raise :class:`Unexpected` unless the core has all that is needed, and answers calls of this process."""
    missing = [
        f"{owner}.{name}" if name else owner
        for owner, names in NEEDED.items()
        for name in ("", *names)
        if not hasattr(core, owner) or (name and not hasattr(getattr(core, owner), name))
    ]
    if missing:
        raise Unexpected(f"without {', '.join(missing)}")
    try:
        await _run_trial()
    except grpc.RpcError as error:
        raise Unexpected(f"where a trial call ends with {error.code().name}: {error.details()}") from error
    except Exception as error:
        raise Unexpected(f"where a trial call ends with {type(error).__name__}: {error}") from error


async def _run_trial() -> None:
    """Serve two calls, one of them a stream, over a socket without a port. Raises whatever goes wrong."""
    broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def break_off(error: BaseException) -> None:
        if not broken.done():
            broken.set_exception(error)

    trials = _trials(break_off)
    transport = CoreTransport(
        (), lambda path, _: (trials[path], ""), SilentCalls(), time.monotonic_ns, break_off
    )
    address = f"unix-abstract:clockwork-{secrets.token_hex(16)}"
    transport.listen(address, None)
    await transport.start()
    try:
        with grpc.insecure_channel(address, (("grpc.enable_http_proxy", 0),)) as channel:
            trial = asyncio.ensure_future(asyncio.to_thread(_call_trials, channel))
            await asyncio.wait((trial, broken), return_when=asyncio.FIRST_COMPLETED)
            if broken.done():
                channel.close()  # which ends the trial calls
                await asyncio.wait((trial,))
                trial.exception()
                await broken
            await trial
    finally:
        async with asyncio.timeout(CHECK_S):
            await transport.stop(0)


def _call_trials(channel: grpc.Channel) -> None:
    once, call = channel.unary_unary("/trial/once").with_call(b"1", timeout=CHECK_S)
    each = list(channel.stream_stream("/trial/each")(iter((b"1", b"2")), timeout=CHECK_S))
    found = (once, tuple(call.trailing_metadata()), each)
    if found != (b"1", (("trial", "1"),), [b"1", b"2"]):
        raise ValueError(f"other answers: {found}")


def _trials(break_off: Callable[[BaseException], None]) -> dict[str, Method]:
    """Methods that return their messages. Exceptions are reported, which would otherwise be lost."""

    def answer_once(call: GrpcCall, message: bytes) -> None:
        try:
            known = bool(call.peer()) and call.time_remaining() is not None
            call.reply(message, (("trial", "1" if known else "no peer, or no deadline"),))
        except Exception as error:  # noqa: BLE001 - see above
            break_off(error)

    async def answer_each(call: GrpcCall) -> None:
        try:
            while (message := await call.receive()) is not None:
                await call.send(message)
            call.finish()
        except Exception as error:  # noqa: BLE001 - see above
            break_off(error)

    def open_each(call: GrpcCall) -> None:
        call.task = asyncio.get_running_loop().create_task(answer_each(call))
        call.task.add_done_callback(call.answered)
        call.on_cancel = call.task.cancel

    once = Method("/trial/once", bytes, on_message=answer_once)
    return {method.path: method for method in (once, Method("/trial/each", bytes, on_open=open_each))}
