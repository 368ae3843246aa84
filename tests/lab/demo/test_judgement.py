"""How far an answer is from another."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_lab.demo.judgement import cosine, relative_error


def test_the_error_is_relative_to_the_largest_number():
    found, wanted = {"y": np.array([1.0, 99.0])}, {"y": np.array([2.0, 100.0])}
    assert relative_error(found, wanted) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"x": np.ones(2)},
        {"y": np.ones(3)},
        {"y": np.array([1.0, np.nan])},
        {"y": np.ones(2), "z": np.ones(2)},
    ],
)
def test_other_names_shapes_and_nans_are_infinitely_wrong(found):
    assert relative_error(found, {"y": np.ones(2)}) == float("inf")


def test_texts_are_equal_or_not():
    wanted = {"y": np.array([[b"ab"]], object)}
    assert relative_error({"y": np.array([["ab"]], object)}, wanted) == 0.0
    assert relative_error({"y": np.array([["ba"]], object)}, wanted) == float("inf")


def test_integers_do_not_overflow():
    assert relative_error({"y": np.array([0], np.uint8)}, {"y": np.array([200], np.uint8)}) == 1.0


def test_cosine():
    assert cosine(np.array([1.0, 0.0]), np.array([2.0, 2.0])) == pytest.approx(0.5**0.5)
