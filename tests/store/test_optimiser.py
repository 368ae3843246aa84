"""Sessions, and one-line errors for models that do not open."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from clockwork_serve.store.optimiser import (
    Optimiser,
    _cpu_flags,
    channel_block,
    parse_model,
    runtime_fingerprint,
)
from clockwork_serve.store.settings import ProblemError
from clockwork_serve.store.trial import RunError
from tests.store import graphs


def test_an_optimised_model_is_handed_back_beside_its_session():
    optimiser = Optimiser()
    session, optimised = optimiser.optimise(graphs.convnet().SerializeToString())
    assert optimiser.runs == 1
    assert "Relu" not in {node.op_type for node in parse_model(optimised).graph.node}  # fused
    assert session.run({"x": np.zeros((2, 3, 8, 8), np.float32)})[0].shape == (2, 10)
    assert session.output_shapes() == [["N", 10]]


def test_a_sum_and_its_normalisation_are_not_fused_into_the_slower_operator():
    h, t = onnx.helper, onnx.TensorProto
    nodes = [h.make_node("Add", ["x", "z"], ["s"]), h.make_node("LayerNormalization", ["s", "g", "b"], ["y"])]
    weights = {"g": np.ones(8, np.float32), "b": np.zeros(8, np.float32)}
    shape = [2, 4, 8]
    model = graphs.model(
        nodes, [("x", t.FLOAT, shape), ("z", t.FLOAT, shape)], [("y", t.FLOAT, shape)], weights
    )
    _, optimised = Optimiser().optimise(model.SerializeToString())
    assert [node.op_type for node in parse_model(optimised).graph.node] == ["Add", "LayerNormalization"]


def test_inputs_that_do_not_fit_are_an_error_of_the_run():
    session, _ = Optimiser().optimise(graphs.mlp().SerializeToString())
    with pytest.raises(RunError, match="invalid dimensions"):
        session.run({"x": np.zeros((2, 9), np.float32)})


def test_an_operator_that_the_runtime_lacks_is_named():
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], domain="com.example")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]))
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    with pytest.raises(ProblemError, match="NoSuchOperator") as caught:
        Optimiser().optimise(model.SerializeToString())
    assert caught.value.problem.field == "model.onnx"
    assert "\n" not in caught.value.problem.found


@pytest.mark.parametrize("data", [b"", b"\xff\xff", onnx.ModelProto(ir_version=8).SerializeToString()])
def test_bytes_that_are_no_model_are_refused(data):
    with pytest.raises(ProblemError, match="expected an ONNX model"):
        parse_model(data)


def test_artefacts_depend_on_the_runtime_and_on_the_instruction_sets(tmp_path):
    assert set(runtime_fingerprint()) == {"onnxruntime", "build", "machine", "cpu_flags"}
    assert runtime_fingerprint() == runtime_fingerprint()
    for name, flags in (("old", "avx avx2"), ("new", "avx avx2 avx512f"), ("same", "avx2 avx")):
        (tmp_path / name).write_text(f"processor : 0\nmodel name : X\nflags : {flags}\ncpu MHz : 1\n")
    assert _cpu_flags(tmp_path / "old") != _cpu_flags(tmp_path / "new")
    assert _cpu_flags(tmp_path / "old") == _cpu_flags(tmp_path / "same")


@pytest.mark.parametrize(
    ("flags", "block"), [("sse avx avx2 avx512f", 16), ("sse avx avx2", 8), ("sse avx", 0), ("avx512fp16", 0)]
)
def test_the_channels_in_a_block_are_known_by_the_instruction_sets(tmp_path, flags, block):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : X\nflags : {flags}\n")
    assert channel_block(tmp_path / "cpuinfo") == block
    assert channel_block(tmp_path / "missing") == 0
