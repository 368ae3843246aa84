"""A model that needs too much memory or time to compile is reported, and the others are prepared."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import uvloop
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.preparation import Preparation, PreparedRepository, prepare
from clockwork_serve.store import StoreConfig
from tests.serve.onnx_models import affine, put

GIB = 1 << 30
pytestmark = [pytest.mark.system]


def model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    sides = [h.make_tensor_value_info(name, T.FLOAT, ["N", 4]) for name in ("x", "y")]
    kept = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = h.make_model(
        h.make_graph(nodes, "g", sides[:1], sides[1:], kept), opset_imports=[h.make_opsetid("", 17)]
    )
    made.ir_version = 9
    return made


def endless() -> onnx.ModelProto:
    """A loop of 2**62 rounds."""
    counted = [h.make_tensor_value_info("i", T.INT64, []), h.make_tensor_value_info("go", T.BOOL, [])]
    body = h.make_graph(
        [h.make_node("Identity", ["go"], ["on"]), h.make_node("Add", ["state", "state"], ["next"])],
        "body",
        [*counted, h.make_tensor_value_info("state", T.FLOAT, None)],
        [h.make_tensor_value_info("on", T.BOOL, []), h.make_tensor_value_info("next", T.FLOAT, None)],
    )
    loop = h.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)
    return model([loop], {"rounds": np.array(2**62, np.int64)})


def greedy() -> onnx.ModelProto:
    """Two bytes of shape become 16 GiB."""
    nodes = [
        h.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        h.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
        h.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return model(nodes, {"shape": np.array([1 << 16, 1 << 16], np.int64)})


def prepared(root: Path, bad: onnx.ModelProto, **more: Any) -> PreparedRepository:
    put(root / "repository", "good", affine(1))
    put(root / "repository", "bad", bad.SerializeToString())
    preparation = Preparation(
        settings=Settings(repository=str(root / "repository"), **more),
        store=StoreConfig(cache_dir=str(root / "cache"), largest_batch=2, max_batch_size=2),
        devices=(DeviceConfig(device="cpu:0"),),
        result=str(root / "result"),
    )
    return uvloop.run(prepare(preparation, lambda told: None, lambda line: None))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_never_ends_is_left_out(tmp_path: Path) -> None:
    """It is found stuck twice, with others and alone; the limit is long enough for a busy machine."""
    found = prepared(tmp_path, endless(), compile_s=15.0)

    assert [each.model.name for each in found.served] == ["good"]
    assert [(each.model, each.found) for each in found.problems] == [
        ("bad", "one that takes longer, or for ever")
    ]
    assert "raise compile_s" in str(found.problems[0])


def test_a_model_that_needs_too_much_memory_is_left_out(tmp_path: Path) -> None:
    """It is not probed then, and its weights are not lifted out of its code."""
    found = prepared(tmp_path, greedy(), compile_memory=2 * GIB)

    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 3 * GIB
    by_name = {each.model.name: each.model for each in found.served}
    assert "good" in by_name
    told = [*map(str, found.problems), *(by_name["bad"].warnings if "bad" in by_name else ())]
    assert any("lloc" in words for words in told), told


CHATTY = """
import atexit

atexit.register(print, "bye")


class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        return {"y": inputs["x"]}

    def unload(self):
        pass
"""


def test_output_of_a_model_at_exit_does_not_hide_its_profile(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "chatty"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(CHATTY)
    tensors = '[{name = "%s", dims = [4], datatype = "FP32"}]'
    (folder / "clockwork.toml").write_text(f"inputs = {tensors % 'x'}\noutputs = {tensors % 'y'}\n")
    found = prepared(tmp_path, model([h.make_node("Relu", ["x"], ["y"])], {}))

    assert [each.model.name for each in found.served] == ["bad", "chatty", "good"]
    assert not found.problems, "what a model prints is no part of its profile"
