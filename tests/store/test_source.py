"""External data is read from beside the model and from nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from clockwork_serve.store.onnx.source import current, read_source
from clockwork_serve.store.settings import ProblemError
from clockwork_serve.store.trial import difference
from tests.store import graphs


def save_external(model: onnx.ModelProto, folder, location: str = "weights.bin"):
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    changed = onnx.load(path, load_external_data=False)
    for tensor in changed.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(changed.SerializeToString())
    return path


def test_external_data_is_put_in_and_watched(tmp_path):
    source = read_source(save_external(graphs.mlp(1), tmp_path), tmp_path)
    whole = onnx.ModelProto.FromString(bytes(source.data))
    for tensor, wanted in zip(whole.graph.initializer, graphs.mlp(1).graph.initializer, strict=True):
        assert tensor.raw_data == wanted.raw_data
    assert [facts.path.rpartition("/")[2] for facts in source.files] == ["model.onnx", "weights.bin"]
    assert current(source.files)
    (tmp_path / "weights.bin").write_bytes(b"other")
    assert not current(source.files)


def test_models_with_external_data_are_served_and_share_the_code(shop):
    shop.add("inside", graphs.mlp(1))
    save_external(graphs.mlp(2), shop.add("outside", None))
    served, problems = shop.compile()
    assert not problems
    assert served["inside/1"].code == served["outside/1"].code
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    wanted = graphs.answers(graphs.mlp(2), {"x": x})
    assert difference(shop.run(served["outside/1"], {"x": x}), wanted) <= 1e-5


def test_external_data_may_not_lie_elsewhere(tmp_path):
    folder = tmp_path / "1"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    for location in ("../secret", str(tmp_path / "secret"), ""):
        path = save_external(graphs.mlp(), folder, location)
        with pytest.raises(ProblemError):
            read_source(path, folder)
    path = save_external(graphs.mlp(), folder)
    (folder / "weights.bin").unlink()
    with pytest.raises(ProblemError, match=r"weights\.bin"):
        read_source(path, folder)
    (folder / "weights.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ProblemError, match="leads to"):
        read_source(path, folder)


def test_truncated_external_data_is_said_to_be(tmp_path):
    path = save_external(graphs.mlp(), tmp_path)
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[:-100])
    with pytest.raises(ProblemError, match="the file is truncated"):
        read_source(path, tmp_path)
