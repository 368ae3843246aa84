"""The controller as a gateway elsewhere has it: tensors arrive as they left, and nonsense ends the link."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.devices.base import put_outputs
from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.messages import (
    Answer,
    Call,
    Cancel,
    FarGateway,
    Frame,
    Outcome,
    Readiness,
    Refused,
    Request,
    RequestPiece,
    Role,
    TensorRef,
    Tensors,
    TensorSpec,
    Undelivered,
)
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway.requests import Slot, Slots
from clockwork_serve.serve.remote import gateway as far_controller
from clockwork_serve.serve.remote.bridge import FarRequests
from clockwork_serve.serve.remote.gateway import RETRY_S_MAX, FarConnector, FarController
from clockwork_serve.serve.remote.link import decode, on_the_way
from clockwork_serve.serve.shm import Calls, RegionMap, SpilledOutputs, encode_outputs
from clockwork_serve.units import MIB, align
from tests.serve.certificates import certificates
from tests.serve.remote.machine_links import theirs
from tests.worker.actions import infer

READY = Readiness(ready=True)


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(test, 120))


class Wire:
    """Stands for the link to the bridge: keeps what is sent, and draws what is queued when told to."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.queued: list[Iterator[Frame]] = []
        self.is_open = True
        self.lost_because = ""
        self.closed = False
        self.far: FarController | None = None  # who is told that it is lost

    def send(self, frame: Frame) -> None:
        self.frames.append(frame)

    def queue(self, frames: Iterator[Frame], *, bulk: bool = False) -> None:
        assert not bulk, "clients wait for it"
        self.queued.append(frames)

    def close(self) -> None:
        self.is_open, self.closed = False, True

    def abort(self, why: str) -> None:
        self.lose(why)

    def lose(self, why: str) -> None:
        self.is_open, self.lost_because = False, why
        if self.far is not None:
            self.far.on_link_lost(self)  # type: ignore[arg-type]

    def taken(self) -> list[Frame]:
        """All that was sent, and after that what was queued."""
        found = self.frames + [frame for frames in self.queued for frame in frames]
        self.frames, self.queued = [], []
        return found


class World:
    """A gateway's memory, what stands for its controller, and whom that tells."""

    def __init__(self) -> None:
        self.slots = Slots(8 * MIB)
        self.wire = Wire()
        self.told: list[Frame] = []
        self.lost: list[str] = []
        self.open: dict[str, Slot] = {}
        self.far = self.wire.far = FarController(self.told.extend, self.lost.append, self.grow)

    @classmethod
    async def begun(cls) -> World:
        world = cls()
        world.hear(READY)
        assert await world.far.begin(world.wire) is None
        assert world.told.pop() == READY
        return world

    def hear(self, *frames: Frame) -> None:
        self.far.on_frames(self.wire, list(frames))  # type: ignore[arg-type]

    def grow(self, name: str, nbytes: int) -> Tensors | None:
        """As its gateway does."""
        larger = self.slots.grow(self.open[name], nbytes)
        if larger is None:
            return None
        self.open[name] = larger
        return larger.tensors

    def send(self, *blobs: bytes, name: str = "r", room: int = 0) -> Slot:
        """Have a request sent."""
        inputs = [InputTensor(f"x{at}", "UINT8", (1, len(blob)), blob) for at, blob in enumerate(blobs)]
        slot = self.slots.fill(inputs, room)
        assert slot is not None
        self.open[name] = slot
        self.far.send(request(slot.encoded, name))
        return slot


def request(tensors: bytes = b"", name: str = "r") -> Request:
    return Request(
        request_id=name, gateway="a.gateway-0", model="m/1", arrival_ns=1, deadline_ns=2, rows=1,
        tensors=tensors, priority=3, way_ns=4,
    )  # fmt: skip


def answer(outputs: bytes = b"", name: str = "r") -> Answer:
    return Answer(request_id=name, gateway="a.gateway-0", outcome=Outcome.OK, outputs=outputs, exec_ns=5)


def piece(at: int, data: bytes, name: str = "r") -> RequestPiece:
    return RequestPiece(request_id=name, at=at, data=data)


# There and back

SIZES = st.sampled_from([0, 1, 63, 64, 65, 1000, 131_072, 131_073, 300_000])
CALLS = st.lists(
    st.tuples(st.lists(SIZES, max_size=3), st.lists(SIZES, min_size=1, max_size=3)), min_size=1, max_size=3
)


def worked(passed: Request, inputs: list[bytes], outputs: list[bytes], spill: SpilledOutputs) -> Answer:
    """What a worker does: it finds these inputs, and writes these outputs."""
    call = Call(request_id=passed.request_id, rows=passed.rows, tensors=passed.tensors)
    action = structs.replace(infer(1, "m", 0), calls=(call,))
    (opened,) = Calls(RegionMap(), spill).open(action)
    assert [np.asarray(array).tobytes() for array in opened.inputs.values()] == inputs
    named = (TensorSpec(name=f"y{at}", datatype="UINT8", shape=(-1,)) for at in range(len(outputs)))
    put_outputs(opened, zip(named, [np.frombuffer(blob, np.uint8)[None] for blob in outputs], strict=True))
    return answer(*encode_outputs([opened]), passed.request_id)


async def there_and_back(calls: list[tuple[list[int], list[int]]], dice: Random) -> None:
    world, bridge, spill = await World.begun(), FarRequests(8 * MIB), SpilledOutputs(8 * MIB)
    sent: dict[str, tuple[list[bytes], list[bytes]]] = {}
    for number, sizes in enumerate(calls):
        inputs, outputs = ([dice.randbytes(size) for size in each] for each in sizes)
        room = sum(align(len(blob)) for blob in outputs) * dice.randint(0, 2) // 2
        world.send(*inputs, name=f"r{number}", room=room)
        sent[f"r{number}"] = inputs, outputs
    passed = []
    for frame in world.wire.taken():
        assert isinstance(frame, Request | RequestPiece)
        passed.append(bridge.take(frame) if isinstance(frame, Request) else bridge.write(frame))
    requests = [frame for frame in passed if isinstance(frame, Request)]
    assert {one.request_id for one in requests} == set(sent)
    dice.shuffle(requests)
    for one in requests:
        world.hear(*bridge.answer(worked(one, *sent[one.request_id], spill)))
    assert [told.request_id for told in world.told] == [one.request_id for one in requests]  # type: ignore[union-attr]
    for told in world.told:
        assert isinstance(told, Answer)
        slot, (inputs, outputs) = world.open[told.request_id], sent[told.request_id]
        assert [bytes(output.data) for output in slot.outputs(told.outputs)[0]] == outputs
        memory, refs = slot.region.buffer, slot.tensors.refs
        assert [bytes(memory[ref.offset : ref.offset + ref.nbytes]) for ref in refs] == inputs
        assert structs.replace(told, outputs=b"") == answer(name=told.request_id)
        world.slots.free(slot)
    assert (len(bridge), bridge.region.free_bytes, world.slots.used_bytes) == (0, bridge.region.size, 0)
    assert not world.lost
    assert (spill.free_unused(), spill.used_bytes) == (False, 0)
    bridge.close()
    world.slots.close()


@settings(max_examples=60)
@given(CALLS, st.integers(0, 2**32))
def test_tensors_arrive_as_they_left_there_and_back(
    calls: list[tuple[list[int], list[int]]], seed: int
) -> None:
    run(there_and_back(calls, Random(seed)))


def test_outputs_that_find_no_room_here_fail_their_request_alone() -> None:
    async def test() -> None:
        world = await World.begun()
        world.send(room=64)
        world.send(room=64, name="other")
        before = bytes(world.slots.region.buffer)
        ref = TensorRef(name="y", datatype="UINT8", shape=(1, 9 * MIB), offset=0, nbytes=9 * MIB)
        for at in (0, 65):
            world.hear(structs.replace(piece(at, b"y" * 65), grown=9 * MIB))
        world.hear(answer(on_the_way((ref,))), answer(name="other"))
        failed, other = world.told
        assert isinstance(failed, Answer)
        assert (failed.outcome, failed.outputs) == (Outcome.FAILED, b"")
        assert "gateway_memory" in failed.message
        assert other == answer(name="other")
        assert bytes(world.slots.region.buffer) == before
        assert not world.lost

    run(test())


def test_a_request_goes_without_its_memory_and_all_else_as_it_is() -> None:
    async def test() -> None:
        world = await World.begun()
        slot = world.send(b"a" * 65, b"b", room=10)
        (sent,) = world.wire.frames
        assert isinstance(sent, Request)
        assert structs.replace(sent, tensors=b"") == request()
        found = decode(sent.tensors)
        assert (found.region, [ref.offset for ref in found.refs], found.output_bytes) == ("", [0, 128], 10)
        assert [ref.name for ref in found.refs] == [ref.name for ref in slot.tensors.refs]

    run(test())


def test_other_frames_pass_both_ways() -> None:
    async def test() -> None:
        world = await World.begun()
        world.far.send(Cancel(request_id="r"))
        world.hear(READY, answer(name="elsewhere"))
        assert world.wire.taken() == [Cancel(request_id="r")]
        assert world.told == [READY, answer(name="elsewhere")]

    run(test())


# Nonsense


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (piece(64, bytes(37)), "outputs of r beyond the room"),
        (piece(101, b""), "outputs of r beyond the room"),
        (piece(-1, b"xx"), "outputs of r beyond the room"),
        (piece(0, b"x", "nobody"), "outputs of nobody, which is not open"),
        (answer(b"\xc1"), "tensors cannot be read"),
        (answer(on_the_way((TensorRef(name="nnnn", datatype="", shape=(), offset=0, nbytes=0),))
                .replace(b"nnnn", b"\xff" * 4)), "tensors cannot be read"),
    ],
    ids=["beyond the room", "behind it", "before it", "of nobody", "no message", "no text"],
)  # fmt: skip
def test_a_server_that_makes_no_sense_loses_its_link(frame: Frame, why: str) -> None:
    async def test() -> None:
        world = await World.begun()
        neighbour = world.send(room=64, name="neighbour")
        world.send(b"x", room=100)
        before = bytes(world.slots.region.buffer)
        world.hear(frame, READY)
        assert [why in lost for lost in world.lost] == [True]
        assert bytes(world.slots.region.buffer) == before
        assert world.told == [], "nor is what follows believed"
        assert neighbour.tensors.output_bytes == 64

    run(test())


def test_outputs_of_a_request_that_was_answered_are_not_written() -> None:
    async def test() -> None:
        world = await World.begun()
        world.send(room=100)
        world.hear(piece(0, b"y"), answer())
        world.hear(piece(0, b"z"))
        assert len(world.lost) == 1

    run(test())


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 101), (-1, 1), (100, -1), (1 << 62, 1 << 62)])
def test_an_answer_that_is_to_be_found_elsewhere_ends_the_link(offset: int, nbytes: int) -> None:
    async def test() -> None:
        world = await World.begun()
        world.send(room=100)
        ref = TensorRef(name="y", datatype="UINT8", shape=(1, 101), offset=offset, nbytes=nbytes)
        world.hear(answer(on_the_way((ref,))))
        assert world.told == []
        assert len(world.lost) == 1

    run(test())


# Ends


@pytest.mark.parametrize(
    "end", [Undelivered(request_id="r", why="no room"), answer()], ids=["unheard", "answered"]
)
def test_inputs_of_a_request_that_has_ended_are_sent_no_further(end: Frame) -> None:
    async def test() -> None:
        world = await World.begun()
        world.send(bytes(300_000))
        (inputs,) = world.wire.queued
        assert isinstance(next(inputs), RequestPiece)
        world.hear(end)
        assert list(inputs) == []
        assert world.told == [end]

    run(test())


@pytest.mark.parametrize("close", [True, False])
def test_with_the_link_all_that_was_sent_is_forgotten(close: bool) -> None:
    async def test() -> None:
        world = await World.begun()
        assert world.far.is_open
        world.send(bytes(300_000))
        if close:
            world.far.close()
            assert world.wire.closed
        else:
            world.wire.lose("gone")
        assert world.lost == ([] if close else ["gone"])
        assert not world.far.is_open
        assert world.wire.taken()[1:] == []

    run(test())


def test_before_it_begins_nothing_can_be_sent() -> None:
    async def test() -> None:
        world = World()
        assert not world.far.is_open
        world.send(b"x")
        world.far.send(READY)
        world.far.close()
        assert world.wire.taken() == []

    run(test())


def test_who_is_refused_is_told_why_and_nobody_hears_of_the_end() -> None:
    async def test() -> None:
        world, refused = World(), Refused(why="another version", final=True)
        beginning = asyncio.ensure_future(world.far.begin(world.wire))
        await asyncio.sleep(0)
        world.hear(refused)
        assert await beginning == refused
        world.wire.lose("it closed the connection")
        assert (world.told, world.lost) == ([], [])

    run(test())


@pytest.mark.parametrize("when", ["before it begins", "without a word", "while it waits"])
def test_a_link_that_is_lost_before_the_server_said_anything_is_none(when: str) -> None:
    async def test() -> None:
        world = World()
        if when == "before it begins":
            world.wire.lose("gone")
        elif when == "without a word":
            world.wire.is_open, world.wire.lost_because = False, "gone"
        beginning = asyncio.ensure_future(world.far.begin(world.wire))
        await asyncio.sleep(0)
        if when == "while it waits":
            world.wire.lose("gone")
        with pytest.raises(TransportError, match="gone"):
            await beginning
        assert world.lost == []

    run(test())


# Again and again


class Dice:
    def uniform(self, low: float, high: float) -> float:
        assert (low, high) == (0.5, 1.0)
        return high


class Net:
    """What connects: to nobody, or to a server that says its first word at once. Nobody waits."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.first: Frame | None = None
        self.wires: list[Wire] = []
        self.pauses: list[float] = []
        self.words = "nobody there"
        server = Settings(controller="h:7", silence_s=3.0, **theirs(certificates(folder)).named())
        self.connector = FarConnector("a.gateway-0", server)
        self.connector._dice = Dice()  # type: ignore[assignment]
        monkeypatch.setattr(far_controller, "connect_machine", self.connect)
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def connect(
        self, address: tuple[str, int], context: Any, own: Any, on_frames: Any, on_lost: Any, silence_s: float
    ) -> Wire:
        assert (address, own.role, own.name, silence_s) == (("h", 7), Role.GATEWAY, "a.gateway-0", 3.0)
        if self.first is None:
            raise TransportError(self.words)
        wire = Wire()
        self.wires.append(wire)
        asyncio.get_running_loop().call_soon(on_frames, wire, [self.first])
        return wire

    async def knock(self) -> FarController | None:
        """What comes of it, if anything."""
        try:
            return await self.connector(lambda frames: None, lambda why: None)
        except TransportError:
            return None


def test_it_comes_again_less_and_less_often_and_says_once_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        net = Net(tmp_path, monkeypatch)
        for _ in range(8):
            assert await net.knock() is None
        assert net.pauses == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, RETRY_S_MAX, RETRY_S_MAX]
        net.words = "nobody at all"
        await net.knock()

    caplog.set_level(logging.WARNING, far_controller.__name__)
    run(test())
    said = [record.getMessage() for record in caplog.records]
    assert said == ["no controller yet: nobody there", "no controller yet: nobody at all"]


def test_after_a_link_that_lasted_it_comes_at_once_and_else_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        net = Net(tmp_path, monkeypatch)
        net.first = READY
        for _ in range(3):
            found = await net.knock()
            assert found is not None
            assert found.is_open
        assert net.wires[0].frames == [FarGateway(gateway="a.gateway-0", version=__version__)]
        net.connector._linked_s -= 2 * RETRY_S_MAX
        for _ in range(2):
            await net.knock()
        assert net.pauses == [0.0, 0.05, 0.1, 0.0, 0.05]
        assert not any(wire.closed for wire in net.wires)

    run(test())


def test_who_is_refused_for_good_gives_up_and_else_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        net = Net(tmp_path, monkeypatch)
        net.first = Refused(why="no controller now", final=False)
        assert await net.knock() is None
        assert not net.connector.refused.done()
        net.first = Refused(why="install that", final=True)
        for _ in range(2):
            with pytest.raises(TransportError, match="does not take this gateway: install that"):
                await net.connector(lambda frames: None, lambda why: None)
        with pytest.raises(ConfigError, match=r"the server does not take a.gateway-0: install that"):
            await net.connector.refused
        assert [wire.closed for wire in net.wires] == [True] * 3

    run(test())


def test_who_stops_while_the_server_says_nothing_leaves_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        net = Net(tmp_path, monkeypatch)
        wire = Wire()

        async def silent(*given: Any) -> Wire:
            return wire

        monkeypatch.setattr(far_controller, "connect_machine", silent)
        knocking = asyncio.ensure_future(net.knock())
        asyncio.get_running_loop().call_soon(knocking.cancel)
        with pytest.raises(asyncio.CancelledError):
            await knocking
        assert wire.closed

    run(test())


def test_files_that_will_not_do_are_named_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        files = structs.replace(theirs(certificates(tmp_path)), ca=str(tmp_path / "nothing.pem"))
        with pytest.raises(ConfigError, match="cluster_ca"):
            FarConnector("a.gateway-0", Settings(controller="h:7", **files.named()))

    run(test())
