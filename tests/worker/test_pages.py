"""Pages: who holds what, against a plain list with one entry per page."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.messages import Extent
from clockwork_serve.worker.pages import WEIGHTS_LIFE, HeldExtent, Pages, WeightsState, WeightsStep

COUNT = 12
extents = st.builds(Extent, st.integers(0, COUNT - 1), st.integers(1, 4)).filter(
    lambda extent: extent.first + extent.count <= COUNT
)


def emptied(held: HeldExtent) -> HeldExtent:
    held.step(WeightsStep.FAILED)
    return held


@given(st.lists(extents, max_size=30))
def test_claims_and_leaves_agree_with_a_list_of_pages(steps: list[Extent]) -> None:
    pages, plain = Pages(COUNT), [None] * COUNT
    book: list[HeldExtent | None] = list(plain)
    for version, extent in enumerate(steps):
        span = slice(extent.first, extent.first + extent.count)
        inside = list(dict.fromkeys(held.version for held in book[span] if held is not None))
        overlapping = pages.overlapping(extent)
        assert [held.version for held in overlapping] == inside
        if overlapping:
            gone = overlapping[0]
            pages.release(emptied(gone))
            book = [None if held is gone else held for held in book]
        else:
            held = HeldExtent(extent, version, "m", "net")
            pages.claim(held)
            book[span] = [held] * extent.count
            assert pages.at(extent, version) is held
            assert pages.at(extent, version + 1) is None
        pages.check()
    assert {held.version for held in pages.all()} == {held.version for held in book if held is not None}


def test_weights_are_found_by_exactly_their_extent() -> None:
    pages = Pages(COUNT)
    pages.claim(HeldExtent(Extent(2, 3), 1, "m", "net"))
    assert pages.at(Extent(2, 2), 1) is None
    assert pages.at(Extent(3, 3), 1) is None
    assert pages.at(Extent(11, 1), 1) is None


def test_weights_leave_only_once_they_are_empty() -> None:
    pages, held = Pages(COUNT), HeldExtent(Extent(0, 1), 1, "m", "net")
    pages.claim(held)
    with pytest.raises(AssertionError, match="leaves while"):
        pages.release(held)


@pytest.mark.parametrize("extents", [(Extent(0, 3), Extent(2, 2)), (Extent(10, 3),)])
def test_an_overlap_or_an_extent_outside_is_found_by_check(extents: tuple[Extent, ...]) -> None:
    pages = Pages(COUNT)
    for version, extent in enumerate(extents):
        pages.claim(HeldExtent(extent, version, "m", "net"))
    with pytest.raises(AssertionError):
        pages.check()


def test_weights_that_are_read_from_disk_can_not_be_unloaded() -> None:
    with pytest.raises(AssertionError, match="UNLOAD while"):
        HeldExtent(Extent(0, 1), 1, "m", "net").step(WeightsStep.UNLOAD)


def test_every_state_leads_to_empty_pages() -> None:
    ends = [state for state in WeightsState if not WEIGHTS_LIFE[state]]
    assert ends == [WeightsState.EMPTY]
