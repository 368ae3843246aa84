"""When a leader that no worker is connected to gives up its lease, and when it keeps it."""

from __future__ import annotations

import pytest

from clockwork_serve.serve.lease import ALONE_MAX_S, REIGN_S, Desertion, LeaseBeat

KNOWN = LeaseBeat(count=1, workers=True)


def given_up_s(made: Desertion, *, workers_until_s: float = -1.0, begin_s: float = 0.0) -> float:
    """After how many seconds it gives up; workers are connected until then. -1: not within a day."""
    now_s = begin_s
    while now_s < begin_s + 86_400:
        if made.gives_up(int(now_s < begin_s + workers_until_s), now_s):
            return now_s - begin_s
        now_s += 0.25
    return -1.0


@pytest.mark.parametrize(("lease_s", "alone_s"), [(1.0, 1.0), (4.0, 4.0), (60.0, ALONE_MAX_S)])
def test_who_lost_all_its_workers_gives_up_soon_after(lease_s: float, alone_s: float):
    made = Desertion(lease_s, 0.0, None)
    assert given_up_s(made, workers_until_s=100) == pytest.approx(100 + alone_s, abs=0.5)
    assert made.last_words("a:7000") == LeaseBeat(
        count=0, address="a:7000", released=True, workers=True, deserted=True
    )


def test_nobody_gives_up_while_no_worker_was_ever_known():
    for last in (None, LeaseBeat(count=1)):
        assert given_up_s(Desertion(1.0, 0.0, last)) == -1


def test_who_led_for_a_moment_only_goes_on_for_a_while():
    assert given_up_s(Desertion(1.0, 0.0, None), workers_until_s=1) == pytest.approx(REIGN_S, abs=0.5)


def test_while_all_workers_are_dead_each_leads_twice_as_long_as_the_one_before():
    last, reigns_s = KNOWN, list[float]()
    for _ in range(6):
        made = Desertion(1.0, 0.0, last)
        reigns_s.append(given_up_s(made))
        last = made.last_words("a:7000")
    assert reigns_s == [REIGN_S * 2**at for at in range(6)]
    found = Desertion(1.0, 0.0, last)
    assert given_up_s(found, workers_until_s=100) == pytest.approx(100 + 1, abs=0.5)
    assert found.last_words("b:7000").in_vain == 0, "a worker joined it"


def test_a_worker_that_is_back_before_ends_it():
    made = Desertion(1.0, 0.0, KNOWN)
    for at in range(1000):  # away for half of each second
        assert not made.gives_up(at // 2 % 2, at / 4)
