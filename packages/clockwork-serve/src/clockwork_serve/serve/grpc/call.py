"""One call of gRPC as its server sees it: what came with it, how to answer, how long it was silent."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc
from grpc._cython import cygrpc

from clockwork_serve.serve.grpc.core import CLOSED, ENDED, MESSAGE, SENT, Core, Operations
from clockwork_serve.units import NS_PER_MS, NS_PER_S

# ------------------------------------------------------------
# Calls of gRPC whose client is to speak, and for how long it has said nothing. It ends none by itself.


Speaker = TypeVar("Speaker", bound=Hashable)


class Silence(Generic[Speaker]):
    """For the loop's thread; :meth:`begin` is for any. ``limit_s``: silence that is too long."""

    def __init__(self, limit_s: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._since_s: dict[Speaker, float] = {}

    def __len__(self) -> int:
        return len(self._since_s)

    def begin(self, speaker: Speaker) -> None:
        """It is its turn."""
        self._since_s[speaker] = self._clock()

    def renew(self, speaker: Speaker) -> None:
        """It was answered, and may think that over."""
        if speaker in self._since_s:
            self.begin(speaker)

    def end(self, speaker: Speaker) -> None:
        """It spoke, or is gone."""
        self._since_s.pop(speaker, None)

    def overdue(self) -> list[Speaker]:
        """Who was silent for too long."""
        limit_s = self._clock() - self.limit_s
        # A list at once, for another thread may add to it meanwhile.
        return [speaker for speaker, since_s in list(self._since_s.items()) if since_s < limit_s]


# ------------------------------------------------------------
# One call of gRPC as its server sees it: what came with it, and how to answer. It knows no service.


Metadata = tuple[tuple[str, str | bytes], ...]
Failure = tuple[grpc.StatusCode, str, Metadata]
AT_ONCE_NS: Final = 2 * NS_PER_MS
"""What surfaces so soon after it was asked for was there before."""
_NO_DEADLINE_S: Final = 1e12
_DETAILS_MAX: Final = 2000
_NO_FLAGS: Final = 0
_OK: Final = 0
_log = logging.getLogger(__name__)


class Delivery(Protocol):
    """What becomes of a reply. Both are called in whichever thread gives it to the core."""

    def failed(self) -> Failure | None:
        """How the call ends instead of by its reply, if so."""

    def sent(self) -> None:
        """It was given to the core, and has been sent."""


class Aborted(Exception):
    """A call ends with this status."""

    def __init__(self, code: grpc.StatusCode, text: str, trailers: Metadata = ()) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.trailers = trailers


@dataclass(slots=True, frozen=True)
class Method:
    """What is done with calls of a path. ``parse`` makes a message of bytes, or raises (:class:`Aborted`).

    ``on_message`` is told the only message of a call. A method that has ``on_open`` instead reads by itself.
    """

    path: str
    parse: Callable[[bytes], Any]
    on_message: Callable[[GrpcCall, Any], None] | None = None
    on_open: Callable[[GrpcCall], None] | None = None


class GrpcCall:
    """For the loop's thread. It ends once; what is said to one that has ended or was cancelled goes nowhere.

    ``arrival_ns`` is when the latest message arrived. ``on_cancel`` is called if the client goes away or its
    deadline passes. ``identity`` is what the server's gate made of the metadata.
    """

    __slots__ = (
        "_asked_ns", "_call", "_core", "_deadline_s", "_delivery", "_headed", "_received", "_reply", "_sent",
        "_silence", "_surfaced_ns", "arrival_ns", "identity", "is_open", "metadata", "method", "on_cancel",
        "task",
    )  # fmt: skip

    def __init__(
        self, core: Core, event: Any, method: Method, identity: str, silence: Silence[GrpcCall]
    ) -> None:
        """Of an event of the core, in its thread."""
        self.method = method
        self.identity = identity
        self.metadata: Metadata = event.invocation_metadata
        self.arrival_ns = 0
        self._surfaced_ns = core.clock()  # it, or its last message
        self._asked_ns = 0  # when the next message was asked for, if that was not at once
        self.is_open = True
        self.on_cancel: Callable[[], object] | None = None
        self._core = core
        self._silence = silence
        self._call = event.call
        self._deadline_s: float = event.call_details.deadline
        self.task: asyncio.Task[None] | None = None  # what answers it, if that takes a task
        self._delivery: Delivery | None = None
        self._reply: tuple[bytes, Metadata] | None = None  # until the core has it
        self._headed = False  # whether initial metadata were sent
        self._received: asyncio.Future[Any] | None = None
        self._sent: asyncio.Future[Any] | None = None

    def begin(self) -> bool:
        """Ask for what is to come, in the core's thread; whether the loop must hear of the call before."""
        start = self._call.start_server_batch
        start((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), (CLOSED, self))
        if self.method.on_open is not None:
            return True
        self._silence.begin(self)
        start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), (MESSAGE, self))
        return False

    # What came with it

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline; None if it has none."""
        return None if self._deadline_s > _NO_DEADLINE_S else max(self._deadline_s - time.time(), 0.0)

    def time_allowed(self, clock: Callable[[], int]) -> float | None:
        """The same of the latest message, from when it came: the client's deadline began with it."""
        if self._deadline_s > _NO_DEADLINE_S:
            return None
        return max(self._deadline_s - time.time() + (clock() - self._surfaced_ns) / NS_PER_S, 0.0)

    def came(self, arrival_ns: int, now_ns: int) -> None:
        """A message surfaces. In the core's thread.

        One that was there as soon as it was asked for may have waited for that since the last one.
        """
        waited = self._asked_ns and now_ns - self._asked_ns < AT_ONCE_NS
        self.arrival_ns = min(arrival_ns, self._surfaced_ns) if waited else arrival_ns
        self._surfaced_ns = now_ns

    def peer(self) -> str:
        """Who calls, as gRPC writes it."""
        found: bytes = self._call.peer()
        return found.decode()

    def metadatum(self, key: str) -> str | None:
        """The first value under that key."""
        for name, value in self.metadata:
            if name == key:
                return str(value)
        return None

    # How it ends

    def reply(self, message: bytes, trailers: Metadata | None = None) -> None:
        """Send the only message, and end."""
        if self.is_open:
            self._close()
            self._start(_replied(message, trailers), ENDED)

    def reply_unless(self, delivery: Delivery, message: bytes, trailers: Metadata) -> None:
        """The same, unless its delivery ``failed`` when that is given to the core."""
        if self.is_open:
            self._close()
            self._delivery = delivery
            self._reply = (message, trailers)
            self._start(self._late_batch, ENDED)

    def fail(self, code: grpc.StatusCode, text: str, trailers: Metadata | None = None) -> None:
        """End with an error."""
        self._end(code.value[0], details(text), trailers)

    def cut(self, code: grpc.StatusCode, text: str) -> None:
        """End it whatever it does, and whoever answers it."""
        on_cancel = self.on_cancel
        self.fail(code, text)
        if on_cancel is not None:
            on_cancel()

    def finish(self) -> None:
        """End after all messages were sent."""
        self._end(_OK, b"", None)

    # Several messages

    async def receive(self) -> bytes | None:
        """The next message, or None if there are no more. One caller at a time."""
        if not self.is_open:
            return None
        self._received = asyncio.get_running_loop().create_future()
        self._asked_ns = self._core.clock()
        self._silence.begin(self)
        self._start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), MESSAGE)
        found: bytes | None = await self._received
        return found

    async def send(self, message: bytes) -> None:
        """Send one, and wait until the client takes it. One caller at a time."""
        if not self.is_open:
            return
        self._sent = asyncio.get_running_loop().create_future()
        self._start((*self._head(), cygrpc.SendMessageOperation(message, _NO_FLAGS)), SENT)
        await self._sent
        self._silence.renew(self)

    # What the core tells

    def sent(self) -> None:
        """Its end was sent, or cannot be. In the core's thread."""
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            delivery.sent()

    def on_event(self, kind: str, found: Any) -> None:
        """Something happened. It raises nothing: one call that is stumbled over must not end all others."""
        try:
            if kind is MESSAGE:
                self._take(found)
            elif kind is CLOSED:
                self._cancelled()
            elif kind is SENT:
                _settle(self._sent, None)
            elif self.method.on_open is not None:
                self.method.on_open(self)
        except Aborted as aborted:
            self.fail(aborted.code, aborted.text, aborted.trailers)
        except Exception:  # noqa: BLE001 - see above
            self.fail_by_fault()

    def answered(self, _: asyncio.Task[None]) -> None:
        """Its task has ended, if it ever began. A cancelled one and its call must not hold each other."""
        self.task = None

    def fail_by_fault(self) -> None:
        """End it, for our own code raised what is being handled now. Only the log tells more."""
        _log.exception("answering a call failed", extra={"method": self.method.path})
        self.fail(grpc.StatusCode.INTERNAL, "answering failed; see the server's log")

    def parsed(self, message: bytes) -> Any:
        """What the bytes say. Raises :class:`Aborted`."""
        try:
            return self.method.parse(message)
        except Aborted:
            raise
        except Exception:  # noqa: BLE001 - whatever a parser raises
            text = f"{self.method.path}: expected a message of its request's type, found other bytes"
            raise Aborted(grpc.StatusCode.INTERNAL, text) from None

    def _take(self, message: bytes | None) -> None:
        self._silence.end(self)
        on_message = self.method.on_message
        if on_message is None:
            _settle(self._received, message)
        elif not self.is_open:
            pass  # cancelled meanwhile
        elif message is not None:
            on_message(self, self.parsed(message))
        else:
            # What the core refuses, as it is too large, ends in this way too, but has its status already.
            raise Aborted(
                grpc.StatusCode.UNIMPLEMENTED, f"{self.method.path}: expected one message, found none"
            )

    def _cancelled(self) -> None:
        on_cancel = self.on_cancel
        self._close()
        if on_cancel is not None:
            on_cancel()

    def _close(self) -> None:
        self.is_open = False
        self.on_cancel = None
        self._silence.end(self)

    def _end(self, code: int, details: bytes, trailers: Metadata | None) -> None:
        if self.is_open:
            self._close()
            status = cygrpc.SendStatusFromServerOperation(trailers, code, details, _NO_FLAGS)
            self._start((*self._head(), status), ENDED)

    def _head(self) -> tuple[Any, ...]:
        if self._headed:
            return ()
        self._headed = True
        return (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),)

    def _late_batch(self) -> tuple[Any, ...]:
        assert self._delivery is not None
        assert self._reply is not None
        reply, self._reply = self._reply, None
        failure = self._delivery.failed()
        if failure is None:
            return _replied(*reply)
        self._delivery = None
        code, text, more = failure
        status = cygrpc.SendStatusFromServerOperation(more, code.value[0], details(text), _NO_FLAGS)
        return (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS), status)

    def _start(self, operations: Operations, kind: str) -> None:
        self._core.ask(self._call, operations, (kind, self))


def details(text: str) -> bytes:
    """A status' text, cut: it travels as a header, where a byte may take three, and clients limit those."""
    return text.encode(errors="backslashreplace")[:_DETAILS_MAX].decode(errors="ignore").encode()


def _replied(message: bytes, trailers: Metadata | None) -> tuple[Any, ...]:
    return (
        cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),
        cygrpc.SendMessageOperation(message, _NO_FLAGS),
        cygrpc.SendStatusFromServerOperation(trailers, _OK, b"", _NO_FLAGS),
    )


def _settle(waiter: asyncio.Future[Any] | None, found: Any) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(found)
