"""gRPC's own core, driven by events: it takes calls and hands what happens to a loop. It knows no service.

The core is used as grpcio's server with a pool of threads uses it, but without the pool: one thread waits for
events and the loop's thread answers. That costs half of that server, a third of ``grpc.aio``, and no thread
for a request that waits. The classes are private to grpcio, so :func:`check_grpcio` looks at them first.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import grpc
from grpc._cython import cygrpc

from clockwork_serve.errors import ConfigError
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
"""What must be there of ``grpc._cython.cygrpc``."""
ACCEPTING: Final = 64
"""Calls that may begin before the thread comes round; the core keeps a thousand more, and refuses others."""
GATHERED: Final = 64
"""Events at most that go to the loop at once."""
BEAT_S: Final = 0.005
"""The thread comes round at least as often as that, if it can."""
IDLE_BEAT_S: Final = 0.02
IDLE_AFTER: Final = 40
"""And as often as this after so many rounds without an event: else an idle thread takes 1.4 % of a core."""
GAP_NS: Final = 10 * NS_PER_MS
"""A longer time between two rounds: the process did not run, or somebody held Python's lock."""
IDLE_GAP_NS: Final = 25 * NS_PER_MS
"""The same where the thread comes round less often."""
AFTER_NS: Final = (10 * NS_PER_MS, 50 * NS_PER_MS)
"""For as long as a gap, but no shorter and no longer than these, what surfaces after it may have come in it:
the core reads by then what waited in its sockets."""

LARGE_BYTES: Final = 64 * 1024
"""Of messages that are longer, one is taken in a turn of the loop."""

NEW: Final = "new"
OPENED: Final = "opened"
MESSAGE: Final = "message"
SENT: Final = "sent"
CLOSED: Final = "closed"
ENDED: Final = "ended"
_DOWN: Final = "down"
_ACCEPT: Final = (NEW, None)
_WAKE: Final = (ENDED, None)
_NOW_S: Final = 0.0
_XDS: Final = False

_log = logging.getLogger(__name__)
# It tells a traceback for each text of a client that is none, at no more than a client's wish.
logging.getLogger(cygrpc.__name__).setLevel(logging.CRITICAL)


def check_grpcio(core: Any = cygrpc) -> None:
    """Raise :class:`ConfigError` if grpcio is not one that can be used as here."""
    missing = [
        f"{owner}.{name}" if name else owner
        for owner, names in NEEDED.items()
        for name in ("", *names)
        if not hasattr(core, owner) or (name and not hasattr(getattr(core, owner), name))
    ]
    if missing:
        raise ConfigError(
            f"grpcio: expected a version that this server can drive (1.66 to 1.85 are known to do), found "
            f"{grpc.__version__} without {', '.join(missing)}; install another one, or switch gRPC off"
        )


Operations = tuple[Any, ...] | Callable[[], tuple[Any, ...]]
"""A batch, or what makes it when it starts."""


class Gaps:
    """When the messages came that surface now: the core shows no sockets, but its thread knows when it stood.

    For one thread.
    """

    __slots__ = ("_since_ns", "_until_ns", "last_ns")

    def __init__(self, now_ns: int) -> None:
        self.last_ns = now_ns
        """The last beat. One that comes no later than a gap after it may just be noted here."""
        self._since_ns = self._until_ns = 0  # of the last gap: its start, and till when it counts

    def beat(self, now_ns: int) -> None:
        """The thread comes round."""
        gap_ns = now_ns - self.last_ns
        if gap_ns > GAP_NS:
            # Two gaps with hardly anything between them are one.
            self._since_ns = self._since_ns if self.last_ns < self._until_ns else self.last_ns
            self._until_ns = now_ns + min(max(gap_ns, AFTER_NS[0]), AFTER_NS[1])
        self.last_ns = now_ns

    def arrival_ns(self, now_ns: int) -> int:
        """When something came that surfaces now: in a gap, or just after one, when that began."""
        return self._since_ns if now_ns < self._until_ns else now_ns


class Taker(Protocol):
    """A call, as it hears of events; on the loop's thread, but for :meth:`came`."""

    def came(self, arrival_ns: int, now_ns: int) -> None:
        """A message surfaces now, and came then at the latest. In the core's thread."""

    def sent(self) -> None:
        """Its end was sent, or cannot be. In the core's thread."""

    def on_event(self, kind: str, found: Any) -> None:
        """OPENED; MESSAGE with its bytes, or None for no more; SENT; CLOSED, if it was cancelled."""


class Core:
    """A server of the core with its thread. ``on_new`` is called in that thread, all else in the loop's."""

    def __init__(
        self, options: Sequence[tuple[str, Any]], on_new: Callable[[Any], Taker | None],
        clock: Callable[[], int],
    ) -> None:  # fmt: skip
        """Raises :class:`ConfigError` if grpcio is not as expected."""
        check_grpcio()
        self.serving = True  # whether anything may be asked of the core; changed by the loop's thread
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options), _XDS)
        self._server.register_completion_queue(self._queue)
        self._on_new = on_new
        self.clock = clock
        self._gaps = Gaps(clock())
        self._loop = asyncio.get_running_loop()
        self._down = asyncio.Event()
        self._handed: deque[tuple[str, Taker, Any]] = deque()  # from the thread to the loop
        self._woken = False  # whether the loop is going to take them
        self._asked: deque[tuple[Any, Operations, tuple[str, Any]]] = deque()  # and back
        self._starting = threading.Lock()  # whoever starts what was asked: in order, and not after the end
        self._flushes = False
        self._ending = False  # known to the thread alone
        self._accepts = True
        self._thread = threading.Thread(target=self._run, name="grpc", daemon=True)

    def listen(self, address: str, credentials: Any) -> int:
        """The port, or 0 if it is not to be had."""
        port: int = (
            self._server.add_http2_port(address.encode())
            if credentials is None
            else self._server.add_http2_port(address.encode(), credentials._credentials)  # noqa: SLF001
        )
        return port

    def start(self) -> None:
        """Take calls."""
        self._server.start()
        for _ in range(ACCEPTING):
            self._server.request_call(self._queue, self._queue, _ACCEPT)
        self._thread.start()

    async def stop(self, patience_s: float) -> None:
        """Take no more calls, let those that are open end for a while, then cancel them."""
        if not self._thread.is_alive():
            return
        self._accepts = False
        self._server.shutdown(self._queue, (_DOWN, None))
        try:
            async with asyncio.timeout(patience_s):
                await self._down.wait()
        except TimeoutError:
            self._server.cancel_all_calls()
            await self._down.wait()
        self.serving = False
        # The core ends the process if it is asked for anything after this.
        with self._starting:
            self._asked.clear()
            self._queue.shutdown()
        await asyncio.to_thread(self._thread.join)
        self._server.destroy()

    # In the thread

    def _run(self) -> None:
        try:
            self._take_events()
        except BaseException as error:  # noqa: BLE001 - nobody else would hear of it
            context = {"message": "the thread of gRPC broke", "exception": error}
            self._loop.call_soon_threadsafe(self._loop.call_exception_handler, context)

    def _take_events(self) -> None:
        poll, take, ended = self._queue.poll, self._take_event, cygrpc.CompletionType.queue_shutdown
        clock, gaps = self.clock, self._gaps
        quiet = 0  # rounds without an event
        while True:
            if self._asked:
                self._start_asked()
            now_ns = clock()
            if now_ns - gaps.last_ns > GAP_NS:
                gaps.beat(now_ns)
            gaps.last_ns = now_ns
            idle = quiet >= IDLE_AFTER
            event = poll(time.time() + (IDLE_BEAT_S if idle else BEAT_S))
            now_ns, limit_ns = clock(), IDLE_GAP_NS if idle else GAP_NS
            if now_ns - gaps.last_ns > limit_ns:
                gaps.beat(now_ns)
            gaps.last_ns = now_ns
            quiet = quiet + 1 if event.tag is None else 0
            # All that is there goes to the loop at once: waking it, and waiting for its lock, costs most.
            for _ in range(GATHERED):
                if event.tag is None:
                    break
                take(event)
                # What belongs to a call that is over must be gone before the next event is waited for.
                event = None
                if self._asked:
                    self._start_asked()
                event = poll(_NOW_S)
            if event.tag is not None:
                take(event)
            elif event.completion_type == ended:
                return
            event = None
            if self._handed and not self._woken:
                self._wake()

    def _take_event(self, event: Any) -> None:
        kind, call = event.tag
        if kind is MESSAGE:
            now_ns, gaps = self.clock(), self._gaps
            if now_ns - gaps.last_ns > GAP_NS:
                gaps.beat(now_ns)
            gaps.last_ns = now_ns
            call.came(gaps.arrival_ns(now_ns), now_ns)
            self._handed.append((MESSAGE, call, event.batch_operations[0].message()))
        elif kind is SENT:
            self._handed.append((SENT, call, None))
        elif kind is CLOSED:
            if event.batch_operations[0].cancelled():
                self._handed.append((CLOSED, call, None))
        elif kind is ENDED:
            if call is not None:
                call.sent()
        elif kind is NEW:
            if event.success and not self._ending:
                self._accept(event)
        elif kind is _DOWN:
            self._ending = True
            self._loop.call_soon_threadsafe(self._down.set)

    def _start_asked(self) -> None:
        with self._starting:
            self._start_all()

    def _start_all(self) -> None:
        asked = self._asked
        while asked:
            call, operations, tag = asked.popleft()
            batch = operations if isinstance(operations, tuple) else operations()
            refused = call.start_server_batch(batch, tag)
            assert not refused, f"gRPC's core refused a batch for {tag[0]}: {refused}"

    def _accept(self, event: Any) -> None:
        if self._accepts:
            try:
                self._server.request_call(self._queue, self._queue, _ACCEPT)
            except ValueError:
                self._accepts = False  # it was told to stop at this moment
        call = self._on_new(event)
        if call is not None:
            self._handed.append((OPENED, call, None))

    def _wake(self) -> None:
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._take_handed)
        except RuntimeError:
            assert self._loop.is_closed()

    # In the loop

    def ask(self, call: Any, operations: Operations, tag: tuple[str, Any]) -> None:
        """Start a batch of a call, together with all others of this turn of the loop."""
        if self.serving:
            self._asked.append((call, operations, tag))
            if not self._flushes:
                self._flushes = True
                self._loop.call_soon(self._flush, call)

    def _flush(self, call: Any) -> None:
        # Many are left to the thread: each that is started here would wake it, to fight for Python's lock.
        self._flushes = False
        if len(self._asked) == 1 and self._starting.acquire(blocking=False):
            try:
                self._start_all()
            finally:
                self._starting.release()
        elif self.serving:
            # A batch of nothing has been done as soon as it starts, which wakes the thread.
            call.start_server_batch((), _WAKE)

    def _take_handed(self) -> None:
        # Before it is read how many there are: what comes later wakes the loop again.
        self._woken = False
        handed = self._handed
        for _ in range(len(handed)):
            kind, call, found = handed.popleft()
            call.on_event(kind, found)
            if kind is MESSAGE and found is not None and len(found) > LARGE_BYTES and handed:
                # Each may take milliseconds: what else the loop has to do comes between.
                self._woken = True
                self._loop.call_soon(self._take_handed)
                return
