"""A gateway's tensors for workers on other machines: they read inputs here, and write outputs back.

Whoever knows the epoch of a slot may read its inputs and write its outputs, and only workers that were given
its request do: where others may ask, epochs are random numbers.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.serve.gateway.requests import Slot, Slots
from clockwork_serve.serve.remote.config import ClusterContext, bound
from clockwork_serve.serve.remote.link import MachineAcceptor
from clockwork_serve.serve.remote.tensor_link import (
    Pieces,
    TensorLink,
    TransferHead,
    TransferKind,
    packed,
    pieces_of,
)

TRANSFERS_MAX: Final = 4096  # open transfers of one worker: far more than it has requests at a time

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Writing:
    """Outputs that are being received for the slot with this epoch; bytes from ``upto`` on are to come."""

    slot: Slot
    epoch: int
    upto: int = 0


@dataclass(slots=True)
class _Worker:
    """The open transfers of one connection."""

    reading: set[int] = field(default_factory=set)
    writing: dict[int, _Writing] = field(default_factory=dict)


class TensorServer(MachineAcceptor):
    """Serves the slots of one gateway.

    ``silence_s`` is how long the kernel waits for what was sent to be acknowledged.
    """

    def __init__(self, slots: Slots, context: ClusterContext, silence_s: float) -> None:
        super().__init__(context)
        self._slots = slots
        self._silence_s = silence_s
        self._workers: dict[TensorLink, _Worker] = {}
        self._at = ("", 0)

    def listen_at(self, host: str, port: int) -> int:
        """Accept workers there, and nowhere else; returns the port, which the system chooses if it is 0.

        Raises :class:`ConfigError` if it cannot be had.
        """
        if self._acceptor is not None and self._at[0] == host:
            return self._at[1]
        super().close()
        try:
            listening = bound(host, port)
        except OSError as error:
            raise ConfigError(
                f"tensor_port: expected a free port of {host}; found {port}, not to be had "
                f"({error.strerror or error}); choose another"
            ) from None
        self._at = host, listening.getsockname()[1]
        self.listen(listening)
        _log.info("workers on other machines get tensors at %s:%d", *self._at)
        return self._at[1]

    def close(self) -> None:
        """Stop listening, and close all connections."""
        super().close()
        for link in list(self._workers):
            link.close()
        self._workers.clear()

    def made(self) -> TensorLink:
        """A connection."""
        link = TensorLink(self, self._silence_s)
        self._workers[link] = _Worker()
        return link

    def failed(self, protocol: asyncio.BaseProtocol) -> None:
        """Forget it."""
        assert isinstance(protocol, TensorLink)
        self._workers.pop(protocol, None)

    # What workers ask

    def take(self, link: TensorLink, head: TransferHead) -> None:
        """Begin or end a transfer, or check where outputs are to go."""
        worker = self._workers[link]
        match head.kind:
            case TransferKind.READ:
                self._read(link, worker, head)
            case TransferKind.WRITE:
                self._write(link, worker, head)
            case TransferKind.DATA | TransferKind.LAST:
                self._check(worker, head)
            case TransferKind.STOP:
                worker.reading.discard(head.transfer)
                worker.writing.pop(head.transfer, None)
            case _:
                raise TransportError(f"it sent a message of kind {head.kind}, which no worker sends")
        if len(worker.reading) + len(worker.writing) > TRANSFERS_MAX:
            raise TransportError(f"it has more than {TRANSFERS_MAX} transfers open")

    def room(self, link: TensorLink, head: TransferHead, done: int) -> memoryview | None:
        """The part of the slot's room; None once the slot is another's, or its outputs were refused."""
        worker = self._workers.get(link)
        writing = None if worker is None else worker.writing.get(head.transfer)
        if writing is None or self._slots.find(writing.epoch) is not writing.slot:
            return None
        start = writing.slot.tensors.output_offset + head.at
        return writing.slot.region.buffer[start + done : start + head.nbytes]

    def received(self, link: TensorLink, head: TransferHead) -> None:
        """Outputs were received; with the last of them, the worker may tell that they are there."""
        if head.kind != TransferKind.LAST or link not in self._workers:
            return
        writing = self._workers[link].writing.pop(head.transfer, None)
        if writing is not None:
            there = self._slots.find(writing.epoch) is writing.slot
            link.send(TransferHead(TransferKind.DONE if there else TransferKind.GONE, 0, head.transfer))

    def lost(self, link: TensorLink, why: str) -> None:
        """Forget the worker, which connects again when it needs anything."""
        if self._workers.pop(link, None) is not None and link.aborted:
            self.complain(link.at.rpartition(":")[0], why)

    def _read(self, link: TensorLink, worker: _Worker, head: TransferHead) -> None:
        slot = self._slots.find(head.epoch)
        if slot is None:
            link.send(TransferHead(TransferKind.GONE, 0, head.transfer))
            return
        worker.reading.add(head.transfer)
        link.queue(self._inputs(worker, head, slot), sum([ref.nbytes for ref in slot.tensors.refs]))

    def _inputs(self, worker: _Worker, head: TransferHead, slot: Slot) -> Pieces:
        """The inputs of a slot, for as long as it is the request's and they are wanted."""
        transfer, refs = head.transfer, slot.tensors.refs
        for piece in pieces_of(transfer, slot.region.buffer, refs, packed(refs)):
            if transfer not in worker.reading:
                return
            if self._slots.find(head.epoch) is not slot:
                yield TransferHead(TransferKind.GONE, 0, transfer), memoryview(b"")
                break
            yield piece
        worker.reading.discard(transfer)

    def _write(self, link: TensorLink, worker: _Worker, head: TransferHead) -> None:
        slot = self._slots.find(head.epoch)
        if slot is None:
            link.send(TransferHead(TransferKind.GONE, 0, head.transfer))
        elif head.at > slot.tensors.output_bytes and not self._slots.grow(slot, head.at):
            link.send(TransferHead(TransferKind.FULL, 0, head.transfer))
        else:
            worker.writing[head.transfer] = _Writing(slot, head.epoch)

    def _check(self, worker: _Worker, head: TransferHead) -> None:
        writing = worker.writing.get(head.transfer)
        if writing is None:
            return
        room, end = writing.slot.tensors.output_bytes, head.at + head.nbytes
        if not writing.upto <= head.at <= end <= room:
            raise TransportError(
                f"it sent outputs from {head.at} to {end}; expected them from {writing.upto} to {room}"
            )
        writing.upto = end
