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
    RequestPiece,
    Result,
    Status,
    TensorRef,
    Tensors,
)
from clockwork_serve.serve.gateway.tls import reason_of
from clockwork_serve.serve.remote.tls import PROTOCOL_NAME, ClusterContext
from clockwork_serve.serve.shm import HEADER_BYTES, Region, write_epoch
from clockwork_serve.serve.transport import Handlers, Link, OnFrames, OnLink, OnLost
from clockwork_serve.units import KIB, NS_PER_S, align

# ------------------------------------------------------------
# Links between machines: TCP and TLS, both sides with certificates of one authority. It knows no message.
#
# What holds for links on one host holds here too, and more: a link that says nothing for a while is lost, and
# what is large waits for what is small.


SILENCE_S: Final = 2.0
"""Unless a setting says otherwise."""
BEATS: Final = 4
"""So many pings come in the time after which silence means that the link is lost."""
PIECE_BYTES: Final = 128 * KIB
"""Of tensors and artefacts in one frame: a millisecond of a fast network."""
CONNECT_S: Final = 5.0
"""For TCP and TLS together."""
SHAKING_MAX: Final = 64
SHAKING_EACH: Final = 8
"""Handshakes at once, of all and of one address: nobody has shown a certificate yet."""
SAID_AGAIN_S: Final = 600.0
"""How long the same complaint of the same address is not repeated."""
_TCP_USER_TIMEOUT: Final = 18
_TCP_NOTSENT_LOWAT: Final = 25

_log = logging.getLogger(__name__)


class MachineLink(Link):
    """A link to another machine. ``at`` is where that is, for logs."""

    samples = 32
    """The last ten seconds: clocks that nobody disciplines drift apart by up to 50 us in each of them."""

    def __init__(self, own: Hello, handlers: Handlers, silence_s: float) -> None:
        super().__init__(own, handlers)
        self.at = "?"
        self._silence_s = silence_s
        self._heard_s = self._loop.time()
        self._beat: asyncio.TimerHandle | None = None
        self._full = False  # more was written than the loop likes to hold
        # Frames that may wait: tensors before artefacts. A queue's first one is being sent.
        self._paced: tuple[deque[Iterator[Frame]], deque[Iterator[Frame]]] = (deque(), deque())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to listen for silence, and go on as on one host."""
        self._heard_s = self._loop.time()
        address = transport.get_extra_info("peername") or ("?", 0)
        self.at = f"{address[0]}:{address[1]}"
        _tune(transport.get_extra_info("socket"), self._silence_s)
        super().connection_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        """Whatever comes shows that the other side lives."""
        self._heard_s = self._loop.time()
        super().buffer_updated(nbytes)

    def queue(self, frames: Iterator[Frame], *, bulk: bool = False) -> None:
        """Send these one after the other as the network takes them; ``bulk`` after all that is not."""
        self._paced[bulk].append(frames)
        self._pump()

    @property
    def all_sent(self) -> bool:
        """Whether nothing queued waits any more."""
        return not any(self._paced)

    def pause_writing(self) -> None:
        """The network is slower than we are."""
        self._full = True

    def resume_writing(self) -> None:
        """It took what it had."""
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

    def _stranger(self, transport: asyncio.BaseTransport) -> str:
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
            self._break(f"silent for {silent_s:.1f} s")
        elif self.is_open:
            self._ping()
            self._beat = self._loop.call_later(self._silence_s / BEATS, self._listen_for_silence)

    def _deliver(self, frames: list[Frame]) -> None:
        if self._peer is None:
            self._greet(frames.pop(0))
        if self._alignment.same_clock:
            # They only show that the other side lives.
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
    """A link to the bridge at ``address``; as :func:`~clockwork_serve.serve.transport.connect`."""
    host, port = address
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[MachineLink] = loop.create_future()

    def refused(_: Link, error: TransportError) -> None:
        if not opened.done():
            opened.set_exception(error)

    def ready(link: Link) -> None:
        assert isinstance(link, MachineLink)
        if not opened.done():
            opened.set_result(link)

    link = MachineLink(own, Handlers(ready, on_frames, on_lost, refused), silence_s)
    try:
        async with asyncio.timeout(CONNECT_S):
            await loop.create_connection(lambda: link, host, port, ssl=context, server_hostname=host)
    except (TimeoutError, OSError) as error:
        if opened.done():
            opened.exception()  # nobody else will ask for it
        why = f"nothing within {CONNECT_S:.0f} s" if isinstance(error, TimeoutError) else reason_of(error)
        raise TransportError(f"cannot connect to {host}:{port}: {why}") from None
    try:
        return await opened
    except asyncio.CancelledError:
        link.close()
        raise


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
        self._shaking: dict[asyncio.Task[None], str] = {}  # all and only handshakes, and of which address
        self._said: dict[str, float] = {}  # complaints, and when each was logged
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    def listen(self, listening: socket.socket) -> None:
        """Begin to accept; the socket is ours from now on."""
        listening.setblocking(False)  # noqa: FBT003 - its only name
        self._socket = listening
        self._accepting = self._loop.create_task(self._accept(listening))

    def close(self) -> None:
        """Stop listening and close every link that was accepted."""
        if self._accepting is not None:
            self._accepting.cancel()
        for shaking in self._shaking:
            shaking.cancel()
        if self._socket is not None:
            self._socket.close()
        for link in tuple(self._links):
            link.close()

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connected, address = await self._loop.sock_accept(listening)
            except OSError as error:
                _log.warning("cannot accept a machine: %s", error)
                await asyncio.sleep(0.1)
                continue
            host = str(address[0])
            if len(self._shaking) >= SHAKING_MAX or list(self._shaking.values()).count(host) >= SHAKING_EACH:
                connected.close()
                self._complain(host, "too many handshakes at once")
                continue
            shaking = self._loop.create_task(self._shake(connected, host))
            self._shaking[shaking] = host
            shaking.add_done_callback(lambda done: self._shaking.pop(done, None))

    async def _shake(self, connected: socket.socket, host: str) -> None:
        link = MachineLink(
            self._own,
            Handlers(self._on_link, self._on_frames, self._lost, self._refused, self._links.discard),
            self._silence_s,
        )
        self._links.add(link)
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._loop.connect_accepted_socket(lambda: link, connected, ssl=self._context.now())
        except (OSError, TimeoutError) as error:
            self._links.discard(link)
            with suppress(OSError):
                connected.close()
            why = "no handshake in time" if isinstance(error, TimeoutError) else reason_of(error)
            self._complain(host, why)

    def _lost(self, link: Link) -> None:
        self._links.discard(link)
        self._on_lost(link)

    def _refused(self, link: Link, error: TransportError) -> None:
        self._links.discard(link)
        assert isinstance(link, MachineLink)
        self._complain(link.at.rpartition(":")[0], str(error))

    def _complain(self, host: str, why: str) -> None:
        """Log it, unless that was said lately: whoever knocks again and again fills no disk."""
        now_s, said = time.monotonic(), f"{host}: {why}"
        if now_s - self._said.get(said, -SAID_AGAIN_S) < SAID_AGAIN_S:
            return
        if len(self._said) >= 1000:
            self._said.clear()
        self._said[said] = now_s
        _log.warning("turned a machine away: %s", said)


def _tune(connected: Any, silence_s: float) -> None:
    """Send at once, keep little unsent in the kernel, and give up what nobody acknowledges."""
    with suppress(OSError, AttributeError):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, PIECE_BYTES)
        connected.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, round(2000 * silence_s))


# ------------------------------------------------------------
# How the tensors of a call travel between machines: as one run of bytes, cut into pieces. It does no I/O.
#
# References count from the start of that run on the way, and from the start of a region at either end.


encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Tensors).decode


def decode(encoded: bytes) -> Tensors:
    """What :data:`encode` made. Raises :class:`TransportError` for anything else."""
    try:
        return _decode(encoded)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: a text that is no UTF-8
        raise TransportError(f"tensors cannot be read: {error}") from None


def packed(refs: Sequence[TensorRef]) -> tuple[TensorRef, ...]:
    """The same tensors, one after the other from 0, each aligned."""
    at, found = 0, []
    for ref in refs:
        found.append(moved(ref, at))
        at = align(at + ref.nbytes)
    return tuple(found)


def moved(ref: TensorRef, offset: int) -> TensorRef:
    """The same tensor elsewhere."""
    return TensorRef(name=ref.name, datatype=ref.datatype, shape=ref.shape, offset=offset, nbytes=ref.nbytes)


def run_bytes(refs: Sequence[TensorRef]) -> int:
    """How long a packed run is."""
    return max([align(ref.offset + ref.nbytes) for ref in refs], default=0)


def on_the_way(refs: tuple[TensorRef, ...], output_bytes: int = 0) -> bytes:
    """A description that names no region."""
    return encode(
        Tensors(region="", epoch=0, header_offset=0, refs=refs, output_offset=0, output_bytes=output_bytes)
    )


def pieces(
    action_id: int, call: int, refs: Sequence[TensorRef], targets: Sequence[TensorRef], memory: memoryview,
    wanted: Callable[[], bool],
) -> Iterator[Piece]:  # fmt: skip
    """What ``refs`` name in ``memory``, for where ``targets`` say; ends early once nobody wants it."""
    for at, data in cut(refs, targets, memory, wanted):
        yield Piece(action_id=action_id, call=call, at=at, data=data)


def request_pieces(
    request_id: str, refs: Sequence[TensorRef], targets: Sequence[TensorRef], memory: memoryview,
    wanted: Callable[[], bool],
) -> Iterator[RequestPiece]:  # fmt: skip
    """The same for the tensors of a request."""
    for at, data in cut(refs, targets, memory, wanted):
        yield RequestPiece(request_id=request_id, at=at, data=data)


def cut(
    refs: Sequence[TensorRef], targets: Sequence[TensorRef], memory: memoryview, wanted: Callable[[], bool]
) -> Iterator[tuple[int, bytes]]:
    """Where each piece goes, and its bytes, in order. All but the last of a tensor are whole."""
    for ref, target in zip(refs, targets, strict=True):
        for start in range(0, ref.nbytes, PIECE_BYTES):
            if not wanted():
                return
            end = min(ref.nbytes, start + PIECE_BYTES)
            yield target.offset + start, bytes(memory[ref.offset + start : ref.offset + end])


# ------------------------------------------------------------
# Tensors of INFERs on a worker far from their gateway: in memory of its own, until the result is away.
#
# An INFER is passed on once its inputs are there, or when its window has closed; its lane then refuses it.


_HEADER = align(HEADER_BYTES)


@dataclass(slots=True)
class _Slot:
    """One INFER's memory: a place for each call. ``inputs`` are where each one's are, and how long."""

    region: Region
    places: list[int] = field(default_factory=list)
    inputs: list[tuple[int, int]] = field(default_factory=list)
    action: Infer | None = None  # until it is passed on
    missing: int = 0  # bytes of inputs that are not there yet
    timer: asyncio.TimerHandle | None = None

    def free(self) -> None:
        for place in self.places:
            self.region.free(place)
        self.places.clear()


class MachineTensors:
    """For one loop's thread. ``post`` passes an INFER on."""

    def __init__(self, region_bytes: int, post: Callable[[Infer], None]) -> None:
        self._region = Region.create(region_bytes)
        self._post = post
        self._loop = asyncio.get_running_loop()
        self._epoch = 0
        self._slots: dict[int, _Slot] = {}  # of all and only INFERs whose result is not away

    @property
    def used_bytes(self) -> int:
        """Memory that INFERs take now."""
        return self._region.size - self._region.free_bytes

    def take(self, action: Infer) -> Result | None:
        """An INFER came, and its inputs will; its result if there is no room for them."""
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
        """Inputs came; of an INFER that has ended they are of no use."""
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
        """What to send for a result: outputs, then itself; the memory is free afterwards."""
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
            memory = slot.region.buffer
            yield from pieces(result.action_id, at, tensors.refs, targets, memory, lambda: True)
        slot.free()
        yield structs.replace(result, outputs=tuple(outputs))

    def renew(self) -> None:
        """The link is gone: leave the memory to what still runs, and take other."""
        for slot in self._slots.values():
            if slot.timer is not None:
                slot.timer.cancel()
        self._slots.clear()
        old, self._region = self._region, Region.create(self._region.size)
        old.close()

    def close(self) -> None:
        """Give the memory up."""
        self._region.close()

    def _place(self, call: Call, slot: _Slot) -> Call | None:
        """The call with its tensors in our memory; None if there is no room."""
        tensors, region = decode(call.tensors), slot.region
        nbytes = run_bytes(tensors.refs)
        place = region.allocate(_HEADER + nbytes + tensors.output_bytes)
        if place is None:
            return None
        self._epoch += 1
        write_epoch(region.buffer, place, self._epoch)
        start = place + _HEADER
        slot.places.append(place)
        slot.inputs.append((start, nbytes))
        slot.missing += sum([ref.nbytes for ref in tensors.refs])
        here = Tensors(
            region=region.name, epoch=self._epoch, header_offset=place, output_offset=start + nbytes,
            refs=tuple([moved(ref, start + ref.offset) for ref in packed(tensors.refs)]),
            output_bytes=tensors.output_bytes,
        )  # fmt: skip
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
    """How long to wait for the end of a window, in a loop whose timers may ring half a millisecond early."""
    return min(3600.0, max(0.0, left_ns / NS_PER_S)) + 0.001
