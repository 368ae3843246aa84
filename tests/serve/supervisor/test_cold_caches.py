"""The caches are evicted between two runs of a profile, for models with large weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from clockwork_serve.serve.supervisor.profile_process import (
    DEFAULT_CACHE_BYTES,
    EVICT_FROM_BYTES,
    cache_bytes,
    cache_evictor,
)
from clockwork_serve.units import KIB, MIB


def write(folder: Path, *sizes: str) -> None:
    for index, size in enumerate(sizes):
        (folder / f"index{index}").mkdir()
        (folder / f"index{index}" / "size").write_text(f"{size}\n")


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    write(tmp_path, "32K", "32768K", "1024K")
    assert cache_bytes(tmp_path) == 32 * MIB


@pytest.mark.parametrize("said", [(), ("",), ("big",), ("-1K",)])
def test_a_default_size_is_assumed_where_none_is_given(tmp_path: Path, said: tuple[str, ...]) -> None:
    write(tmp_path, *said)
    assert cache_bytes(tmp_path) == DEFAULT_CACHE_BYTES


def test_a_default_size_is_assumed_where_the_system_hides_its_caches(tmp_path: Path) -> None:
    (tmp_path / "index0" / "size").mkdir(parents=True)
    assert cache_bytes(tmp_path) == DEFAULT_CACHE_BYTES


def test_large_weights_are_evicted_from_the_caches() -> None:
    read = cache_evictor("cpu", EVICT_FROM_BYTES, most_bytes=64 * KIB)
    assert read() == 64 * KIB // 8, "a sum of ones"


@pytest.mark.parametrize(("kind", "weights"), [("cpu", EVICT_FROM_BYTES - 1), ("cuda:sm_90", 100 * MIB)])
def test_nothing_is_read_for_small_weights_and_gpus(kind: str, weights: int) -> None:
    assert cache_evictor(kind, weights)() is None
