"""One gRPC call, whichever transport carries it, and what a transport must be. It knows no service.

A transport (``core``, ``aio``) accepts calls, subclasses :class:`GrpcCall` for how its messages are read and
sent, and reports what happens to it. All that is equal for transports is here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc

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
# When messages came, where no socket can be seen: by gaps in what comes round regularly.


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


class Gaps:
    """When the messages came that surface now: gRPC shows no sockets, but who takes them knows when it stood.

    For one thread.
    """

    __slots__ = ("_since_ns", "_until_ns", "last_ns")

    def __init__(self, now_ns: int) -> None:
        self.last_ns = now_ns
        """The last beat. One that comes no later than a gap after it may just be noted here."""
        self._since_ns = self._until_ns = 0  # of the last gap: its start, and till when it counts

    def beat(self, now_ns: int, limit_ns: int = GAP_NS) -> None:
        """Who takes messages comes round; what is longer than ``limit_ns`` is a gap."""
        gap_ns = now_ns - self.last_ns
        if gap_ns > limit_ns:
            # Two gaps with hardly anything between them are one.
            self._since_ns = self._since_ns if self.last_ns < self._until_ns else self.last_ns
            self._until_ns = now_ns + min(max(gap_ns, AFTER_NS[0]), AFTER_NS[1])
        self.last_ns = now_ns

    def arrival_ns(self, now_ns: int) -> int:
        """When something came that surfaces now: in a gap, or just after one, when that began."""
        return self._since_ns if now_ns < self._until_ns else now_ns


# ------------------------------------------------------------
# One call of gRPC as its server sees it: what came with it, and how to answer.


Metadata = tuple[tuple[str, str | bytes], ...]
Failure = tuple[grpc.StatusCode, str, Metadata]
AT_ONCE_NS: Final = 2 * NS_PER_MS
"""What surfaces so soon after it was asked for was there before."""
NO_DEADLINE_S: Final = math.inf
_DETAILS_MAX: Final = 2000
_log = logging.getLogger(__name__)
# It tells a traceback for each text of a client that is none, at no more than a client's wish.
logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)


class Delivery(Protocol):
    """What becomes of a reply. Both are called in whichever thread gives it to gRPC."""

    def failed(self) -> Failure | None:
        """How the call ends instead of by its reply, if so."""

    def sent(self) -> None:
        """It was given to gRPC, and has been sent."""


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


class GrpcCall(ABC):
    """For the loop's thread. It ends once; what is said to one that has ended or was cancelled goes nowhere.

    ``arrival_ns`` is when the latest message arrived. ``on_cancel`` is called if the client goes away or its
    deadline passes. ``identity`` is what the server's gate made of the metadata. A transport says how a
    message is read and sent, and reports by :meth:`open`, :meth:`take`, :meth:`came` and :meth:`cancel`.
    """

    __slots__ = (
        "_asked_ns", "_clock", "_silence", "_surfaced_ns", "arrival_ns", "deadline_s", "identity", "is_open",
        "metadata", "method", "on_cancel", "task",
    )  # fmt: skip

    def __init__(
        self, admitted: Admitted, metadata: Metadata, deadline_s: float, silence: Silence[GrpcCall],
        clock: Callable[[], int],
    ) -> None:  # fmt: skip
        """``deadline_s`` is the client's, in Unix time, or :data:`NO_DEADLINE_S`. In any thread."""
        self.method, self.identity = admitted
        self.metadata = metadata
        self.deadline_s = deadline_s
        self.arrival_ns = 0
        self._clock = clock
        self._surfaced_ns = clock()  # it, or its last message
        self._asked_ns = 0  # when the next message was asked for, if that was not at once
        self._silence = silence
        self.is_open = True
        self.on_cancel: Callable[[], object] | None = None
        self.task: asyncio.Task[None] | None = None  # what answers it, if that takes a task

    # What came with it

    @abstractmethod
    def peer(self) -> str:
        """Who calls, as gRPC writes it."""

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline; None if it has none."""
        return None if self.deadline_s == NO_DEADLINE_S else max(self.deadline_s - time.time(), 0.0)

    def time_allowed(self, clock: Callable[[], int]) -> float | None:
        """The same of the latest message, from when it came: the client's deadline began with it."""
        if self.deadline_s == NO_DEADLINE_S:
            return None
        return max(self.deadline_s - time.time() + (clock() - self._surfaced_ns) / NS_PER_S, 0.0)

    def metadatum(self, key: str) -> str | None:
        """The first value under that key."""
        for name, value in self.metadata:
            if name == key:
                return str(value)
        return None

    # How it ends

    def reply(self, message: bytes, trailers: Metadata = ()) -> None:
        """Send the only message, and end."""
        if self.is_open:
            self._close()
            self._send_reply(message, trailers, None)

    def reply_unless(self, delivery: Delivery, message: bytes, trailers: Metadata) -> None:
        """The same, unless its delivery ``failed`` when that is given to gRPC."""
        if self.is_open:
            self._close()
            self._send_reply(message, trailers, delivery)

    def fail(self, code: grpc.StatusCode, text: str, trailers: Metadata = ()) -> None:
        """End with an error."""
        if self.is_open:
            self._close()
            self._send_status(code, text, trailers)

    def cut(self, code: grpc.StatusCode, text: str) -> None:
        """End it whatever it does, and whoever answers it."""
        on_cancel = self.on_cancel
        self.fail(code, text)
        if on_cancel is not None:
            on_cancel()

    def finish(self) -> None:
        """End after all messages were sent."""
        self.fail(grpc.StatusCode.OK, "")

    def fail_by_fault(self) -> None:
        """End it, for our own code raised what is being handled now. Only the log tells more."""
        _log.exception("answering a call failed", extra={"method": self.method.path})
        self.fail(grpc.StatusCode.INTERNAL, "answering failed; see the server's log")

    def answered(self, _: asyncio.Task[None]) -> None:
        """Its task has ended, if it ever began. A cancelled one and its call must not hold each other."""
        self.task = None

    # Several messages

    async def receive(self) -> bytes | None:
        """The next message, or None if there are no more. One caller at a time."""
        if not self.is_open:
            return None
        self._asked_ns = self._clock()
        self._silence.begin(self)
        message = await self._next_message()
        self._silence.end(self)
        return message

    async def send(self, message: bytes) -> None:
        """Send one, and wait until the client takes it. One caller at a time."""
        if self.is_open:
            await self._send_message(message)
            self._silence.renew(self)

    def parsed(self, message: bytes) -> Any:
        """What the bytes say. Raises :class:`Aborted`."""
        try:
            return self.method.parse(message)
        except Aborted:
            raise
        except Exception:  # noqa: BLE001 - whatever a parser raises
            text = f"{self.method.path}: expected a message of its request's type, found other bytes"
            raise Aborted(grpc.StatusCode.INTERNAL, text) from None

    # What the transport reports. Nothing raises: one call that is stumbled over must not end all others.

    def came(self, arrival_ns: int, now_ns: int) -> None:
        """A message surfaces now, and came then at the latest. In the thread that sees it first.

        One that was there as soon as it was asked for may have waited for that since the last one.
        """
        waited = self._asked_ns and now_ns - self._asked_ns < AT_ONCE_NS
        self.arrival_ns = min(arrival_ns, self._surfaced_ns) if waited else arrival_ns
        self._surfaced_ns = now_ns

    def open(self) -> None:
        """It began, and its method reads by itself."""
        assert self.method.on_open is not None
        try:
            self.method.on_open(self)
        except Exception:  # noqa: BLE001 - see above
            self.fail_by_fault()

    def take(self, message: bytes | None) -> None:
        """Its only message, or None if there was none."""
        self._silence.end(self)
        if not self.is_open:
            return  # cancelled meanwhile
        if message is None:
            # What is refused as too large ends in this way too, but has its status already.
            text = f"{self.method.path}: expected one message, found none"
            self.fail(grpc.StatusCode.UNIMPLEMENTED, text)
            return
        assert self.method.on_message is not None
        try:
            self.method.on_message(self, self.parsed(message))
        except Aborted as aborted:
            self.fail(aborted.code, aborted.text, aborted.trailers)
        except Exception:  # noqa: BLE001 - see above
            self.fail_by_fault()

    def cancel(self) -> None:
        """The client went away, or its deadline passed."""
        on_cancel = self.on_cancel
        self._close()
        if on_cancel is not None:
            try:
                on_cancel()
            except Exception:  # noqa: BLE001 - see above
                self.fail_by_fault()

    def _close(self) -> None:
        self.is_open = False
        self.on_cancel = None
        self._silence.end(self)

    # What a transport does

    @abstractmethod
    async def _next_message(self) -> bytes | None:
        """Read one, once :meth:`came` was called for it; None if there are no more, or never will be."""

    @abstractmethod
    async def _send_message(self, message: bytes) -> None:
        """Send one of several, and return once it left, or never will."""

    @abstractmethod
    def _send_reply(self, message: bytes, trailers: Metadata, delivery: Delivery | None) -> None:
        """Send the only message and OK; or, if the delivery failed by then, how that ends it."""

    @abstractmethod
    def _send_status(self, code: grpc.StatusCode, text: str, trailers: Metadata) -> None:
        """End it, after what was sent before."""


def details(text: str) -> bytes:
    """A status' text, cut: it travels as a header, where a byte may take three, and clients limit those."""
    return text.encode(errors="backslashreplace")[:_DETAILS_MAX].decode(errors="ignore").encode()


# ------------------------------------------------------------
# What carries calls.


Admitted = tuple[Method, str]
"""What is done with a call, and whose it is: what the server's gate made of its metadata."""
Admit = Callable[[str, Metadata], Admitted]
"""Whether a call may come in, by path and metadata, before its message is read. Raises :class:`Aborted` and
nothing else. It is called in a thread of the transport's own, or in the loop's."""


class Transport(Protocol):
    """Accepts calls and carries their messages. For the loop's thread."""

    def listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Open a port, and return its number. Raises :class:`OSError` if it is not to be had."""

    async def start(self) -> None:
        """Take calls."""

    async def stop(self, patience_s: float) -> None:
        """Take no more calls, let those that are open end for a while, then cancel them."""


class MakeTransport(Protocol):
    """How a server has its transport made; options are those of gRPC's channel arguments."""

    def __call__(
        self, options: Sequence[tuple[str, Any]], admit: Admit, silence: Silence[GrpcCall],
        clock: Callable[[], int],
    ) -> Transport:  # fmt: skip
        """A transport that has no port yet."""
