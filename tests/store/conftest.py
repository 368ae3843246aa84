"""A repository in a temporary folder, filled and compiled in one line each."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

from clockwork_serve.messages import OnnxIndex
from clockwork_serve.store import (
    Cache,
    Compiler,
    Problem,
    Repository,
    ServedVersion,
    StoreConfig,
    compile_all,
)
from clockwork_serve.store.onnx.weights import views


class Shop:
    """A repository and a cache below one folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "models"
        self.root.mkdir()
        self.config = StoreConfig(cache_dir=str(folder / "cache"))
        self.cache = Cache(self.config.cache_dir)
        self.compiler = Compiler(self.cache, self.config)

    def add(self, name, model: onnx.ModelProto | bytes | None, *, version=1, toml=None, pbtxt=None) -> Path:
        """Put a model (or the bytes of its file) and its settings there; the version's folder."""
        folder = self.root / name / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        if model is not None:
            data = model if isinstance(model, bytes) else model.SerializeToString()
            (folder / "model.onnx").write_bytes(data)
        if toml is not None:
            (folder.parent / "clockwork.toml").write_text(toml)
        if pbtxt is not None:
            (folder.parent / "config.pbtxt").write_text(pbtxt)
        return folder

    def compile(self) -> tuple[dict[str, ServedVersion], list[Problem]]:
        """All models by key, and the problems; models in the order of their names, one at a time."""
        repository = Repository(self.root, self.config)
        served, problems = compile_all(repository, self.cache, compiler=self.compiler, threads=1)
        return {each.model.key: each for each in served}, problems

    def served(self, name: str, model, **settings) -> ServedVersion:
        """One model, compiled."""
        self.add(name, model, **settings)
        served, problems = self.compile()
        assert not problems
        return served[f"{name}/1"]

    def run(self, served: ServedVersion, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """What the artefacts answer, used as a device uses them."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not served.code.lifted:
            return _open(served.model.weights.path, options).run(None, inputs)
        folder = Path(served.code.path)
        index = msgspec.json.decode((folder / "index.json").read_bytes(), type=OnnxIndex)
        blob = np.fromfile(served.model.weights.path, np.uint8)
        assert len(blob) == index.blob_bytes == served.model.weights.size
        return _open(str(folder / "model.onnx"), options).run(None, {**inputs, **views(index, blob)})


def _open(path: str, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def shop(tmp_path):
    shop = Shop(tmp_path)
    yield shop
    shop.cache.close()
