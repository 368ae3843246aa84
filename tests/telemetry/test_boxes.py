"""Boxes of a lane: none is lost before it must be, and few are drawn."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.telemetry.boxes import BOX, CHUNK_ROWS, MERGED, LaneBoxes, box, drawn, drawn_new, merged


def row(start: int, lasted: int, model: int = 0, status: int = 0) -> tuple[int, ...]:
    return box(start, lasted, (start, lasted), (start, start), model, 1, 1, status)


def rows(*found: tuple[int, ...]) -> np.ndarray:
    return np.array(list(found), BOX)


def test_boxes_of_one_pixel_become_one_that_says_how_busy_it_was() -> None:
    found = merged(rows(row(0, 3), row(4, 5, model=2), row(9, 1, status=2), row(10, 4)), 10)

    assert found.tolist() == [(0, 10, 2, 2, 3, 9), (10, 4, 0, 0, 1, 4)]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=60), st.integers(1, 200))
def test_merging_keeps_every_box_and_all_their_time(steps: list[tuple[int, int]], width: int) -> None:
    at, made = 0, []
    for gap, lasted in steps:
        made.append(row(at + gap, lasted))
        at += gap + lasted

    found = merged(rows(*made), width)

    assert found["count"].sum() == len(made)
    assert found["busy"].sum() == sum(one[1] for one in made)
    assert len(found) <= at // width + 1
    assert (found["busy"] <= found["lasted"]).all()


def test_a_screen_gets_wide_boxes_as_they_are_and_the_others_merged() -> None:
    found = drawn(rows(row(0, 2), row(3, 2), row(5, 50, model=1)), np.empty(0, MERGED), 10)

    assert sorted(map(len, found)) == [6, 10]
    assert next(one for one in found if len(one) == 10)[:2] == (5, 50)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(0, 2)), max_size=60))
def test_a_few_are_drawn_as_many_are(steps: list[tuple[int, int, int]]) -> None:
    at, made = 0, []
    for gap, lasted, status in steps:
        made.append(row(at + gap, lasted, model=lasted, status=status))
        at += gap + lasted

    few = [tuple(one) for one in drawn_new(made, 17)]
    many = drawn(np.array(made, BOX), np.empty(0, MERGED), 17)

    # Where a wide box lies between two that are merged, the order of equals may differ.
    assert sorted(few) == sorted(many)


def test_what_does_not_fit_a_row_is_cut() -> None:
    found = rows(box(5, 1 << 40, (1 << 50, -3), (-(1 << 50), 7), 1, 1 << 20, 1 << 20, 0))[0]

    assert (found["lasted"], found["expected"], found["batch"]) == ((1 << 32) - 1, 0, (1 << 16) - 1)
    assert (found["ahead"], found["first"], found["last"]) == ((1 << 31) - 1, -(1 << 31) + 1, 2)


def filled(count: int) -> LaneBoxes:
    lane = LaneBoxes()
    for at in range(count):
        lane.add(row(10 * at, 5))
    return lane


def test_a_reader_gets_what_came_since() -> None:
    lane = filled(3 * CHUNK_ROWS + 5)

    for wanted in (0, 3, 7, CHUNK_ROWS + 7, lane.added):
        assert [one[0] for one in lane.since(lane.added - wanted)] == [
            10 * at for at in range(lane.added - wanted, lane.added)
        ]


def test_older_boxes_are_merged_and_then_forgotten() -> None:
    lane = filled(2 * CHUNK_ROWS)
    lane.merge_oldest(1000)
    boxes, older = lane.between(0, 1 << 40)

    assert len(boxes) == CHUNK_ROWS
    assert older["count"].sum() == CHUNK_ROWS
    assert len(older) == -(-CHUNK_ROWS * 10 // 1000)
    assert lane.forget(20 * CHUNK_ROWS + 1) == 1
    assert [len(part) for part in lane.between(0, 1 << 40)] == [0, 0]


def test_a_stretch_has_what_overlaps_it() -> None:
    lane = filled(3 * CHUNK_ROWS + 9)
    boxes, _ = lane.between(21, 34)

    assert boxes["start"].tolist() == [20, 30]
    assert lane.busy_us(21, 34) == 4 + 4
    assert lane.busy_us(0, 1 << 40) == 5 * lane.added
    assert lane.busy_us(10 * CHUNK_ROWS + 2, 30 * CHUNK_ROWS) == 5 * 2 * CHUNK_ROWS - 2
