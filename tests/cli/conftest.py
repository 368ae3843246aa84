"""The command line; a model repository that needs no graph, and a cache of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.commands import Cli

SLOW = """
backend = "emulated"
max_batch_size = 8
inputs = [{name = "x", dims = [4], datatype = "FP32"}]
outputs = [{name = "y", dims = [4], datatype = "FP32"}]
emulated = {weights_mb = 2, infer_ms = {1 = 5, 8 = 20}, load_ms = 3}
"""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One good model, and nothing of the caller's environment."""
    for name in os.environ:
        if name.startswith("CLOCKWORK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CLOCKWORK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "models"
    (folder / "slow").mkdir(parents=True)
    (folder / "slow" / "clockwork.toml").write_text(SLOW)
    return folder


@pytest.fixture
def broken(repository: Path) -> Path:
    """The same repository with a model that cannot be served."""
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"not a graph")
    return repository
