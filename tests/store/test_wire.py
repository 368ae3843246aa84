"""Holes are exactly where the float weights are, and everything else is the skeleton."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.store.onnx.wire import WireError, elements, filled, skeleton
from tests.store import graphs


def frame(model: onnx.ModelProto):
    return skeleton(memoryview(model.SerializeToString()))


def test_copies_have_one_skeleton_and_others_have_another():
    assert frame(graphs.convnet(1)).digest == frame(graphs.convnet(2)).digest
    assert frame(graphs.convnet(1)).digest != frame(graphs.convnet(1, classes=11)).digest
    assert frame(graphs.mlp(1)).digest != frame(graphs.constants_as_nodes(1)).digest


def test_elements_are_those_of_the_weights_in_file_order():
    model = graphs.mlp(3)
    data = memoryview(model.SerializeToString())
    wanted = [onnx.numpy_helper.to_array(tensor).ravel() for tensor in model.graph.initializer]
    flat = elements(data, skeleton(data).holes)
    np.testing.assert_array_equal(flat[:-1].view(np.float32), np.concatenate(wanted))
    assert flat[-1] == 0


def test_weights_in_constant_nodes_and_in_branches_are_found():
    assert frame(graphs.constants_as_nodes()).elements == frame(graphs.mlp()).elements
    assert frame(graphs.scalar_input()).elements == 2 * 8 * 16


def test_weights_written_as_numbers_are_found_too():
    model = graphs.mlp()
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).ravel()
        tensor.ClearField("raw_data")
        tensor.float_data.extend(values.tolist())
    assert frame(model).elements == frame(graphs.mlp()).elements


def test_integers_and_small_constants_are_part_of_the_skeleton():
    model = graphs.quantised()
    assert frame(model).elements == 32
    first = graphs.model(
        [onnx.helper.make_node("Clip", ["x", "least"], ["y"])],
        [("x", onnx.TensorProto.FLOAT, ["N", 4])],
        [("y", onnx.TensorProto.FLOAT, ["N", 4])],
        {"least": np.float32(0.5).reshape(())},
    )
    assert frame(first).elements == 0


def test_filling_changes_the_holes_only():
    data = memoryview(graphs.convnet(1).SerializeToString())
    other = memoryview(graphs.convnet(2).SerializeToString())
    holes = skeleton(data).holes
    assert filled(data, holes, elements(other, holes)) == bytes(other)


@given(st.integers(0, 2000), st.binary(max_size=30))
def test_damage_is_an_error_or_another_model_but_never_a_crash(cut, tail):
    data = graphs.mlp().SerializeToString()[:cut] + tail
    try:
        found = skeleton(memoryview(data))
    except WireError:
        return
    assert all(0 <= hole.start <= len(data) - 4 * hole.count for hole in found.holes)


@pytest.mark.parametrize("data", [b"\xff" * 20, b"\x3a\x80", b"\x3a\xff\x01", b"\x0b"])
def test_what_is_no_protobuf_is_refused(data):
    with pytest.raises(WireError):
        skeleton(memoryview(data))
