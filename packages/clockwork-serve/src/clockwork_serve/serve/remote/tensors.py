"""Tensors of INFERs that are in gateways on other machines: read before they run, and outputs written back.

A worker has a connection to each such gateway, and keeps it. Inputs are read into memory of the worker from
the moment that the INFER arrives, long before its window opens where the device is busy.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median_low
from typing import Final

from msgspec import structs

from clockwork_serve.config.values import split_address
from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Infer,
    Result,
    Status,
    TensorRef,
    Tensors,
    TensorsOffered,
    TensorsReached,
)
from clockwork_serve.serve.remote.config import ClusterContext, refused_by_itself
from clockwork_serve.serve.remote.link import dial
from clockwork_serve.serve.remote.tensor_link import (
    SERVER,
    Pieces,
    TensorLink,
    TransferHead,
    TransferKind,
    decode,
    encode,
    moved,
    outputs_there,
    packed,
    pieces_of,
    run_bytes,
    stretches,
)
from clockwork_serve.serve.shm import HEADER_BYTES, NO_EPOCH, Region, memory_of, write_epoch
from clockwork_serve.units import NS_PER_S, align, scratch_for

RECONNECT_S: Final = 0.05
RECONNECT_S_MAX: Final = 1.0  # the pause between attempts to connect doubles up to this
GONE: Final = "its tensors were withdrawn: no slot of its gateway has its epoch"
FULL: Final = (
    "outputs: no room for them among its gateway's gateway_memory; ask for less, try again, or raise it"
)
_HEADER: Final = align(HEADER_BYTES)

_log = logging.getLogger(__name__)


# ------------------------------------------------------------
# The duration of an INFER whose tensors come over a network, as the controller should see it.
#
# The inputs of one come while the one before it runs: a pipeline of two stages, whose rate the slower one
# bounds. So an INFER counts as long on its lane as its execution or the transfer of its inputs, whichever is
# longer; what else the network takes is a delay before and after, and no other action waits for it.


KINDS_MAX: Final = 1024  # of how many kinds of INFERs the transfer time is remembered
FEW: Final = 9  # the median of so many is taken: one that was stopped on its way changes nothing

Kind = tuple[str, int, int]  # of an INFER: code, batch size, bytes of inputs


class LaneTiming:
    """The timing of the INFERs of one device whose tensors come over a network."""

    def __init__(self) -> None:
        self._arrived_ns = 0  # when the last inputs had come
        self._took_ns: dict[Kind, deque[int]] = {}  # how long the last of a kind took by themselves

    def inputs_arrived(self, kind: Kind, asked_ns: int, now_ns: int) -> int:
        """All inputs of an INFER that was received at ``asked_ns`` are here; returns how long they took."""
        # The network was for those before it until these had come.
        took_ns = max(0, now_ns - max(asked_ns, self._arrived_ns))
        self._arrived_ns = now_ns
        last_ns = self._took_ns.pop(kind, None) or deque[int](maxlen=FEW)
        if len(self._took_ns) >= KINDS_MAX:
            del self._took_ns[next(iter(self._took_ns))]
        last_ns.append(took_ns)
        self._took_ns[kind] = last_ns
        return took_ns

    def ended(self, result: Result, kind: Kind, transfer_in_ns: int, now_ns: int) -> Result:
        """The result of an INFER whose outputs are in their gateways at ``now_ns``.

        It counts as begun no earlier than its own inputs began to come: it is never longer than it was here.
        """
        last_ns = self._took_ns.get(kind, ())
        usual_ns = median_low(last_ns) if len(last_ns) > 1 else 0  # one alone may have been stopped
        more_ns = max(0, min(usual_ns, transfer_in_ns) - result.lane_ns)
        return structs.replace(
            result, started_ns=result.started_ns - more_ns, input_ns=result.input_ns + more_ns,
            transfer_in_ns=transfer_in_ns, transfer_out_ns=max(0, now_ns - result.ended_ns),
        )  # fmt: skip


def _kind(action: Infer, calls: Sequence[Tensors]) -> Kind:
    return (action.code_id, action.batch, sum([ref.nbytes for tensors in calls for ref in tensors.refs]))


# ------------------------------------------------------------
# One gateway, and what is read from it and written to it.
#
# A transfer whose connection breaks begins again with the next one: whoever waits for it knows how long.


@dataclass(slots=True)
class Transfer:
    """Inputs to be read into ``memory``, or outputs to be written: the tensors ``refs`` there.

    ``ended`` gets its number, and how it ended: LAST (all was read), DONE, GONE or FULL.
    """

    epoch: int
    memory: memoryview
    refs: tuple[TensorRef, ...]
    targets: tuple[TensorRef, ...]
    ended: Callable[[int, TransferKind], None]
    writes: bool = False
    left: int = 0  # bytes of inputs that are to come, from ``upto`` on
    upto: int = 0


_PROBE: Final = 0  # the number of a transfer that nobody has


class TensorSource:
    """The tensor server of a gateway at ``address``; ``unused`` is called once nothing is left to do there.

    ``why`` says why nothing comes from there: from the first failure on, or after ``silence_s`` of failures
    once something came, for a short cut costs nothing but time. For the running loop's thread.
    """

    def __init__(
        self, address: str, context: ClusterContext, silence_s: float, unused: Callable[[TensorSource], None]
    ) -> None:
        self.address = address
        self._context = context
        self._silence_s = silence_s
        self._unused = unused
        self._loop = asyncio.get_running_loop()
        self._link: TensorLink | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.why = ""
        self._report: Callable[[str], None] | None = None  # set while the connection is watched
        self._said = False  # that it has answered on this connection
        self._next_probe: asyncio.TimerHandle | None = None
        self._reached = False  # it has answered on some connection
        self._silent_since_s = self._loop.time()  # when the last of these was lost; inf while it answers
        self._linked_s = 0.0  # when it was connected
        self._pause_s = 0.0  # before the next attempt to connect
        self._watch: asyncio.TimerHandle | None = None
        self._asked_s = 0.0  # when the first of the transfers under way began: silence before is none
        self._transfers: dict[int, Transfer] = {}  # all and only those that have not ended

    def begin(self, number: int, transfer: Transfer) -> None:
        """Begin a transfer of this number."""
        self._transfers[number] = transfer
        if self._link is not None:
            self._send(self._link, number, transfer)
        elif self._connecting is None:
            self._connecting = self._loop.create_task(self._connect())

    def watch(self, report: Callable[[str], None]) -> None:
        """Keep a connection, and report ``why`` it is of no use: "" as soon as the gateway has answered."""
        self._report = report
        self._said = False
        if self.why:
            report(self.why)
        self._probe()

    def unwatch(self) -> None:
        """End that."""
        self._report = None
        self._cancel_probe()
        self.drop(_PROBE)

    def drop(self, number: int) -> None:
        """End a transfer: its memory is not touched any more, and ``ended`` is not called."""
        if self._transfers.pop(number, None) is not None and self._link is not None:
            self._link.send(TransferHead(TransferKind.STOP, 0, number))

    def close(self) -> None:
        """Close the connection."""
        self._transfers.clear()
        self._cancel_probe()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if self._link is not None:
            self._link.close()

    async def _connect(self) -> None:
        while self._transfers:
            if self._pause_s:
                await asyncio.sleep(self._pause_s)
            self._pause_s = min(max(RECONNECT_S, 2 * self._pause_s), RECONNECT_S_MAX)
            link = TensorLink(self, self._silence_s)
            try:
                await dial(split_address(self.address), self._context.now(), link)
            except TransportError as error:
                self._failed(str(error))
                continue
            if link.is_open:
                self._connecting, self._link, self._linked_s = None, link, self._loop.time()
                for number, transfer in list(self._transfers.items()):
                    self._send(link, number, transfer)
                return
        self._connecting = None
        self._unused(self)

    def _probe(self) -> None:
        """Ask for inputs that no slot has: a gateway that can be asked says so.

        It is asked again and again: a cut that began while nothing was asked would be seen by a request.
        """
        self._cancel_probe()
        self.begin(_PROBE, Transfer(NO_EPOCH, memoryview(b""), (), (), self._probed))

    def _probed(self, number: int, how: TransferKind) -> None:
        if how is TransferKind.LOST or self._report is None:
            return
        if not self._said:
            self._said = True
            self._report("")
        self._next_probe = self._loop.call_later(self._silence_s, self._probe)

    def _cancel_probe(self) -> None:
        if self._next_probe is not None:
            self._next_probe.cancel()
            self._next_probe = None

    def _failed(self, why: str) -> None:
        """Nothing comes from there: say so, and end all transfers, once that is no short cut."""
        short = self._loop.time() - self._silent_since_s < self._silence_s
        if short and self._reached:
            return
        if why != self.why:
            self.why = why
            _log.warning("no tensors from %s: %s", self.address, why)
            if self._report is not None:
                self._report(why)
        for number in [] if short else [number for number in self._transfers if number != _PROBE]:
            self._end(number, TransferKind.LOST)

    def _send(self, link: TensorLink, number: int, transfer: Transfer) -> None:
        if len(self._transfers) == 1:
            self._asked_s = self._loop.time()
        if transfer.writes:
            link.send(
                TransferHead(TransferKind.WRITE, 0, number, transfer.epoch, room_bytes(transfer.targets))
            )
            nbytes = sum([ref.nbytes for ref in transfer.refs])
            link.queue(self._outputs(number, transfer), nbytes)
        else:
            transfer.left = sum([nbytes for _, _, nbytes in stretches(transfer.refs, transfer.targets)])
            transfer.upto = 0
            link.send(TransferHead(TransferKind.READ, 0, number, transfer.epoch))
        if self._watch is None:
            self._watch = self._loop.call_later(self._silence_s, self._listen_for_silence)

    def _outputs(self, number: int, transfer: Transfer) -> Pieces:
        for piece in pieces_of(number, transfer.memory, transfer.refs, transfer.targets):
            if self._transfers.get(number) is not transfer:
                return
            yield piece

    def _listen_for_silence(self) -> None:
        self._watch = None
        link = self._link
        if link is None or not self._transfers:
            return
        silent_s = self._loop.time() - max(link.heard_s, self._asked_s)
        if silent_s >= self._silence_s:
            link.abort(f"silent for {silent_s:.1f} s")
        else:
            self._watch = self._loop.call_later(self._silence_s - silent_s, self._listen_for_silence)

    # What the gateway says

    def take(self, link: TensorLink, head: TransferHead) -> None:
        """End a transfer, or check where inputs are to go."""
        self._reached, self._silent_since_s, self.why = True, math.inf, ""
        transfer = self._transfers.get(head.transfer)
        match head.kind:
            case TransferKind.DATA | TransferKind.LAST:
                if transfer is not None:
                    _check(transfer, head)
            case TransferKind.DONE | TransferKind.GONE | TransferKind.FULL:
                self._end(head.transfer, TransferKind(head.kind))
            case _:
                raise TransportError(f"it sent a message of kind {head.kind}, which no gateway sends")

    def room(self, link: TensorLink, head: TransferHead, done: int) -> memoryview | None:
        """The memory of the inputs."""
        transfer = self._transfers.get(head.transfer)
        return None if transfer is None else transfer.memory[head.at + done : head.at + head.nbytes]

    def received(self, link: TensorLink, head: TransferHead) -> None:
        """Inputs were received."""
        if head.kind == TransferKind.LAST:
            self._end(head.transfer, TransferKind.LAST)

    def lost(self, link: TensorLink, why: str) -> None:
        """Connect again, if there is anything to do."""
        if link is not self._link:
            return  # it never served
        self._link, self._said = None, False
        now_s = self._loop.time()
        if now_s - self._linked_s >= RECONNECT_S_MAX:
            self._pause_s = 0.0
        if self._silent_since_s < math.inf:  # this one has answered nothing
            own = refused_by_itself(self._context.now().files)
            self._failed(f"{self.address} has answered nothing: {why}{'; ' if own else ''}{own}")
        else:
            self._silent_since_s = now_s
            if self._transfers:
                _log.warning("no tensors from %s: %s", self.address, why)
        if self._report is not None:
            self._probe()
        if self._transfers and self._connecting is None:
            self._connecting = self._loop.create_task(self._connect())
        elif not self._transfers:
            self._unused(self)

    def _end(self, number: int, how: TransferKind) -> None:
        transfer = self._transfers.pop(number, None)
        if transfer is not None:
            transfer.ended(number, how)


def room_bytes(targets: Sequence[TensorRef]) -> int:
    """The room that outputs need."""
    return max([ref.offset + ref.nbytes for ref in targets], default=0)


def _check(transfer: Transfer, head: TransferHead) -> None:
    """Raise :class:`TransportError` for inputs that are not the next, or more or less than there are."""
    end = head.at + head.nbytes
    transfer.left -= head.nbytes
    last = head.kind == TransferKind.LAST
    if (
        transfer.writes or head.at < transfer.upto or end > len(transfer.memory)
        or transfer.left < 0 or last != (transfer.left == 0)
    ):  # fmt: skip
        raise TransportError(
            f"it sent inputs from {head.at} to {end}, {transfer.left} bytes before their end; "
            f"expected them in order, from {transfer.upto} to {len(transfer.memory)}"
        )
    transfer.upto = end


# ------------------------------------------------------------
# The tensors of a worker's INFERs: in memory of its own, until the result was sent.
#
# An INFER is posted to its lane once its inputs are complete, or when its window has closed; the lane then
# rejects it as too late.


@dataclass(slots=True)
class _Slot:
    """The memory of one INFER's calls. ``servers``: of each call the server and epoch, None if it is here."""

    region: Region
    action: Infer
    kind: Kind
    asked_ns: int
    transfer_in_ns: int = 0
    servers: list[tuple[str, int] | None] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    open: dict[int, TensorSource] = field(default_factory=dict)  # transfers that have not ended
    timer: asyncio.TimerHandle | None = None
    result: Result | None = None  # OK, while its outputs are being written
    outputs: list[bytes] = field(default_factory=list)

    def stop(self) -> None:
        """End all transfers."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        for number, source in self.open.items():
            source.drop(number)
        self.open.clear()

    def free(self) -> None:
        """End all transfers, and free the memory."""
        self.stop()
        for place in self.places:
            write_epoch(self.region.buffer, place, NO_EPOCH)
            self.region.free(place)
        self.places.clear()


class RemoteTensors:
    """The tensors of all INFERs of a worker that are elsewhere. For the running loop's thread.

    ``post`` hands an INFER to the lanes, ``send`` sends a result, or whether a gateway is reached. With a
    ``server``, the host that the worker joined from another machine, all are elsewhere, and gateways of that
    host name only their port. Without, only those are that no process of this host can map.
    """

    def __init__(
        self, region_bytes: int, context: ClusterContext, silence_s: float, post: Callable[[Infer], None],
        send: Callable[[Result | TensorsReached], None], server: str = "",
    ) -> None:  # fmt: skip
        self._region = Region.create(region_bytes)
        self._context = context
        self._silence_s = silence_s
        self._post = post
        self._send = send
        self.server = server
        self._loop = asyncio.get_running_loop()
        self._count = 0  # of epochs and transfers
        self._sources: dict[str, TensorSource] = {}
        self._watched: dict[str, TensorSource] = {}  # those that are watched, by gateway
        self._slots: dict[int, _Slot] = {}  # of INFERs whose result was not sent yet
        self._timing: dict[str, LaneTiming] = {}  # by device

    @property
    def used_bytes(self) -> int:
        """Memory in use by INFERs."""
        return self._region.size - self._region.free_bytes

    @property
    def idle(self) -> bool:
        """Whether no INFER waits for its tensors, or for its outputs to be there."""
        return not self._slots

    def bring(self, action: Infer) -> bool:
        """Have the inputs of an INFER brought, to post it then; False if they are here."""
        try:
            calls = [decode(call.tensors) for call in action.calls]
        except TransportError:
            return False  # its lane says what is wrong with it
        away = [tensors for tensors in calls if self.server or not tensors.region]
        if not away or not all(SERVER.fullmatch(tensors.server) for tensors in away):
            return False
        slot = _Slot(self._region, action, _kind(action, calls), time.monotonic_ns())
        reads = self._place(slot, calls)
        self._slots[action.action_id] = slot
        if reads is None:
            self._refuse_for_room(slot, away)
            return True
        for server, transfer in reads:
            self._begin(slot, server, transfer)
        if slot.open:
            self._wait(slot)
        else:
            self._pass_on(slot)
        return True

    def offered(self, offer: TensorsOffered) -> None:
        """Try whether tensors come from a gateway, and keep trying, until it is gone."""
        before = self._watched.pop(offer.gateway, None)
        if before is not None:
            before.unwatch()
        if not SERVER.fullmatch(offer.server):
            return
        report = partial(self._reached, offer.gateway)
        if offer.server.startswith(":") and not self.server:
            report("")  # a gateway of this host, whose memory is mapped
            return
        source = self._watched[offer.gateway] = self._source(offer.server)
        source.watch(report)

    def _reached(self, gateway: str, why: str) -> None:
        self._send(TensorsReached(gateway=gateway, ok=not why, why=why))

    def answer(self, result: Result) -> Result | None:
        """The result to send now, if any: one with outputs is sent once these are in their gateways."""
        slot = self._slots.get(result.action_id)
        if slot is None:
            return result
        if result.status is not Status.OK:
            return self._finished(slot, result)
        slot.result, slot.outputs = result, list(result.outputs)
        for at, there in enumerate(slot.servers):
            if there is not None:
                self._write(slot, at, *there)
        if not slot.open:
            return self._finished(slot, result)
        why = f"its gateway took no outputs for {self._silence_s:g} s"
        slot.timer = self._loop.call_later(self._silence_s, self._fail, slot, Status.INPUT_GONE, why)
        return None

    def renew(self) -> None:
        """Forget all INFERs, because the link was lost; those that still run keep the old region.

        Whoever leads next says again which gateways there are.
        """
        for source in self._watched.values():
            source.unwatch()
        self._watched.clear()
        for slot in self._slots.values():
            slot.stop()
        self._slots.clear()
        old, self._region = self._region, Region.create(self._region.size)
        old.close()

    def close(self) -> None:
        """Close the connections and the region."""
        for source in list(self._sources.values()):
            source.close()
        self._region.close()

    def _place(self, slot: _Slot, calls: list[Tensors]) -> list[tuple[str, Transfer]] | None:
        """Find memory for tensors that are elsewhere; what is to be read where, None if there is no room."""
        reads, placed = [], list(slot.action.calls)
        for at, tensors in enumerate(calls):
            if tensors.region and not self.server:
                slot.servers.append(None)
                continue
            refs = packed(tensors.refs)
            nbytes = run_bytes(refs)
            place = slot.region.allocate(_HEADER + nbytes + tensors.output_bytes)
            if place is None:
                return None
            self._count += 1
            write_epoch(slot.region.buffer, place, self._count)
            slot.places.append(place)
            slot.servers.append((tensors.server, tensors.epoch))
            start = place + _HEADER
            here = Tensors(
                region=slot.region.name, epoch=self._count, header_offset=place,
                refs=tuple([moved(ref, start + ref.offset) for ref in refs]), output_offset=start + nbytes,
                output_bytes=tensors.output_bytes,
            )  # fmt: skip
            placed[at] = structs.replace(placed[at], tensors=encode(here))
            memory, ended = slot.region.buffer[start : start + nbytes], partial(self._read, slot)
            if any(ref.nbytes for ref in refs):
                reads.append((tensors.server, Transfer(tensors.epoch, memory, tensors.refs, refs, ended)))
        slot.action = structs.replace(slot.action, calls=tuple(placed))
        return reads

    def _refuse_for_room(self, slot: _Slot, calls: list[Tensors]) -> None:
        """Refuse an INFER that is too large, at once; or for want of room now, when its window closes."""
        slot.free()
        size = self._region.size
        needed = sum([_HEADER + run_bytes(packed(one.refs)) + align(one.output_bytes) for one in calls])
        if needed > size:
            why = (
                f"tensors: expected at most {size} bytes, twice gateway_memory or two fifths of "
                f"scratch_memory; found {needed}; "
                f"ask for less at once, or set scratch_memory to at least {scratch_for(-(-needed // 2))}"
            )
            self._fail(slot, Status.MODEL_RAISED, why)
            return
        why = f"there was no room for its tensors, {needed} of {size} bytes, in its window"
        left_ns = slot.action.window.latest_ns - time.monotonic_ns()
        slot.timer = self._loop.call_later(waiting_s(left_ns), self._fail, slot, Status.TOO_LATE, why)

    def _begin(self, slot: _Slot, server: str, transfer: Transfer) -> None:
        source = self._source(server)
        self._count += 1
        slot.open[self._count] = source
        source.begin(self._count, transfer)

    def _source(self, server: str) -> TensorSource:
        host, _, port = server.rpartition(":")
        address = f"{host or self.server}:{port}"
        source = self._sources.get(address)
        if source is None:
            source = TensorSource(address, self._context, self._silence_s, self._forget)
            self._sources[address] = source
        return source

    def _forget(self, source: TensorSource) -> None:
        if self._sources.get(source.address) is source:
            del self._sources[source.address]

    # Inputs

    def _read(self, slot: _Slot, number: int, how: TransferKind) -> None:
        """A call's inputs are here, or gone."""
        source = slot.open.pop(number)
        if how is not TransferKind.LAST:
            self._fail(slot, Status.INPUT_GONE, source.why or GONE)
        elif not slot.open:
            now_ns = time.monotonic_ns()
            slot.transfer_in_ns = self._of(slot).inputs_arrived(slot.kind, slot.asked_ns, now_ns)
            self._pass_on(slot)

    def _wait(self, slot: _Slot) -> None:
        left_ns = slot.action.window.latest_ns - time.monotonic_ns()
        if left_ns < 0:
            self._pass_on(slot)
        else:
            slot.timer = self._loop.call_later(waiting_s(left_ns), self._wait, slot)

    def _pass_on(self, slot: _Slot) -> None:
        slot.stop()
        self._post(slot.action)

    # Outputs

    def _write(self, slot: _Slot, at: int, server: str, epoch: int) -> None:
        found = decode(slot.outputs[at])
        memory = memory_of(found, slot.region)
        targets = tuple([moved(ref, ref.offset - found.output_offset) for ref in found.refs])
        slot.outputs[at] = outputs_there(targets)
        ended = partial(self._written, slot)
        self._begin(slot, server, Transfer(epoch, memory, found.refs, targets, ended, writes=True))

    def _written(self, slot: _Slot, number: int, how: TransferKind) -> None:
        """A call's outputs are in its gateway, or have no place there."""
        source = slot.open.pop(number)
        if how is TransferKind.FULL:
            self._fail(slot, Status.MODEL_RAISED, FULL)
        elif how is not TransferKind.DONE:
            self._fail(slot, Status.INPUT_GONE, source.why or GONE)
        elif not slot.open:
            assert slot.result is not None, "its lane has ended"
            self._send(self._finished(slot, structs.replace(slot.result, outputs=tuple(slot.outputs))))

    def _finished(self, slot: _Slot, result: Result) -> Result:
        """The result to be sent, of an INFER whose memory is not needed any more."""
        del self._slots[result.action_id]
        slot.free()
        if result.status is not Status.OK:
            return result
        return self._of(slot).ended(result, slot.kind, slot.transfer_in_ns, time.monotonic_ns())

    def _of(self, slot: _Slot) -> LaneTiming:
        return self._timing.setdefault(slot.action.device, LaneTiming())

    def _fail(self, slot: _Slot, status: Status, why: str) -> None:
        self._send(self._finished(slot, _refusal(slot.action, status, why)))


def _refusal(action: Infer, status: Status, message: str) -> Result:
    now_ns = time.monotonic_ns()
    return Result(
        action_id=action.action_id, device=action.device, status=status, started_ns=now_ns, ended_ns=now_ns,
        message=message,
    )  # fmt: skip


def waiting_s(left_ns: int) -> float:
    """How long to wait for the end of a window, in a loop whose timers may fire half a millisecond early."""
    return min(3600.0, max(0.0, left_ns / NS_PER_S)) + 0.001
