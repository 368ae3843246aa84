"""A worker on another machine as the bridge represents it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Extent, Infer, Piece, Result, Status, TensorRef, Window
from clockwork_serve.serve.remote.bridge_peers import Actions, LaneTiming, not_after
from clockwork_serve.serve.remote.link import PIECE_BYTES, decode, on_the_way
from clockwork_serve.serve.shm import Region, memory_of
from clockwork_serve.units import align, ms
from tests.serve.slots import Slot, answer, slot
from tests.worker.actions import GPU, infer, load

# INFERs as the bridge passes them on: tensors out of a gateway's memory and back, and nowhere else.


X = np.arange(4, dtype=np.float32).reshape(1, 4)
LARGE = np.arange(PIECE_BYTES, dtype=np.float32)


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region.create(4 * 1024 * 1024)
    yield made
    made.close()


def over(action: Infer, *slots: Slot) -> Infer:
    calls = tuple(each.call(request_id=f"r{at}") for at, each in enumerate(slots))
    return structs.replace(action, calls=calls, batch=max(1, len(calls)))


def ended(action_id: int, *outputs: bytes, status: Status = Status.OK, device: str = GPU) -> Result:
    return Result(
        action_id=action_id, device=device, status=status, started_ns=50, ended_ns=60, outputs=outputs
    )


def y(nbytes: int = 16, offset: int = 0) -> bytes:
    ref = TensorRef(name="y", datatype="FP32", shape=(1, nbytes // 4), offset=offset, nbytes=nbytes)
    return on_the_way((ref,))


def collected(actions: Actions, action_id: int) -> dict[tuple[int, int], bytes]:
    return {(piece.call, piece.at): piece.data for piece in pieces(actions, action_id)}


def pieces(actions: Actions, action_id: int) -> list[Any]:
    return list(actions.inputs(action_id))


def test_inputs_travel_in_pieces_and_outputs_come_back_to_their_slots(region: Region) -> None:
    actions = Actions(1 << 20)
    slots = slot(region, {"x": X, "big": LARGE}), slot(region, {"x": X + 1}, epoch=8)
    sent = actions.send_infer(over(infer(1, "a", 0), *slots), 100)
    assert isinstance(sent, Infer)
    first = decode(sent.calls[0].tensors)
    assert (first.region, [ref.offset for ref in first.refs], first.output_bytes) == ("", [0, 64], 256)
    got = collected(actions, 1)
    assert got[0, 0] == X.tobytes()
    assert (
        got[0, 64] + got[0, 64 + PIECE_BYTES] + got[0, 64 + 2 * PIECE_BYTES] + got[0, 64 + 3 * PIECE_BYTES]
        == LARGE.tobytes()
    )
    assert got[1, 0] == (X + 1).tobytes()

    for call in (0, 1):
        actions.write(Piece(action_id=1, call=call, at=0, data=(X * call).tobytes()))
    result = actions.end(ended(1, y(), y()), 1000)
    assert (result.status, result.started_ns, result.ended_ns) == (Status.OK, 100, 1000)
    for call in (0, 1):
        found = answer(region, result.outputs[call])["y"]
        np.testing.assert_array_equal(found, X * call)
        assert decode(result.outputs[call]).epoch == slots[call].tensors.epoch
    assert len(actions) == 0


def spilled(outputs: bytes, region: Region, made: Slot) -> bytes:
    """The output ``y`` that a result has, in other memory than its slot's."""
    told = decode(outputs)
    memory, (ref,) = memory_of(told, region), told.refs
    assert memory is not region.buffer
    assert (told.epoch, told.header_offset) == (made.tensors.epoch, made.tensors.header_offset)
    return bytes(memory[ref.offset : ref.offset + ref.nbytes])


def test_outputs_that_outgrow_their_room_are_kept_until_their_slot_is_free(region: Region) -> None:
    actions, made, blob = Actions(1 << 20), slot(region, {"x": X}), bytes(range(250)) * 400
    assert isinstance(actions.send_infer(over(infer(1, "a", 0), made), 100), Infer)
    for at in (0, 50_000):
        actions.write(Piece(action_id=1, call=0, at=at, data=blob[at : at + 50_000], grown=align(len(blob))))
    result = actions.end(ended(1, y(len(blob))), 1000)
    assert result.status is Status.OK
    assert spilled(result.outputs[0], region, made) == blob
    assert actions.spill.free_unused()
    made.take_back()
    assert not actions.spill.free_unused()


@pytest.mark.parametrize("grown", [1 << 20, 1 << 63])
def test_outputs_without_room_fail_their_infer_and_leave_the_worker(region: Region, grown: int) -> None:
    actions = Actions(8192)
    assert isinstance(actions.send_infer(over(infer(1, "a", 0), slot(region, {"x": X})), 100), Infer)
    for at in (0, 250):
        actions.write(Piece(action_id=1, call=0, at=at, data=bytes(250), grown=grown))
    result = actions.end(ended(1, y(grown)), 1000)
    assert result.status is Status.MODEL_RAISED
    assert result.message.startswith("outputs: expected at most 8192 bytes, as are left of io_memory (8192)")


def test_a_slot_that_was_taken_back_is_not_read_and_not_answered_from(region: Region) -> None:
    actions, taken = Actions(1 << 20), slot(region, {"x": X})
    taken.take_back()
    refused = actions.send_infer(over(infer(1, "a", 0), taken), 100)
    assert isinstance(refused, Result)
    assert (refused.status, refused.started_ns) == (Status.INPUT_GONE, 100)

    later = slot(region, {"x": X})
    assert isinstance(actions.send_infer(over(infer(2, "a", 0), later), 100), Infer)
    later.take_back()
    assert actions.end(ended(2, y()), 1000).status is Status.INPUT_GONE


def test_nothing_is_written_outside_of_an_action_s_room_or_after_its_end(region: Region) -> None:
    actions = Actions(1 << 20)
    assert isinstance(actions.send_infer(over(infer(1, "a", 0), slot(region, {"x": X})), 100), Infer)
    for wrong in (
        Piece(action_id=1, call=0, at=250, data=bytes(16)),
        Piece(action_id=1, call=0, at=-8, data=bytes(16)),
        Piece(action_id=1, call=1, at=0, data=bytes(16)),
        Piece(action_id=2, call=0, at=0, data=bytes(16)),
    ):
        with pytest.raises(TransportError, match="it sent outputs"):
            actions.write(wrong)
    assert actions.end(ended(1, y(16, offset=250)), 1000).status is Status.DEVICE_FAULT
    with pytest.raises(TransportError, match="which it was not given"):
        actions.write(Piece(action_id=1, call=0, at=0, data=bytes(16)))
    with pytest.raises(TransportError, match="which it was not given"):
        actions.end(ended(1, y()), 1000)


def test_outputs_that_cannot_be_read_or_are_too_few_are_a_fault_of_the_device(region: Region) -> None:
    actions = Actions(1 << 20)
    no_text = y().replace(b"\xa1y", b"\xa1\xff")
    for action_id, outputs in ((1, (b"\xc1",)), (2, ()), (3, (no_text,))):
        assert isinstance(
            actions.send_infer(over(infer(action_id, "a", 0), slot(region, {"x": X})), 100), Infer
        )
        assert actions.end(ended(action_id, *outputs), 1000).status is Status.DEVICE_FAULT


def test_a_result_of_another_device_is_not_believed(region: Region) -> None:
    actions = Actions(1 << 20)
    actions.send(load(1, "a", 0), 100)
    with pytest.raises(TransportError, match="which it was not given"):
        actions.end(ended(1, device="gpu:1"), 1000)


def test_inputs_of_an_infer_that_has_ended_are_sent_no_further(region: Region) -> None:
    actions = Actions(1 << 20)
    actions.send_infer(over(infer(1, "a", 0), slot(region, {"x": LARGE})), 100)
    sending = actions.inputs(1)
    next(sending)
    actions.end(ended(1, status=Status.TOO_LATE), 1000)
    assert list(sending) == []


# Durations as the controller sees them of an INFER on another machine.


KEY = ("code", 1, 1000)


def result(lane_ms: float, status: Status = Status.OK) -> Result:
    """On a clock of its own."""
    return Result(
        action_id=1, device="d", status=status, started_ns=10**15, ended_ns=10**15 + ms(lane_ms),
        run_ns=ms(lane_ms),
    )  # fmt: skip


def timed_infer() -> Infer:
    return Infer(
        action_id=1, device="d", model="m/1", code_id="code", extent=Extent(0, 1), version=1, batch=1,
        calls=(), window=Window(0, ms(50)), expected_ns=ms(1),
    )  # fmt: skip


def test_the_way_there_and_back_counts_where_the_lane_was_idle() -> None:
    found = LaneTiming().ended(result(2), KEY, ms(100), ms(110), 1000)
    assert (found.started_ns, found.ended_ns) == (ms(100), ms(110))
    assert found.input_ns + found.run_ns + found.output_ns == ms(10)
    assert found.input_ns == found.output_ns == ms(4), "as much there as back"


def test_what_came_while_another_one_ran_took_only_the_rest() -> None:
    timing = LaneTiming()
    timing.ended(result(2), KEY, ms(100), ms(110), 1000)
    found = timing.ended(result(2), KEY, ms(101), ms(113), 1000)
    assert found.lane_ns == ms(3)


def test_no_duration_is_shorter_than_the_lane_was_taken() -> None:
    timing = LaneTiming()
    timing.ended(result(2), KEY, ms(100), ms(110), 1000)
    found = timing.ended(result(5), KEY, ms(101), ms(112), 1000)
    assert found.lane_ns == ms(5)
    assert found.ended_ns == ms(112)


def test_a_window_there_ends_later_by_the_way_to_it() -> None:
    timing = LaneTiming()
    assert timing.ordered(timed_infer(), KEY) == timed_infer()
    timing.ended(result(2), KEY, ms(100), ms(110), 1000)
    assert timing.ordered(timed_infer(), KEY).window == Window(0, ms(54))
    assert timing.ordered(timed_infer(), ("code", 2, 1000)) == timed_infer(), (
        "nothing is known of another size"
    )


def test_a_refusal_takes_no_time() -> None:
    found = LaneTiming().ended(result(2, Status.TOO_LATE), KEY, ms(100), ms(110), 0)
    assert (found.started_ns, found.ended_ns) == (ms(110), ms(110))


def test_nothing_ends_in_the_future() -> None:
    assert not_after(result(2), 10**15).ended_ns == 10**15
    assert not_after(result(2), 10**15).lane_ns == ms(2)
    assert not_after(result(2), 10**16) == result(2)
