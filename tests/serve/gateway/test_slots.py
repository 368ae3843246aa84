"""Slots in a region: aligned, filled, used in place, never allocated twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from clockwork_serve.errors import InvalidRequest, TransportError
from clockwork_serve.messages import TensorRef, Tensors
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway.requests import COPIED_AT_ONCE, NO_EPOCH, Copies, Copying, Slots
from clockwork_serve.serve.shm import RegionGone, RegionMap, read_epoch
from clockwork_serve.units import KIB


@pytest.fixture
def slots() -> Iterator[Slots]:
    found = Slots(64 * KIB)
    yield found
    found.close()


def tensor(data: bytes | memoryview, name: str = "X") -> InputTensor:
    return InputTensor(name, "UINT8", (1, len(data)), data)


def test_a_slot_holds_its_inputs_and_room_for_outputs_all_aligned(slots: Slots) -> None:
    slot = slots.fill([tensor(b"a" * 70), tensor(b"bc", "Z")], 100)
    assert slot is not None
    memory = RegionMap().view(slots.region.name)
    x, z = slot.tensors.refs
    assert bytes(memory[x.offset : x.offset + x.nbytes]) == b"a" * 70
    assert bytes(memory[z.offset : z.offset + z.nbytes]) == b"bc"
    places = [slot.tensors.header_offset, x.offset, z.offset, slot.tensors.output_offset]
    assert [place % 64 for place in places] == [0, 0, 0, 0]
    assert places == sorted(set(places))
    assert slots.used_bytes == 64 + 128 + 64 + 128
    slots.free(slot)
    assert slots.used_bytes == 0


def test_the_header_has_the_requests_epoch_until_the_slot_is_free(slots: Slots) -> None:
    first, second = slots.fill([], 1), slots.fill([], 1)
    assert first is not None
    assert second is not None
    assert len({first.tensors.epoch, second.tensors.epoch, NO_EPOCH}) == 3
    buffer = slots.region.buffer
    assert read_epoch(buffer, first.tensors.header_offset) == first.tensors.epoch
    slots.free(first)
    assert read_epoch(buffer, first.tensors.header_offset) == NO_EPOCH
    assert read_epoch(buffer, second.tensors.header_offset) == second.tensors.epoch


def test_a_full_region_allocates_nothing_and_leaks_nothing(slots: Slots) -> None:
    slot = slots.fill([], 60 * KIB)
    assert slot is not None
    used = slots.used_bytes
    assert slots.fill([tensor(bytes(8 * KIB))], 0) is None
    assert slots.used_bytes == used
    slots.free(slot)
    assert slots.fill([tensor(bytes(8 * KIB))], 0) is not None


@pytest.mark.parametrize("head", [0, 1, 63, 64, 100])
def test_a_body_is_used_where_it_was_received(slots: Slots, head: int) -> None:
    body = slots.body(head + 128 + 5, head)
    assert body is not None
    body.view[:] = b"j" * head + b"x" * 128 + b"z" * 5
    slot = slots.fill([tensor(body.view[head : head + 128]), tensor(body.view[head + 128 :], "Z")], 10, body)
    assert slot is not None
    assert slot.pieces[0] == body.piece
    buffer = slots.region.buffer
    found = [bytes(buffer[ref.offset : ref.offset + ref.nbytes]) for ref in slot.tensors.refs]
    assert found == [b"x" * 128, b"z" * 5]
    assert all(ref.offset % 64 == 0 for ref in slot.tensors.refs)
    slots.free(slot)
    slots.region.check()
    assert slots.used_bytes == 0


def test_a_body_with_unaligned_tensors_is_copied_and_freed(slots: Slots) -> None:
    body = slots.body(2 + 70 + 5, 2)
    assert body is not None
    body.view[:] = b"jj" + b"x" * 70 + b"z" * 5
    slot = slots.fill([tensor(body.view[2:72]), tensor(body.view[72:], "Z")], 10, body)
    assert slot is not None
    assert len(slot.pieces) == 1
    buffer = slots.region.buffer
    found = [bytes(buffer[ref.offset : ref.offset + ref.nbytes]) for ref in slot.tensors.refs]
    assert found == [b"x" * 70, b"z" * 5]
    assert all(ref.offset % 64 == 0 for ref in slot.tensors.refs)
    slots.free(slot)
    assert slots.used_bytes == 0


def test_a_body_with_a_tensor_that_is_not_in_it_is_copied(slots: Slots) -> None:
    body = slots.body(64, 0)
    assert body is not None
    slot = slots.fill([tensor(b"from json"), tensor(body.view, "Z")], 0, body)
    assert slot is not None
    slots.free(slot)
    assert slots.used_bytes == 0


def test_no_room_for_outputs_frees_the_body(slots: Slots) -> None:
    body = slots.body(1 * KIB, 0)
    assert body is not None
    assert slots.fill([tensor(body.view)], 64 * KIB, body) is None
    assert slots.used_bytes == 0


def test_bodies_get_half_of_the_region_at_most(slots: Slots) -> None:
    first = slots.body(20 * KIB, 0)
    assert first is not None
    assert slots.body(13 * KIB, 0) is None
    slots.drop(first)
    second = slots.body(32 * KIB, 0)
    assert second is not None
    # Once a request, it is no body any more.
    assert slots.fill([tensor(second.view)], 0, second) is not None
    assert slots.body(16 * KIB, 0) is not None


def test_a_new_region_leaves_the_old_one_to_its_workers(slots: Slots) -> None:
    slot, body = slots.fill([tensor(b"old")], 10), slots.body(100, 0)
    assert slot is not None
    assert body is not None
    old = slots.region.name
    regions = RegionMap()
    memory = regions.view(old)
    slots.renew()
    assert bytes(memory[slot.tensors.refs[0].offset :][:3]) == b"old"
    with pytest.raises(RegionGone):
        regions.view(old)
    slots.free(slot)
    slots.drop(body)
    assert slots.used_bytes == 0
    body = slots.body(100, 0)
    assert body is not None
    slots.renew()
    body.view[:3] = b"abc"  # still being received
    slot = slots.fill([tensor(body.view[:3])], 0, body)
    assert slot is not None
    assert slot.region is slots.region
    assert bytes(slots.region.buffer[slot.tensors.refs[0].offset :][:3]) == b"abc"


def test_a_slot_is_found_by_an_epoch_that_nobody_guesses_until_it_is_free(slots: Slots) -> None:
    hidden = slots.fill([], 1)
    slots.server = "10.0.0.1:7001"
    first, second = slots.fill([], 1), slots.fill([], 1)
    assert hidden is not None
    assert first is not None
    assert second is not None
    epochs = [slot.tensors.epoch for slot in (hidden, first, second)]
    assert [slots.find(epoch) for epoch in epochs] == [None, first, second]
    assert abs(epochs[1] - epochs[2]) > 2**32
    assert (first.tensors.server, first.tensors.region) == ("10.0.0.1:7001", slots.region.name)
    release = slots.keep(first)
    slots.free(first)
    assert slots.find(epochs[1]) is first, "it is still read"
    release()
    assert slots.find(epochs[1]) is None
    slots.renew()
    assert slots.find(epochs[2]) is None


def test_a_slot_that_grows_is_the_same_slot(slots: Slots) -> None:
    slot = slots.fill([tensor(b"abc")], 8)
    assert slot is not None
    assert not slots.grow(slot, 64 * KIB)
    assert slots.grow(slot, 1000)
    room = slot.tensors
    assert (room.output_bytes, bytes(slots.region.buffer[room.refs[0].offset :][:3])) == (1000, b"abc")
    slots.free(slot)
    assert slots.used_bytes == 0


def test_outputs_that_name_no_region_are_in_the_slot_s_room(slots: Slots) -> None:
    slot = slots.fill([tensor(b"secret")], 100)
    assert slot is not None
    start = slot.tensors.output_offset
    slots.region.buffer[start : start + 70] = b"y" * 70
    (found,), own = slot.outputs(there(0, 70))
    assert (bytes(found.data), own) == (b"y" * 70, False)
    for offset, nbytes in ((-64, 64), (1, 100), (0, 101)):
        with pytest.raises(TransportError, match="lies outside of its request's slot"):
            slot.outputs(there(offset, nbytes))


def there(offset: int, nbytes: int) -> bytes:
    """Outputs as a worker on another machine describes them."""
    ref = TensorRef(name="y", datatype="UINT8", shape=(1, nbytes), offset=offset, nbytes=nbytes)
    return msgspec.msgpack.encode(Tensors(region="", epoch=0, header_offset=0, refs=(ref,)))


@pytest.mark.parametrize("freed_first", [True, False])
def test_a_slot_that_is_kept_is_freed_by_the_last_who_needs_it(slots: Slots, *, freed_first: bool) -> None:
    slot = slots.fill([tensor(b"abc")], 8)
    assert slot is not None
    release = slots.keep(slot)
    first, last = (lambda: slots.free(slot)), release
    if not freed_first:
        first, last = last, first
    first()
    assert read_epoch(slots.region.buffer, slot.tensors.header_offset) == slot.tensors.epoch
    last()
    assert not slots.used_bytes


def refused(request_id: str, error: InvalidRequest) -> None:
    pytest.fail(f"{request_id}: {error}")


async def test_large_inputs_are_copied_a_piece_in_a_turn() -> None:
    data = np.random.default_rng(1).integers(0, 255, 3 * COPIED_AT_ONCE + 5, np.uint8).tobytes()
    inputs = [InputTensor("A", "UINT8", (5,), b"12345"), InputTensor("B", "UINT8", (len(data),), data)]
    filled: list[str] = []
    slots = Slots(16 * COPIED_AT_ONCE)
    room = slots.body(100, 0)
    copies, copying = Copies(filled.append, refused), Copying()
    slot = slots.fill(inputs, 8, room, copying)
    assert slot is not None and copying
    used = slots.used_bytes
    copies.begin("one", copying)
    turns = 0
    while not filled:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 5
    assert slots.used_bytes < used  # the body's room is given back
    buffer = slots.region.buffer
    found = [bytes(buffer[ref.offset : ref.offset + ref.nbytes]) for ref in slot.tensors.refs]
    assert found == [b"12345", data]
    slots.free(slot)
    assert not slots.used_bytes
    del buffer
    slots.close()
    assert filled == ["one"]


async def test_a_withdrawn_copy_is_not_reported() -> None:
    inputs = [InputTensor("B", "UINT8", (COPIED_AT_ONCE * 3,), bytes(COPIED_AT_ONCE * 3))]
    filled: list[str] = []
    slots = Slots(16 * COPIED_AT_ONCE)
    copies = Copies(filled.append, refused)
    kept = []
    for name in ("one", "two"):
        copying = Copying()
        kept.append(slots.fill(inputs, 8, None, copying))
        copies.begin(name, copying)
    assert copies.withdraw("one")
    assert not copies.withdraw("one")
    while not filled:
        await asyncio.sleep(0)
    assert copies.clear() == []
    slots.close()
    assert filled == ["two"]
