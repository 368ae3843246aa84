"""Regions: memory is allocated and freed without a gap, and only valid regions are mapped."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_serve.errors import TransportError
from clockwork_serve.serve.shm import Region, RegionGone, RegionMap, read_epoch, write_epoch
from clockwork_serve.units import KIB, align

PAGE = mmap.PAGESIZE


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region.create(64 * KIB)
    yield made
    made.close()


def test_a_region_is_a_whole_number_of_pages_and_zero() -> None:
    region = Region.create(PAGE + 1)
    assert region.size == len(region.buffer) == 2 * PAGE
    assert bytes(region.buffer) == bytes(2 * PAGE)
    region.close()


def test_what_is_allocated_is_aligned_and_disjoint(region: Region) -> None:
    offsets = [region.allocate(100) for _ in range(3)]
    assert offsets == [0, 128, 256]
    assert region.free_bytes == 64 * KIB - 3 * 128


def test_even_nothing_gets_an_offset_of_its_own(region: Region) -> None:
    assert region.allocate(0) == 0
    assert region.allocate(0) == 64


def test_a_full_region_returns_none_until_a_piece_is_freed(region: Region) -> None:
    whole = region.allocate(64 * KIB)
    assert whole == 0
    assert region.allocate(1) is None
    region.free(whole)
    assert region.allocate(64 * KIB) == 0


def test_freed_neighbours_become_one_piece(region: Region) -> None:
    first, second, third = (region.allocate(16 * KIB) for _ in range(3))
    assert first is not None and second is not None and third is not None
    region.free(first)
    region.free(third)
    assert region.allocate(48 * KIB) is None
    region.free(second)
    region.check()
    assert region.allocate(64 * KIB) == 0


def test_the_smallest_hole_that_fits_is_used(region: Region) -> None:
    small, wall, large = region.allocate(64), region.allocate(64), region.allocate(256)
    assert small is not None and wall is not None and large is not None
    region.allocate(64)
    region.free(small)
    region.free(large)
    assert region.allocate(200) == large
    assert region.allocate(10) == small


def test_freeing_twice_is_a_bug(region: Region) -> None:
    offset = region.allocate(10)
    assert offset is not None
    region.free(offset)
    with pytest.raises(AssertionError, match="freed twice"):
        region.free(offset)


@given(st.lists(st.one_of(st.integers(0, 9000), st.integers(-20, -1)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_pieces_never_overlap_and_all_memory_is_freed(steps: list[int]) -> None:
    region = Region.create(32 * KIB)
    live: list[tuple[int, int]] = []
    for step in steps:
        if step < 0:
            if live:
                region.free(live.pop(step % len(live))[0])
        elif (offset := region.allocate(step)) is not None:
            live.append((offset, align(max(step, 1))))
        elif sum(size for _, size in live) + align(max(step, 1)) <= region.size:
            assert live, "an empty region has room for whatever it is large enough for"
        region.check()
        ends = sorted(live)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(ends))
        assert region.free_bytes == region.size - sum(size for _, size in live)
    for offset, _ in live:
        region.free(offset)
    assert region.allocate(region.size) == 0
    region.close()


def test_an_epoch_is_eight_little_endian_bytes(region: Region) -> None:
    write_epoch(region.buffer, 64, 2**40 + 7)
    assert bytes(region.buffer[64:72]) == (2**40 + 7).to_bytes(8, "little")
    assert read_epoch(region.buffer, 64) == 2**40 + 7


def test_both_sides_see_the_same_bytes(region: Region) -> None:
    view = RegionMap().view(region.name)
    region.buffer[5:10] = b"hello"
    view[10:15] = b"there"
    assert bytes(region.buffer[5:15]) == b"hellothere" == bytes(view[5:15])


def test_a_mapping_is_made_once(region: Region) -> None:
    regions = RegionMap()
    assert regions.view(region.name) is regions.view(region.name)
    assert len(regions) == 1
    regions.forget(region.name)
    assert len(regions) == 0


def test_a_closed_region_is_gone(region: Region) -> None:
    regions = RegionMap()
    regions.view(region.name)
    region.close()
    with pytest.raises(RegionGone, match=f"region {region.name} is gone"):
        regions.view(region.name)
    assert len(regions) == 0


def test_a_new_region_with_the_same_name_is_mapped_anew() -> None:
    regions = RegionMap()
    old = Region.create(PAGE)
    regions.view(old.name)[0] = 1
    old.close()
    new = Region.create(PAGE)
    assert new.name == old.name, "the lowest free descriptor is used again"
    assert regions.view(new.name)[0] == 0
    new.close()


def test_mapping_a_new_region_drops_the_dead_ones(region: Region) -> None:
    regions = RegionMap()
    dead = Region.create(PAGE)
    regions.view(dead.name)
    dead.close()
    regions.view(region.name)
    assert len(regions) == 1


def test_the_region_of_a_killed_process_is_gone_but_its_memory_still_works() -> None:
    source = (
        "import sys; from clockwork_serve.serve.shm import Region; r = Region.create(4096); "
        "r.buffer[:4] = b'live'; print(r.name, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().decode().strip()
        regions = RegionMap()
        view = regions.view(name)
        assert bytes(view[:4]) == b"live"
        owner.kill()
        owner.wait()
        with pytest.raises(RegionGone):
            regions.view(name)
        view[:4] = b"dead"
        assert bytes(view[:4]) == b"dead"


def test_gone_is_a_transport_error() -> None:
    assert issubclass(RegionGone, TransportError)


@pytest.mark.parametrize("name", ["", "1:2", "a:b:c", "1:2:3:4", "-1:2:3", "../1:0:5", "1:2:\u0663"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RegionGone, match="expected PID:FD:BYTES"):
        RegionMap().view(name)


def test_another_size_is_refused(region: Region) -> None:
    pid, fd, size = region.name.split(":")
    with pytest.raises(RegionGone, match=f"expected a file of {int(size) * 2} bytes"):
        RegionMap().view(f"{pid}:{fd}:{int(size) * 2}")


def test_a_memfd_that_could_shrink_is_refused() -> None:
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    with pytest.raises(RegionGone, match="can neither shrink nor grow"):
        RegionMap().view(f"{os.getpid()}:{fd}:{PAGE}")
    os.close(fd)


def test_an_ordinary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with path.open("rb+") as opened, pytest.raises(RegionGone):
        RegionMap().view(f"{os.getpid()}:{opened.fileno()}:{PAGE}")


def test_a_pipe_is_refused_without_opening_it() -> None:
    read, write = os.pipe()
    with pytest.raises(RegionGone, match="expected a file of 0 bytes"):
        RegionMap().view(f"{os.getpid()}:{read}:0")
    os.close(read)
    os.close(write)


def test_a_region_can_not_be_resized() -> None:
    region = Region.create(PAGE)
    fd = int(region.name.split(":")[1])
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 2 * PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    region.close()


def test_cached_pieces_are_joined_before_memory_runs_out() -> None:
    region = Region.create(64 * KIB)
    pieces = [region.allocate(KIB) for _ in range(64)]
    assert region.allocate(1) is None
    for piece in pieces:
        assert piece is not None
        region.free(piece)
    region.check()
    assert region.free_bytes == 64 * KIB
    whole = region.allocate(64 * KIB)
    assert whole == 0
    region.check()
    region.free(whole)
    region.close()


def test_a_freed_small_piece_is_allocated_again_and_never_twice() -> None:
    region = Region.create(64 * KIB)
    first, second = region.allocate(KIB), region.allocate(KIB)
    assert first is not None
    region.free(first)
    assert [region.allocate(KIB - 1), region.allocate(KIB) in (first, second)] == [first, False]
    region.check()
    region.close()
