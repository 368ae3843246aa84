"""The models that all servers run."""

from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from comparison.peers import models, served

BATCH_NORM = {"mobilenet_v3_small": 6_056, "resnet18": 4_800}
"""Channels that are normalised: folding saves one number of each."""
PUBLISHED = {"mobilenet_v3_small": 2_542_856, "resnet18": 11_689_512}
"""Weights that torchvision's documentation gives."""


@pytest.mark.parametrize("kind", sorted(PUBLISHED))
def test_a_network_has_the_weights_of_the_published_one(kind: str) -> None:
    graph = models.NETWORKS[kind](0).graph

    weights = sum(int(np.prod(one.dims)) for one in graph.initializer)
    assert weights == PUBLISHED[kind] - BATCH_NORM[kind]


def test_copies_of_a_network_differ_in_their_answers(tmp_path: Path) -> None:
    files = [models.network_file(tmp_path, "mobilenet_v3_small", seed) for seed in (0, 1)]
    x = np.random.default_rng(0).standard_normal((2, *models.SHAPE), dtype=np.float32)
    first, second = (served.Network(str(file))(x) for file in files)

    assert first.shape == (2, models.CLASSES)
    assert np.isfinite(first).all()
    assert float(np.abs(first - second).max()) > 0.1
    assert float(np.abs(first[0] - first[1]).max()) > 1e-3


def test_the_device_waits_for_who_has_it_and_writes_down_what_it_did(tmp_path: Path) -> None:
    lock, log = tmp_path / "lock", tmp_path / "log"
    device = served.Device(str(lock), str(log), 5.0)
    done: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: done.append(device(np.zeros((2, 4), np.float32))))
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.1)
        assert not done
    thread.join()

    assert done[0].tolist() == [[5.0] * 4] * 2
    rows, wanted_ms, took_ms = log.read_text().split()
    assert (rows, wanted_ms) == ("2", "24")
    assert float(took_ms) >= 24


def test_what_is_served_is_told_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "kind": served.DEVICE, "shape": [4], "lock": str(tmp_path / "lock"), "log": str(tmp_path / "log"),
        "models": {"m": 1.0},
    }  # fmt: skip
    (tmp_path / "models.json").write_text(json.dumps(told))
    monkeypatch.setenv("PEER_MODELS", str(tmp_path / "models.json"))
    served.plan.cache_clear()
    try:
        assert served.names() == ["m"]
        assert served.array(bytes(32)).shape == (2, 4)
        assert isinstance(served.load("m"), served.Device)
    finally:
        served.plan.cache_clear()


def test_renaming_a_network_s_tensors_changes_its_names_alone() -> None:
    graph = models.Graph("g")
    graph.node("Relu", graph.node("Neg", "image"), output="feature")
    one, other = (
        models.helper.make_tensor_value_info(name, models.TensorProto.FLOAT, ["n", 2])
        for name in ("image", "feature")
    )

    found = models._renamed(graph.model([one], [other]), image="x", feature="y")

    models.onnx.checker.check_model(found)
    assert [value.name for value in (*found.graph.input, *found.graph.output)] == ["x", "y"]
    assert [(*node.input, *node.output) for node in found.graph.node] == [("x", "t1"), ("t1", "y")]
