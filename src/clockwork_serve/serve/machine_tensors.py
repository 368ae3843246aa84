"""Tensors of INFERs on a worker far from their gateway: in memory of its own, until the result is away.

An INFER is passed on once its inputs are there, or when its window has closed; its lane then refuses it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from msgspec import structs

from clockwork_serve.messages import Call, Frame, Infer, Piece, Result, Status, Tensors
from clockwork_serve.serve.piece_layout import decode, encode, moved, on_the_way, packed, pieces, run_bytes
from clockwork_serve.serve.region import HEADER_BYTES, Region, write_epoch
from clockwork_serve.units import NS_PER_S, align

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
