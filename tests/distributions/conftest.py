"""The three wheels, built once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributions.building import NAMES, build, python, source


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: source(name, tmp_path_factory.mktemp("source")) for name in NAMES}


@pytest.fixture(scope="session")
def wheels(trees: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build("wheel", tree, tmp_path_factory.mktemp("wheel")) for name, tree in trees.items()}


@pytest.fixture(scope="session")
def server(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the server alone."""
    found = [wheels["clockwork-client"], wheels["clockwork-serve"]]
    return python(tmp_path_factory.mktemp("server") / "venv", found)
