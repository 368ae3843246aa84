"""The arena gives out views of its own pages and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_serve.devices.arena import Arena, Scratch, populate, reserve
from clockwork_serve.errors import DeviceError
from clockwork_serve.messages import Extent

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
    ("memory", "page", "field"), [(1 << 20, 5000, "page_bytes"), (1, 4096, "memory_bytes")]
)
def test_sizes_that_make_no_sense_are_named(memory, page, field):
    with pytest.raises(DeviceError, match=f"^{field}: expected"):
        Arena(memory, page)


def test_more_than_the_host_has_is_refused_before_it_is_touched():
    with pytest.raises(DeviceError, match="memory_bytes"):
        Arena(1 << 50, 1 << 20)


def test_populating_keeps_what_is_there():
    memory = reserve(4 * 4096, "io_bytes")
    memory[5000:5003] = b"abc"
    populate(memory, 0, len(memory))
    assert memory[5000:5003] == b"abc"
    memory.close()


def test_a_scratch_area_gives_only_what_it_has():
    scratch = Scratch(4096)
    assert scratch.claim(4096)
    assert not scratch.claim(4097)
    scratch.array((4,), np.dtype("f4"), 64)[:] = 3
    assert scratch.claim(100)
    assert (scratch.array((4,), np.dtype("f4"), 64) == 3).all()
    scratch.close()
