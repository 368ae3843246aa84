"""Which sets of devices are simulated: the answer against an oracle that tries all, and how few suffice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.apps.plan.search import Mix, MixSearch


def each_at_least(one: Mix, other: Mix) -> bool:
    return all(mine >= theirs for mine, theirs in zip(one, other, strict=True))


def by_price(mixes: list[Mix], prices: tuple[float, ...]) -> list[Mix]:
    def price(mix: Mix) -> float:
        return sum(each * count for each, count in zip(prices, mix, strict=True))

    return sorted(mixes, key=lambda mix: (price(mix), sum(mix), mix))


def searched(
    search: MixSearch, meets: Callable[[Mix], bool], needed: Callable[[Mix], float] = lambda mix: 1.0
) -> list[Mix]:
    """What it had simulated until it was over."""
    tried: list[Mix] = []
    while mixes := search.next():
        assert not set(mixes) & set(tried), "nothing is simulated twice"
        for mix in mixes:
            search.record(mix, met=meets(mix), needed=needed(mix))
            tried.append(mix)
    return tried


@st.composite
def fleets(draw: st.DrawFn) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...], float, int]:
    """Prices, speeds and limits of up to three kinds; how much speed and how many pages are needed."""
    kinds = draw(st.integers(1, 3))
    some = st.lists(st.floats(0.2, 5.0), min_size=kinds, max_size=kinds)
    limits = tuple(draw(st.lists(st.integers(1, 5), min_size=kinds, max_size=kinds)))
    return tuple(draw(some)), tuple(draw(some)), limits, draw(st.floats(0.1, 20.0)), draw(st.integers(0, 8))


@given(fleets(), st.floats(0.3, 3.0))
def test_the_cheapest_of_all_is_found(fleet: tuple, wrong: float) -> None:
    prices, speeds, limits, needed, memory = fleet
    candidates = by_price([mix for mix in product(*(range(n + 1) for n in limits)) if sum(mix)], prices)

    def speed(mix: Mix) -> float:
        return sum(each * count for each, count in zip(speeds, mix, strict=True))

    def meets(mix: Mix) -> bool:
        # Only the first kind has memory: sets that add up to enough speed need not do.
        return speed(mix) >= needed and 2 * mix[0] + sum(mix[1:]) >= memory

    search = MixSearch(candidates, lambda mix: wrong * speed(mix) / needed, each_at_least)
    searched(search, meets)

    assert search.best == next((mix for mix in candidates if meets(mix)), None)


@pytest.mark.parametrize("needed", range(1, 17))
@pytest.mark.parametrize("wrong", [0.6, 0.8, 1.0, 1.25, 1.7])
def test_one_kind_takes_few_simulations(needed: int, wrong: float) -> None:
    candidates = [(count,) for count in range(1, 65)]
    search = MixSearch(candidates, lambda mix: wrong * mix[0] / needed, each_at_least)

    tried = searched(
        search,
        lambda mix: mix[0] >= needed,
        lambda mix: (0.95 if mix[0] < needed else 0.85) * needed / mix[0],
    )

    assert search.best == (needed,)
    assert len(tried) <= (2 if wrong == 1 else 5)


def test_nothing_does() -> None:
    search = MixSearch([(count,) for count in range(1, 17)], lambda mix: mix[0] / 2, each_at_least)

    tried = searched(search, lambda mix: False)

    assert search.best is None
    assert (16,) in tried
    assert len(tried) <= 10


def test_a_seed_that_misses_takes_an_answer_back() -> None:
    search = MixSearch([(count,) for count in range(1, 9)], lambda mix: mix[0] / 3, each_at_least)
    searched(search, lambda mix: mix[0] >= 3)
    assert search.best == (3,)

    search.record((3,), met=False)

    searched(search, lambda mix: mix[0] >= 4)
    assert search.best == (4,)


def test_without_candidates_it_is_over_at_once() -> None:
    assert MixSearch([], lambda mix: 1.0, each_at_least).next() == ()
