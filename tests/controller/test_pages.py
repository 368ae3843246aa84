"""Belief about pages: gaps, room, and a random history against a plain array."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.pages import PageMap
from clockwork_serve.messages import Extent


def filled(count: int, *extents: tuple[int, int]) -> PageMap[str]:
    pages: PageMap[str] = PageMap(count)
    for first, size in extents:
        pages.hold(Extent(first, size), f"at{first}")
    return pages


def test_the_smallest_gap_that_fits_is_taken() -> None:
    pages = filled(20, (4, 2), (8, 8))
    assert pages.gap(2) == Extent(6, 2)
    assert pages.gap(4) == Extent(0, 4)
    assert pages.gap(5) is None


def test_a_gap_is_found_again_once_what_divides_it_is_gone() -> None:
    pages = filled(9, (0, 3), (3, 3), (6, 3))
    assert pages.gap(1) is None
    pages.release(Extent(3, 3))
    assert (pages.gap(4), pages.gap(3)) == (None, Extent(3, 3))
    pages.release(Extent(6, 3))
    pages.check()
    assert pages.gap(6) == Extent(3, 6)


def test_room_displaces_the_least_wanted_neighbours() -> None:
    pages = filled(6, (0, 2), (2, 2), (4, 2))
    ranks = {"at0": 3, "at2": 1, "at4": 2}
    room = pages.room(4, ranks.get)
    assert room is not None
    assert (room.extent, room.evicted) == (Extent(2, 4), ["at2", "at4"])


def test_what_has_no_rank_is_never_displaced() -> None:
    pages = filled(6, (0, 2), (2, 2), (4, 2))
    assert pages.room(4, {"at0": 1, "at4": 2}.get) is None


def test_room_counts_the_gap_before_its_first_victim() -> None:
    pages = filled(6, (2, 2), (4, 2))
    room = pages.room(4, {"at2": 9, "at4": 9}.get)
    assert room is not None
    assert (room.extent, room.evicted) == (Extent(0, 4), ["at2"])


@given(st.data())
def test_any_history_conserves_pages(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 24))
    pages: PageMap[int] = PageMap(count)
    truth: list[int | None] = [None] * count
    ranks: dict[int, int] = {}
    for number in range(data.draw(st.integers(0, 30))):
        size = data.draw(st.integers(1, 6))
        room = pages.room(size, ranks.get)
        if room is None:
            assert not ranks or size > count
            continue
        for victim in room.evicted:
            at = truth.index(victim)
            pages.release(Extent(at, truth.count(victim)))
            truth = [None if owner == victim else owner for owner in truth]
            del ranks[victim]
        span = range(room.extent.first, room.extent.first + size)
        assert all(truth[at] is None for at in span), "room is free once its victims are gone"
        for at in span:
            truth[at] = number
        pages.hold(room.extent, number)
        ranks[number] = data.draw(st.integers(0, 9))
        pages.check()
        assert pages.used == sum(owner is not None for owner in truth)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.none() | st.integers(0, 5)), max_size=12),
    st.integers(1, 20),
)
def test_room_is_the_least_wanted_stretch_of_all(parts: list[tuple[int, int, int | None]], size: int) -> None:
    pages: PageMap[int] = PageMap(sum(gap + count for gap, count, _ in parts) + 1)
    ranks, spans, end = {}, [], 0
    for at, (gap, count, rank) in enumerate(parts):
        pages.hold(Extent(end + gap, count), at)
        spans.append((end + gap, end + gap + count))
        ranks[at], end = rank, end + gap + count
    ends = [0, *(last for _, last in spans)]
    starts = [*(first for first, _ in spans), pages.count]
    stretches = [
        (max(ranks[one] for one in range(at, last)), last - at, at)
        for at in range(len(parts))
        for last in range(at + 1, len(parts) + 1)
        if starts[last] - ends[at] >= size and all(ranks[one] is not None for one in range(at, last))
    ]
    gap = any(start - end >= size for start, end in zip(starts, ends, strict=True))
    assert (pages.gap(size) is not None) == gap
    if gap:
        return
    room = pages.room(size, ranks.get)
    if not stretches:
        assert room is None
    else:
        _, victims, at = min(stretches)
        assert room is not None
        assert (room.extent, room.evicted) == (Extent(ends[at], size), list(range(at, at + victims)))


def test_pages_that_are_added_are_free_and_last() -> None:
    pages: PageMap[str] = PageMap(4)
    pages.hold(Extent(0, 3), "a")
    assert pages.gap(3) is None

    pages.add(2)

    assert pages.gap(3) == Extent(3, 3)
    pages.check()
