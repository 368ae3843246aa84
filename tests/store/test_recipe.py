"""A recipe is a pure gather, or there is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.store.onnx.recipe import PROBES, Recipe, learnt, probe_elements

COUNT = 200


def shown(layout, count: int = COUNT) -> Recipe | None:
    """The recipe for an optimiser that turns the file's floats (with a zero at the end) into a blob's."""
    blobs = [layout(probe_elements(count, probe).view(np.float32)) for probe in PROBES]
    return learnt([blob.astype(np.float32).view(np.uint8) for blob in blobs], count)


places_lists = st.lists(st.integers(0, COUNT), min_size=1, max_size=500)


@given(places_lists)
def test_any_gather_with_padding_is_learnt_and_done(places):
    recipe = shown(lambda flat: flat[places])
    weights = np.random.default_rng(0).integers(0, 2**32, COUNT + 1, np.uint32)
    weights[-1] = 0
    np.testing.assert_array_equal(recipe.blob(weights).view(np.uint32), weights[places])


@given(places_lists)
def test_a_recipe_is_the_same_after_it_was_stored(places):
    recipe = shown(lambda flat: flat[places])
    again = Recipe.from_bytes(recipe.to_bytes())
    weights = probe_elements(COUNT, 0)
    np.testing.assert_array_equal(again.blob(weights), recipe.blob(weights))
    assert again.blob_bytes == 4 * len(places)


@given(places_lists, st.lists(st.sampled_from([1.0, -0.0, np.nan, 1e-19, 3.5]), min_size=1))
def test_what_no_weight_has_a_part_in_is_constant(places, constants):
    fixed = np.array(constants, np.float32)
    recipe = shown(lambda flat: np.concatenate([flat[places], fixed, flat[places]]))
    weights = np.random.default_rng(0).integers(0, 2**32, COUNT + 1, np.uint32)
    weights[-1] = 0
    wanted = np.concatenate([weights[places], fixed.view(np.uint32), weights[places]])
    np.testing.assert_array_equal(Recipe.from_bytes(recipe.to_bytes()).blob(weights).view(np.uint32), wanted)


def test_long_runs_are_copied_as_such():
    count = 20_000
    recipe = shown(
        lambda flat: np.concatenate([flat[5000:12000], flat[:300][::-1], flat[12000:20000]]), count
    )
    weights = np.arange(count + 1, dtype=np.uint32)
    wanted = np.concatenate([weights[5000:12000], weights[:300][::-1], weights[12000:20000]])
    np.testing.assert_array_equal(recipe.blob(weights).view(np.uint32), wanted)


@pytest.mark.parametrize(
    "layout",
    [
        lambda flat: flat * np.float32(2),
        lambda flat: flat + np.float32(1),
        lambda flat: -flat,
        np.abs,
        lambda flat: np.maximum(flat, 0),
        np.sort,
        lambda flat: flat[np.argsort(np.abs(flat))],
        lambda flat: flat[: 10 if flat[0] > 0 else 11],
        lambda flat: (flat[:-1].reshape(10, -1) - flat[:20]).ravel(),
    ],
)
def test_what_computes_or_looks_at_values_has_no_recipe(layout):
    assert shown(layout) is None


def test_probes_are_distinct_normal_floats_of_both_signs():
    for probe in PROBES:
        flat = probe_elements(100_000, probe).view(np.float32)
        assert flat[-1] == 0
        weights = np.abs(flat[:-1])
        assert len(np.unique(weights)) == 100_000
        assert weights.min() >= 1 / 32
        assert np.isfinite(weights).all()
        assert 0.4 < (flat[:-1] < 0).mean() < 0.6


def test_more_weights_than_there_are_floats_have_no_probe():
    assert probe_elements(1 << 31, 0) is None


def test_a_file_that_is_no_recipe_is_refused():
    with pytest.raises((ValueError, OSError, EOFError)):
        Recipe.from_bytes(b"nonsense")
