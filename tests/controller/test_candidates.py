"""Who wants a LOAD, by example."""

from __future__ import annotations

from clockwork_serve.controller.lanes import STALE_MIN
from clockwork_serve.controller.placement import Candidates
from tests.controller.clusters import ask, belief, place, serve


def test_what_is_nowhere_wants_a_load_as_much_as_it_is_asked_for() -> None:
    made = belief("d0")
    candidates = Candidates(made)
    little, much = serve(made, "little"), serve(made, "much")
    ask(made, little)
    ask(made, much, count=2)
    assert all([candidates.rank(little), candidates.rank(much)])
    assert (candidates.priority(much), candidates.priority(little)) == (much.demand_ns, little.demand_ns)
    assert [candidates.pop(), candidates.pop(), candidates.pop()] == [much, little, None]


def test_one_device_suffices_until_it_is_asked_for_more_than_it_can_serve() -> None:
    made = belief("d0", "d1")
    candidates = Candidates(made)
    served = serve(made, "a")
    place(made, served, "d0")
    ask(made, served, count=9)
    assert not candidates.rank(served), "9 x 10 ms in 98 ms"
    ask(made, served, count=2)
    assert candidates.rank(served)
    assert 0 < candidates.priority(served) < served.demand_ns // 5


def test_a_device_alone_takes_the_whole_demand_and_two_share_it_by_their_loads() -> None:
    made = belief("d0", "d1")
    candidates = Candidates(made)
    served, other = serve(made, "a"), serve(made, "b")
    first = place(made, served, "d0")
    place(made, other, "d0", first=4)
    ask(made, other, count=5)
    ask(made, served, count=2)
    assert made.devices["d0"].demand_ns == served.demand_ns + other.demand_ns
    second = place(made, served, "d1")
    candidates.rank(served)
    assert 0 < first.share_ns < second.share_ns, "d0 has more to do"
    assert served.demand_ns - 1 <= first.share_ns + second.share_ns <= served.demand_ns
    made.drop(second)
    assert made.devices["d1"].demand_ns == 0
    assert made.devices["d0"].demand_ns == served.demand_ns + other.demand_ns


def test_what_is_everywhere_or_removed_wants_none() -> None:
    made = belief("d0")
    candidates = Candidates(made)
    everywhere, removed = serve(made, "a"), serve(made, "b")
    place(made, everywhere, "d0")
    removed.removed = True
    for served in (everywhere, removed):
        ask(made, served, count=50)
        assert not candidates.rank(served)


def test_stale_entries_do_not_pile_up() -> None:
    made = belief("d0")
    candidates = Candidates(made)
    served = serve(made, "a")
    for _ in range(1000):
        ask(made, served)
        candidates.rank(served)
    assert len(candidates) <= 2 + STALE_MIN + 1
    assert candidates.pop() is served


def test_of_models_wanted_equally_the_one_due_first_comes_first_if_that_counts() -> None:
    made = belief("d0")
    by_due, by_order = Candidates(made, by_due=True), Candidates(made)
    late, early = serve(made, "late"), serve(made, "early")
    ask(made, late, slo_ms=100.000_001)
    ask(made, early, slo_ms=100)
    late.demand_ns = early.demand_ns
    for candidates in (by_due, by_order):
        for served in (late, early):
            served.load_key = None
            candidates.rank(served)
        first = early if candidates is by_due else late
        assert candidates.pop() is first


def test_a_model_whose_first_request_is_gone_has_its_place_corrected() -> None:
    made = belief("d0")
    candidates = Candidates(made, by_due=True)
    one, other = serve(made, "one"), serve(made, "other")
    for slo_ms in (80, 120):
        queue = ask(made, one, slo_ms=slo_ms)
    ask(made, other, slo_ms=100)
    one.demand_ns = other.demand_ns = 10
    for served in (one, other):
        candidates.rank(served)
    del queue.dues[0], queue.waiters[0]
    assert candidates.pop() is other


def test_the_first_is_told_without_taking_it_out_though_entries_before_it_are_stale() -> None:
    made = belief("d0")
    candidates = Candidates(made)
    first, second = serve(made, "a"), serve(made, "b")
    assert candidates.top() is None
    for served, count in ((first, 2), (second, 1)):
        ask(made, served, count=count)
        candidates.rank(served)
    assert [candidates.top(), candidates.top()] == [first, first]
    first.removed = True
    candidates.rank(first)
    assert [candidates.top(), candidates.pop()] == [second, second]
