"""What the oracle calls infeasible: only what no schedule of one device could have done."""

from __future__ import annotations

from collections import Counter

from comparison.promises.rejections import Asked, Rules, infeasible, work_ns

MS = 1_000_000
RULES = Rules(lambda rows: (16 + 4 * rows) * MS, batch_max=8, ahead_ns=2 * MS, grace_ns=5 * MS)


def asked(model: str, sent_ms: int, slo_ms: int, began_ms: int | None = None) -> Asked:
    began_ns = None if began_ms is None else began_ms * MS
    return Asked(model, sent_ms * MS, (sent_ms + slo_ms) * MS, began_ns)


def test_work_is_full_batches_of_each_model() -> None:
    assert work_ns(Counter(a=1), RULES) == 20 * MS
    assert work_ns(Counter(a=8), RULES) == 48 * MS
    assert work_ns(Counter(a=9, b=2), RULES) == (48 + 20 + 24) * MS


def test_an_idle_device_leaves_hope_unless_the_batch_alone_takes_too_long() -> None:
    assert infeasible([asked("a", 0, 15)], [], RULES) == [False]  # 20 ms are within 15 and 5 of grace
    assert infeasible([asked("a", 0, 14)], [], RULES) == [True]


def test_what_runs_must_end_first() -> None:
    busy = [(-30 * MS, 10 * MS)]

    assert infeasible([asked("a", 0, 25)], busy, RULES) == [False]
    assert infeasible([asked("a", 0, 24)], busy, RULES) == [True]
    assert infeasible([asked("a", 10, 15)], busy, RULES) == [False]  # it has ended at that instant


def test_what_runs_later_is_no_obstacle_by_itself() -> None:
    assert infeasible([asked("a", 0, 20)], [(5 * MS, 500 * MS)], RULES) == [False]


def test_admitted_requests_of_other_models_take_their_time_and_of_its_own_only_a_place() -> None:
    others = [asked("b", 0, 60, 50), asked("c", 1, 60, 70)]
    same = [asked("a", 0, 30, 50), asked("a", 1, 30, 50)]

    assert infeasible([*others, asked("a", 10, 54)], [], RULES)[-1]  # 60 ms of work
    assert not infeasible([*others, asked("a", 10, 55)], [], RULES)[-1]
    assert infeasible([*same, asked("a", 10, 22)], [], RULES)[-1]  # 28 ms of work
    assert not infeasible([*same, asked("a", 10, 23)], [], RULES)[-1]


def test_who_was_refused_has_begun_or_came_at_the_same_time_does_not_count() -> None:
    refused = asked("b", 0, 100)
    begun = asked("c", 1, 100, began_ms=9)
    beside = asked("d", 9, 100, began_ms=50)

    assert infeasible([refused, begun, beside, asked("a", 10, 15)], [], RULES)[-1] is False


def test_who_is_due_later_can_wait() -> None:
    later = asked("b", 0, 200, began_ms=100)

    assert not infeasible([later, asked("a", 10, 20)], [], RULES)[-1]
    assert infeasible([asked("b", 0, 30, began_ms=100), asked("a", 10, 20)], [], RULES)[-1]


def test_one_that_waits_is_remembered_though_those_before_it_are_done() -> None:
    requests = [
        asked("b", 0, 20, began_ms=1), asked("c", 1, 75, began_ms=90), asked("b", 2, 20, began_ms=5),
        asked("a", 50, 30),
    ]  # fmt: skip

    assert infeasible(requests, [], RULES)[-1]


def test_a_lone_full_load_is_never_infeasible() -> None:
    requests = [asked("a", 20 * row, 20, began_ms=20 * row) for row in range(50)]
    busy = [(20 * row * MS, (20 * row + 20) * MS) for row in range(50)]

    assert not any(infeasible(requests, busy, RULES))
