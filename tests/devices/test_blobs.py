"""Weights files are read whole or refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.devices.blobs import Blobs
from clockwork_serve.errors import DeviceError


@pytest.fixture
def blobs():
    made = Blobs(open_max=2)
    yield made
    made.close()


def blob(path, size=100_000):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    return str(path), content


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_fills_its_target_and_nothing_else(blobs, tmp_path):
    path, content = blob(tmp_path / "a")
    memory = np.zeros(100_200, np.uint8)
    blobs.read_into(path, memory[100:100_100])
    assert (memory[100:100_100] == content).all()
    assert not memory[:100].any()
    assert not memory[100_100:].any()


@pytest.mark.parametrize("size", [99_999, 100_001])
def test_another_size_is_refused_and_nothing_written(blobs, tmp_path, size):
    path, _ = blob(tmp_path / "a")
    target = np.zeros(size, np.uint8)
    with pytest.raises(DeviceError, match=f"expected {size} bytes, found 100000"):
        blobs.read_into(path, target)
    assert not target.any()


def test_a_file_that_is_not_there_is_named(blobs, tmp_path):
    with pytest.raises(DeviceError, match=r"none: No such file .*compile the model again"):
        blobs.read_into(str(tmp_path / "none"), np.zeros(1, np.uint8))


def test_a_file_cut_short_while_open_is_refused_and_opened_again(blobs, tmp_path):
    path, content = blob(tmp_path / "a")
    target = np.zeros(100_000, np.uint8)
    blobs.read_into(path, target)
    os.truncate(path, 50_000)
    with pytest.raises(DeviceError, match="expected 100000 bytes, found 50000"):
        blobs.read_into(path, target)
    blob(tmp_path / "new")
    (tmp_path / "new").replace(path)
    blobs.read_into(path, target)
    assert (target == content).all()


def test_few_files_stay_open(blobs, tmp_path):
    before = open_files()
    for place in range(6):
        path, _ = blob(tmp_path / str(place), 10)
        blobs.read_into(path, np.zeros(10, np.uint8))
        assert open_files() <= before + 2
    blobs.close()
    assert open_files() == before
