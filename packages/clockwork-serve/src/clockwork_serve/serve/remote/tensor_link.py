"""Tensors between machines: how they are described and laid out, and a connection that carries them."""

from __future__ import annotations

import asyncio
import enum
import re
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol, cast

import msgspec

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import TensorRef, Tensors
from clockwork_serve.serve.remote.link import PIECE_BYTES, tune, why_refused
from clockwork_serve.units import KIB, TENSOR_ALIGN, align

# ------------------------------------------------------------
# The form of a call's tensors between machines: one run of bytes. Offsets of references count from its start.


encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Tensors).decode


def decode(encoded: bytes) -> Tensors:
    """The inverse of :data:`encode`. Raises :class:`TransportError` if ``encoded`` is malformed."""
    try:
        found = _decode(encoded)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: a text that is no UTF-8
        raise TransportError(f"tensors cannot be read: {error}") from None
    if found.output_bytes < 0 or any(ref.nbytes < 0 for ref in found.refs):
        raise TransportError("tensors cannot be read: they take less than no bytes")
    return found


SERVER: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*):\d{1,5}")  # the form of ``Tensors.server``


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
    """The length of a run."""
    return max([align(ref.offset + ref.nbytes) for ref in refs], default=0)


def outputs_there(refs: tuple[TensorRef, ...]) -> bytes:
    """An encoded description of outputs that were written to their request's room, from its start."""
    return encode(Tensors(region="", epoch=0, header_offset=0, refs=refs))


# ------------------------------------------------------------
# A connection for tensors: a worker's to the gateway that has them, which answers.
#
# Each message is a head of fixed size; behind DATA and LAST are bytes of tensors. These are decrypted into
# the memory where they belong, and encrypted from the memory where they are: nothing is copied on the way.


class TransferKind(enum.IntEnum):
    """What a message says."""

    READ = 1  # to a gateway: send the inputs of the slot with this epoch
    WRITE = 2  # to a gateway: outputs follow, for the slot with this epoch, which take ``at`` bytes of room
    DATA = 3  # bytes of a transfer, for byte ``at`` of its run and on; in order
    LAST = 4  # as DATA: the last of the transfer
    STOP = 5  # to a gateway: no more of that transfer is wanted
    DONE = 6  # from a gateway: all outputs are in their slot
    GONE = 7  # from a gateway: no slot has that epoch; it was freed, and may belong to another request
    FULL = 8  # from a gateway: it has no room for as many outputs
    LOST = 9  # never sent: nothing comes from there, for a reason that its source has


class TransferHead(NamedTuple):
    """A message. ``nbytes`` of data follow it; ``transfer`` is a number that the worker chose."""

    kind: int
    nbytes: int
    transfer: int
    epoch: int = 0
    at: int = 0


_HEAD: Final = struct.Struct("<IIQQQ")
_SCRATCH_BYTES: Final = 16 * KIB
"""Room for heads, and for the data of small tensors behind them; as much as one record of TLS."""

Pieces = Iterator[tuple[TransferHead, memoryview]]
"""Messages with their data, which is read from memory when the network takes it."""


class Transfers(Protocol):
    """What one end of a connection does with messages. Methods may raise :class:`TransportError`."""

    def take(self, link: TensorLink, head: TransferHead) -> None:
        """Handle a message; of one with data, check where that is to go."""

    def room(self, link: TensorLink, head: TransferHead, done: int) -> memoryview | None:
        """The memory for the data behind a head but its first ``done`` bytes; None if nobody wants it.

        It is written to at once, and asked for again.
        """

    def received(self, link: TensorLink, head: TransferHead) -> None:
        """All data behind a head was received."""

    def lost(self, link: TensorLink, why: str) -> None:
        """The connection has ended; called once, unless it was closed here."""


class TensorLink(asyncio.BufferedProtocol):
    """One end of a connection for tensors. ``at`` is the peer's address. For the loop's own thread."""

    def __init__(self, transfers: Transfers, silence_s: float) -> None:
        self.at = "?"
        self.heard_s = 0.0  # when the peer was last seen to live
        self.aborted = False  # this end has given it up
        self._transfers = transfers
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None  # None before the connection and after its end
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._end = 0  # bytes of it that were received and not understood yet
        self._head = TransferHead(0, 0, 0)  # of the data that is being received
        self._left = 0  # bytes of that which are to come
        self._waste = memoryview(b"")  # where data goes that nobody wants
        self._full = False  # more was written than the loop likes to hold
        # What is to be sent, small tensors before large ones; the first of each is being sent.
        self._queues: tuple[deque[Pieces], deque[Pieces]] = (deque(), deque())

    @property
    def is_open(self) -> bool:
        """Whether anything can still be sent."""
        return self._transport is not None

    def send(self, head: TransferHead) -> None:
        """Send a message without data, before all that is queued; dropped if the connection has ended."""
        if self._transport is not None:
            self._transport.write(_HEAD.pack(*head))

    def queue(self, pieces: Pieces, nbytes: int) -> None:
        """Send these, ``nbytes`` in all, as fast as the network takes them."""
        self._queues[nbytes > PIECE_BYTES].append(pieces)
        self._pump()

    def close(self) -> None:
        """Close without a word."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def abort(self, why: str) -> None:
        """Close at once; ``lost`` is called."""
        transport = self._transport
        if transport is not None:
            self.aborted = True
            self._lose(why)
            transport.abort()

    # Called by the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Check the peer's certificate."""
        self._transport = cast("asyncio.Transport", transport)
        address = transport.get_extra_info("peername") or ("?", 0)
        self.at = f"{address[0]}:{address[1]}"
        self.heard_s = self._loop.time()
        tune(transport, self._silence_s)
        self._transport.set_write_buffer_limits(PIECE_BYTES)
        if why := why_refused(transport):
            self.abort(why)

    def get_buffer(self, sizehint: int) -> memoryview:
        """The memory for the next bytes: where they belong, if that is known."""
        if not self._left:
            return self._scratch[self._end :]
        return self._room() or self._wasted()

    def buffer_updated(self, nbytes: int) -> None:
        """Handle what was received; the connection ends at the first message that makes no sense."""
        self.heard_s = self._loop.time()
        try:
            if self._left:
                self._left -= nbytes
                if not self._left:
                    self._transfers.received(self, self._head)
            else:
                self._end += nbytes
                self._understand()
        except TransportError as error:
            self.abort(str(error))

    def eof_received(self) -> bool:
        """Have the loop close the connection: the peer has closed its side."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end, unless it was ours."""
        if self._transport is not None:
            self._lose(f"connection lost: {exc}" if exc else "it closed the connection")

    def pause_writing(self) -> None:
        """Pause: the write buffer is full."""
        self._full = True

    def resume_writing(self) -> None:
        """Go on: the write buffer has drained, so the peer takes what it is sent."""
        self._full = False
        self.heard_s = self._loop.time()
        self._pump()

    # Private.

    def _understand(self) -> None:
        """Handle all whole messages in the scratch memory."""
        at, end = 0, self._end
        while end - at >= _HEAD.size and self._transport is not None:
            head = TransferHead._make(_HEAD.unpack_from(self._scratch, at))
            at += _HEAD.size
            has_data = head.kind in (TransferKind.DATA, TransferKind.LAST)
            if head.nbytes > (PIECE_BYTES if has_data else 0):
                raise TransportError(f"it sent {head.nbytes} bytes at once")
            self._transfers.take(self, head)
            if not has_data:
                continue
            here = min(head.nbytes, end - at)
            self._head, self._left = head, head.nbytes
            if here and (room := self._room()):
                room[:here] = self._scratch[at : at + here]
            at += here
            self._left -= here
            if not self._left:
                self._transfers.received(self, head)
        self._scratch[: end - at] = self._scratch[at:end]
        self._end = end - at

    def _room(self) -> memoryview | None:
        head = self._head
        return self._transfers.room(self, head, head.nbytes - self._left)

    def _wasted(self) -> memoryview:
        if not self._waste:
            self._waste = memoryview(bytearray(PIECE_BYTES))
        return self._waste[: self._left]

    def _pump(self) -> None:
        while self._transport is not None and not self._full:
            queue = self._queues[0] or self._queues[1]
            if not queue:
                return
            piece = next(queue[0], None)
            if piece is None:
                queue.popleft()
            else:
                head, data = piece
                packed_head = _HEAD.pack(*head)
                self._transport.writelines((packed_head, data) if data else (packed_head,))

    def _lose(self, why: str) -> None:
        self._transport = None
        for queue in self._queues:
            queue.clear()
        self._transfers.lost(self, why)


def pieces_of(
    transfer: int, memory: memoryview, refs: Sequence[TensorRef], targets: Sequence[TensorRef]
) -> Pieces:
    """Tensors in ``memory`` as messages, for the run that ``targets`` describe."""
    found = stretches(refs, targets)
    if not found:
        yield TransferHead(TransferKind.LAST, 0, transfer), memory[:0]
    for number, (offset, at, nbytes) in enumerate(found, start=1):
        for start in range(0, nbytes, PIECE_BYTES):
            end = min(nbytes, start + PIECE_BYTES)
            kind = TransferKind.LAST if end == nbytes and number == len(found) else TransferKind.DATA
            yield (
                TransferHead(kind, end - start, transfer, at=at + start),
                memory[offset + start : offset + end],
            )


def stretches(refs: Sequence[TensorRef], targets: Sequence[TensorRef]) -> list[tuple[int, int, int]]:
    """Tensors by offset, offset in their run, and length; those side by side in both, as one."""
    found: list[tuple[int, int, int]] = []
    for ref, target in zip(refs, targets, strict=True):
        if not ref.nbytes:
            continue
        if found:
            offset, at, nbytes = found[-1]
            beside = 0 <= ref.offset - offset - nbytes < TENSOR_ALIGN
            if beside and ref.offset - offset == target.offset - at:
                found[-1] = (offset, at, ref.offset + ref.nbytes - offset)
                continue
        found.append((ref.offset, target.offset, ref.nbytes))
    return found
