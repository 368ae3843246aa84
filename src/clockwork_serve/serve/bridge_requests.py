"""Requests of one gateway on another machine: their tensors, in memory here that workers map.

A request is passed on once its inputs are here. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Answer,
    Frame,
    Outcome,
    Request,
    RequestPiece,
    TensorRef,
    Tensors,
    Unheard,
)
from clockwork_serve.serve.piece_layout import (
    decode,
    encode,
    moved,
    on_the_way,
    packed,
    request_pieces,
    run_bytes,
)
from clockwork_serve.serve.region import HEADER_BYTES, Region, write_epoch
from clockwork_serve.units import align

NO_EPOCH: Final = 0
"""What the header of memory that was given back says; no request has it."""
_HEADER: Final = align(HEADER_BYTES)


@dataclass(slots=True)
class _Open:
    """One request. Inputs have come as far as ``here`` of ``inputs_end``, from where they start.

    ``request`` waits for its inputs; it is None once it was passed on. Its memory is given back once its
    answer was ``sent`` with all outputs, and workers have ``released`` it.
    """

    place: int
    start: int
    inputs_end: int
    tensors: Tensors
    request: Request | None
    here: int = 0
    sent: bool = False
    released: bool = False


class Requests:
    """For one thread."""

    def __init__(self, region_bytes: int) -> None:
        self.region = Region.create(region_bytes)
        self._epoch = NO_EPOCH
        self._open: dict[str, _Open] = {}  # all and only those that have memory here

    def __len__(self) -> int:
        return len(self._open)

    def take(self, request: Request) -> Request | Unheard | None:
        """A request came: what to pass on, or to say if there is no room; None while inputs are to come.

        Raises :class:`TransportError` for one that no gateway sends.
        """
        request_id = request.request_id
        if request_id in self._open:
            raise TransportError(f"it sent request {request_id} twice")
        tensors = _described(request)
        refs = packed(tensors.refs)
        nbytes = run_bytes(refs)
        place = self.region.allocate(_HEADER + nbytes + tensors.output_bytes)
        if place is None:
            size = self.region.size
            why = f"no room among {size} bytes at the server for the tensors of one more request"
            return Unheard(request_id=request_id, why=why)
        self._epoch += 1
        write_epoch(self.region.buffer, place, self._epoch)
        start = place + _HEADER
        here = Tensors(
            region=self.region.name, epoch=self._epoch, header_offset=place, output_offset=start + nbytes,
            refs=tuple([moved(ref, start + ref.offset) for ref in refs]), output_bytes=tensors.output_bytes,
        )  # fmt: skip
        inputs_end = max([ref.offset + ref.nbytes for ref in refs if ref.nbytes], default=0)
        found = structs.replace(request, tensors=encode(here))
        opened = self._open[request_id] = _Open(place, start, inputs_end, here, found)
        return self._complete(opened)

    def write(self, piece: RequestPiece) -> Request | None:
        """Inputs came; the request to pass on, if they were the last.

        Raises :class:`TransportError` unless they are the next. Those of a request that ended are of no use.
        """
        opened = self._open.get(piece.request_id)
        if opened is None:
            return None
        end = piece.at + len(piece.data)
        if opened.request is None or piece.at != align(opened.here) or end > opened.inputs_end:
            raise TransportError(
                f"it sent inputs of {piece.request_id} from {piece.at} to {end}; expected them from "
                f"{align(opened.here)} to {opened.inputs_end} at most"
            )
        self.region.buffer[opened.start + piece.at : opened.start + end] = piece.data
        opened.here = end
        return self._complete(opened)

    def cancel(self, request_id: str) -> Unheard | None:
        """The client went away: what to say if the request was not passed on, and is gone now."""
        opened = self._open.get(request_id)
        if opened is None or opened.request is None:
            return None
        self._free(request_id, opened)
        return Unheard(request_id=request_id)

    def answer(self, answer: Answer) -> Iterator[Frame]:
        """What to send for an answer: its outputs, then itself."""
        opened = self._open.get(answer.request_id)
        if opened is None:
            yield answer
            return
        opened.released |= answer.release
        outputs = b""
        if answer.outputs:
            refs = _outputs(opened.tensors, answer)
            if refs is None:
                message = "its worker wrote outputs elsewhere than in the room for them"
                answer = structs.replace(answer, outcome=Outcome.FAILED, message=message)
            else:
                targets = tuple([moved(ref, ref.offset - opened.tensors.output_offset) for ref in refs])
                memory, outputs = self.region.buffer, on_the_way(targets)
                yield from request_pieces(answer.request_id, refs, targets, memory, lambda: True)
        opened.sent = True
        self._settle(answer.request_id, opened)
        # Whatever workers still touch is here: the gateway's own memory is free.
        yield structs.replace(answer, release=True, outputs=outputs)

    def release(self, request_id: str) -> None:
        """No worker touches its tensors any more."""
        opened = self._open.get(request_id)
        if opened is not None:
            opened.released = True
            self._settle(request_id, opened)

    def close(self) -> None:
        """Give the memory up; workers that still use it keep it."""
        self._open.clear()
        self.region.close()

    def _complete(self, opened: _Open) -> Request | None:
        if opened.here < opened.inputs_end:
            return None
        request, opened.request = opened.request, None
        return request

    def _settle(self, request_id: str, opened: _Open) -> None:
        if opened.sent and opened.released:
            self._free(request_id, opened)

    def _free(self, request_id: str, opened: _Open) -> None:
        write_epoch(self.region.buffer, opened.place, NO_EPOCH)
        self.region.free(opened.place)
        del self._open[request_id]


def _described(request: Request) -> Tensors:
    """What a request says of its tensors. Raises :class:`TransportError` if it cannot be."""
    tensors = decode(request.tensors)
    if tensors.output_bytes < 0 or any(ref.nbytes < 0 for ref in tensors.refs):
        raise TransportError(f"tensors of {request.request_id} take less than no bytes")
    return tensors


def _outputs(room: Tensors, answer: Answer) -> tuple[TensorRef, ...] | None:
    """Where an answer's outputs are; None if that is outside of the room for them."""
    first, end = room.output_offset, room.output_offset + room.output_bytes
    try:
        refs = decode(answer.outputs).refs
    except TransportError:
        return None
    inside = all(first <= ref.offset <= ref.offset + ref.nbytes <= end for ref in refs)
    return refs if inside else None
