"""A gateway's tensors for workers elsewhere: who may have which, and what ends a connection."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.messages import Status
from clockwork_serve.serve.gateway.requests import Slot
from clockwork_serve.serve.remote import link as machine_link
from clockwork_serve.serve.remote import tensor_server
from clockwork_serve.serve.remote.config import ClusterContext, bound, context_of
from clockwork_serve.serve.remote.link import PIECE_BYTES, MachineAcceptor, dial
from clockwork_serve.serve.remote.tensor_link import TensorLink
from clockwork_serve.serve.remote.tensor_link import TransferHead as Head
from clockwork_serve.serve.remote.tensor_link import TransferKind as Kind
from tests.serve.certificates import certificates, renewed_certificates
from tests.serve.links import Side, until
from tests.serve.remote.machine_links import connect, ours, theirs
from tests.serve.remote.tensor_ends import Gateway, Worker, over

NOBODY = 12345


class Peer:
    """One end of a connection that says what a test wants, and keeps what it is told."""

    def __init__(self) -> None:
        self.heads: list[Head] = []
        self.data = bytearray()
        self.why = ""
        self.link = TensorLink(self, 5.0)
        self.on_head: Callable[[TensorLink, Head], None] = lambda link, head: None

    def take(self, link: TensorLink, head: Head) -> None:
        self.heads.append(head)
        self.on_head(link, head)

    def room(self, link: TensorLink, head: Head, done: int) -> memoryview | None:
        return None

    def received(self, link: TensorLink, head: Head) -> None:
        pass

    def lost(self, link: TensorLink, why: str) -> None:
        self.why = why

    def say(self, head: Head, data: bytes = b"") -> None:
        self.link.queue(iter([(head, memoryview(data))]), len(data))


@asynccontextmanager
async def peer(folder: Path) -> AsyncIterator[tuple[Gateway, Peer]]:
    """A worker that says what it likes to a gateway."""
    gateway, made = Gateway(folder), Peer()
    await dial(("127.0.0.1", gateway.port), context_of(theirs(certificates(folder)), server=False), made.link)
    try:
        yield gateway, made
    finally:
        made.link.close()
        gateway.close()
        await asyncio.sleep(0.05)


def read(slot: Slot, transfer: int = 1) -> Head:
    return Head(Kind.READ, 0, transfer, slot.tensors.epoch)


def write(slot: Slot, room: int, transfer: int = 1) -> Head:
    return Head(Kind.WRITE, 0, transfer, slot.tensors.epoch, room)


async def test_who_knows_no_epoch_gets_nothing(tmp_path: Path) -> None:
    async with peer(tmp_path) as (gateway, worker):
        slot = gateway.ask(b"secret", room=64)
        before = bytes(gateway.slots.region.buffer)
        for number, epoch in enumerate((0, 1, slot.tensors.epoch ^ 1)):
            worker.say(Head(Kind.READ, 0, number, epoch))
            worker.say(Head(Kind.WRITE, 0, 10 + number, epoch, 4))
            worker.say(Head(Kind.LAST, 4, 10 + number), b"evil")
        await until(lambda: len(worker.heads) == 6)
        assert {head.kind for head in worker.heads} == {Kind.GONE}
        assert bytes(gateway.slots.region.buffer) == before
        worker.say(read(slot))
        await until(lambda: len(worker.heads) == 7)
        assert worker.heads[-1] == Head(Kind.LAST, 6, 1)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([(Head(Kind.DATA, 4, 1, at=97), b"evil")], "outputs from 97 to 101; expected them from 0 to 100"),
        ([(Head(Kind.DATA, 4, 1, at=(1 << 64) - 2), b"evil")], "expected them from 0 to 100"),
        ([(Head(Kind.DATA, 4, 1), b"good"), (Head(Kind.LAST, 4, 1), b"evil")], "expected them from 4 to 100"),
        ([(Head(Kind.DONE, 0, 1), b"")], "it sent a message of kind 6"),
        ([(Head(99, 0, 1), b"")], "it sent a message of kind 99"),
        ([(Head(Kind.DATA, PIECE_BYTES + 1, 1), b"x")], f"it sent {PIECE_BYTES + 1} bytes at once"),
        ([(Head(Kind.STOP, 1, 1), b"x")], "it sent 1 bytes at once"),
    ],
    ids=["beyond", "far beyond", "twice", "a gateway's", "no kind", "too much", "data behind others"],
)
async def test_a_worker_that_makes_no_sense_is_cut_off(
    tmp_path: Path, messages: list[tuple[Head, bytes]], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, machine_link.__name__)
    async with peer(tmp_path) as (gateway, worker):
        slot, neighbour = gateway.ask(room=100), gateway.ask(b"neighbour", room=64)
        before = bytes(gateway.slots.region.buffer)
        worker.say(write(slot, 100))
        for head, data in messages:
            worker.say(head, data)
        await until(lambda: worker.why)
        start = slot.tensors.output_offset
        after = bytes(gateway.slots.region.buffer)
        assert (after[:start], after[start + 100 :]) == (before[:start], before[start + 100 :])
        assert (gateway.server._workers, neighbour.tensors.output_bytes) == ({}, 64)
    (said,) = [record.getMessage() for record in caplog.records]
    assert why in said


async def test_what_a_worker_stops_comes_no_further(tmp_path: Path) -> None:
    async with peer(tmp_path) as (gateway, worker):
        slot = gateway.ask(bytes(300 * PIECE_BYTES))  # more than sockets hold
        worker.link._transport.pause_reading()  # type: ignore[union-attr]
        worker.say(read(slot))
        await until(lambda: [each for each in gateway.server._workers.values() if each.reading])
        worker.say(Head(Kind.STOP, 0, 1))
        worker.say(read(gateway.ask(b"next"), 2))
        await until(lambda: not [each for each in gateway.server._workers.values() if 1 in each.reading])
        worker.link._transport.resume_reading()  # type: ignore[union-attr]
        await until(lambda: worker.heads and worker.heads[-1].transfer == 2)
        assert len(worker.heads) < 301
        assert Kind.GONE not in {head.kind for head in worker.heads}


async def test_a_worker_that_is_gone_without_a_word_is_noticed_by_the_kernel(tmp_path: Path) -> None:
    async with peer(tmp_path) as (gateway, worker):
        await until(lambda: [link for link in gateway.server._workers if link.is_open])
        for link in (worker.link, *gateway.server._workers):
            assert link._transport is not None
            connected = link._transport.get_extra_info("socket")
            assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle_s = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert idle_s == machine_link.KEEP_IDLE_S


async def test_a_slot_that_is_freed_while_it_is_read_is_gone(tmp_path: Path) -> None:
    async with peer(tmp_path) as (gateway, worker):
        slot = gateway.ask(bytes(300 * PIECE_BYTES))  # more than sockets hold
        worker.link._transport.pause_reading()  # type: ignore[union-attr]
        worker.say(read(slot))
        await until(lambda: [each for each in gateway.server._workers.values() if each.reading])
        gateway.slots.free(slot)
        worker.link._transport.resume_reading()  # type: ignore[union-attr]
        await until(lambda: worker.heads and worker.heads[-1].kind in (Kind.GONE, Kind.LAST))
        assert worker.heads[-1].kind == Kind.GONE, "it may be another request's by now"


async def test_open_transfers_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_server, "TRANSFERS_MAX", 3)
    async with peer(tmp_path) as (gateway, worker):
        slot = gateway.ask(room=64)
        for number in range(4):
            worker.say(write(slot, 4, number))
        await until(lambda: worker.why)
        assert not gateway.server._workers


async def test_who_is_of_another_authority_or_speaks_otherwise_is_turned_away(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    gateway = Gateway(tmp_path)
    strangers = renewed_certificates(tmp_path / "other")
    files = msgspec.structs.replace(theirs(strangers), ca=certificates(tmp_path).ca)
    stranger = Peer()
    try:
        await dial(("127.0.0.1", gateway.port), context_of(files, server=False), stranger.link)
    except TransportError:
        pass
    else:  # TLS 1.3: it hears of the refusal later
        await until(lambda: stranger.why)
    with pytest.raises(TransportError):
        await connect(Side(), gateway.port, theirs(certificates(tmp_path)))  # a link of another kind
    await until(lambda: not gateway.server._workers)
    gateway.close()


async def test_it_listens_at_one_address_and_moves_with_it(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    assert gateway.server.listen_at("127.0.0.1", 0) == gateway.port, "the link was made again"
    moved = gateway.server.listen_at("127.0.0.2", 0)
    context = context_of(theirs(certificates(tmp_path)), server=False)
    with pytest.raises(TransportError):
        await dial(("127.0.0.1", gateway.port), context, Peer().link)
    with bound("127.0.0.3", moved), pytest.raises(ConfigError, match="tensor_port: expected a free port"):
        gateway.server.listen_at("127.0.0.3", moved)
    gateway.close()


# What a worker thinks of a gateway


class Liar(MachineAcceptor):
    """A gateway that answers each READ by these messages."""

    def __init__(self, folder: Path, messages: list[tuple[Head, bytes]]) -> None:
        super().__init__(ClusterContext(ours(certificates(folder)), server=True))
        self.messages = messages
        self.peers: list[Peer] = []

    def made(self) -> TensorLink:
        said = Peer()

        def on_head(link: TensorLink, head: Head) -> None:
            if head.kind == Kind.READ:
                for each, data in self.messages:
                    said.say(each._replace(transfer=head.transfer), data)

        said.on_head = on_head
        self.peers.append(said)
        return said.link


@pytest.mark.parametrize(
    "messages",
    [
        [(Head(Kind.DATA, 8, 1, at=124), b"too late")],
        [(Head(Kind.DATA, 8, 1, at=(1 << 64) - 8), b"far away")],
        [(Head(Kind.LAST, 8, 1), b"too few!")],
        [(Head(Kind.DATA, 64, 1), b"x" * 64), (Head(Kind.LAST, 36, 1, at=28), b"y" * 36)],
        [(Head(Kind.LAST, 101, 1), b"x" * 101)],
        [(Head(Kind.READ, 0, 1), b"")],
        [(Head(77, 0, 1), b"")],
    ],
    ids=["beyond", "far beyond", "too few", "twice", "too many", "a worker's", "no kind"],
)
async def test_a_gateway_that_makes_no_sense_gives_no_inputs(
    tmp_path: Path, messages: list[tuple[Head, bytes]]
) -> None:
    worker, liar, honest = Worker(tmp_path), Liar(tmp_path, messages), Gateway(tmp_path)
    listening = bound("127.0.0.1", 0)
    liar.listen(listening)
    slot = honest.ask(b"x" * 100)
    slot.tensors = msgspec.structs.replace(slot.tensors, server=f"127.0.0.1:{listening.getsockname()[1]}")
    action = over(1, slot, for_ms=300)
    assert worker.tensors.bring(action)
    await until(lambda: worker.posted)
    assert len(liar.peers) > 1, "it tried again, in vain"
    (call,) = worker.open(worker.posted.pop())
    assert call.inputs["x0"].shape == (1, 100)
    after = bytes(worker.tensors._region.buffer[64 + 128 :])
    assert not any(after), "beyond its inputs nothing is written"
    liar.close()
    honest.close()
    worker.tensors.close()
    await asyncio.sleep(0.05)


async def test_a_gateway_that_tells_that_nothing_is_there_is_believed(tmp_path: Path) -> None:
    worker, liar, honest = (
        Worker(tmp_path),
        Liar(tmp_path, [(Head(Kind.GONE, 0, 1), b"")]),
        Gateway(tmp_path),
    )
    listening = bound("127.0.0.1", 0)
    liar.listen(listening)
    slot = honest.ask(b"x" * 100)
    slot.tensors = msgspec.structs.replace(slot.tensors, server=f"127.0.0.1:{listening.getsockname()[1]}")
    assert worker.tensors.bring(over(1, slot))
    assert (await worker.result()).status is Status.INPUT_GONE
    liar.close()
    honest.close()
    worker.tensors.close()
    await asyncio.sleep(0.05)
