"""Links between machines: TCP and TLS with certificates on both sides, and tensors cut into pieces."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgspec
from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Call,
    Frame,
    Hello,
    Infer,
    Piece,
    Ping,
    Result,
    Status,
    TensorRef,
    Tensors,
)
from clockwork_serve.serve.accepting import Acceptor, Strangers, network_of
from clockwork_serve.serve.gateway.tls import reason_of
from clockwork_serve.serve.remote.config import PROTOCOL_NAME, ClusterContext
from clockwork_serve.serve.shm import HEADER_BYTES, NO_EPOCH, Region, memory_of, write_epoch
from clockwork_serve.serve.transport import Handlers, Handshake, Link, OnFrames, OnLink, OnLost
from clockwork_serve.units import KIB, NS_PER_S, align

# ------------------------------------------------------------
# Links between machines: TCP and TLS, both sides with certificates of one authority.
#
# They work as links on one host do, and more: a link over which nothing is received for a while is lost, and
# tensors and artefacts wait for small frames.


SILENCE_S: Final = 2.0
"""After how long without a byte a link is lost, by default."""
BEATS: Final = 4
"""How many pings are sent within that time."""
PIECE_BYTES: Final = 128 * KIB
"""The most bytes of tensors and artefacts in one frame: a millisecond of a fast network."""
CONNECT_S: Final = 5.0
"""The time limit for connecting: TCP and TLS together."""
SHAKING_MAX: Final = 256
"""The most concurrent handshakes, for these peers are not authenticated yet: of networks from which no
machine has joined, and of those from which one has."""
MET_MAX: Final = 1024
"""Networks from which machines have joined, and are remembered."""
SAID_AGAIN_S: Final = 600.0
"""The same warning about the same address is not logged again for this long."""
_CROWDED: Final = "too many handshakes at once"
_TCP_USER_TIMEOUT: Final = 18
_TCP_NOTSENT_LOWAT: Final = 25

_log = logging.getLogger(__name__)


class MachineLink(Link):
    """A link to another machine. ``at`` is the peer's address, for logs."""

    samples = 32
    """Those of the last ten seconds: undisciplined clocks drift apart by up to 50 us in each second."""

    def __init__(self, own: Hello, handlers: Handlers, silence_s: float) -> None:
        super().__init__(own, handlers)
        self.at = "?"
        self._silence_s = silence_s
        self._heard_s = self._loop.time()
        self._beat: asyncio.TimerHandle | None = None
        self._full = False  # more was written than the loop likes to hold
        # Frames that may wait: tensors before artefacts. The first of each queue is being sent.
        self._paced: tuple[deque[Iterator[Frame]], deque[Iterator[Frame]]] = (deque(), deque())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timeout, set options of the socket, and go on as on one host."""
        self._heard_s = self._loop.time()
        address = transport.get_extra_info("peername") or ("?", 0)
        self.at = f"{address[0]}:{address[1]}"
        _tune(transport.get_extra_info("socket"), self._silence_s)
        super().connection_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        """Restart the timeout: any byte shows that the peer lives."""
        self._heard_s = self._loop.time()
        super().buffer_updated(nbytes)

    def queue(self, frames: Iterator[Frame], *, bulk: bool = False) -> None:
        """Queue frames, to be sent as fast as the network accepts them; ``bulk`` ones after all others."""
        self._paced[bulk].append(frames)
        self._pump()

    @property
    def all_sent(self) -> bool:
        """Whether no queued frame waits."""
        return not any(self._paced)

    def pause_writing(self) -> None:
        """Pause the queues: the write buffer is full."""
        self._full = True

    def resume_writing(self) -> None:
        """Resume the queues: the write buffer has drained."""
        self._full = False
        self._pump()

    def _pump(self) -> None:
        for waiting in self._paced:
            while waiting and not self._full and self.is_open:
                frame = next(waiting[0], None)
                if frame is None:
                    waiting.popleft()
                    continue
                self.send(frame)
                self.flush()

    def _why_refused(self, transport: asyncio.BaseTransport) -> str:
        shown: Any = transport.get_extra_info("ssl_object")
        if shown is None or not shown.getpeercert():
            return "it showed no certificate"
        if shown.selected_alpn_protocol() != PROTOCOL_NAME:
            return f"it does not speak {PROTOCOL_NAME}"
        return ""

    def _opened(self) -> None:
        super()._opened()
        if self.is_open:
            self._listen_for_silence()

    def _listen_for_silence(self) -> None:
        silent_s = self._loop.time() - self._heard_s
        if silent_s >= self._silence_s:
            self.abort(f"silent for {silent_s:.1f} s")
        elif self.is_open:
            self._ping()
            self._beat = self._loop.call_later(self._silence_s / BEATS, self._listen_for_silence)

    def _deliver(self, frames: list[Frame]) -> None:
        if self._peer is None:
            self._on_hello(frames.pop(0))
        if self._alignment.same_clock:
            # Between processes with one clock, pings only restart the timeout.
            frames = [frame for frame in frames if type(frame) is not Ping]
        if frames and self._transport is not None:
            super()._deliver(frames)

    def _end(self) -> None:
        super()._end()
        for waiting in self._paced:
            waiting.clear()
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None


async def connect_machine(
    address: tuple[str, int], context: ssl.SSLContext, own: Hello, on_frames: OnFrames, on_lost: OnLost,
    silence_s: float = SILENCE_S,
) -> MachineLink:  # fmt: skip
    """Connect to the bridge at ``address``; as :func:`~clockwork_serve.serve.transport.connect`."""
    host, port = address
    loop = asyncio.get_running_loop()
    handshake = Handshake()
    link = MachineLink(own, handshake.handlers(on_frames, on_lost), silence_s)
    try:
        async with asyncio.timeout(CONNECT_S):
            await loop.create_connection(lambda: link, host, port, ssl=context, server_hostname=host)
    except (TimeoutError, OSError) as error:
        why = f"nothing within {CONNECT_S:g} s" if isinstance(error, TimeoutError) else reason_of(error)
        raise TransportError(f"cannot connect to {host}:{port}: {why}") from None
    await handshake.done(link)
    return link


class MachineListener:
    """Accepts links on one port. ``on_link`` is called once a peer's Hello was accepted."""

    def __init__(
        self, context: ClusterContext, own: Hello, on_link: OnLink, on_frames: OnFrames, on_lost: OnLost,
        silence_s: float = SILENCE_S,
    ) -> None:  # fmt: skip
        self._context = context
        self._own = own
        self._on_link = on_link
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._links: set[Link] = set()
        # Handshakes in progress, where nobody has joined from before, and where somebody has: a machine that
        # comes back finds room.
        self._shaking = Strangers[asyncio.Task[None]]()
        self._shaking_again = Strangers[asyncio.Task[None]]()
        self._met: dict[str, None] = {}  # networks of machines, the last that joined last
        self._said: dict[str, float] = {}  # warnings, and when each was logged
        self._acceptor: Acceptor | None = None

    def listen(self, listening: socket.socket) -> None:
        """Accept links on this socket, which is closed with the listener."""
        self._acceptor = Acceptor(listening, self._accepted)

    def close(self) -> None:
        """Stop listening, and close all accepted links."""
        if self._acceptor is not None:
            self._acceptor.close()
        for shaking in (*self._shaking, *self._shaking_again):
            shaking.cancel()
        for link in tuple(self._links):
            link.close()

    def _accepted(self, connected: socket.socket, host: str) -> None:
        network = network_of(host)
        table = self._shaking_again if network in self._met else self._shaking
        now_s = self._loop.time()
        if len(table) >= SHAKING_MAX:
            displaced = table.displace(network, now_s)
            if displaced is None:
                connected.close()
                self._complain(host, _CROWDED)
                return
            displaced.cancel()
            self._complain(displaced.get_name(), _CROWDED)
        shaking = self._loop.create_task(self._shake(connected, host, network), name=host)
        table.add(shaking, network, now_s)
        shaking.add_done_callback(table.discard)
        shaking.add_done_callback(partial(_close_if_cancelled, connected))

    async def _shake(self, connected: socket.socket, host: str, network: str) -> None:
        link = MachineLink(
            self._own,
            Handlers(self._on_link, self._on_frames, self._lost, self._refused, self._links.discard),
            self._silence_s,
        )
        self._links.add(link)
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._loop.connect_accepted_socket(lambda: link, connected, ssl=self._context.now())
        except (OSError, TimeoutError, asyncio.CancelledError) as error:
            self._links.discard(link)
            if isinstance(error, asyncio.CancelledError):
                raise
            with suppress(OSError):
                connected.close()
            why = "no handshake in time" if isinstance(error, TimeoutError) else reason_of(error)
            self._complain(host, why)
            return
        self._met.pop(network, None)
        if len(self._met) >= MET_MAX:
            del self._met[next(iter(self._met))]
        self._met[network] = None

    def _lost(self, link: Link) -> None:
        self._links.discard(link)
        self._on_lost(link)

    def _refused(self, link: Link, error: TransportError) -> None:
        self._links.discard(link)
        assert isinstance(link, MachineLink)
        self._complain(link.at.rpartition(":")[0], str(error))

    def _complain(self, host: str, why: str) -> None:
        """Log a warning, unless it was logged lately: repeated attempts may not fill the disk."""
        now_s, said = time.monotonic(), f"{host}: {why}"
        if now_s - self._said.get(said, -SAID_AGAIN_S) < SAID_AGAIN_S:
            return
        if len(self._said) >= 1000:
            self._said.clear()
        self._said[said] = now_s
        _log.warning("turned a machine away: %s", said)


def _close_if_cancelled(connected: socket.socket, shaking: asyncio.Task[None]) -> None:
    """Close a connection, whether its handshake had begun or not."""
    if shaking.cancelled():
        with suppress(OSError):
            connected.close()


def _tune(connected: Any, silence_s: float) -> None:
    """Send without delay, keep little unsent data in the kernel, and time out without acknowledgements."""
    with suppress(OSError, AttributeError):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, PIECE_BYTES)
        connected.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, round(2000 * silence_s))


# ------------------------------------------------------------
# The form of a call's tensors between machines: one run of bytes, cut into pieces.
#
# Offsets of references count from the start of that run on the network, and from the start of a region at
# either end.


encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Tensors).decode


def decode(encoded: bytes) -> Tensors:
    """The inverse of :data:`encode`. Raises :class:`TransportError` if ``encoded`` is malformed."""
    try:
        return _decode(encoded)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: a text that is no UTF-8
        raise TransportError(f"tensors cannot be read: {error}") from None


def packed(refs: Sequence[TensorRef]) -> tuple[TensorRef, ...]:
    """References to the same tensors, laid out one after the other from offset 0, each aligned."""
    at, found = 0, []
    for ref in refs:
        found.append(moved(ref, at))
        at = align(at + ref.nbytes)
    return tuple(found)


def moved(ref: TensorRef, offset: int) -> TensorRef:
    """A reference to the same tensor at another offset."""
    return TensorRef(name=ref.name, datatype=ref.datatype, shape=ref.shape, offset=offset, nbytes=ref.nbytes)


def run_bytes(refs: Sequence[TensorRef]) -> int:
    """The length of a packed run."""
    return max([align(ref.offset + ref.nbytes) for ref in refs], default=0)


def on_the_way(refs: tuple[TensorRef, ...], output_bytes: int = 0) -> bytes:
    """An encoded description of tensors in a run: it names no region."""
    return encode(
        Tensors(region="", epoch=0, header_offset=0, refs=refs, output_offset=0, output_bytes=output_bytes)
    )


def pieces(
    refs: Sequence[TensorRef], targets: Sequence[TensorRef], memory: memoryview,
    wanted: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[int, bytes]]:  # fmt: skip
    """The tensors ``refs`` in ``memory``, as offset and bytes of each piece for ``targets``, in order.

    All but the last of a tensor have ``PIECE_BYTES``. It ends once not ``wanted``.
    """
    for ref, target in zip(refs, targets, strict=True):
        for start in range(0, ref.nbytes, PIECE_BYTES):
            if not wanted():
                return
            end = min(ref.nbytes, start + PIECE_BYTES)
            yield target.offset + start, bytes(memory[ref.offset + start : ref.offset + end])


HEADER: Final = align(HEADER_BYTES)


def placed(region: Region, tensors: Tensors, epoch: int) -> Tensors | None:
    """Room in a region for described tensors, behind a header with this epoch; None if there is none."""
    refs = packed(tensors.refs)
    nbytes = run_bytes(refs)
    place = region.allocate(HEADER + nbytes + tensors.output_bytes)
    if place is None:
        return None
    write_epoch(region.buffer, place, epoch)
    start = place + HEADER
    return Tensors(
        region=region.name, epoch=epoch, header_offset=place, output_offset=start + nbytes,
        refs=tuple([moved(ref, start + ref.offset) for ref in refs]), output_bytes=tensors.output_bytes,
    )  # fmt: skip


# ------------------------------------------------------------
# The tensors of INFERs on a remote worker: in memory of its own, until the result was sent.
#
# An INFER is posted to its lane once its inputs are complete, or when its window has closed; the lane then
# rejects it as too late.


@dataclass(slots=True)
class _Slot:
    """The memory of one INFER: a place for each call. ``inputs``: offset and length of each call's inputs."""

    region: Region
    places: list[int] = field(default_factory=list)
    inputs: list[tuple[int, int]] = field(default_factory=list)
    action: Infer | None = None  # None once it was posted
    missing: int = 0  # bytes of inputs that were not received yet
    timer: asyncio.TimerHandle | None = None

    def free(self) -> None:
        for place in self.places:
            write_epoch(self.region.buffer, place, NO_EPOCH)
            self.region.free(place)
        self.places.clear()


class MachineTensors:
    """The tensors of all INFERs of a remote worker. ``post`` hands an INFER to the lanes. For one thread."""

    def __init__(self, region_bytes: int, post: Callable[[Infer], None]) -> None:
        self._region = Region.create(region_bytes)
        self._post = post
        self._loop = asyncio.get_running_loop()
        self._epoch = 0
        self._slots: dict[int, _Slot] = {}  # of INFERs whose result was not sent yet

    @property
    def used_bytes(self) -> int:
        """Memory in use by INFERs."""
        return self._region.size - self._region.free_bytes

    def take(self, action: Infer) -> Result | None:
        """Allocate memory for an INFER, whose inputs follow; returns its result if there is no room."""
        slot = _Slot(self._region)
        calls = [self._place(call, slot) for call in action.calls]
        if not all(calls):
            slot.free()
            now_ns = time.monotonic_ns()
            return Result(
                action_id=action.action_id, device=action.device, status=Status.NO_ROOM, started_ns=now_ns,
                ended_ns=now_ns, message=f"no room among {self._region.size} bytes for its tensors",
            )  # fmt: skip
        self._slots[action.action_id] = slot
        slot.action = structs.replace(action, calls=tuple([call for call in calls if call is not None]))
        if slot.missing:
            self._wait(slot, slot.action)
        else:
            self._pass_on(slot)
        return None

    def write(self, piece: Piece) -> None:
        """Write a piece of inputs; ignored if its INFER has ended."""
        slot = self._slots.get(piece.action_id)
        if slot is None or not slot.places or not 0 <= piece.call < len(slot.inputs):
            return
        start, nbytes = slot.inputs[piece.call]
        end = piece.at + len(piece.data)
        if not 0 <= piece.at <= end <= nbytes:
            return
        slot.region.buffer[start + piece.at : start + end] = piece.data
        slot.missing -= len(piece.data)
        if slot.missing <= 0 and slot.action is not None:
            self._pass_on(slot)

    def answer(self, result: Result) -> Iterator[Frame]:
        """The frames to send for a result: outputs, then the result; the memory is freed afterwards."""
        slot = self._slots.pop(result.action_id, None)
        if slot is None:
            yield result
            return
        if slot.timer is not None:
            slot.timer.cancel()
        outputs = []
        for at, encoded in enumerate(result.outputs):
            tensors = decode(encoded)
            targets = tuple([moved(ref, ref.offset - tensors.output_offset) for ref in tensors.refs])
            outputs.append(on_the_way(targets))
            memory, grown = memory_of(tensors, slot.region), 0
            if memory is not slot.region.buffer:
                grown = run_bytes(targets)
            for offset, data in pieces(tensors.refs, targets, memory):
                yield Piece(action_id=result.action_id, call=at, at=offset, data=data, grown=grown)
        slot.free()
        yield structs.replace(result, outputs=tuple(outputs))

    def renew(self) -> None:
        """Forget all INFERs, because the link was lost; those that still run keep the old region."""
        for slot in self._slots.values():
            if slot.timer is not None:
                slot.timer.cancel()
        self._slots.clear()
        old, self._region = self._region, Region.create(self._region.size)
        old.close()

    def close(self) -> None:
        """Close the region."""
        self._region.close()

    def _place(self, call: Call, slot: _Slot) -> Call | None:
        """The call with its tensors in our memory; None if there is no room."""
        tensors = decode(call.tensors)
        self._epoch += 1
        here = placed(slot.region, tensors, self._epoch)
        if here is None:
            return None
        start = here.header_offset + HEADER
        slot.places.append(here.header_offset)
        slot.inputs.append((start, here.output_offset - start))
        slot.missing += sum([ref.nbytes for ref in tensors.refs])
        return structs.replace(call, tensors=encode(here))

    def _wait(self, slot: _Slot, action: Infer) -> None:
        left_ns = action.window.latest_ns - time.monotonic_ns()
        if left_ns < 0:
            self._pass_on(slot)
        else:
            slot.timer = self._loop.call_later(waiting_s(left_ns), self._wait, slot, action)

    def _pass_on(self, slot: _Slot) -> None:
        action, slot.action = slot.action, None
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None
        if action is not None:
            self._post(action)


def waiting_s(left_ns: int) -> float:
    """How long to wait for the end of a window, in a loop whose timers may fire half a millisecond early."""
    return min(3600.0, max(0.0, left_ns / NS_PER_S)) + 0.001
