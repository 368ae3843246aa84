"""Rows go into a batch and out of it again; outputs stay inside their room."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs

from clockwork_serve.devices.base import encode_bytes, io_bytes, put_outputs, rows_of, stack, write_outputs
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import Code
from tests.devices import lifted
from tests.devices.lifted import spec

CODE = Code(
    code_id="c", backend="onnx", path="", inputs=(spec("x", 3),), outputs=(spec("y", 2), spec("z", -1)),
    batched=True, batch_sizes=(1, 2, 4), lifted=True,
)  # fmt: skip


def test_rows_left_over_repeat_the_last():
    batch = np.zeros((5, 2))
    stack([np.ones((1, 2)), np.full((2, 2), 2.0)], batch)
    assert batch[:, 0].tolist() == [1, 2, 2, 2, 2]


def test_outputs_are_aligned_and_referred_to_from_the_rooms_start():
    call = lifted.call({}, room=1000)
    y, z = np.array([[1, 2]], np.float32), np.array([[3]], np.float32)
    texts = np.array([b"ab", "ü"], dtype=object)
    put_outputs(call, [(spec("y", 2), y), (spec("t", 2, datatype="BYTES"), texts), (spec("z", 1), z)])
    assert [(ref.name, ref.offset, ref.nbytes) for ref in call.outputs] == [
        ("y", 0, 8),
        ("t", 64, 12),
        ("z", 128, 4),
    ]
    assert bytes(call.output[64:76]) == b"\x02\0\0\0ab\x02\0\0\0" + "ü".encode()
    assert call.output[76] == 0xAA


@pytest.mark.parametrize(("room", "grown"), [(72, False), (71, True)])
def test_a_room_grows_if_the_last_output_would_end_after_it(room: int, grown: bool):
    call = lifted.call({}, room=room)
    before = call.output
    put_outputs(call, [(spec("y", 2), np.ones((1, 2), np.float32))] * 2)
    assert (call.output is not before, len(call.output)) == (grown, 72)
    assert bytes(call.output[64:72]) == np.ones(2, np.float32).tobytes()
    if grown:
        assert bytes(before) == b"\xaa" * 71


def test_an_empty_output_takes_no_room():
    call = lifted.call({}, room=0)
    put_outputs(call, [(spec("y", 0), np.zeros((1, 0), np.float32))])
    assert call.outputs[0].shape == (1, 0)


def test_each_call_gets_its_own_rows():
    code = structs.replace(CODE, outputs=(spec("y", 2),))
    calls = [lifted.call({}), lifted.call({})]
    batch = np.arange(8, dtype=np.float32).reshape(4, 2)
    write_outputs(code, [batch], 4, calls, [1, 2])
    assert lifted.output(calls[0], "y").tolist() == [[0, 1]]
    assert lifted.output(calls[1], "y").tolist() == [[2, 3], [4, 5]]


@pytest.mark.parametrize("shape", [(4, 3), (3, 2), (4, 2, 1)])
def test_an_output_of_another_shape_is_the_models_fault(shape):
    code = structs.replace(CODE, outputs=(spec("y", 2),))
    with pytest.raises(ModelError, match=r"output y: expected shape \(4, 2\), found"):
        write_outputs(code, [np.zeros(shape, np.float32)], 4, [], [])


def test_io_bytes_count_what_is_known():
    assert io_bytes(CODE, 4) == 64 + 64
    assert io_bytes(CODE, 6) == 128 + 64


@pytest.mark.parametrize(
    ("rows", "batch", "what"), [([1, 1], 3, "batch"), ([2, 3], 4, "rows"), ([0, 1], 2, "rows")]
)
def test_an_action_that_contradicts_its_code_is_refused(rows, batch, what):
    with pytest.raises(DeviceError, match=f"^{what}: expected"):
        rows_of(CODE, lifted.infer(CODE, rows, batch), [lifted.call({}) for _ in rows])


def test_there_are_buffers_for_every_call():
    with pytest.raises(DeviceError, match="calls: expected buffers for 2 calls, found 1"):
        rows_of(CODE, lifted.infer(CODE, [1, 1]), [lifted.call({})])


def test_strings_in_wire_form():
    assert encode_bytes(np.array([["a"], [b""]], dtype=object)) == b"\x01\0\0\0a\0\0\0\0"
