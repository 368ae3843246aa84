"""The arena gives out views of its own pages and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.devices import arena as arenas
from clockwork_serve.devices.arena import Arena, Scratch, populate, reserve, used_bytes
from clockwork_serve.errors import DeviceError
from clockwork_serve.messages import Extent
from clockwork_serve.units import KIB, MIB

PAGE = 8192


@pytest.fixture
def arena():
    made = Arena(4 * PAGE + 5, PAGE)
    yield made
    made.close()


def test_memory_is_cut_into_whole_pages(arena):
    assert arena.pages == 4


def test_an_extent_is_a_writable_view_of_its_pages(arena):
    arena.view(Extent(1, 2), 2 * PAGE)[:] = 7
    assert not arena.view(Extent(0, 1), PAGE).any()
    assert (arena.view(Extent(1, 2), 2 * PAGE) == 7).all()
    assert not arena.view(Extent(3, 1), PAGE).any()


def test_an_extent_starts_at_a_multiple_of_the_systems_page(arena):
    assert arena.view(Extent(3, 1), 1).ctypes.data % 4096 == 0


@pytest.mark.parametrize(
    ("extent", "nbytes"),
    [(Extent(-1, 1), 1), (Extent(4, 1), 1), (Extent(3, 2), 1), (Extent(0, 0), 0), (Extent(0, 1), PAGE + 1)],
)
def test_what_is_not_inside_is_refused(arena, extent, nbytes):
    with pytest.raises(DeviceError, match="extent"):
        arena.view(extent, nbytes)


@pytest.mark.parametrize(
    ("memory", "page", "field"), [(1 << 20, 5000, "page_size"), (1, 4096, "device_memory")]
)
def test_sizes_that_make_no_sense_are_named(memory, page, field):
    with pytest.raises(DeviceError, match=f"^{field}: expected"):
        Arena(memory, page)


def test_more_than_the_host_has_is_refused_before_it_is_touched():
    with pytest.raises(DeviceError, match="device_memory"):
        Arena(1 << 50, 1 << 20)


def resident(memory):
    """How many of the pages that an array covers are in memory."""
    start, end = memory.ctypes.data, memory.ctypes.data + len(memory)
    found = 0
    for block in Path("/proc/self/smaps").read_text().split("\n"):
        words = block.split()
        if words and "-" in words[0] and not words[0].endswith(":"):
            low, high = (int(word, 16) for word in words[0].split("-"))
            inside = low <= start < high or start <= low < end
        elif words and words[0] == "Rss:" and inside:
            found += int(words[1]) * 1024
    return found


@pytest.mark.parametrize("advice", [arenas.POPULATE_WRITE, 12345], ids=["new kernel", "old kernel"])
def test_populating_touches_every_page_and_keeps_what_is_there(monkeypatch, advice):
    monkeypatch.setattr(arenas, "POPULATE_WRITE", advice)
    memory = np.frombuffer(mapping := reserve(64 * 4096, "io_bytes"), dtype=np.uint8)
    memory[5000:5003] = (1, 2, 3)
    assert populate(memory) or advice == 12345
    assert resident(memory) >= len(memory)
    assert memory[5000:5003].tolist() == [1, 2, 3]
    assert memory.sum() == 6
    del memory
    mapping.close()


def test_an_arena_is_touched_from_the_bottom_as_far_as_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(arenas, "STEP", 1 << 20)
    arena = Arena(64 << 20, PAGE)
    memory = arena.view(Extent(0, arena.pages), 64 << 20)
    arena.touch(5 << 20)
    arena.touch(3 << 20)
    arena.wait_resident()
    assert 5 << 20 <= resident(memory) <= 12 << 20, (
        "in steps of 4 MiB, and of what the kernel has for huge pages"
    )
    arena.touch(1 << 40)
    arena.wait_resident()
    assert resident(memory) >= 64 << 20
    arena.close()


def test_an_arena_is_touched_beside_the_work_and_can_be_closed_meanwhile(monkeypatch):
    monkeypatch.setattr(arenas, "STEP", 1 << 20)
    arena = Arena(16 << 20, PAGE)
    arena.touch(16 << 20)
    arena.view(Extent(2040, 1), PAGE)[:] = 9
    arena.wait_resident()
    assert (arena.view(Extent(2040, 1), PAGE) == 9).all()
    arena.close()
    for _ in range(5):
        made = Arena(16 << 20, PAGE)
        made.touch(16 << 20)
        made.close()


def test_an_old_kernel_touches_everything_at_once(monkeypatch):
    monkeypatch.setattr(arenas, "POPULATE_WRITE", 12345)
    arena = Arena(16 << 20, PAGE)
    assert resident(arena.view(Extent(0, arena.pages), 16 << 20)) >= 16 << 20
    arena.close()


def test_what_is_used_leaves_out_what_is_resident_in_arena_and_area():
    arena, area = Arena(64 * MIB, 256 * KIB), Scratch(32 * MIB)
    before = used_bytes(arena, area)
    arena.touch(48 * MIB)
    arena.wait_resident()
    assert area.claim(24 * MIB)
    assert (arena.resident_bytes(), area.resident_bytes()) == (48 * MIB, 24 * MIB)
    assert abs(used_bytes(arena, area) - before) < 4 * MIB
    arena.close()
    area.close()


def test_a_scratch_area_gives_only_what_it_has():
    scratch = Scratch(4096)
    assert scratch.claim(4096)
    assert not scratch.claim(4097)
    scratch.array((4,), np.dtype("f4"), 64)[:] = 3
    assert scratch.claim(100)
    assert (scratch.array((4,), np.dtype("f4"), 64) == 3).all()
    scratch.close()
