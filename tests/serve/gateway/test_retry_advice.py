"""Retry advice for rejected clients, randomised so that not all return at once."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from clockwork_serve.serve.gateway.requests import spread_s
from clockwork_serve.units import ms


@pytest.mark.parametrize(
    ("wait_ms", "least", "most"),
    [(0.001, 1, 2), (1000, 1, 2), (1000.001, 2, 3), (3000, 3, 4), (9_500, 10, 15), (60_000, 60, 90)],
)
def test_advice_is_never_shortened_and_spread_evenly(wait_ms: float, least: int, most: int) -> None:
    dice = Random(7)
    counts = Counter(spread_s(ms(wait_ms), dice) for _ in range(2000))
    assert set(counts) == set(range(least, most + 1))
    share = 2000 / len(counts)
    assert all(0.5 * share < count < 1.5 * share for count in counts.values()), counts


def test_no_advice_stays_no_advice() -> None:
    assert spread_s(0, Random(7)) == 0


def test_the_same_seed_gives_the_same_advice() -> None:
    first, second = ([spread_s(ms(5000), dice) for _ in range(20)] for dice in (Random(1), Random(1)))
    assert first == second
