"""One gRPC call, as methods see it: nothing here knows what is private to grpcio.

The transport (``core``) accepts calls, subclasses :class:`GrpcCall` for reading and sending messages, and
reports what happens to a call.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc

from clockwork_serve.units import NS_PER_S

# ------------------------------------------------------------
# Time limits for clients of open calls that send nothing.


Waiting = TypeVar("Waiting", bound=Hashable)


class SilentCalls(Generic[Waiting]):
    """Calls whose client is to send a message, and since when; only finds those that exceed ``limit_s``.

    For the loop's thread; :meth:`begin` is for any.
    """

    def __init__(self, limit_s: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._since_s: dict[Waiting, float] = {}

    def __len__(self) -> int:
        return len(self._since_s)

    def begin(self, call: Waiting) -> None:
        """The client is to send a message."""
        self._since_s[call] = self._clock()

    def renew(self, call: Waiting) -> None:
        """A response was sent: restart the time limit."""
        if call in self._since_s:
            self.begin(call)

    def end(self, call: Waiting) -> None:
        """The message is there, or the call has ended."""
        self._since_s.pop(call, None)

    def overdue(self) -> list[Waiting]:
        """Calls whose time limit has passed."""
        limit_s = self._clock() - self.limit_s
        # A copy, for another thread may add to it meanwhile.
        return [call for call, since_s in list(self._since_s.items()) if since_s < limit_s]


# ------------------------------------------------------------
# One call of gRPC: its metadata, its messages, its end.


Metadata = tuple[tuple[str, str | bytes], ...]
Failure = tuple[grpc.StatusCode, str, Metadata]
NO_DEADLINE_S: Final = math.inf
_DETAILS_MAX: Final = 2000
_log = logging.getLogger(__name__)
# grpcio logs a traceback for each invalid text from a client, who could flood the log.
logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)


class Delivery(Protocol):
    """The fate of a reply. Both methods are called in the thread that passes it to gRPC."""

    def failure(self) -> Failure | None:
        """The status to send instead of the reply, if it comes too late."""

    def on_sent(self) -> None:
        """The reply was sent by gRPC."""


class Aborted(Exception):
    """Raised to end a call with this status."""

    def __init__(self, code: grpc.StatusCode, text: str, trailers: Metadata = ()) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.trailers = trailers


@dataclass(slots=True, frozen=True)
class Method:
    """The handler of a path. ``parse`` decodes a message, or raises (:class:`Aborted`).

    ``on_message`` is called with the only message of a call. A method with ``on_open`` instead reads messages
    itself.
    """

    path: str
    parse: Callable[[bytes], Any]
    on_message: Callable[[GrpcCall, Any], None] | None = None
    on_open: Callable[[GrpcCall], None] | None = None


Admitted = tuple[Method, str]
"""A call's method, and its client's identity, as the server's access check found it."""
Admit = Callable[[str, Metadata], Admitted]
"""Checks a call, by path and metadata, before its message is read. Raises :class:`Aborted` and nothing else.
It is called in the transport's own thread."""


class GrpcCall(ABC):
    """A call, for the loop's thread. It ends once; after that, or once cancelled, replies are ignored.

    ``arrival_ns`` is the arrival of the latest message: the only one, or the last that :meth:`receive`
    returned. ``on_cancel`` is called if the client leaves or its deadline passes. ``identity`` is what the
    server's access check made of the metadata. A transport implements reading and sending, and reports by
    :meth:`open`, :meth:`handle_message`, :meth:`note_arrival` and :meth:`cancel`.
    """

    __slots__ = (
        "_clock", "_read_ns", "_silence", "arrival_ns", "deadline_s", "identity",
        "is_open", "metadata", "method", "on_cancel", "task",
    )  # fmt: skip

    def __init__(
        self, admitted: Admitted, metadata: Metadata, deadline_s: float, silence: SilentCalls[GrpcCall],
        clock: Callable[[], int],
    ) -> None:  # fmt: skip
        """``deadline_s`` is the client's, in Unix time, or :data:`NO_DEADLINE_S`. For any thread."""
        self.method, self.identity = admitted
        self.metadata = metadata
        self.deadline_s = deadline_s
        self.arrival_ns = 0
        self._clock = clock
        self._read_ns = clock()  # when it, or the latest message, was read
        self._silence = silence
        self.is_open = True
        self.on_cancel: Callable[[], object] | None = None
        self.task: asyncio.Task[None] | None = None  # the task that handles it, if any

    # Metadata

    @abstractmethod
    def peer(self) -> str:
        """The client's address, as gRPC writes it."""

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline; None if it has none."""
        return None if self.deadline_s == NO_DEADLINE_S else max(self.deadline_s - time.time(), 0.0)

    def time_allowed(self, clock: Callable[[], int]) -> float | None:
        """Seconds from the arrival of the latest message to the client's deadline; None if it has none."""
        if self.deadline_s == NO_DEADLINE_S:
            return None
        return max(self.deadline_s - time.time() + (clock() - self._read_ns) / NS_PER_S, 0.0)

    def metadatum(self, key: str) -> str | None:
        """The first value of that key; None if there is none."""
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
        """The same, unless ``delivery.failure()`` gives another status when the reply is passed to gRPC."""
        if self.is_open:
            self._close()
            self._send_reply(message, trailers, delivery)

    def fail(self, code: grpc.StatusCode, text: str, trailers: Metadata = ()) -> None:
        """End with an error."""
        if self.is_open:
            self._close()
            self._send_status(code, text, trailers)

    def terminate(self, code: grpc.StatusCode, text: str) -> None:
        """End the call, and cancel what handles it."""
        on_cancel = self.on_cancel
        self.fail(code, text)
        if on_cancel is not None:
            on_cancel()

    def finish(self) -> None:
        """End with OK, after all messages were sent."""
        self.fail(grpc.StatusCode.OK, "")

    def fail_internally(self) -> None:
        """End with INTERNAL; the exception being handled, a bug of ours, is logged."""
        _log.exception("answering a call failed", extra={"method": self.method.path})
        self.fail(grpc.StatusCode.INTERNAL, "answering failed; see the server's log")

    def answered(self, _: asyncio.Task[None]) -> None:
        """Its task has ended, if it ever began. Break the cycle between the task and its call."""
        self.task = None

    # Several messages

    async def receive(self) -> bytes | None:
        """The next message, or None if there are no more. One caller at a time."""
        if not self.is_open:
            return None
        self._silence.begin(self)
        message, self.arrival_ns, self._read_ns = await self._next_message()
        self._silence.end(self)
        return message

    async def send(self, message: bytes) -> None:
        """Send a message, and wait until gRPC has sent it. One caller at a time."""
        if self.is_open:
            await self._send_message(message)
            self._silence.renew(self)

    def parsed(self, message: bytes) -> Any:
        """The decoded message. Raises :class:`Aborted`."""
        try:
            return self.method.parse(message)
        except Aborted:
            raise
        except Exception:  # noqa: BLE001 - whatever a parser raises
            text = (
                f"{self.method.path}: expected a message of its request's type, with texts in UTF-8; "
                "found other bytes"
            )
            raise Aborted(grpc.StatusCode.INVALID_ARGUMENT, text) from None

    # Reported by the transport. Nothing raises: a bug that one call triggers must not end all others.

    def note_arrival(self, arrival_ns: int, now_ns: int) -> None:
        """The only message, which had arrived by ``arrival_ns``, was read. In the thread that reads it."""
        self.arrival_ns, self._read_ns = arrival_ns, now_ns

    def open(self) -> None:
        """The call began, and its method reads messages itself."""
        assert self.method.on_open is not None
        try:
            self.method.on_open(self)
        except Exception:  # noqa: BLE001 - see above
            self.fail_internally()

    def handle_message(self, message: bytes | None) -> None:
        """Handle its only message; None if the client sent none."""
        self._silence.end(self)
        if not self.is_open:
            return  # cancelled meanwhile
        if message is None:
            # A message that gRPC rejected as too large ends here too, but has its status already.
            text = f"{self.method.path}: expected one message, found none"
            self.fail(grpc.StatusCode.UNIMPLEMENTED, text)
            return
        assert self.method.on_message is not None
        try:
            self.method.on_message(self, self.parsed(message))
        except Aborted as aborted:
            self.fail(aborted.code, aborted.text, aborted.trailers)
        except Exception:  # noqa: BLE001 - see above
            self.fail_internally()

    def cancel(self) -> None:
        """The client left, or its deadline passed."""
        on_cancel = self.on_cancel
        self._close()
        if on_cancel is not None:
            try:
                on_cancel()
            except Exception:  # noqa: BLE001 - see above
                self.fail_internally()

    def _close(self) -> None:
        self.is_open = False
        self.on_cancel = None
        self._silence.end(self)

    # Implemented by a transport

    @abstractmethod
    async def _next_message(self) -> tuple[bytes | None, int, int]:
        """The next message (None if there are no more), when it had arrived, and when it was read."""

    @abstractmethod
    async def _send_message(self, message: bytes) -> None:
        """Send one of several messages, and return once it is sent, or never will be."""

    @abstractmethod
    def _send_reply(self, message: bytes, trailers: Metadata, delivery: Delivery | None) -> None:
        """Send the only message and OK; or the status that ``delivery.failure()`` gives by then."""

    @abstractmethod
    def _send_status(self, code: grpc.StatusCode, text: str, trailers: Metadata) -> None:
        """End it, after messages that were sent before."""


def details(text: str) -> bytes:
    """A status' text, cut: it travels as a header, where a byte may take three, and clients limit those."""
    return text.encode(errors="backslashreplace")[:_DETAILS_MAX].decode(errors="ignore").encode()
