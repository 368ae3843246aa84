"""Links between the server's processes: frames of msgpack over unix sockets, and alignment of clocks."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from clockwork_serve import __version__
from clockwork_serve.errors import TransportError, encodable
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    AdmissionQuery,
    Frame,
    Hello,
    Infer,
    Load,
    Ping,
    Quarantined,
    Request,
    Result,
    Role,
    SoonestEnd,
    SoonestEnds,
    Unload,
    Window,
)
from clockwork_serve.units import KIB, MIB

# ------------------------------------------------------------
# Encoding and decoding of frames: a 4-byte little-endian length, then msgpack.


FRAME_BYTES_MAX: Final = 64 * MIB
"""Tensors never travel in frames; the largest are statistics of all models, about 1 kB each."""

_READ_BYTES: Final = 256 * KIB
_LENGTH: Final = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


class FrameWriter:
    """Collects frames until they are taken as one buffer."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def add(self, frame: Frame) -> None:
        """Append one frame; raises :class:`TransportError`, and appends nothing, if it is too large.

        Text that cannot be encoded as UTF-8 is sent with escapes, so that no string can raise in a process
        that forwards it.
        """
        pending = self._pending
        start = len(pending)
        pending += b"\0\0\0\0"
        try:
            _encoder.encode_into(frame, pending, -1)
        except UnicodeEncodeError:
            del pending[start + _LENGTH.size :]
            pending += escaped(frame)
        length = len(pending) - start - _LENGTH.size
        if length > FRAME_BYTES_MAX:
            del pending[start:]
            raise TransportError(_too_large(f"the {type(frame).__name__} to send", length))
        _LENGTH.pack_into(pending, start, length)

    def take(self) -> bytearray:
        """Return all bytes so far, and start a new buffer."""
        pending, self._pending = self._pending, bytearray()
        return pending


class FrameReader:
    """Decodes frames from bytes that arrive in any pieces. Its buffer is reused; it grows if necessary."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray())  # until something arrives: whoever says nothing takes no memory
        # Bytes [start, end) were received and are not decoded yet.
        self._start = 0
        self._end = 0

    def room(self) -> memoryview:
        """The buffer for the next read; never empty."""
        if not self._view:
            self._view = memoryview(bytearray(_READ_BYTES))
        return self._view[self._end :]

    def received(self, nbytes: int, frames: list[Frame]) -> None:
        """Append to ``frames`` all that are complete after ``nbytes`` more bytes in :meth:`room`.

        Raises :class:`TransportError` at the first malformed frame; those before it were appended.
        """
        self._end += nbytes
        view, start, end = self._view, self._start, self._end
        needed = _LENGTH.size
        while end - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(view, start)
            if length > FRAME_BYTES_MAX:
                raise TransportError(_too_large("a frame received", length))
            needed = _LENGTH.size + length
            if end - start < needed:
                break
            frames.append(_decode(view[start + _LENGTH.size : start + needed]))
            start += needed
            needed = _LENGTH.size
        self._start = start
        self._make_room(needed)

    def _make_room(self, needed: int) -> None:
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._view) > _READ_BYTES:
                self._view = memoryview(bytearray(_READ_BYTES))
            return
        if self._start + max(needed, _READ_BYTES // 2) <= len(self._view) and self._end < len(self._view):
            return
        rest = bytes(self._view[self._start : self._end])
        if needed > len(self._view):
            self._view = memoryview(bytearray(needed))
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)


def escaped(record: object) -> bytes:
    """A record as msgpack; text that cannot be encoded as UTF-8 is escaped."""
    return _encoder.encode(_escaped(msgspec.to_builtins(record, builtin_types=(bytes,))))


def _escaped(found: Any) -> Any:
    """Plain data with all its text encodable."""
    match found:
        case str():
            return encodable(found)
        case dict():
            return {_escaped(key): _escaped(value) for key, value in found.items()}
        case list() | tuple():
            return [_escaped(each) for each in found]
        case _:
            return found


def _decode(payload: memoryview) -> Frame:
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise TransportError(f"malformed frame of {len(payload)} bytes: {error}") from None


def _too_large(what: str, length: int) -> str:
    return f"{what} has {length} bytes, more than the {FRAME_BYTES_MAX} that a frame may have"


# ------------------------------------------------------------
# Alignment of the monotonic clocks of two hosts, from one-way delays.
#
# Each side keeps the least of (received - sent) over the last messages, in both directions. Half of their
# difference is the offset between the clocks, and half of their sum (the shortest round trip) bounds its
# error, whatever the network's asymmetry. Equal boot ids mean one clock: offset and error are zero.


SAMPLES_MAX: Final = 1024
"""The minimum is over this many one-way delays: enough to include a moment without queueing, and few enough
to follow a drifting clock."""


class SlidingMinimum:
    """The least of the last ``size`` numbers, at O(1) amortised."""

    def __init__(self, size: int) -> None:
        assert size > 0
        self._size = size
        self._count = 0
        # (index, number), both ascending: all and only those that may become the minimum later.
        self._rising: deque[tuple[int, int]] = deque()

    def add(self, number: int) -> None:
        """Add one number; the one ``size`` before it drops out."""
        while self._rising and self._rising[-1][1] >= number:
            self._rising.pop()
        self._rising.append((self._count, number))
        self._count += 1
        if self._rising[0][0] <= self._count - 1 - self._size:
            self._rising.popleft()

    @property
    def least(self) -> int | None:
        """The least number, or None before the first."""
        return self._rising[0][1] if self._rising else None


class ClockAlignment:
    """The estimated offset of a peer's clock."""

    def __init__(self, *, same_clock: bool, samples: int = SAMPLES_MAX) -> None:
        self.same_clock = same_clock
        self._inbound = SlidingMinimum(samples)
        self._outbound_delta_ns: int | None = None

    def observe(self, sent_ns: int, received_ns: int, peer_delta_ns: int | None) -> None:
        """Add a ping: the peer's clock when sent, ours when received, the least delta seen by the peer."""
        self._inbound.add(received_ns - sent_ns)
        if peer_delta_ns is not None:
            self._outbound_delta_ns = peer_delta_ns

    @property
    def least_delta_ns(self) -> int | None:
        """The least (received here - sent there), to be sent to the peer."""
        return self._inbound.least

    @property
    def aligned(self) -> bool:
        """Whether the offset is known."""
        return self.same_clock or (self._inbound.least is not None and self._outbound_delta_ns is not None)

    @property
    def offset_ns(self) -> int:
        """Our clock minus the peer's; zero until aligned."""
        inbound, outbound = self._inbound.least, self._outbound_delta_ns
        if self.same_clock or inbound is None or outbound is None:
            return 0
        return (inbound - outbound) // 2

    @property
    def error_ns(self) -> int:
        """How far the offset may be from the truth; zero for one clock."""
        inbound, outbound = self._inbound.least, self._outbound_delta_ns
        if self.same_clock or inbound is None or outbound is None:
            return 0
        # Clocks that were stepped between two samples can make the sum negative for a while.
        return max(0, -(-(inbound + outbound) // 2))


def to_local(frame: Frame, offset_ns: int, error_ns: int) -> Frame:
    """A frame from the controller with its instants on our clock; windows shrink by the offset's error."""
    match frame:
        case Load() | Unload() | Infer():
            return msgspec.structs.replace(frame, window=_local_window(frame.window, offset_ns, error_ns))
        case Quarantined() if frame.why:
            return msgspec.structs.replace(frame, since_ns=frame.since_ns + offset_ns)
        case SoonestEnds():
            return _local_ends(frame, offset_ns, error_ns)
        case _:
            return frame


def to_controller(frame: Frame, offset_ns: int) -> Frame:
    """A frame for the controller with its instants on the controller's clock."""
    match frame:
        case Result():
            return msgspec.structs.replace(
                frame, started_ns=frame.started_ns - offset_ns, ended_ns=frame.ended_ns - offset_ns
            )
        case Request() | AdmissionQuery():
            return msgspec.structs.replace(
                frame, arrival_ns=frame.arrival_ns - offset_ns, deadline_ns=frame.deadline_ns - offset_ns
            )
        case _:
            return frame


def _local_ends(frame: SoonestEnds, offset_ns: int, error_ns: int) -> SoonestEnds:
    # Requests that are due sooner, or end later, than these instants pass; the error makes more of them pass.
    ends = {
        key: SoonestEnd(
            due_ns=one.due_ns + offset_ns + error_ns,
            end_ns=one.end_ns + offset_ns - error_ns,
            each_ns=one.each_ns,
            other_end_ns=one.other_end_ns + offset_ns - error_ns,
        )
        for key, one in frame.ends.items()
    }
    return SoonestEnds(ends=ends, until_ns=frame.until_ns + offset_ns - error_ns)


def _local_window(window: Window, offset_ns: int, error_ns: int) -> Window:
    earliest_ns, latest_ns = window.earliest_ns + offset_ns, window.latest_ns + offset_ns
    # A window shorter than twice the error shrinks to its middle, the likeliest instant inside it.
    margin_ns = min(error_ns, (latest_ns - earliest_ns) // 2)
    return Window(earliest_ns + margin_ns, latest_ns - margin_ns)


# ------------------------------------------------------------
# Links over unix sockets.
#
# The first frame of each side is its Hello. Frames sent in one turn of the loop are written together; frames
# of one read are delivered as one list. A peer that breaks the protocol, or does not read, loses its link
# only.


SOCKET_NAME: Final = "controller.sock"
"""The file in the run directory on which the controller listens; every other process connects to it."""
OBSERVER_SOCKET: Final = "observer.sock"  # likewise, of the process that answers questions about the journal
PROTOCOL: Final = 3
"""What this build speaks. Neighbours understand each other, so that processes can be upgraded one by one: a
peer of the protocol before it is sent nothing that is new, and one of the protocol after it will do likewise.
Fields may be added at the end of any record, with a default."""
FIRST_NEIGHBOUR: Final = 3
"""The first protocol of which that is true: those before it accept no other than their own."""
UNSENT_BYTES_MAX: Final = 256 * MIB
"""A peer that is this far behind has stopped reading, and its link is closed before it costs more memory."""
HANDSHAKE_S: Final = 10.0
ALIGN_EXCHANGES: Final = 16
"""Pings that each side answers at once on a new link between hosts: enough that one meets no queue."""
PING_EVERY_S: Final = 1.0
RETRY_S: Final = 0.05  # the usual pause between attempts to reach a controller on this host
QUICK_RETRY_S, QUICK_TRIES = 0.005, 100
"""The first ones follow each other faster: one that stands by listens within milliseconds."""

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_PATH_BYTES_MAX: Final = 107  # sun_path of Linux, less its closing zero
_log = logging.getLogger(__name__)

OnFrames = Callable[["Link", list[Frame]], None]
OnLink = Callable[["Link"], None]
OnLost = Callable[["Link"], None]


def hello(role: Role, name: str, epoch: int = 0) -> Hello:
    """The Hello of this process, its first frame on a new link; ``epoch``: of a controller by its lease."""
    return Hello(
        role=role, name=name, pid=os.getpid(), boot_id=boot_id(), protocol=PROTOCOL, epoch=epoch,
        version=__version__,
    )  # fmt: skip


def why_strange(own: Hello, peer: Hello) -> str:
    """Why a process that says ``own`` does not speak with one that says ``peer``; "" if it does.

    Who is refused has got our Hello, finds the same by it, and says so in its own log.
    """
    least, most = max(own.protocol - 1, FIRST_NEIGHBOUR), own.protocol + 1
    if least <= peer.protocol <= most:
        return ""
    return (
        f"{peer.role} {peer.name!r:.80} is of clockwork-serve {peer.version!r:.20} and speaks protocol "
        f"{peer.protocol}, expected {least} to {most}, as {own.version!r} here understands; restart all "
        "processes from one installation, or upgrade them by one protocol at a time"
    )


@lru_cache(maxsize=1)
def boot_id() -> str:
    """An id that is equal in two processes exactly if both read the same monotonic clock."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    try:
        # A container may have a clock of its own.
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:  # a kernel without time namespaces
        return boot


def retry_s(tries: int) -> float:
    """How long to wait before another attempt to reach a controller on this host, after so many in vain."""
    return QUICK_RETRY_S if tries < QUICK_TRIES else RETRY_S


async def connect(
    path: Path, hello: Hello, on_frames: OnFrames, on_lost: OnLost, fence: Fence | None = None
) -> Link:
    """Connect to the process that listens on ``path``; returns the link once both have sent their Hello.

    ``on_lost`` is called at most once, and never after :meth:`Link.close`. ``fence`` is that of this process,
    where a controller listens: one that it bars is refused, and its link is lost once another link has joined
    a later one. Raises :class:`TransportError` if no process listens there, or the peer is refused.
    """
    check_path(path)
    loop = asyncio.get_running_loop()
    handshake = Handshake()
    link = Link(hello, handshake.handlers(on_frames, on_lost), fence)
    try:
        await loop.create_unix_connection(lambda: link, os.fspath(path))
    except OSError as error:
        raise TransportError(
            f"cannot connect to {path}: {error.strerror or error}; is its process up?"
        ) from None
    await handshake.done(link)
    return link


class Handshake:
    """Waits until a link that connects has been accepted."""

    def __init__(self) -> None:
        self._error: asyncio.Future[TransportError | None] = asyncio.get_running_loop().create_future()

    def handlers(self, on_frames: OnFrames, on_lost: OnLost) -> Handlers:
        """The callbacks of that link."""
        return Handlers(lambda link: self._end(None), on_frames, on_lost, lambda _, error: self._end(error))

    async def done(self, link: Link) -> None:
        """Return once it is accepted; cancelling closes it. Raises :class:`TransportError`."""
        try:
            error = await self._error
        except asyncio.CancelledError:
            link.close()
            raise
        if error is not None:
            raise error

    def _end(self, error: TransportError | None) -> None:
        if not self._error.done():
            self._error.set_result(error)


async def listen(path: Path, hello: Hello, on_link: OnLink, on_frames: OnFrames, on_lost: OnLost) -> Listener:
    """Accept links on a new unix socket at ``path``, mode 0600; a stale socket there is replaced.

    ``on_link`` is called once a peer's Hello was accepted, before any of its frames arrive.
    """
    check_path(path)
    links: set[Link] = set()

    def lost(link: Link) -> None:
        links.discard(link)
        on_lost(link)

    def refused(link: Link, error: TransportError) -> None:
        links.discard(link)
        _log.warning("refused a peer: %s", error)

    def accept() -> Link:
        link = Link(hello, Handlers(on_link, on_frames, lost, refused, links.discard))
        links.add(link)
        return link

    server = await asyncio.get_running_loop().create_unix_server(accept, sock=bind(path))
    return Listener(path, server, links)


class Listener:
    """A listening socket and the links accepted on it."""

    def __init__(self, path: Path, server: asyncio.AbstractServer, links: set[Link]) -> None:
        self.path = path
        self._server = server
        self._links = links

    def close(self) -> None:
        """Stop listening, and close all accepted links."""
        self._server.close()
        for link in tuple(self._links):
            link.close()
        self.path.unlink(missing_ok=True)


@dataclass(slots=True, frozen=True)
class Handlers:
    """The callbacks of a link.

    ``on_ready`` is called after the handshake, or ``on_refused`` if it failed; then ``on_frames`` for frames
    received, and ``on_lost`` or, after :meth:`Link.close`, ``on_closed`` at the end.
    """

    on_ready: OnLink
    on_frames: OnFrames
    on_lost: OnLost
    on_refused: Callable[[Link, TransportError], None]
    on_closed: OnLink = lambda link: None


class Link(asyncio.BufferedProtocol):
    """One side of a link. All methods are for the loop's own thread."""

    samples = SAMPLES_MAX  # how many samples of the peer's clock are used

    def __init__(self, own: Hello, handlers: Handlers, fence: Fence | None = None) -> None:
        self.own = own
        self.lost_because = ""
        self._handlers = handlers
        self._fence = fence or Fence()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None  # None before the connection and after its end
        self._reader = FrameReader()
        self._writer = FrameWriter()
        self._flush_due = False
        self._peer: Hello | None = None
        self._epoch = 0  # the peer's
        self._alignment = ClockAlignment(same_clock=True)
        self._exchanges = 0
        self._open = False  # from the end of the handshake to the end of the link
        self._timer: asyncio.TimerHandle | None = None

    @property
    def peer(self) -> Hello:
        """The peer's Hello."""
        assert self._peer is not None, "the peer is known once the link was handed out"
        return self._peer

    @property
    def offset_ns(self) -> int:
        """Our clock minus the peer's, in ns."""
        return self._alignment.offset_ns

    @property
    def is_open(self) -> bool:
        """Whether frames can still be sent."""
        return self._open

    def send(self, frame: Frame) -> None:
        """Queue one frame; it is written at the end of this turn of the loop. Dropped if the link is closed.

        Raises :class:`TransportError` if the frame is larger than the protocol allows.
        """
        if self._transport is None:
            return
        if not self._alignment.same_clock and self.own.role is not Role.CONTROLLER:
            frame = to_controller(frame, self._alignment.offset_ns)
        self._writer.add(frame)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write the queued frames now."""
        self._flush_due = False
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if pending := self._writer.take():
            try:
                transport.write(pending)
            except RuntimeError:  # uvloop closed it without a word: who connected gave up meanwhile
                return
            if (unsent := transport.get_write_buffer_size()) > UNSENT_BYTES_MAX:
                self.abort(f"it does not read: {unsent} bytes wait for it")

    def close(self) -> None:
        """Close after the queued frames were written; ``on_lost`` is not called."""
        self.flush()
        transport = self._transport
        self._end()
        if transport is not None:
            self._handlers.on_closed(self)
            transport.close()

    def abort(self, why: str) -> None:
        """Close at once, because the peer broke the protocol; ``on_lost`` is called."""
        transport = self._transport
        if transport is not None:
            self._lose(why)
            transport.abort()

    # Called by the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Check the peer's user, and send our Hello."""
        self._transport = cast("asyncio.Transport", transport)
        self._timer = self._loop.call_later(HANDSHAKE_S, self.abort, f"no Hello within {HANDSHAKE_S:.0f} s")
        if why := self._why_refused(transport):
            self.abort(why)
            return
        self.send(self.own)

    def get_buffer(self, sizehint: int) -> memoryview:
        """The buffer for the next read."""
        return self._reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Decode what was received, and deliver its frames."""
        frames: list[Frame] = []
        broken = ""
        try:
            self._reader.received(nbytes, frames)
        except TransportError as error:
            broken = str(error)
        if frames and self._transport is not None:
            self._deliver(frames)
        if broken:
            self.abort(broken)

    def eof_received(self) -> bool:
        """Have the loop close the connection: the peer has closed its side."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the lost connection."""
        if self._transport is not None:
            self._lose(f"connection lost: {exc}" if exc else "it closed the connection")

    # Private.

    def _why_refused(self, transport: asyncio.BaseTransport) -> str:
        """Why the peer is refused: it runs as another user; empty if it is accepted."""
        uid = peer_uid(transport)
        return "" if uid == os.geteuid() else f"it runs as user id {uid}, expected {os.geteuid()}"

    def _deliver(self, frames: list[Frame]) -> None:
        if self._peer is None:
            self._on_hello(frames.pop(0))
        if not self._alignment.same_clock:
            frames = self._inbound(frames)
        if frames and self._open:
            if self._fence.bars(self._epoch):
                self.abort(self._why_barred())
            else:
                self._handlers.on_frames(self, frames)

    def _why_barred(self) -> str:
        return f"it was deposed: its epoch is {self._epoch}, and one of epoch {self._fence.epoch} leads"

    def _on_hello(self, frame: Frame) -> None:
        if not isinstance(frame, Hello):
            self.abort(f"its first frame is {type(frame).__name__}, expected Hello")
        elif why := why_strange(self.own, frame):
            self.abort(why)
        else:
            self._peer = frame
            self._epoch = frame.epoch
            same_clock = frame.boot_id == self.own.boot_id
            self._alignment = ClockAlignment(same_clock=same_clock, samples=self.samples)
            if self._alignment.same_clock:
                self._opened()
            else:
                self._ping()

    def _opened(self) -> None:
        assert self._timer is not None and not self._open
        if self._fence.bars(self._epoch):
            self.abort(self._why_barred())
            return
        self._timer.cancel()
        self._timer = None
        self._fence.join(self._epoch)
        self._open = True
        self._handlers.on_ready(self)
        if not self._alignment.same_clock and self._transport is not None:
            self._timer = self._loop.call_later(PING_EVERY_S, self._ping_again)

    def _inbound(self, frames: list[Frame]) -> list[Frame]:
        """Handle pings, and return the other frames with their instants on our clock."""
        received_ns = time.monotonic_ns()
        alignment = self._alignment
        rest: list[Frame] = []
        for frame in frames:
            if isinstance(frame, Ping):
                alignment.observe(frame.sent_ns, received_ns, frame.least_delta_ns)
                self._exchanges += 1
                if self._exchanges <= ALIGN_EXCHANGES:
                    self._ping()
                # A peer sends frames only after the ping by which we are aligned, so none arrives before.
                if alignment.aligned and not self._open:
                    self._opened()
            elif self.own.role is Role.CONTROLLER:
                rest.append(frame)
            else:
                rest.append(to_local(frame, alignment.offset_ns, alignment.error_ns))
        return rest

    def _ping(self) -> None:
        self.flush()
        self.send(Ping(sent_ns=time.monotonic_ns(), least_delta_ns=self._alignment.least_delta_ns))
        self.flush()

    def _ping_again(self) -> None:
        self._ping()
        if self._transport is not None:
            self._timer = self._loop.call_later(PING_EVERY_S, self._ping_again)

    def _lose(self, why: str) -> None:
        who = (
            "a peer"
            if self._peer is None
            else f"{self._peer.role} {self._peer.name!r} (pid {self._peer.pid})"
        )
        self.lost_because = f"{who}: {why}"
        was_open = self._open
        self._end()
        if was_open:
            self._handlers.on_lost(self)
        else:
            self._handlers.on_refused(self, TransportError(self.lost_because))

    def _end(self) -> None:
        self._open = False
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def is_own_user(transport: asyncio.BaseTransport) -> bool:
    """Whether the peer of a unix socket is a process of this process's user."""
    return peer_uid(transport) == os.geteuid()


def peer_uid(transport: asyncio.BaseTransport) -> int:
    """The user of the peer of a unix socket."""
    connected: Any = transport.get_extra_info("socket")
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid


def check_path(path: Path) -> None:
    """Raise :class:`TransportError` if a path is too long for a socket."""
    length = len(os.fsencode(path))
    if length > _PATH_BYTES_MAX:
        raise TransportError(
            f"socket path {path} has {length} bytes, expected at most {_PATH_BYTES_MAX}; "
            "choose a shorter run directory (XDG_RUNTIME_DIR or TMPDIR)"
        )


def bind(path: Path) -> socket.socket:
    """A unix socket at ``path``, mode 0600, in place of a stale one. Raises :class:`TransportError`."""
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    except FileNotFoundError:
        pass
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(os.fspath(path))
        # No process can connect before listen(), so the wider mode until here does no harm.
        path.chmod(0o600)
    except OSError as error:
        bound.close()
        raise TransportError(f"cannot listen on {path}: {error.strerror}") from None
    return bound
