"""Shared memory: regions, and the tensors of calls in them."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from clockwork_serve.errors import DeviceError, ModelError, TransportError
from clockwork_serve.messages import Call, Infer, TensorRef, Tensors
from clockwork_serve.serve.shm import (
    BadTensors,
    Calls,
    OpenCall,
    Region,
    RegionGone,
    RegionMap,
    SpilledOutputs,
    check_epochs,
    encode_outputs,
    memory_of,
    read_epoch,
    write_epoch,
)
from clockwork_serve.units import KIB, align
from tests.serve.slots import Slot, slot
from tests.worker.actions import infer

# Regions: memory is allocated and freed without a gap, and only valid regions are mapped.


PAGE = mmap.PAGESIZE


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region.create(64 * KIB)
    yield made
    made.close()


def test_a_region_is_a_whole_number_of_pages_and_zero() -> None:
    region = Region.create(PAGE + 1)
    assert region.size == len(region.buffer) == 2 * PAGE
    assert bytes(region.buffer) == bytes(2 * PAGE)
    region.close()


def test_what_is_allocated_is_aligned_and_disjoint(region: Region) -> None:
    offsets = [region.allocate(100) for _ in range(3)]
    assert offsets == [0, 128, 256]
    assert region.free_bytes == 64 * KIB - 3 * 128


def test_even_nothing_gets_an_offset_of_its_own(region: Region) -> None:
    assert region.allocate(0) == 0
    assert region.allocate(0) == 64


def test_a_full_region_returns_none_until_a_piece_is_freed(region: Region) -> None:
    whole = region.allocate(64 * KIB)
    assert whole == 0
    assert region.allocate(1) is None
    region.free(whole)
    assert region.allocate(64 * KIB) == 0


def test_freed_neighbours_become_one_piece(region: Region) -> None:
    first, second, third = (region.allocate(16 * KIB) for _ in range(3))
    assert first is not None and second is not None and third is not None
    region.free(first)
    region.free(third)
    assert region.allocate(48 * KIB) is None
    region.free(second)
    region.check()
    assert region.allocate(64 * KIB) == 0


def test_the_smallest_hole_that_fits_is_used(region: Region) -> None:
    small, wall, large = region.allocate(64), region.allocate(64), region.allocate(256)
    assert small is not None and wall is not None and large is not None
    region.allocate(64)
    region.free(small)
    region.free(large)
    assert region.allocate(200) == large
    assert region.allocate(10) == small


def test_freeing_twice_is_a_bug(region: Region) -> None:
    offset = region.allocate(10)
    assert offset is not None
    region.free(offset)
    with pytest.raises(AssertionError, match="freed twice"):
        region.free(offset)


@given(st.lists(st.one_of(st.integers(0, 9000), st.integers(-20, -1)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_pieces_never_overlap_and_all_memory_is_freed(steps: list[int]) -> None:
    region = Region.create(32 * KIB)
    live: list[tuple[int, int]] = []
    for step in steps:
        if step < 0:
            if live:
                region.free(live.pop(step % len(live))[0])
        elif (offset := region.allocate(step)) is not None:
            live.append((offset, align(max(step, 1))))
        elif sum(size for _, size in live) + align(max(step, 1)) <= region.size:
            assert live, "an empty region has room for whatever it is large enough for"
        region.check()
        ends = sorted(live)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(ends))
        assert region.free_bytes == region.size - sum(size for _, size in live)
    for offset, _ in live:
        region.free(offset)
    assert region.allocate(region.size) == 0
    region.close()


def test_an_epoch_is_eight_little_endian_bytes(region: Region) -> None:
    write_epoch(region.buffer, 64, 2**40 + 7)
    assert bytes(region.buffer[64:72]) == (2**40 + 7).to_bytes(8, "little")
    assert read_epoch(region.buffer, 64) == 2**40 + 7


def test_both_sides_see_the_same_bytes(region: Region) -> None:
    view = RegionMap().view(region.name)
    region.buffer[5:10] = b"hello"
    view[10:15] = b"there"
    assert bytes(region.buffer[5:15]) == b"hellothere" == bytes(view[5:15])


def test_a_mapping_is_made_once(region: Region) -> None:
    regions = RegionMap()
    assert regions.view(region.name) is regions.view(region.name)
    assert len(regions) == 1
    regions.forget(region.name)
    assert len(regions) == 0


def test_a_closed_region_is_gone(region: Region) -> None:
    regions = RegionMap()
    regions.view(region.name)
    region.close()
    with pytest.raises(RegionGone, match=f"region {region.name} is gone"):
        regions.view(region.name)
    assert len(regions) == 0


def test_a_new_region_with_the_same_name_is_mapped_anew() -> None:
    regions = RegionMap()
    old = Region.create(PAGE)
    regions.view(old.name)[0] = 1
    old.close()
    new = Region.create(PAGE)
    assert new.name == old.name, "the lowest free descriptor is used again"
    assert regions.view(new.name)[0] == 0
    new.close()


def test_mapping_a_new_region_drops_the_dead_ones(region: Region) -> None:
    regions = RegionMap()
    dead = Region.create(PAGE)
    regions.view(dead.name)
    dead.close()
    regions.view(region.name)
    assert len(regions) == 1


def test_the_region_of_a_killed_process_is_gone_but_its_memory_still_works() -> None:
    source = (
        "import sys; from clockwork_serve.serve.shm import Region; r = Region.create(4096); "
        "r.buffer[:4] = b'live'; print(r.name, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().decode().strip()
        regions = RegionMap()
        view = regions.view(name)
        assert bytes(view[:4]) == b"live"
        owner.kill()
        owner.wait()
        with pytest.raises(RegionGone):
            regions.view(name)
        view[:4] = b"dead"
        assert bytes(view[:4]) == b"dead"


def test_gone_is_a_transport_error() -> None:
    assert issubclass(RegionGone, TransportError)


@pytest.mark.parametrize("name", ["", "1:2", "a:b:c", "1:2:3:4", "-1:2:3", "../1:0:5", "1:2:\u0663"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RegionGone, match="expected PID:FD:BYTES"):
        RegionMap().view(name)


def test_another_size_is_refused(region: Region) -> None:
    pid, fd, size = region.name.split(":")
    with pytest.raises(RegionGone, match=f"expected a file of {int(size) * 2} bytes"):
        RegionMap().view(f"{pid}:{fd}:{int(size) * 2}")


def test_a_memfd_that_could_shrink_is_refused() -> None:
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    with pytest.raises(RegionGone, match="can neither shrink nor grow"):
        RegionMap().view(f"{os.getpid()}:{fd}:{PAGE}")
    os.close(fd)


def test_an_ordinary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with path.open("rb+") as opened, pytest.raises(RegionGone):
        RegionMap().view(f"{os.getpid()}:{opened.fileno()}:{PAGE}")


def test_a_pipe_is_refused_without_opening_it() -> None:
    read, write = os.pipe()
    with pytest.raises(RegionGone, match="expected a file of 0 bytes"):
        RegionMap().view(f"{os.getpid()}:{read}:0")
    os.close(read)
    os.close(write)


def test_a_region_can_not_be_resized() -> None:
    region = Region.create(PAGE)
    fd = int(region.name.split(":")[1])
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 2 * PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    region.close()


def test_cached_pieces_are_joined_before_memory_runs_out() -> None:
    region = Region.create(64 * KIB)
    pieces = [region.allocate(KIB) for _ in range(64)]
    assert region.allocate(1) is None
    for piece in pieces:
        assert piece is not None
        region.free(piece)
    region.check()
    assert region.free_bytes == 64 * KIB
    whole = region.allocate(64 * KIB)
    assert whole == 0
    region.check()
    region.free(whole)
    region.close()


def test_a_freed_small_piece_is_allocated_again_and_never_twice() -> None:
    region = Region.create(64 * KIB)
    first, second = region.allocate(KIB), region.allocate(KIB)
    assert first is not None
    region.free(first)
    assert [region.allocate(KIB - 1), region.allocate(KIB) in (first, second)] == [first, False]
    region.check()
    region.close()


# Calls are opened without a copy, and references that do not fit their region are refused by name.


IMAGE = np.arange(12, dtype=np.float32).reshape(1, 3, 4)


def of(*calls: Call) -> Infer:
    return structs.replace(infer(1, "a", 0), calls=calls)


def opened(made: Slot) -> OpenCall:
    (call,) = Calls(RegionMap(), SpilledOutputs(1 << 20)).open(of(made.call()))
    return call


def bent(made: Slot, **changes: Any) -> Slot:
    return Slot(made.region, structs.replace(made.tensors, **changes))


def bent_ref(made: Slot, **changes: Any) -> Slot:
    return bent(made, refs=(structs.replace(made.tensors.refs[0], **changes), *made.tensors.refs[1:]))


def test_inputs_are_views_of_the_region(region: Region) -> None:
    made = slot(region, {"x": IMAGE})
    x = opened(made).inputs["x"]
    np.testing.assert_array_equal(x, IMAGE)
    region.buffer[made.tensors.refs[0].offset + 3] = 0x40
    assert x[0, 0, 0] == 2.0


def test_inputs_can_not_be_written(region: Region) -> None:
    x = opened(slot(region, {"x": IMAGE})).inputs["x"]
    with pytest.raises(ValueError, match="read-only"):
        x[0, 0, 0] = 1


@pytest.mark.parametrize(
    "array",
    [
        np.array([[1, -2]], np.int64),
        np.array([True, False]),
        np.array(7, np.float32),
        np.zeros((0, 4), np.float32),
        np.array([b"", b"ab", b"c" * 300], dtype=object),
        np.array([[b"x"], [b"yz"]], dtype=object),
        np.array([], dtype=object),
    ],
    ids=["int64", "bool", "scalar", "empty", "strings", "strings in two axes", "no strings"],
)
def test_every_kind_of_tensor_is_read_as_it_was_written(region: Region, array: np.ndarray[Any, Any]) -> None:
    found = opened(slot(region, {"pad": np.zeros(3, np.uint8), "x": array})).inputs["x"]
    assert found.shape == array.shape
    assert found.dtype == array.dtype
    assert found.tolist() == array.tolist()


def test_outputs_are_written_into_their_room_and_described_from_the_regions_start(region: Region) -> None:
    slot(region, {"x": IMAGE})
    made = slot(region, {"x": IMAGE}, room=128)
    call = opened(made)
    assert len(call.output) == 128
    call.output[64:68] = b"done"
    call.outputs.append(TensorRef(name="y", datatype="UINT8", shape=(4,), offset=64, nbytes=4))
    (encoded,) = encode_outputs([call])
    told = msgspec.msgpack.decode(encoded, type=Tensors)
    (ref,) = told.refs
    assert bytes(region.buffer[ref.offset : ref.offset + ref.nbytes]) == b"done"
    assert told == structs.replace(made.tensors, refs=(ref,))


# Outputs that outgrow their room are in memory of the worker, until their slot is free.


def grown(made: Slot, spill: SpilledOutputs, data: bytes) -> Tensors:
    """What a worker reports of a call that needs this much room."""
    (call,) = Calls(RegionMap(), spill).open(of(made.call()))
    call.grow(len(data))
    call.output[: len(data)] = data
    call.outputs.append(TensorRef(name="y", datatype="UINT8", shape=(1,), offset=0, nbytes=len(data)))
    (encoded,) = encode_outputs([call])
    return msgspec.msgpack.decode(encoded, type=Tensors)


def test_outputs_larger_than_their_room_are_read_in_the_workers_memory(region: Region) -> None:
    made, spill = slot(region, {"x": IMAGE}, room=64), SpilledOutputs(64 * KIB)
    before = bytes(region.buffer)
    told = grown(made, spill, b"z" * 5000)
    assert bytes(region.buffer) == before
    memory = memory_of(told, region)
    assert memory is not region.buffer
    (ref,) = told.refs
    assert bytes(memory[ref.offset : ref.offset + ref.nbytes]) == b"z" * 5000
    made.take_back()
    assert bytes(memory[:5000]) == b"z" * 5000, "a mapping keeps it"
    assert (spill.free_unused(), spill.used_bytes) == (False, 0)
    with pytest.raises(RegionGone, match="its owner died or closed it"):
        memory_of(told, region)


def test_outputs_are_kept_until_their_slot_is_free_or_its_gateway_has_died(region: Region) -> None:
    other, spill = Region.create(4096), SpilledOutputs(64 * KIB)
    kept, freed, died = slot(region, {"x": IMAGE}), slot(region, {"x": IMAGE}), slot(other, {"x": IMAGE})
    told = [grown(made, spill, bytes(5000)) for made in (kept, freed, died)]
    assert spill.used_bytes == 3 * 8 * KIB
    assert spill.free_unused()
    assert spill.used_bytes == 3 * 8 * KIB
    freed.take_back()
    other.close()
    assert spill.free_unused()
    assert spill.used_bytes == 8 * KIB
    assert len(memory_of(told[0], region)) == 8 * KIB
    spill.close()
    assert spill.used_bytes == 0


def test_a_request_that_runs_again_keeps_its_latest_outputs_alone(region: Region) -> None:
    made, spill = slot(region, {"x": IMAGE}), SpilledOutputs(64 * KIB)
    grown(made, spill, b"a" * 30_000)
    second = grown(made, spill, b"b" * 5000)
    assert spill.used_bytes == 8 * KIB
    assert bytes(memory_of(second, region)[:5000]) == b"b" * 5000
    spill.close()


def test_outputs_have_no_more_memory_than_the_setting_says(region: Region) -> None:
    spill, slots = SpilledOutputs(20_000), [slot(region, {"x": IMAGE}) for _ in range(3)]
    for made in slots[:2]:
        grown(made, spill, bytes(8 * KIB))
    why = r"outputs: expected at most 3616 bytes, as are left of 20000; found 3617; .* at least 5MiB"
    with pytest.raises(ModelError, match=why):
        grown(slots[2], spill, bytes(3617))
    slots[0].take_back()
    assert grown(slots[2], spill, bytes(8 * KIB)).output_bytes == 8 * KIB
    spill.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (100, 29), (0, -1)])
def test_a_device_that_writes_outside_the_room_is_at_fault(region: Region, offset: int, nbytes: int) -> None:
    call = opened(slot(region, {"x": IMAGE}, room=128))
    ref = TensorRef(name="y", datatype="UINT8", shape=(nbytes,), offset=offset, nbytes=nbytes)
    call.outputs.append(ref)
    with pytest.raises(DeviceError, match="output y: the device wrote"):
        encode_outputs([call])


def test_a_slot_that_was_reused_is_refused_before_and_after(region: Region) -> None:
    made = slot(region, {"x": IMAGE})
    call = opened(made)
    check_epochs([call])
    made.take_back()
    with pytest.raises(RegionGone, match=r"r1: its tensors were withdrawn.*has epoch 8, expected 7"):
        check_epochs([call])
    with pytest.raises(RegionGone, match="epoch 8"):
        opened(made)


def test_a_dead_gateways_tensors_are_gone(region: Region) -> None:
    made = slot(region, {"x": IMAGE})
    region.close()
    with pytest.raises(RegionGone, match="its owner died or closed it"):
        opened(made)


def test_calls_of_several_gateways_share_a_batch(region: Region) -> None:
    other = Region.create(4096)
    calls = Calls(RegionMap(), SpilledOutputs(1 << 20)).open(
        of(
            slot(region, {"x": IMAGE}).call(),
            slot(other, {"x": IMAGE + 1}).call(),
            slot(region, {"x": IMAGE}).call(),
        )
    )
    assert [float(call.inputs["x"][0, 0, 0]) for call in calls] == [0, 1, 0]
    other.close()


def test_bytes_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(BadTensors, match="request r9: tensors can not be decoded"):
        Calls(RegionMap(), SpilledOutputs(1 << 20)).open(of(Call(request_id="r9", rows=1, tensors=b"\x00")))


@pytest.mark.parametrize(
    "changes",
    [
        {"header_offset": -8},
        {"header_offset": 65529},
        {"output_offset": -1},
        {"output_bytes": -1},
        {"output_bytes": 65536},
    ],
)
def test_a_header_or_a_room_outside_the_region_is_refused(region: Region, changes: dict[str, int]) -> None:
    made = bent(slot(region, {"x": IMAGE}), **changes)
    with pytest.raises(BadTensors, match=r"outside 0\.\.65536"):
        opened(made)


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": -64},
        {"offset": 65536},
        {"nbytes": -48},
        {"nbytes": 47},
        {"nbytes": 65536},
        {"offset": 66},
        {"shape": (1, 3, 5)},
        {"shape": (-1, -12)},
        {"shape": (1,) * 33},
        {"shape": (2**62, 8)},
        {"datatype": "FP128"},
        {"datatype": "FP64"},
    ],
    ids=str,
)
def test_an_input_that_does_not_fit_is_refused_by_name(region: Region, changes: dict[str, Any]) -> None:
    made = bent_ref(slot(region, {"x": IMAGE}), **changes)
    with pytest.raises(BadTensors, match="request r1: input x: "):
        opened(made)


def test_an_input_named_twice_is_refused(region: Region) -> None:
    made = slot(region, {"x": IMAGE})
    with pytest.raises(BadTensors, match="expected each name once"):
        opened(bent(made, refs=made.tensors.refs * 2))


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [((2,), 6), ((1,), 5), ((1,), 7), ((1,), 3), ((0,), 6), ((2**40,), 6)],
    ids=["too few", "cut", "more than one", "no length", "none expected", "absurd"],
)
def test_strings_that_do_not_add_up_are_refused(region: Region, shape: tuple[int, ...], nbytes: int) -> None:
    made = slot(region, {"x": np.array([b"ab"], dtype=object)})
    with pytest.raises(BadTensors, match=r"input x: expected .* elements"):
        opened(bent_ref(made, shape=shape, nbytes=nbytes))
