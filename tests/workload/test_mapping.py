"""Functions to models: which, how much of each, and that the notes say so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.workload.tables import FieldError
from clockwork_serve.workload.traces import assign
from tests.workload.scenarios import load

VOLUMES = np.array([50.0, 30.0, 10.0, 6.0, 4.0])


def given_to(models: int, seed: int = 1, **fields):
    return assign(VOLUMES, load("generated", functions=5, **fields), models, np.random.default_rng(seed))


def test_block_gives_neighbours_the_same_model() -> None:
    found = given_to(2)

    assert found.models.tolist() == [0, 0, 0, 1, 1]
    assert found.notes == (
        "mapping block: 5 functions to 2 of 2 models; the busiest model gets 90.0% of the calls",
    )  # fmt: skip


def test_block_spreads_few_functions_over_many_models() -> None:
    assert given_to(12).models.tolist() == [0, 2, 4, 7, 9]


def test_stripe_gives_neighbours_different_models() -> None:
    assert given_to(2, mapping="stripe").models.tolist() == [0, 1, 0, 1, 0]


def test_shuffled_is_even_and_decided_by_the_seed() -> None:
    maps = [given_to(3, seed, mapping="shuffled").models.tolist() for seed in range(20)]

    assert all(sorted(one) == [0, 0, 1, 1, 2] for one in maps)
    assert maps[3] == given_to(3, 3, mapping="shuffled").models.tolist()
    assert len({tuple(one) for one in maps}) > 5


def test_the_busiest_are_left_out_before_the_rest_is_mapped() -> None:
    found = given_to(2, drop_top=1)

    assert found.kept.tolist() == [0, 1, 1, 1, 1]
    assert found.models[1:].tolist() == [0, 0, 1, 1]
    assert found.volume == 50
    assert found.notes[0] == "left out the 1 busiest function (50.0% of all calls)"


def test_no_more_can_be_left_out_than_there_is() -> None:
    with pytest.raises(FieldError, match="drop_top: expected less than the trace's 5 functions, found 5"):
        given_to(2, drop_top=5)


def test_a_cap_is_a_share_of_what_is_left() -> None:
    found = given_to(5, cap_share=0.25)
    left = VOLUMES * found.kept

    assert left.max() / left.sum() == pytest.approx(0.25)
    assert found.kept[2:].tolist() == [1, 1, 1]
    assert left[:2].tolist() == pytest.approx([10, 10])
    assert (
        found.notes[0]
        == "cap of 25.0% of the calls per function: 2 functions cut, 60.0% of all calls dropped"
    )


@given(
    volumes=st.lists(st.integers(1, 100_000), min_size=1, max_size=40).map(
        lambda all_of: sorted(all_of)[::-1]
    ),
    share=st.floats(0.001, 1),
    drop=st.integers(0, 39),
)
def test_no_function_carries_more_than_the_cap(volumes, share, drop) -> None:
    drop %= len(volumes)
    asked = load("generated", functions=1, cap_share=share, drop_top=drop)
    if share * (len(volumes) - drop) < 1:
        with pytest.raises(FieldError, match="cap_share: expected at least 1 /"):
            assign(np.array(volumes, dtype=float), asked, 3, np.random.default_rng(1))
        return
    found = assign(np.array(volumes, dtype=float), asked, 3, np.random.default_rng(1))
    left = np.array(volumes) * found.kept

    assert left.max() <= share * left.sum() * (1 + 1e-9)
    assert (found.kept[drop:] > 0).all()
    assert (found.kept <= 1 + 1e-12).all()
    untouched = found.kept == 1
    assert (left[untouched] <= left.max() * (1 + 1e-9)).all()
    assert found.volume == pytest.approx(left.sum())
