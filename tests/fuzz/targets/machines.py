"""What a machine that was let in tells the bridge, and what a server tells a gateway elsewhere."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Answer,
    Cancel,
    Frame,
    Outcome,
    Release,
    Request,
    RequestPiece,
    Tensors,
    Undelivered,
)
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway.requests import Slot, Slots
from clockwork_serve.serve.remote.bridge import FarRequests
from clockwork_serve.serve.remote.gateway import FarController
from clockwork_serve.serve.transport import FrameReader
from tests.fuzz import mutators
from tests.fuzz.engine import Target

_ROOM = 16384
_SLOTS = Slots(_ROOM)


def _frames(data: bytes) -> Iterator[Frame]:
    """Frames one after the other, as far as they can be read; their lengths are another parser's."""
    at = 0
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, at)
        whole, frames = data[at : at + 4 + length], list[Frame]()
        at += 4 + length
        if at > len(data):
            return
        reader = FrameReader()
        reader.room()[: len(whole)] = whole
        reader.received(len(whole), frames)
        yield from frames


def _far_requests(data: bytes) -> None:
    """What a gateway elsewhere sends, and what the controller says to it."""
    requests = FarRequests(_ROOM)
    try:
        for frame in _frames(data):
            match frame:
                case Request():
                    requests.take(frame)
                case RequestPiece():
                    requests.write(frame)
                case Cancel():
                    requests.cancel(frame.request_id)
                case Answer():
                    list(requests.answer(frame))
                case Release():
                    requests.release(frame.request_id)
                case _:
                    pass
            requests.region.check()
    finally:
        requests.close()


class _Network:
    """A link on which nothing leaves."""

    is_open = True
    lost_because = "cut off"

    def __init__(self) -> None:
        self.ended = False

    def send(self, frame: Frame) -> None:
        pass

    def queue(self, frames: Iterator[Frame]) -> None:
        list(frames)

    def abort(self, why: str) -> None:
        assert why
        self.ended = True


def _beside(rooms: list[Slot]) -> bytes:
    """All memory but the room for outputs."""
    memory = bytearray(_SLOTS.region.buffer)
    for room in (slot.tensors for slot in rooms):
        memory[room.output_offset : room.output_offset + room.output_bytes] = bytes(room.output_bytes)
    return bytes(memory)


async def _hear(data: bytes) -> None:
    told: list[Frame] = []
    network = _Network()
    slot = _SLOTS.fill([InputTensor("x", "FP32", (1, 4), bytes(16))], 64)
    assert slot is not None
    rooms = [slot]
    before = bytes(_SLOTS.region.buffer)

    def grow(request_id: str, nbytes: int) -> Tensors | None:
        larger = _SLOTS.grow(rooms[-1], nbytes) if request_id == "g-1" else None
        rooms.extend([] if larger is None else [larger])
        return larger and larger.tensors

    controller = FarController(told.extend, lambda why: None, grow)
    controller._link = network  # type: ignore[assignment]
    controller.send(
        Request(request_id="g-1", gateway="g", model="m/1", arrival_ns=0, deadline_ns=1, tensors=slot.encoded)
    )
    try:
        for frame in _frames(data):
            if not network.ended:
                controller.on_frames(network, [frame])  # type: ignore[arg-type]
        assert not any(isinstance(frame, RequestPiece) for frame in told)
        # A gateway takes the first end of a request; another is of one that is not open.
        ends = [one for one in told if isinstance(one, Answer | Undelivered) and one.request_id == "g-1"]
        if ends and isinstance(ends[0], Answer) and ends[0].outcome is Outcome.OK and ends[0].outputs:
            rooms[-1].outputs(ends[0].outputs)
        after = _beside(rooms)
        _SLOTS.region.buffer[:] = before
        assert after == _beside(rooms), "beyond its room"
    finally:
        _SLOTS.free(rooms[-1])


def _far_answers(data: bytes) -> None:
    """What a server sends a gateway elsewhere that waits for one answer."""
    asyncio.run(_hear(data))


_MUTATOR = mutators.framed(mutators.as_msgpack)
TARGETS = (
    Target("far_requests", _far_requests, (TransportError,), _MUTATOR),
    Target("far_answers", _far_answers, (TransportError,), _MUTATOR),
)
