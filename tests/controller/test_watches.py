"""The queues that hope for one lane."""

from __future__ import annotations

from clockwork_serve.controller.cluster import Queue
from clockwork_serve.controller.lanes import STALE_MIN, LaneBelief, Watch
from tests.controller.clusters import ask, belief, serve


def queues(count: int) -> list[Queue]:
    made = belief("d0")
    return [ask(made, serve(made, f"m{at}")) for at in range(count)]


def test_queues_surface_when_the_lane_is_free_too_late() -> None:
    watch, (first, second, third) = Watch(LaneBelief(5), 1), queues(3)
    for queue, latest_ns in ((second, 20), (third, 30), (first, 10)):
        watch.place(queue, latest_ns)
    assert watch.surface(10) == []
    assert watch.surface(21) == [first, second]
    assert (first.watch, third.watch) == (None, watch)


def test_a_queue_counts_where_it_was_placed_last() -> None:
    here, there, (queue,) = Watch(LaneBelief(5), 1), Watch(LaneBelief(5), 2), queues(1)
    here.place(queue, 10)
    there.place(queue, 50)
    assert here.surface(1000) == []
    assert there.clear() == [queue]
    assert queue.watch is None


def test_an_empty_queue_is_forgotten() -> None:
    watch, (queue,) = Watch(LaneBelief(5), 1), queues(1)
    watch.place(queue, 10)
    queue.take(0, 1)
    assert watch.surface(0) == []
    assert queue.watch is None
    assert watch.heap == []


def test_stale_entries_do_not_pile_up() -> None:
    watch, (queue,) = Watch(LaneBelief(5), 1), queues(1)
    for latest_ns in range(10_000, 0, -1):
        watch.place(queue, latest_ns)
    assert len(watch.heap) <= 2 + STALE_MIN + 1
    assert watch.surface(2) == [queue]
