"""Which connection is used next, and which never again."""

from __future__ import annotations

from dataclasses import dataclass

from clockwork_client.base import IDLE_S, Pool


@dataclass(eq=False)
class Line:
    idle_since: float = 0.0
    stale: bool = False


def pool_of(*lines):
    pool = Pool()
    for line in lines:
        assert pool.add(line)
        assert pool.release(line, 1.0, keep=True)
    return pool


def test_the_one_used_last_is_used_next():
    first, last = Line(), Line()
    pool = pool_of(first, last)

    assert [pool.acquire(2.0)[0] for _ in range(3)] == [last, first, None]


def test_one_that_the_server_closed_is_dropped_unused():
    good, bad = Line(), Line(stale=True)

    assert pool_of(good, bad).acquire(2.0) == (good, [bad])


def test_one_that_was_idle_for_long_is_dropped_unused():
    old = Line()

    assert pool_of(old).acquire(1.0 + IDLE_S) == (None, [old])


def test_one_that_is_not_to_be_kept_is_not():
    line = Line()
    pool = pool_of(line)
    pool.acquire(2.0)

    assert not pool.release(line, 2.0, keep=False)
    assert pool.acquire(2.0) == (None, [])


def test_a_closed_pool_keeps_and_takes_none():
    idle, busy = Line(), Line()
    pool = pool_of(idle, busy)
    pool.acquire(2.0)

    assert pool.close() == ([idle], [busy])
    assert not pool.release(busy, 2.0, keep=True)
    assert not pool.add(Line())
    assert pool.acquire(2.0) == (None, [])
