"""How much a model is asked for."""

from __future__ import annotations

from math import log2

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.estimates import HALF_LIFE_NS, ONE, popularity_after

ARRIVALS = st.lists(st.integers(0, 40 * HALF_LIFE_NS), min_size=1, max_size=60).map(sorted)


def heat(arrivals: list[int]) -> int:
    value = 0
    for arrival_ns in arrivals:
        value = popularity_after(value, arrival_ns)
    return value


@given(ARRIVALS, ARRIVALS)
def test_heats_compare_as_the_windows_do(ours: list[int], theirs: list[int]) -> None:
    end_ns = max(ours[-1], theirs[-1])
    mine, other = (
        log2(sum(2.0 ** ((at - end_ns) / HALF_LIFE_NS) for at in arrivals)) for arrivals in (ours, theirs)
    )
    difference = (heat(ours) - heat(theirs)) / ONE
    assert abs(difference - (mine - other)) < 1e-3


@given(ARRIVALS)
def test_a_request_never_cools(arrivals: list[int]) -> None:
    values = [heat(arrivals[:count]) for count in range(len(arrivals) + 1)]
    assert values == sorted(values)
