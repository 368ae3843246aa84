"""What a worker on another machine sends a gateway for its tensors, and what that sends back."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable

from clockwork_serve.errors import TransportError
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway.requests import Slot, Slots
from clockwork_serve.serve.remote.tensor_link import TensorLink, TransferKind, Transfers, packed
from clockwork_serve.serve.remote.tensor_server import TensorServer
from clockwork_serve.serve.remote.tensors import TensorSource, Transfer
from tests.fuzz import mutators
from tests.fuzz.engine import Target

_ROOM = 16384
_EPOCH = 7
_NUMBER = 1


class _Files:
    """Stands for the context of connections, of which none is made."""

    def now(self) -> ssl.SSLContext:
        raise AssertionError


class _Network:
    """A connection on which nothing arrives."""

    def write(self, data: bytes) -> None:
        pass

    def writelines(self, pieces: Iterable[bytes]) -> None:
        list(pieces)

    def abort(self) -> None:
        pass

    close = abort


def _hear(link: TensorLink, why: list[str], data: bytes) -> None:
    link._transport = _Network()  # type: ignore[assignment]
    at = 0
    while at < len(data) and link.is_open:
        room = link.get_buffer(-1)
        assert room, "there is always room for more"
        nbytes = min(len(room), len(data) - at)
        room[:nbytes] = data[at : at + nbytes]
        link.buffer_updated(nbytes)
        at += nbytes
    if link.aborted:
        raise TransportError(why[0])


def _beside(slots: Slots, rooms: list[tuple[int, int]]) -> bytes:
    """All memory but the rooms for outputs."""
    memory = bytearray(slots.region.buffer)
    for start, nbytes in rooms:
        memory[start : start + nbytes] = bytes(nbytes)
    return bytes(memory)


def _room(slot: Slot) -> tuple[int, int]:
    return slot.tensors.output_offset, slot.tensors.output_bytes


async def _serve(data: bytes) -> None:
    slots, why = Slots(_ROOM), list[str]()
    slot = slots.fill([InputTensor("x", "FP32", (1, 4), bytes(16))], 64)
    assert slot is not None
    slots._open[_EPOCH] = slot
    rooms, before = [_room(slot)], bytes(slots.region.buffer)
    server = TensorServer(slots, _Files(), 1.0)  # type: ignore[arg-type]
    server.complain = lambda host, said: why.append(said)  # type: ignore[method-assign]
    try:
        _hear(server.made(), why, data)
    finally:
        rooms.append(_room(slot))
        after = _beside(slots, rooms)
        slots.region.buffer[:] = before
        assert after == _beside(slots, rooms), "beyond its room"
        slots.region.check()
        server.close()
        slots.close()


class _Source(TensorSource):
    """One that is not connected again."""

    def __init__(self, why: list[str]) -> None:
        super().__init__("h:7", _Files(), 1.0, lambda source: None)  # type: ignore[arg-type]
        self.reasons = why

    def lost(self, link: TensorLink, why: str) -> None:
        self.reasons.append(why)


async def _read(data: bytes) -> None:
    slots, why, told = Slots(_ROOM), list[str](), list[TransferKind]()
    slot = slots.fill(
        [InputTensor("x", "FP32", (1, 4), bytes(16)), InputTensor("z", "INT8", (5,), b"12345")], 0
    )
    assert slot is not None
    memory = bytearray(_ROOM)
    refs = slot.tensors.refs
    source = _Source(why)
    transfers: Transfers = source
    link = TensorLink(transfers, 1.0)
    link._transport = _Network()  # type: ignore[assignment]
    source._link = link
    wanted = memoryview(memory)[1024 : 1024 + 128]
    source.begin(_NUMBER, Transfer(_EPOCH, wanted, refs, packed(refs), lambda number, how: told.append(how)))
    try:
        _hear(link, why, data)
    finally:
        assert not any(memory[:1024]) and not any(memory[1024 + 128 :]), "beyond its memory"
        assert len(told) < 2, "it ends once"
        source.close()
        slots.close()


def _tensor_server(data: bytes) -> None:
    """What a worker elsewhere sends a gateway that has one request."""
    asyncio.run(_serve(data))


def _tensor_source(data: bytes) -> None:
    """What a gateway sends a worker elsewhere that waits for the inputs of one request."""
    asyncio.run(_read(data))


TARGETS = (
    Target("tensor_server", _tensor_server, (TransportError,), mutators.raw),
    Target("tensor_source", _tensor_source, (TransportError,), mutators.raw),
)
