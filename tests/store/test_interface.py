"""Which graphs have a batch axis, and why the others have none."""

from __future__ import annotations

import onnx
import pytest

from clockwork_serve.store.onnx.graph import batching_of, interface_of
from clockwork_serve.store.settings import ModelSettings, ProblemError, StoreConfig
from clockwork_serve.store.trial import GraphTensor, Interface

CONFIG = StoreConfig(cache_dir="unused")


def batching(inputs, outputs, **said):
    found = Interface(
        tuple(GraphTensor(f"x{n}", "FP32", dims) for n, dims in enumerate(inputs)),
        tuple(GraphTensor(f"y{n}", "FP32", dims) for n, dims in enumerate(outputs)),
    )
    return batching_of(found, ModelSettings(**said), CONFIG)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([("N", 3)], [("N", 4)]),
        ([("", 3), ("N",)], [("", 4)]),
        ([("N", 3)], [("other", 4)]),
        ([("N", 3)], [None]),
        ([("N", 3)], [()]),
    ],
)
def test_free_first_axes_are_a_batch_until_a_trial_says_otherwise(inputs, outputs):
    assert batching(inputs, outputs).max_batch_size == 16
    assert batching(inputs, outputs, max_batch_size=3).max_batch_size == 3
    assert batching(inputs, outputs, max_batch_size=0).max_batch_size == 0


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        ([(1, 3)], [("N", 4)], "axis 0 of input 'x0' is fixed to 1"),
        ([("N", 3), ()], [("N", 4)], "input 'x1' has no axis 0"),
        ([("N", 3), None], [("N", 4)], "input 'x1' has no axis 0"),
        ([("N", 3), ("M", 3)], [("N", 4)], "axis 0 of the inputs is not the same dimension (M, N)"),
        ([("N", 3)], [(1, 4)], "axis 0 of output 'y0' is fixed to 1"),
        ([("N", 3), (2, "N")], [("N", 4)], "fixed to 2 and its batch dimension 'N' is axis 1"),
    ],
)
def test_what_stands_in_the_way_is_named(inputs, outputs, why):
    assert batching(inputs, outputs).max_batch_size == 0
    assert why in batching(inputs, outputs).lost
    assert batching(inputs, outputs, max_batch_size=0).lost == ""
    assert batching(inputs, outputs, max_batch_size=8).lost.startswith("max_batch_size 8 was asked for, but ")


def test_a_model_without_inputs_is_not_advised_to_open_their_axes():
    assert batching([], [("N", 4)]).lost == ""
    lost = batching([], [("N", 4)], max_batch_size=8).lost
    assert "the model has no input" in lost
    assert "axis 0 of every input" not in lost


@pytest.mark.parametrize("name", ["seq", "sequence_length", "time", "num_frames", "tokens"])
def test_an_axis_named_as_a_sequence_is_no_batch_unless_a_setting_says_so(name):
    assert "by its name a sequence" in batching([(name, 3)], [(name, 4)]).lost
    assert batching([(name, 3)], [(name, 4)], max_batch_size=8).max_batch_size == 8
    assert batching([(f"batch_{name}", 3)], [("", 4)]).max_batch_size == 16


def one_output(value: onnx.ValueInfoProto) -> onnx.ModelProto:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N"])
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [value]))


def test_types_that_the_protocol_cannot_carry_are_refused_by_name():
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.COMPLEX64, ["N"])
    with pytest.raises(ProblemError, match=r"output 'y': expected an element type .* found COMPLEX64"):
        interface_of(one_output(value))
    sequence = onnx.helper.make_tensor_sequence_value_info("y", onnx.TensorProto.FLOAT, None)
    with pytest.raises(ProblemError, match="output 'y': expected a tensor, found a sequence"):
        interface_of(one_output(sequence))
