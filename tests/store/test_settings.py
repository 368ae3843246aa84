"""Settings from two files are one, and versions are chosen from what is there."""

from __future__ import annotations

import pytest

from clockwork_serve.store.cache import batch_sizes, fine_batch_sizes
from clockwork_serve.store.settings import ModelSettings, StoreConfig, TensorSettings, VersionPolicy, merged

CONFIG = StoreConfig(cache_dir="unused")


def test_what_is_said_above_goes_and_zero_is_something_said():
    above = ModelSettings(max_batch_size=0, inputs=(TensorSettings(name="x"),))
    below = ModelSettings(max_batch_size=8, slo_ms=3.0, inputs=(TensorSettings(name="y"),))
    both = merged(above, below)
    assert (both.max_batch_size, both.slo_ms, both.inputs) == (0, 3.0, above.inputs)


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (VersionPolicy(), (10,)),
        (VersionPolicy(latest=2), (2, 10)),
        (VersionPolicy(latest=9), (1, 2, 10)),
        (VersionPolicy(latest=None), (1, 2, 10)),
        (VersionPolicy(latest=None, specific=(2, 5)), (2,)),
    ],
)
def test_versions_are_chosen_as_numbers(policy, chosen):
    assert policy.choose((10, 1, 2)) == chosen


def test_the_key_of_a_compilation_holds_what_changes_its_result_only():
    plain = ModelSettings().compile_key(CONFIG)
    assert ModelSettings(slo_ms=3.0, priority=1, labels={"y": ("a",)}).compile_key(CONFIG) == plain
    assert ModelSettings(max_batch_size=0).compile_key(CONFIG) != plain
    assert ModelSettings(inputs=(TensorSettings(name="x", dims=(3,)),)).compile_key(CONFIG) != plain
    assert ModelSettings().compile_key(StoreConfig(cache_dir="unused", max_batch_size=8)) != plain


@pytest.mark.parametrize(
    ("most", "sizes"), [(0, (1,)), (1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (6, (1, 2, 4, 6))]
)
def test_batch_sizes_are_powers_of_two_and_the_largest(most, sizes):
    assert batch_sizes(most) == sizes


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(0, (1,)), (1, (1,)), (3, (1, 2, 3)), (9, (1, 2, 3, 4, 5, 6, 7, 8, 9)),
     (20, (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20))],
)  # fmt: skip
def test_fine_batch_sizes_are_all_of_the_small_ones(most, sizes):
    assert fine_batch_sizes(most) == sizes
