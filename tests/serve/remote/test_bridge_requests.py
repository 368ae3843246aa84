"""Requests of a gateway elsewhere: passed on once all of their inputs are here, in memory that is theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Answer,
    Call,
    Frame,
    Outcome,
    Request,
    RequestPiece,
    TensorRef,
    Tensors,
    Undelivered,
)
from clockwork_serve.serve.remote.bridge import FarRequests
from clockwork_serve.serve.remote.link import PIECE_BYTES, decode, encode, on_the_way, packed
from clockwork_serve.serve.shm import NO_EPOCH, Calls, Region, RegionMap, SpilledOutputs, read_epoch
from clockwork_serve.units import KIB, MIB, align
from tests.serve.remote.bridges import used
from tests.worker.actions import infer


@pytest.fixture
def requests() -> Iterator[FarRequests]:
    made = FarRequests(1 * MIB)
    yield made
    made.region.check()
    made.close()


def tensor(nbytes: int, offset: int = 0, name: str = "x") -> TensorRef:
    return TensorRef(name=name, datatype="UINT8", shape=(1, nbytes), offset=offset, nbytes=nbytes)


def request(*sizes: int, name: str = "r", room: int = 0, **fields: Any) -> Request:
    refs = packed([tensor(size, name=f"x{at}") for at, size in enumerate(sizes)])
    made = Request(request_id=name, gateway="g", model="m/1", arrival_ns=1, deadline_ns=2, rows=3, tenant="t")
    return structs.replace(made, **({"tensors": on_the_way(refs, room)} | fields))


def piece(at: int, data: bytes, name: str = "r") -> RequestPiece:
    return RequestPiece(request_id=name, at=at, data=data)


def cut(blobs: list[bytes], name: str = "r") -> list[RequestPiece]:
    found, start = [], 0
    for blob in blobs:
        ends = range(0, len(blob), PIECE_BYTES)
        found += [piece(start + at, blob[at : at + PIECE_BYTES], name) for at in ends]
        start += align(len(blob))
    return found


def seen(passed: Request) -> list[bytes]:
    call = Call(request_id=passed.request_id, rows=passed.rows, tensors=passed.tensors)
    action = structs.replace(infer(1, "m", 0), calls=(call,))
    (opened,) = Calls(RegionMap(), SpilledOutputs(0)).open(action)
    return [np.asarray(array).tobytes() for array in opened.inputs.values()]


def written(requests: FarRequests, passed: Request, *blobs: bytes) -> bytes:
    room = decode(passed.tensors)
    at, refs = room.output_offset, []
    for number, blob in enumerate(blobs):
        requests.region.buffer[at : at + len(blob)] = blob
        refs.append(tensor(len(blob), at, f"y{number}"))
        at += align(len(blob))
    return encode(structs.replace(room, refs=tuple(refs)))


def answer(outputs: bytes = b"", name: str = "r", *, release: bool = True, **fields: Any) -> Answer:
    plain = {"outcome": Outcome.OK, "batch": 2, "exec_ns": 7} | fields
    return Answer(request_id=name, gateway="g", outputs=outputs, release=release, **plain)


def come(requests: FarRequests, *blobs: bytes, name: str = "r", room: int = 0) -> Request:
    passed = requests.take(request(*map(len, blobs), name=name, room=room))
    for each in cut(list(blobs), name):
        assert passed is None
        passed = requests.write(each)
    assert isinstance(passed, Request)
    return passed


def test_a_request_without_inputs_is_passed_on_at_once(requests: FarRequests) -> None:
    sent = request(room=100)
    passed = requests.take(sent)
    assert isinstance(passed, Request)
    assert structs.replace(passed, tensors=sent.tensors) == sent, "all else is as it was"
    found = decode(passed.tensors)
    assert (found.region, found.refs, found.output_bytes) == (requests.region.name, (), 100)
    assert read_epoch(requests.region.buffer, found.header_offset) == found.epoch != NO_EPOCH
    assert (len(requests), used(requests)) == (1, 64 + 128)


def test_a_request_with_inputs_is_passed_on_with_the_last_of_them(requests: FarRequests) -> None:
    blobs = [Random(size).randbytes(size) for size in (100, 64, 1, 300_000, 0, 63)]
    assert requests.take(request(*map(len, blobs), room=10)) is None
    *pieces, last = cut(blobs)
    assert not any(requests.write(each) for each in pieces)
    passed = requests.write(last)
    assert passed is not None
    assert seen(passed) == blobs
    assert all(ref.offset % 64 == 0 for ref in decode(passed.tensors).refs)


@pytest.mark.parametrize("sizes", [(0,), (0, 0), (1, 0), (0, 65), (1, 0, 0)])
def test_nobody_waits_for_an_input_that_is_empty(requests: FarRequests, sizes: tuple[int, ...]) -> None:
    blobs = [b"x" * size for size in sizes]
    assert seen(come(requests, *blobs)) == blobs


@pytest.mark.parametrize(
    "pieces",
    [
        [(128, 50)],
        [(0, 100), (0, 100)],
        [(0, 100), (128, 51)],
        [(0, 179)],
        [(0, 100), (100, 50)],
        [(1, 10)],
        [(-64, 64)],
        [(0, 100), (128, 50), (128, 50)],
        [(0, 100), (128, 50), (192, 0)],
    ],
    ids=[
        "out of order", "twice", "beyond the end", "beyond the end at once", "too soon", "from within",
        "from before", "twice at the end", "after the end",
    ],
)  # fmt: skip
def test_inputs_that_are_not_the_next_are_not_taken(
    requests: FarRequests, pieces: list[tuple[int, int]]
) -> None:
    requests.take(request(100, 50))
    neighbour = come(requests, b"n" * 64, name="neighbour")
    *good, (at, nbytes) = pieces
    for start, count in good:
        requests.write(piece(start, bytes(count)))
    with pytest.raises(TransportError, match=rf"it sent inputs of r from {at} to {at + nbytes}; expected"):
        requests.write(piece(at, bytes(nbytes)))
    assert seen(neighbour) == [b"n" * 64]


def test_inputs_of_nobody_are_of_no_use(requests: FarRequests) -> None:
    assert requests.write(piece(0, b"x", "nobody")) is None
    requests.take(request(100))
    requests.cancel("r")
    assert requests.write(piece(0, bytes(100))) is None
    assert used(requests) == 0


@pytest.mark.parametrize("sizes", [(), (100,)])
def test_a_request_comes_once(requests: FarRequests, sizes: tuple[int, ...]) -> None:
    requests.take(request(*sizes))
    with pytest.raises(TransportError, match="it sent request r twice"):
        requests.take(request(*sizes))


@pytest.mark.parametrize(
    "tensors",
    [
        b"",
        b"\xc1",
        encode([1, 2]),
        b"\x81\xa1z" + b"\x91" * 100_000 + b"\xc0",
        on_the_way((tensor(1, name="nnnn"),)).replace(b"nnnn", b"\xff" * 4),
        on_the_way((tensor(-1),)),
        on_the_way((tensor(5000), tensor(-4000))),
        on_the_way((), -1),
    ],
    ids=[
        "empty", "no message", "another message", "too deep", "no text", "less than none", "less in all",
        "less room",
    ],
)  # fmt: skip
def test_tensors_that_no_gateway_describes_are_not_taken(requests: FarRequests, tensors: bytes) -> None:
    with pytest.raises(TransportError, match="tensors "):
        requests.take(request(tensors=tensors))
    assert (len(requests), used(requests)) == (0, 0)


def test_without_room_nothing_is_taken_and_it_says_why() -> None:
    requests = FarRequests(4 * KIB)
    held = requests.take(request(name="held", room=4 * KIB - 256))
    assert isinstance(held, Request)
    refused = requests.take(request(128, room=1))
    assert isinstance(refused, Undelivered)
    assert (refused.request_id, "no room among 4096 bytes" in refused.why) == ("r", True)
    assert used(requests) == 4 * KIB - 192
    assert requests.write(piece(0, bytes(128))) is None
    assert isinstance(requests.take(request(128, room=2**63)), Undelivered)
    assert requests.take(request(128)) is None, "a smaller one has room"
    requests.close()


def test_all_memory_can_be_used() -> None:
    requests = FarRequests(4 * KIB)
    assert isinstance(requests.take(request(room=4 * KIB - 63)), Undelivered)
    assert isinstance(requests.take(request(room=4 * KIB - 64)), Request)
    assert requests.region.free_bytes == 0
    requests.close()


def test_who_is_cancelled_before_it_was_passed_on_is_gone(requests: FarRequests) -> None:
    requests.take(request(100, 100))
    requests.write(piece(0, bytes(100)))
    said = [requests.cancel(name) for name in ("r", "r", "nobody")]
    assert said == [Undelivered(request_id="r"), None, None]
    assert (len(requests), used(requests)) == (0, 0)


def test_who_is_cancelled_afterwards_is_still_to_be_answered(requests: FarRequests) -> None:
    come(requests, bytes(100))
    assert requests.cancel("r") is None
    assert used(requests) == 64 + 128
    assert list(requests.answer(answer(outcome=Outcome.CANCELLED))) == [answer(outcome=Outcome.CANCELLED)]
    assert used(requests) == 0


def test_an_answer_follows_its_outputs(requests: FarRequests) -> None:
    passed = come(requests, b"abc", room=400_000)
    blobs = [b"y" * 70, Random(1).randbytes(PIECE_BYTES + 1), b""]
    *pieces, told = requests.answer(answer(written(requests, passed, *blobs), release=False))
    room = bytearray(400_000)
    for each in pieces:
        assert isinstance(each, RequestPiece)
        assert (each.request_id, len(each.data) <= PIECE_BYTES) == ("r", True)
        room[each.at : each.at + len(each.data)] = each.data
    assert isinstance(told, Answer)
    found = decode(told.outputs)
    assert [bytes(room[ref.offset : ref.offset + ref.nbytes]) for ref in found.refs] == blobs
    assert [ref.name for ref in found.refs] == ["y0", "y1", "y2"]
    assert found.region == ""
    assert structs.replace(told, outputs=b"") == answer(), "and its gateway's memory is free"


def outputs_at(room: Tensors, *refs: TensorRef) -> bytes:
    return encode(structs.replace(room, refs=refs))


def test_outputs_that_outgrew_their_room_are_read_in_their_workers_memory(requests: FarRequests) -> None:
    passed = come(requests, b"abc", room=10)
    blobs, worker = [b"y" * 70, Random(1).randbytes(PIECE_BYTES + 1)], Region.create(1 * MIB)
    worker.buffer[:70], worker.buffer[128 : 128 + len(blobs[1])] = blobs
    found = outputs_at(
        structs.replace(decode(passed.tensors), region=worker.name, output_offset=0),
        tensor(70, 0, "y0"), tensor(len(blobs[1]), 128, "y1"),
    )  # fmt: skip
    *pieces, told = requests.answer(answer(found))
    assert {each.grown for each in pieces if isinstance(each, RequestPiece)} == {128 + PIECE_BYTES + 64}
    room = bytearray(128 + PIECE_BYTES + 64)
    for each in pieces:
        assert isinstance(each, RequestPiece)
        room[each.at : each.at + len(each.data)] = each.data
    assert isinstance(told, Answer)
    refs = decode(told.outputs).refs
    assert [bytes(room[ref.offset : ref.offset + ref.nbytes]) for ref in refs] == blobs
    assert header(requests, passed) == NO_EPOCH, "and the worker may free it"
    worker.close()


def header(requests: FarRequests, passed: Request) -> int:
    return read_epoch(requests.region.buffer, decode(passed.tensors).header_offset)


@pytest.mark.parametrize("release", [True, False])
def test_memory_is_free_once_the_answer_is_sent_and_then_released(
    requests: FarRequests, release: bool
) -> None:
    passed = come(requests, bytes(100), room=300_000)
    epoch = header(requests, passed)
    sending = requests.answer(answer(written(requests, passed, bytes(300_000)), release=release))
    for _ in range(3):
        assert isinstance(next(sending), RequestPiece)
        assert header(requests, passed) == epoch, "outputs are still to be read"
    assert isinstance(next(sending), Answer)
    assert next(sending, None) is None
    if not release:
        assert header(requests, passed) == epoch, "a worker still reads its inputs"
        assert used(requests) > 0
        requests.release("r")
    assert header(requests, passed) == NO_EPOCH
    assert (len(requests), used(requests)) == (0, 0)
    requests.release("r")


@pytest.mark.parametrize("after", [0, 1, 3])
def test_memory_that_is_released_first_is_kept_until_the_answer_is_sent(
    requests: FarRequests, after: int
) -> None:
    passed = come(requests, bytes(100), room=300_000)
    epoch = header(requests, passed)
    sending = requests.answer(answer(written(requests, passed, b"z" * 300_000), release=False))
    frames: list[Frame] = [next(sending) for _ in range(after)]
    requests.release("r")
    assert header(requests, passed) == epoch
    frames += sending
    assert b"".join(each.data for each in frames if isinstance(each, RequestPiece)) == b"z" * 300_000
    assert header(requests, passed) == NO_EPOCH
    assert used(requests) == 0


def test_an_answer_without_tensors_says_so(requests: FarRequests) -> None:
    (told,) = requests.answer(answer(written(requests, come(requests))))
    assert decode(told.outputs).refs == ()


def test_an_answer_to_nobody_here_is_passed_on_as_it_is(requests: FarRequests) -> None:
    told = answer(b"whatever", "nobody", release=False)
    assert list(requests.answer(told)) == [told]
    requests.release("nobody")


@pytest.mark.parametrize(
    "outputs",
    [
        lambda room: outputs_at(room, tensor(1, room.output_offset - 1)),
        lambda room: outputs_at(room, tensor(101, room.output_offset)),
        lambda room: outputs_at(room, tensor(100, room.output_offset), tensor(1)),
        lambda room: outputs_at(room, tensor(-1, room.output_offset + 1)),
        lambda room: outputs_at(room, tensor(-200, room.output_offset + 200)),
        lambda room: outputs_at(structs.replace(room, region=f"{os.getpid()}:9999:4096"), tensor(1)),
        lambda room: outputs_at(structs.replace(room, region="/etc/passwd"), tensor(1)),
        lambda room: b"\xc1",
        lambda room: outputs_at(room, tensor(1, 0, "nnnn")).replace(b"nnnn", b"\xff" * 4),
    ],
    ids=[
        "before", "beyond", "one of two", "less than none", "backwards", "dead worker", "no region",
        "no message", "no text",
    ],
)  # fmt: skip
def test_nothing_is_sent_from_outside_of_the_room_for_outputs(
    requests: FarRequests, outputs: Callable[[Tensors], bytes]
) -> None:
    passed = come(requests, b"secret", room=100)
    (told,) = requests.answer(answer(outputs(decode(passed.tensors))))
    assert isinstance(told, Answer)
    assert (told.outcome, told.outputs, told.release) == (Outcome.FAILED, b"", True)
    assert told.message.startswith("its outputs cannot be read: ")
    assert used(requests) == 0


# Random lives of many requests, against bookkeeping of the test's own.

SIZES = st.sampled_from([0, 1, 63, 64, 65, 500, 9_000, 150_000, 300_000])


@dataclass
class Life:
    """One request. ``told`` is what its gateway got of its outputs."""

    name: str
    blobs: list[bytes]
    room: int
    pieces: list[RequestPiece]
    passed: Request | None = None
    outputs: list[bytes] = field(default_factory=list)
    told: bytearray = field(default_factory=bytearray)
    answered: bool = False  # the controller did
    sent: bool = False
    released: bool = False

    @property
    def footprint(self) -> int:
        return align(64 + sum(align(len(blob)) for blob in self.blobs) + self.room)


class Lives(RuleBasedStateMachine):
    """A gateway that sends requests, a controller that answers, a network that takes what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = FarRequests(1 * MIB)
        self.dice = Random(1)
        self.count = 0
        self.lives: dict[str, Life] = {}  # all and only those that have memory
        self.sending: list[tuple[Life, Iterator[Frame]]] = []

    def pick(self, data: st.DataObject, wanted: Callable[[Life], bool]) -> Life | None:
        found = [life for life in self.lives.values() if wanted(life)]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(sizes=st.lists(SIZES, max_size=4), room=SIZES)
    def a_request_comes(self, sizes: list[int], room: int) -> None:
        self.count += 1
        name = f"r{self.count}"
        blobs = [self.dice.randbytes(size) for size in sizes]
        life = Life(name, blobs, room, cut(blobs, name))
        taken = self.requests.take(request(*sizes, name=name, room=room))
        if isinstance(taken, Undelivered):
            assert (taken.request_id, taken.why != "") == (name, True)
            assert self.lives or life.footprint > self.requests.region.size
            return
        self.lives[name] = life
        self.arrived(life, taken)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), count=st.integers(1, 4))
    def inputs_come(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            life = self.pick(data, lambda life: bool(life.pieces))
            if life is not None:
                self.arrived(life, self.requests.write(life.pieces.pop(0)))

    def arrived(self, life: Life, passed: Request | None) -> None:
        assert (passed is None) == bool(life.pieces), "passed on with its last input"
        life.passed = passed
        if passed is not None:
            assert seen(passed) == life.blobs

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), at=st.integers(-70, 400_000), nbytes=st.integers(1, 200))
    def nonsense_comes(self, data: st.DataObject, at: int, nbytes: int) -> None:
        life = self.pick(data, lambda life: not life.pieces or life.pieces[0].at != at)
        if life is not None:
            with pytest.raises(TransportError):
                self.requests.write(piece(at, bytes(nbytes), life.name))

    @precondition(lambda self: self.count)
    @rule(number=st.integers(1, 60))
    def a_client_leaves(self, number: int) -> None:
        name = f"r{min(number, self.count)}"
        life = self.lives.get(name)
        said = self.requests.cancel(name)
        assert said == (Undelivered(request_id=name) if life is not None and life.pieces else None)
        if said is not None:
            del self.lives[name]

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), release=st.booleans(), parts=st.integers(0, 3))
    def the_controller_answers(self, data: st.DataObject, release: bool, parts: int) -> None:
        life = self.pick(data, lambda life: life.passed is not None and not life.answered)
        if life is None:
            return
        assert life.passed is not None
        assert seen(life.passed) == life.blobs, "no other request wrote there"
        each = max(0, life.room // parts // 64 * 64 - 1) if parts else 0
        life.outputs = [self.dice.randbytes(each) for _ in range(parts)]
        life.told = bytearray(life.room)
        life.answered, life.released = True, release
        outputs = written(self.requests, life.passed, *life.outputs) if parts else b""
        told = answer(outputs, life.name, release=release)
        self.sending.append((life, self.requests.answer(told)))

    @precondition(lambda self: self.sending)
    @rule(count=st.integers(1, 6))
    def the_network_takes_frames(self, count: int) -> None:
        for _ in range(count):
            if self.sending:
                life, frames = self.sending[0]
                frame = next(frames, None)
                if frame is None:
                    self.sending.pop(0)
                else:
                    self.told(life, frame)

    def told(self, life: Life, frame: Frame) -> None:
        if isinstance(frame, RequestPiece):
            assert not life.sent
            assert 0 <= frame.at <= frame.at + len(frame.data) <= life.room
            life.told[frame.at : frame.at + len(frame.data)] = frame.data
            return
        assert isinstance(frame, Answer)
        assert (frame.outcome, frame.release) == (Outcome.OK, True)
        refs = decode(frame.outputs).refs if frame.outputs else ()
        assert [bytes(life.told[ref.offset : ref.offset + ref.nbytes]) for ref in refs] == life.outputs
        life.sent = True
        self.settle(life)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def workers_let_go(self, data: st.DataObject) -> None:
        life = self.pick(data, lambda life: life.answered and not life.released)
        if life is not None:
            self.requests.release(life.name)
            life.released = True
            self.settle(life)

    def settle(self, life: Life) -> None:
        if life.sent and life.released:
            del self.lives[life.name]

    @invariant()
    def memory_is_that_of_the_open_requests(self) -> None:
        self.requests.region.check()
        assert len(self.requests) == len(self.lives)
        assert used(self.requests) == sum(life.footprint for life in self.lives.values())

    @invariant()
    def no_two_requests_have_one_epoch(self) -> None:
        passed = [decode(life.passed.tensors) for life in self.lives.values() if life.passed is not None]
        epochs = [read_epoch(self.requests.region.buffer, each.header_offset) for each in passed]
        assert epochs == [each.epoch for each in passed]
        assert len({*epochs, NO_EPOCH}) == len(epochs) + 1

    def teardown(self) -> None:
        """All end: nothing is left."""
        for life in list(self.lives.values()):
            if life.passed is None:
                self.requests.cancel(life.name)
            elif not life.answered:
                list(self.requests.answer(answer(name=life.name)))
        for _, frames in self.sending:
            list(frames)
        for name in self.lives:
            self.requests.release(name)
        assert (len(self.requests), used(self.requests)) == (0, 0)
        self.requests.region.check()
        self.requests.close()


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
