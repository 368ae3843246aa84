"""Calls are opened without a copy, and references that do not fit their region are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import structs

from clockwork_serve.errors import DeviceError
from clockwork_serve.messages import Call, Infer, TensorRef, Tensors
from clockwork_serve.serve.shm import (
    BadTensors,
    Calls,
    OpenCall,
    Region,
    RegionGone,
    RegionMap,
    check_epochs,
    encode_outputs,
)
from tests.serve.slots import Slot, slot
from tests.worker.actions import infer

IMAGE = np.arange(12, dtype=np.float32).reshape(1, 3, 4)


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region.create(65536)
    yield made
    made.close()


def of(*calls: Call) -> Infer:
    return structs.replace(infer(1, "a", 0), calls=calls)


def opened(made: Slot) -> OpenCall:
    (call,) = Calls(RegionMap()).open(of(made.call()))
    return call


def bent(made: Slot, **changes: Any) -> Slot:
    return Slot(made.region, structs.replace(made.tensors, **changes))


def bent_ref(made: Slot, **changes: Any) -> Slot:
    return bent(made, refs=(structs.replace(made.tensors.refs[0], **changes), *made.tensors.refs[1:]))


def test_inputs_are_views_of_the_region(region: Region) -> None:
    made = slot(region, {"x": IMAGE})
    x = opened(made).buffers.inputs["x"]
    np.testing.assert_array_equal(x, IMAGE)
    region.buffer[made.tensors.refs[0].offset + 3] = 0x40
    assert x[0, 0, 0] == 2.0


def test_inputs_can_not_be_written(region: Region) -> None:
    x = opened(slot(region, {"x": IMAGE})).buffers.inputs["x"]
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
    found = opened(slot(region, {"pad": np.zeros(3, np.uint8), "x": array})).buffers.inputs["x"]
    assert found.shape == array.shape
    assert found.dtype == array.dtype
    assert found.tolist() == array.tolist()


def test_outputs_are_written_into_their_room_and_described_from_the_regions_start(region: Region) -> None:
    slot(region, {"x": IMAGE})
    made = slot(region, {"x": IMAGE}, room=128)
    call = opened(made)
    assert len(call.buffers.output) == 128
    call.buffers.output[64:68] = b"done"
    call.buffers.outputs.append(TensorRef(name="y", datatype="UINT8", shape=(4,), offset=64, nbytes=4))
    (encoded,) = encode_outputs([call])
    told = msgspec.msgpack.decode(encoded, type=Tensors)
    (ref,) = told.refs
    assert bytes(region.buffer[ref.offset : ref.offset + ref.nbytes]) == b"done"
    assert told == structs.replace(made.tensors, refs=(ref,))


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (100, 29), (0, -1)])
def test_a_device_that_writes_outside_the_room_is_at_fault(region: Region, offset: int, nbytes: int) -> None:
    call = opened(slot(region, {"x": IMAGE}, room=128))
    ref = TensorRef(name="y", datatype="UINT8", shape=(nbytes,), offset=offset, nbytes=nbytes)
    call.buffers.outputs.append(ref)
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
    with pytest.raises(RegionGone, match="its gateway died or closed it"):
        opened(made)


def test_calls_of_several_gateways_share_a_batch(region: Region) -> None:
    other = Region.create(4096)
    calls = Calls(RegionMap()).open(
        of(
            slot(region, {"x": IMAGE}).call(),
            slot(other, {"x": IMAGE + 1}).call(),
            slot(region, {"x": IMAGE}).call(),
        )
    )
    assert [float(call.buffers.inputs["x"][0, 0, 0]) for call in calls] == [0, 1, 0]
    other.close()


def test_bytes_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(BadTensors, match="request r9: tensors can not be decoded"):
        Calls(RegionMap()).open(of(Call(request_id="r9", rows=1, tensors=b"\x00")))


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
