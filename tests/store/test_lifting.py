"""What is a weight leaves the graph unchanged in its bits; what is none stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from clockwork_serve.store.onnx.weights import is_weight, lift, views
from tests.store import graphs


@pytest.mark.parametrize(
    ("elements", "rank", "readers", "lifted"),
    [
        (16, 1, ["Clip"], True),
        (15, 1, ["Clip"], False),
        (10, 1, ["Gemm"], True),
        (1, 1, ["Gemm"], True),
        (10, 1, ["Gemm", "Clip"], False),
        (3, 1, ["Add"], True),
        (1, 1, ["Add"], False),
        (1, 0, ["Conv"], False),
        (0, 1, ["Conv"], False),
        (3, 1, [], False),
    ],
)
def test_weights_are_known_by_size_and_by_their_readers(elements, rank, readers, lifted):
    assert is_weight(elements, rank, readers) is lifted


def test_values_are_lifted_bit_by_bit_whichever_way_they_are_written():
    first, second = graphs.mlp(1), graphs.mlp(1)
    for tensor in second.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).ravel()
        tensor.ClearField("raw_data")
        tensor.float_data.extend(values.tolist())
    one, two = lift(first), lift(second)
    assert one.digest == two.digest
    np.testing.assert_array_equal(one.blob, two.blob)
    found = views(one.index, one.blob)
    wanted = {tuple(t.dims): onnx.numpy_helper.to_array(t) for t in graphs.mlp(1).graph.initializer}
    for view in found.values():
        np.testing.assert_array_equal(view, wanted[view.shape])


def test_weights_of_branches_stay_if_they_are_told_to():
    inside = lift(graphs.scalar_input(), branches=False)
    assert inside.index.tensors == ()
    assert inside.baked_bytes > 2 * 8 * 16 * 4
    assert len(lift(graphs.scalar_input()).index.tensors) == 2


def test_weights_of_one_name_in_two_branches_are_not_mixed_up():
    model = graphs.scalar_input()
    for attribute in model.graph.node[1].attribute:
        attribute.g.initializer[0].name = attribute.g.node[0].input[1] = "w"
    onnx.checker.check_model(model)
    inputs = {"x": graphs.floats(np.random.default_rng(1), 1, 8), "rate": np.array(8000, np.int64)}
    wanted = graphs.answers(model, inputs)
    lifted = lift(model)
    got = graphs.answers(
        onnx.ModelProto.FromString(lifted.graph), {**inputs, **views(lifted.index, lifted.blob)}
    )
    np.testing.assert_array_equal(got[0], wanted[0])


def test_a_weight_that_is_an_output_stays():
    model = graphs.mlp()
    model.graph.output.append(onnx.helper.make_tensor_value_info("w1", onnx.TensorProto.FLOAT, [32, 3]))
    assert (32, 3) not in [tensor.shape for tensor in lift(model).index.tensors]
