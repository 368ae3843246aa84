"""A request inside a gateway: its tensors in shared memory, its client's side, and how it ended."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Final, Protocol

import msgspec
from msgspec import Struct

from clockwork_client.datatypes import Buffer
from clockwork_serve.errors import InvalidRequest, TransportError
from clockwork_serve.messages import Answer, Outcome, Reason, Request, TensorRef, Tensors
from clockwork_serve.oip import (
    OK,
    ClientStatus,
    InferCall,
    InputTensor,
    OutputTensor,
    Served,
    StringsWalk,
    reason_of_error,
    status_of,
    status_of_error,
)
from clockwork_serve.serve.shm import HEADER_BYTES, NO_EPOCH, Region, memory_of, write_epoch
from clockwork_serve.units import KIB, NS_PER_MS, NS_PER_S, TENSOR_ALIGN, align

# ------------------------------------------------------------
# Memory for requests' tensors: slots in a region that workers map.
#
# A slot is a header, inputs and room for outputs, each aligned to 64 bytes. Large bodies are received
# straight into the region, placed so that their first tensor is aligned, and then need no copy.


COPIED_AT_ONCE: Final = 512 * KIB
"""Bytes of inputs: about half a millisecond, where memory is accessed for the first time."""
LITTLE_RESERVE: Final = 4 * KIB
RESERVE_FADE: Final = 8  # the largest answer counts less by this part with each that is smaller
RESERVES_MAX: Final = 1024  # for how many models and shapes of inputs the size of answers is remembered
_HEADER: Final = align(HEADER_BYTES)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Tensors).decode


@dataclass(slots=True, frozen=True)
class Body:
    """Room for a body: ``view`` is ``region`` from ``start``; its tensors begin at its byte ``at``."""

    region: Region
    piece: int
    start: int
    at: int
    view: memoryview


class Copying:
    """Tensors still to be looked at, then to be copied; False if none are left.

    ``release`` is to be called then.
    """

    __slots__ = ("_at", "_parts", "_strings", "begun", "release")

    def __init__(self) -> None:
        self._strings: StringsWalk | None = None
        self._parts: list[tuple[memoryview, memoryview]] = []
        self.begun = False  # whether anything was ever added
        self._at = 0  # bytes of the first part that are copied
        self.release: Callable[[], None] = lambda: None

    def __bool__(self) -> bool:
        return bool(self._parts) or self._strings is not None

    def look(self, strings: StringsWalk) -> None:
        """Look at these, before anything is copied."""
        self.begun = True
        self._strings = strings

    def add(self, target: memoryview, source: memoryview) -> None:
        """Append a copy."""
        self.begun = True
        self._parts.append((target, source))

    def step(self) -> None:
        """Look at the next piece, or copy it: at most :data:`COPIED_AT_ONCE` bytes.

        Raises :class:`InvalidRequest`.
        """
        if self._strings is not None:
            if not self._strings.step():
                self._strings = None
            return
        target, source = self._parts[0]
        start, end = self._at, min(self._at + COPIED_AT_ONCE, len(source))
        target[start:end] = source[start:end]
        self._at = end
        if end == len(source):
            self._parts.pop(0)
            self._at = 0


class Copies:
    """Slots that are being filled or read, by their requests' ids: one piece in a turn of the loop, in order.

    ``filled`` is called with the id of each that is complete, ``refused`` with those whose inputs are wrong.
    For the running loop's thread.
    """

    def __init__(
        self, filled: Callable[[str], None], refused: Callable[[str, InvalidRequest], None] | None = None
    ) -> None:
        self._filled = filled
        self._refused = refused
        self._open: dict[str, Copying] = {}
        self._steps = False

    def begin(self, request_id: str, copying: Copying) -> None:
        """Fill a slot after all others."""
        self._open[request_id] = copying
        if not self._steps:
            self._steps = True
            asyncio.get_running_loop().call_soon(self._step)

    def withdraw(self, request_id: str) -> bool:
        """Stop filling a slot; False if it was not being filled."""
        copying = self._open.pop(request_id, None)
        if copying is not None:
            copying.release()
        return copying is not None

    def clear(self) -> list[str]:
        """Stop filling all; the ids of their requests."""
        found = [*self._open]
        for request_id in found:
            self.withdraw(request_id)
        return found

    def _step(self) -> None:
        request_id, copying = next(iter(self._open.items()), ("", None))
        if copying is not None:
            try:
                copying.step()
            except InvalidRequest as error:
                assert self._refused is not None
                self.withdraw(request_id)
                self._refused(request_id, error)
            else:
                if not copying:
                    self.withdraw(request_id)
                    self._filled(request_id)
        self._steps = bool(self._open)
        if self._steps:
            asyncio.get_running_loop().call_soon(self._step)


class Slot(msgspec.Struct):
    """The memory of one request: ``pieces`` of ``region``, and the references that its worker gets.

    Only :meth:`Slots.grow` changes it.
    """

    region: Region
    pieces: tuple[int, ...]
    tensors: Tensors

    @property
    def encoded(self) -> bytes:
        """The references, as they are sent."""
        return _encode(self.tensors)

    def outputs(self, encoded: bytes) -> tuple[list[OutputTensor], bool]:
        """Views of the outputs that a worker reports, and whether their memory is their own, not the slot's.

        Raises :class:`TransportError` if one is elsewhere.
        """
        reported, tensors = _decode(encoded), self.tensors
        first, end = tensors.output_offset, tensors.output_offset + tensors.output_bytes
        # A worker on another machine counts from the start of the room, for it does not know where that is.
        memory, base = self.region.buffer, first
        if reported.region:
            memory, base = memory_of(reported, self.region), 0
        own = memory is not self.region.buffer
        if own:  # the worker frees it with the slot, and writes nothing else there; it lasts as it is mapped
            first, end = 0, len(memory)
        found = []
        for ref in reported.refs:
            offset = base + ref.offset
            if offset < first or offset + ref.nbytes > end:
                raise TransportError(f"output {ref.name} lies outside of its request's slot")
            view = memory[offset : offset + ref.nbytes]
            found.append(OutputTensor(ref.name, ref.datatype, ref.shape, view))
        return found, own


class Slots:
    """Allocates slots in one region. For one thread.

    With a ``server``, as in :class:`Tensors`, workers on other machines find them by :meth:`find`;
    ``elsewhere``: no worker is on this host.
    """

    def __init__(self, region_bytes: int, *, elsewhere: bool = False) -> None:
        self.region = Region.create(region_bytes)
        self.server = ""
        self._elsewhere = elsewhere
        self._open: dict[int, Slot] = {}  # by epoch: all and only slots of the region that have a server
        self.in_place_bytes = 0  # of all inputs so far that stayed where they were received
        self.copied_bytes = 0
        self._epoch = NO_EPOCH
        self._received = 0  # bytes of the region held by bodies still being received
        self._kept: dict[int, bool] = {}  # slots that are still read, by epoch; whether they are free else

    @property
    def used_bytes(self) -> int:
        """Allocated bytes of the region."""
        return self.region.size - self.region.free_bytes

    def body(self, nbytes: int, tensors_at: int) -> Body | None:
        """Room for a body whose tensors begin at byte ``tensors_at``; None if there is too little.

        Bodies being received get at most half of the region, so that slow senders cannot exhaust it.
        """
        region = self.region
        shift = -tensors_at % TENSOR_ALIGN
        if self._received + nbytes > region.size // 2:
            return None
        piece = region.allocate(nbytes + shift)
        if piece is None:
            return None
        self._received += nbytes
        start = piece + shift
        return Body(region, piece, start, tensors_at, region.buffer[start : start + nbytes])

    def drop(self, body: Body) -> None:
        """Free a body's room. Exactly once, unless :meth:`fill` was called with it."""
        self._forget(body)
        if body.region is self.region:
            self.region.free(body.piece)

    def fill(
        self, inputs: Sequence[InputTensor], output_bytes: int, body: Body | None = None,
        later: Copying | None = None,
    ) -> Slot | None:  # fmt: skip
        """A slot that holds these inputs; None, with nothing allocated, if there is no room.

        ``body`` is the memory that holds those inputs that are memoryviews, one after the other. It becomes
        part of the slot if all of them are aligned in it; otherwise the inputs are copied and it is freed.
        Large copies are left to ``later``, if given.
        """
        if body is not None:
            offsets = self._in_place(inputs, body)
            if offsets is not None:
                return self._adopt(inputs, offsets, output_bytes, body)
        try:
            return self._copy(inputs, output_bytes, later)
        finally:
            if body is not None:
                if later:
                    later.release = partial(self.drop, body)
                else:
                    self.drop(body)

    def bytes_for(self, inputs: Sequence[InputTensor], output_bytes: int) -> int:
        """The size of a slot for these."""
        return _HEADER + sum(align(len(tensor.data)) for tensor in inputs) + align(output_bytes)

    def find(self, epoch: int) -> Slot | None:
        """The slot that has this epoch, for workers on other machines; None once it is free."""
        return self._open.get(epoch)

    def grow(self, slot: Slot, output_bytes: int) -> bool:
        """Give a slot other, larger room for outputs; False if there is none."""
        piece = self.region.allocate(output_bytes) if slot.region is self.region else None
        if piece is None:
            return False
        slot.pieces = (*slot.pieces, piece)
        slot.tensors = msgspec.structs.replace(slot.tensors, output_offset=piece, output_bytes=output_bytes)
        return True

    def keep(self, slot: Slot) -> Callable[[], None]:
        """Keep a slot from being freed until what this returns is called, exactly once."""
        epoch = slot.tensors.epoch
        self._kept[epoch] = False

        def release() -> None:
            if self._kept.pop(epoch):
                self.free(slot)

        return release

    def free(self, slot: Slot) -> None:
        """Free a slot that no worker accesses any more. Exactly once."""
        if self._kept and slot.tensors.epoch in self._kept:
            self._kept[slot.tensors.epoch] = True
            return
        if slot.region is not self.region:
            return  # freed with its region
        self._open.pop(slot.tensors.epoch, None)
        write_epoch(slot.region.buffer, slot.tensors.header_offset, NO_EPOCH)
        for piece in slot.pieces:
            slot.region.free(piece)

    def renew(self, kept: Sequence[Slot] = ()) -> list[Slot | None]:
        """Abandon the region with all its slots, which workers may still write to, and create another.

        Returns, for each slot in ``kept``, a new slot with its inputs; None if there is no room.
        """
        old, self.region = self.region, Region.create(self.region.size)
        self._open.clear()
        self._received = 0
        moved = [self._copy(_inputs(slot), slot.tensors.output_bytes) for slot in kept]
        old.close()
        return moved

    def close(self) -> None:
        """Free the memory."""
        self.region.close()

    def _forget(self, body: Body) -> None:
        if body.region is self.region:
            self._received -= len(body.view)

    def _in_place(self, inputs: Sequence[InputTensor], body: Body) -> list[int] | None:
        """The inputs' offsets in the region, if all can stay where they were received."""
        if body.region is not self.region:
            return None
        offsets: list[int] = []
        at = body.start + body.at
        for tensor in inputs:
            if type(tensor.data) is not memoryview or at % TENSOR_ALIGN:
                return None
            offsets.append(at)
            at += len(tensor.data)
        return offsets

    def _adopt(
        self, inputs: Sequence[InputTensor], offsets: list[int], output_bytes: int, body: Body
    ) -> Slot | None:
        header = self.region.allocate(_HEADER + output_bytes)
        if header is None:
            self.drop(body)
            return None
        self._forget(body)
        refs = tuple(_ref(tensor, offset) for tensor, offset in zip(inputs, offsets, strict=True))
        self.in_place_bytes += sum(ref.nbytes for ref in refs)
        return self._slot((body.piece, header), header, refs, header + _HEADER, output_bytes)

    def _copy(
        self, inputs: Sequence[InputTensor], output_bytes: int, later: Copying | None = None
    ) -> Slot | None:
        region = self.region
        ends, end = [], _HEADER
        for tensor in inputs:
            end -= -len(tensor.data) // TENSOR_ALIGN * TENSOR_ALIGN  # align(), without the call
            ends.append(end)
        if end <= COPIED_AT_ONCE:
            later = None
        piece = region.allocate(end + output_bytes)
        if piece is None:
            return None
        buffer, at = region.buffer, piece + _HEADER
        refs = []
        for tensor, end in zip(inputs, ends, strict=True):
            data = tensor.data
            nbytes = len(data)
            if later is None:
                buffer[at : at + nbytes] = data
            else:
                later.add(buffer[at : at + nbytes], memoryview(data))
            refs.append(
                TensorRef(
                    name=tensor.name, datatype=tensor.datatype, shape=tensor.shape, offset=at, nbytes=nbytes
                )
            )  # fmt: skip
            at = piece + end
            self.copied_bytes += nbytes
        return self._slot((piece,), piece, tuple(refs), at, output_bytes)

    def _slot(
        self, pieces: tuple[int, ...], header: int, refs: tuple[TensorRef, ...], outputs: int,
        output_bytes: int,
    ) -> Slot:  # fmt: skip
        region = self.region
        server = self.server
        # Who can tell the epoch may have the tensors, so others must not guess it.
        epoch = self._epoch = secrets.randbits(63) | 1 if server else self._epoch + 1
        write_epoch(region.buffer, header, epoch)
        tensors = Tensors(
            region="" if self._elsewhere else region.name, epoch=epoch, header_offset=header, refs=refs,
            output_offset=outputs, output_bytes=output_bytes, server=server,
        )  # fmt: skip
        slot = Slot(region, pieces, tensors)
        if server:
            self._open[epoch] = slot
        return slot


class OutputReserves:
    """Room for outputs whose size only running the model tells: as much as answers of the kind took lately.

    Larger answers arrive from memory of their worker. So a reserve never refuses a request: all together they
    have half of the region at most, and a little.
    """

    def __init__(self) -> None:
        self._row_bytes: dict[tuple[str, str], int] = {}  # by model and signature, the latest last

    def room(self, served: Served, rows: int, signature: str, region: Region) -> int:
        """The bytes to reserve for a request; where no output is open, what they take."""
        if not served.outputs_open:
            return served.model.output_bytes * rows
        row_bytes = self._row_bytes.get((served.model.key, signature), served.model.output_bytes)
        wanted = rows * row_bytes + TENSOR_ALIGN * len(served.code.outputs)
        return wanted if wanted <= region.free_bytes - region.size // 2 else min(wanted, LITTLE_RESERVE)

    def learn(self, request: Request, outputs: Sequence[OutputTensor]) -> None:
        """Note the size of an answer."""
        key, nbytes = (request.model, request.signature), sum([len(tensor.data) for tensor in outputs])
        before = self._row_bytes.pop(key, 0)
        if len(self._row_bytes) >= RESERVES_MAX:
            del self._row_bytes[next(iter(self._row_bytes))]
        self._row_bytes[key] = max(-(-nbytes // request.rows), before - before // RESERVE_FADE)


def _inputs(slot: Slot) -> list[InputTensor]:
    buffer = slot.region.buffer
    return [
        InputTensor(ref.name, ref.datatype, ref.shape, buffer[ref.offset : ref.offset + ref.nbytes])
        for ref in slot.tensors.refs
    ]


def _ref(tensor: InputTensor, offset: int) -> TensorRef:
    return TensorRef(
        name=tensor.name, datatype=tensor.datatype, shape=tensor.shape, offset=offset, nbytes=len(tensor.data)
    )


# ------------------------------------------------------------
# A client's request as the core of a gateway sees it, over any protocol, and how one ended.


class InferResponse(Struct):
    """A response, not encoded yet. ``served`` and ``call`` are None if it was refused before they were known.

    With a ``deadline_ns`` the protocol's server must report back to the core: :meth:`Gateway.check_delivery`
    when the response is written to the socket, or :meth:`Gateway.discard` if it never is. ``retry_after_ns``
    is exact, ``retry_after_s`` is in whole seconds and randomised. ``texts`` are the data of outputs that are
    encoded as JSON already.

    Unless it is their ``own``, ``outputs`` refer to memory that is freed when :meth:`Exchange.end` returns.
    If they are large, ``keep`` delays that, until what it returns is called.
    """

    outcome: Outcome
    reason: Reason
    status: ClientStatus
    message: str = ""
    request_id: str = ""
    served: Served | None = None
    call: InferCall | None = None
    retry_after_ns: int = 0
    retry_after_s: int = 0
    deadline_ns: int = 0
    outputs: list[OutputTensor] = []
    own: bool = False
    keep: Callable[[], Callable[[], None]] | None = None
    parameters: dict[str, Any] = {}
    texts: dict[str, Buffer] = {}

    @property
    def text(self) -> str:
        """The message for the client. The reason comes first: stock clients show nothing but this text."""
        name = self.reason or self.outcome
        if self.outcome is Outcome.INVALID:
            return self.message or name
        return f"{name}: {self.message}" if self.message else name


def spread_s(wait_ns: int, rng: Random) -> int:
    """Retry advice in whole seconds: rounded up, plus a random part of up to half, or up to one second.

    Without the random part all rejected clients would return at once.
    """
    least_s = -(-wait_ns // NS_PER_S)
    return least_s + rng.randint(0, max(1, least_s // 2)) if least_s > 0 else 0


class Exchange(Protocol):
    """One inference request of a client, over any protocol, as the core of a gateway sees it.

    ``body`` is the room in the region that its tensors were received into, if any; :meth:`Gateway.infer`
    takes it over. ``identity`` is the tenant that the API key belongs to; empty where no keys are required.
    ``trace`` is its ``Request.trace``.
    """

    model: str
    version: str
    identity: str
    arrival_ns: int
    slo_header: str | None
    trace: str
    remaining_s: float | None
    every_output_binary: bool
    body: Body | None

    @property
    def local(self) -> bool:
        """Whether its client is on this host."""

    def call(self, served: Served) -> InferCall:
        """Parse it. Raises :class:`InvalidRequest`."""

    def end(self, response: InferResponse) -> None:
        """Respond to the client, perhaps before :meth:`Gateway.infer` returns. Again only if it raised."""


class EarlyExchange(Exchange, Protocol):
    """A request whose head is received before its body."""

    def query_done(self) -> None:
        """Its admission query is done: go on, unless :meth:`end` was called before."""


# ------------------------------------------------------------
# How a request ended, for its client: by the controller's answer, or by the gateway itself.


ROOM_RETRY_NS: Final = 50 * NS_PER_MS
"""Retry advice if there is no capacity: about as long as most requests hold a slot."""


EXPIRE_WHEN_LATE: Final = frozenset({Outcome.OK, Outcome.REJECTED})
"""Outcomes that are worth something only in time: after its deadline a request has expired."""


class PendingRequest(Struct):
    """A request that the controller has not answered; ``exchange`` is None once its client needs no response.

    ``request`` is what the controller was sent.
    """

    exchange: Exchange | None
    served: Served
    call: InferCall
    slot: Slot
    request: Request
    slo_ns: int = 0  # the SLO it got, if another was requested
    expired: bool = False  # its client was told so, for the controller's answer was overdue
    resubmitted: bool = False  # to a second controller, for the first one died

    @property
    def deadline_ns(self) -> int:
        """By when its response must be with the client."""
        return self.request.deadline_ns


def response_of(pending: PendingRequest, answer: Answer, slots: Slots) -> InferResponse:
    """How a request ended, by the controller's answer. Its outputs may be in one of ``slots``."""
    outcome, reason = answer.outcome, answer.reason
    status = OK if outcome is Outcome.OK else status_of(outcome, reason)
    response = InferResponse(
        outcome, reason, status, answer.message, answer.request_id, pending.served,
        pending.call, answer.retry_after_ns,
    )  # fmt: skip
    if answer.batch:
        response.parameters = {
            "queue_ms": answer.queue_ns // 1000 / 1000,
            "exec_ms": answer.exec_ns // 1000 / 1000,
            "expected_ms": answer.expected_ns // 1000 / 1000,
            "batch_size": answer.batch,
            "cold_start": answer.cold,
        }
        if pending.slo_ns:
            response.parameters["slo_ms"] = pending.slo_ns / NS_PER_MS
    if outcome in EXPIRE_WHEN_LATE:
        response.deadline_ns = pending.request.deadline_ns
    if outcome is Outcome.OK:
        outputs, response.own = pending.slot.outputs(answer.outputs)
        response.outputs = pending.served.answered(outputs)
        # The room for them is asked first: it is small for most, and costs no look at each.
        if (
            pending.slot.tensors.output_bytes > COPIED_AT_ONCE
            and not (response.own or pending.call.shared)
            and sum([len(tensor.data) for tensor in outputs]) > COPIED_AT_ONCE
        ):
            response.keep = partial(slots.keep, pending.slot)
    return response


def invalid_response(
    error: InvalidRequest, request_id: str = "", served: Served | None = None
) -> InferResponse:
    """How an invalid request ends."""
    reason = reason_of_error(error)
    return InferResponse(Outcome.INVALID, reason, status_of_error(error), str(error), request_id, served)


def late_response(request_id: str, outcome: Outcome, call: InferCall | None) -> InferResponse:
    """How a request ends whose response, of that outcome, could not be sent to its client in time."""
    message = "the gateway could give its answer to the client only after the deadline"
    reason = Reason.LATE if outcome is Outcome.OK else Reason.NONE
    response = gateway_response(Outcome.EXPIRED, reason, message, request_id)
    response.call = call
    return response


def missed_by(shortage_ns: int) -> str:
    """The message for a request that the controller's summary shows to be hopeless."""
    return f"the deadline would be missed by {shortage_ns / NS_PER_MS:.1f} ms: others are due before it"


def gateway_response(
    outcome: Outcome, reason: Reason, message: str, request_id: str = "",
    pending: PendingRequest | None = None,
) -> InferResponse:  # fmt: skip
    """How a request ends that the gateway ends itself."""
    response = InferResponse(outcome, reason, status_of(outcome, reason), message, request_id)
    if pending is not None:
        response.served, response.call = pending.served, pending.call
    return response
