"""Weights files are copied completely and match their id, or are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.devices.files import Blobs
from clockwork_serve.errors import DamageError
from clockwork_serve.integrity import Verified, hash_of
from clockwork_serve.messages import Weights

LONG_NS = 10**18


@pytest.fixture
def blobs():
    made = Blobs(open_max=2)
    yield made
    made.close()


@pytest.fixture
def settled():
    """To whom files count as settled, though they were written just now."""
    made = Blobs(verified=Verified(settled_ns=-LONG_NS))
    yield made
    made.close()


def blob(path, size=100_000):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    return Weights(weights_id=hash_of(content.data), path=str(path), size=size), content


def flip(path, at=5000):
    """Change one bit where it is."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


class Hashes:
    """Counts what is hashed."""

    def __init__(self, blobs):
        self.blobs = blobs
        self.done = 0

    def read(self, weights, target):
        self.done += self.blobs.read_into(weights, target) > 0
        return self.done


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_fills_its_target_and_nothing_else(blobs, tmp_path):
    weights, content = blob(tmp_path / "a")
    memory = np.zeros(100_200, np.uint8)
    blobs.read_into(weights, memory[100:100_100])
    assert (memory[100:100_100] == content).all()
    assert not memory[:100].any()
    assert not memory[100_100:].any()


@pytest.mark.parametrize("size", [99_999, 100_001])
def test_another_size_is_refused_and_nothing_written(blobs, tmp_path, size):
    weights, _ = blob(tmp_path / "a")
    target = np.zeros(size, np.uint8)
    with pytest.raises(DamageError, match=f"found 100000 bytes, not {size}"):
        blobs.read_into(weights, target)
    assert not target.any()


def test_a_file_that_is_not_there_is_named(blobs, tmp_path):
    weights = Weights(weights_id="w", path=str(tmp_path / "none"), size=1)
    with pytest.raises(DamageError, match=r"weights w: .*none, found No such file ") as found:
        blobs.read_into(weights, np.zeros(1, np.uint8))
    assert (found.value.what, found.value.name) == ("weights", "w")


def test_a_file_cut_short_while_open_is_refused_and_opened_again(blobs, tmp_path):
    weights, content = blob(tmp_path / "a")
    target = np.zeros(100_000, np.uint8)
    blobs.read_into(weights, target)
    os.truncate(weights.path, 50_000)
    with pytest.raises(DamageError, match="found 50000 bytes, not 100000"):
        blobs.read_into(weights, target)
    blob(tmp_path / "new")
    (tmp_path / "new").replace(weights.path)
    blobs.read_into(weights, target)
    assert (target == content).all()


def test_a_changed_bit_is_noticed_at_the_first_copy_and_at_any_later_one(blobs, tmp_path):
    target = np.zeros(100_000, np.uint8)
    for copied_before in (False, True):
        weights, _ = blob(tmp_path / str(copied_before))
        if copied_before:
            blobs.read_into(weights, target)
        flip(weights.path)
        with pytest.raises(DamageError, match="found other content"):
            blobs.read_into(weights, target)


def test_what_was_verified_is_hashed_again_only_if_it_looks_different(settled, tmp_path):
    weights, _ = blob(tmp_path / "a")
    target, hashes = np.zeros(100_000, np.uint8), Hashes(settled)
    assert [hashes.read(weights, target) for _ in range(3)] == [1, 1, 1]
    os.utime(weights.path, ns=(1, 1))
    assert [hashes.read(weights, target) for _ in range(2)] == [2, 2]


def test_a_file_written_just_now_may_change_within_one_tick_and_is_hashed_each_time(tmp_path):
    blobs = Blobs(verified=Verified(settled_ns=LONG_NS))
    weights, _ = blob(tmp_path / "a")
    target, hashes = np.zeros(100_000, np.uint8), Hashes(blobs)
    assert [hashes.read(weights, target) for _ in range(3)] == [1, 2, 3]
    blobs.close()


def test_a_damaged_file_is_refused_without_a_copy_until_it_looks_different(settled, tmp_path):
    weights, content = blob(tmp_path / "a")
    flip(weights.path)
    target = np.zeros(100_000, np.uint8)
    with pytest.raises(DamageError, match="other content"):
        settled.read_into(weights, target)
    target[:] = 7
    with pytest.raises(DamageError, match="other content"):
        settled.read_into(weights, target)
    assert (target == 7).all()
    flip(weights.path)
    os.utime(weights.path, ns=(1, 1))
    settled.read_into(weights, target)
    assert (target == content).all()


def test_a_good_file_in_the_place_of_another_is_not_that(blobs, tmp_path):
    first, _ = blob(tmp_path / "a")
    blob(tmp_path / "b", 100_000 - 64)
    (tmp_path / "b").replace(first.path)
    with pytest.raises(DamageError):
        blobs.read_into(first, np.zeros(100_000 - 64, np.uint8))


def test_what_was_verified_beside_the_lane_is_not_hashed_by_it(settled, tmp_path):
    weights, _ = blob(tmp_path / "a")
    settled.verify(weights)
    assert Hashes(settled).read(weights, np.zeros(100_000, np.uint8)) == 0
    flip(weights.path)
    os.utime(weights.path, ns=(1, 1))
    with pytest.raises(DamageError, match="other content"):
        settled.verify(weights)


def test_a_file_that_changes_while_it_is_copied_is_refused(blobs, tmp_path):
    weights, _ = blob(tmp_path / "a")

    def copy():
        with blobs.reading(weights, 100_000) as reading:
            reading.part(np.zeros(100_000, np.uint8), 0)
            os.utime(weights.path, ns=(1, 1))

    with pytest.raises(DamageError, match="changed while it was read"):
        copy()


class Meanwhile(np.ndarray):
    """A target beside which something happens as soon as it is copied to."""

    happens = staticmethod(lambda: None)

    @property
    def data(self):
        self.happens()
        return memoryview(np.asarray(self))


def test_a_warm_file_that_changes_while_it_is_copied_is_read_again_and_refused(settled, tmp_path):
    weights, _ = blob(tmp_path / "a")
    target = np.zeros(weights.size, np.uint8).view(Meanwhile)
    settled.read_into(weights, target)
    once = iter([weights.path])
    target.happens = lambda: [flip(path) for path in once]
    with pytest.raises(DamageError, match="other content"):
        settled.read_into(weights, target)


def test_few_files_stay_open(blobs, tmp_path):
    before = open_files()
    for place in range(6):
        weights, _ = blob(tmp_path / str(place), 10)
        blobs.read_into(weights, np.zeros(10, np.uint8))
        assert open_files() <= before + 2
    blobs.close()
    assert open_files() == before


FEW_FILES = """
import resource, sys
from pathlib import Path
import numpy as np
from clockwork_serve.devices.files import Blobs
from clockwork_serve.errors import DeviceError
from tests.devices.test_blobs import blob

made = [blob(Path(sys.argv[1]) / str(number), 1000) for number in range(40)]
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
few, many = Blobs(), Blobs(open_max=100)
target = np.zeros(1000, np.uint8)
try:
    for number, (weights, content) in enumerate(made):
        for blobs in (few, many):
            blobs.read_into(weights, target)
            assert np.array_equal(target, content)
except DeviceError as error:
    print(type(error).__name__, error)
print(number, len(few._fd_by_path))
"""


def test_as_many_files_stay_open_as_the_system_allows_and_no_damage_is_seen_where_there_are_no_more(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", FEW_FILES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=root)
    error, counts = done.stdout.splitlines()
    assert error.startswith("DeviceError weights ")
    assert "Too many open files" in error
    number, kept = map(int, counts.split())
    assert (10 < number < 40, kept) == (True, 10)
