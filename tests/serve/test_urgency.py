"""The timer's thread preempts others when its time is near, and uses the batch policy in bursts."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop

from clockwork_serve.serve.driver import (
    BATCH_MESSAGES,
    MARGIN_NS,
    TURNS,
    UrgentTimer,
    own_slice_ns,
    use_short_slices,
)
from clockwork_serve.units import NS_PER_MS, NS_PER_S

MANY = int(BATCH_MESSAGES) * TURNS
FAR_NS = 1000 * NS_PER_S

pytestmark = pytest.mark.skipif(
    os.sched_getscheduler(0) != os.SCHED_OTHER, reason="these tests were given another scheduling class"
)


class Rings:
    """The callback of a timer: records when it was called, and under which policy."""

    def __init__(self) -> None:
        self.times: list[int] = []
        self.classes: list[int] = []
        self.rang = asyncio.Event()
        self.timer = UrgentTimer(self)

    def __call__(self) -> None:
        self.times.append(time.monotonic_ns())
        self.classes.append(os.sched_getscheduler(0))
        self.rang.set()

    async def wait(self) -> None:
        await asyncio.wait_for(self.rang.wait(), 20)


def in_a_thread(test: Callable[[], Awaitable[None]], before: Callable[[], object] = lambda: None) -> None:
    """Run a test on a loop in a thread of its own, for policy and slice stay as they were left."""

    async def main() -> None:
        await test()

    def body() -> None:
        before()
        uvloop.run(main())

    assert threading.current_thread() is threading.main_thread()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(body).result(60)


def soon_ns(ms: int) -> int:
    return time.monotonic_ns() + ms * NS_PER_MS


def test_in_a_burst_the_batch_policy_is_used_until_shortly_before_the_time() -> None:
    async def test() -> None:
        rings = Rings()
        rings.timer.count(MANY)
        at_ns = soon_ns(500)
        rings.timer.arm(at_ns)
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
        await rings.wait()
        await asyncio.sleep(0.01)
        assert rings.classes == [os.SCHED_OTHER]
        assert rings.times[0] >= at_ns
        rings.timer.arm(None)
        assert os.sched_getscheduler(0) == os.SCHED_BATCH, "nothing is near any more"
        rings.timer.close()

    in_a_thread(test)


def test_the_batch_policy_is_left_for_a_time_that_is_near_or_past() -> None:
    async def test() -> None:
        rings = Rings()
        rings.timer.count(MANY)
        for delay_ns in (MARGIN_NS // 2, -5, 1):
            rings.rang.clear()
            rings.timer.arm(soon_ns(10_000))
            assert os.sched_getscheduler(0) == os.SCHED_BATCH
            rings.timer.arm(time.monotonic_ns() + delay_ns)
            assert os.sched_getscheduler(0) == os.SCHED_OTHER
            await rings.wait()
        assert rings.classes == [os.SCHED_OTHER] * 3
        rings.timer.close()

    in_a_thread(test)


def test_the_last_arming_wins_while_it_waits_and_none_disarms() -> None:
    async def test() -> None:
        rings = Rings()
        rings.timer.count(MANY)
        rings.timer.arm(soon_ns(20))
        rings.timer.arm(None)
        await asyncio.sleep(0.05)
        assert rings.times == []
        rings.timer.arm(time.monotonic_ns() + FAR_NS)
        at_ns = soon_ns(10)
        rings.timer.arm(at_ns)
        await rings.wait()
        assert rings.times[0] >= at_ns
        rings.timer.close()

    in_a_thread(test)


def test_the_batch_policy_is_not_used_for_single_messages() -> None:
    async def test() -> None:
        rings = Rings()
        rings.timer.count(MANY)
        rings.timer.arm(None)
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
        for _ in range(50):
            rings.timer.count(0)
        rings.timer.arm(None)
        assert os.sched_getscheduler(0) == os.SCHED_BATCH, "turns without messages tell nothing"
        for _ in range(4 * TURNS):
            rings.timer.count(1)
        rings.timer.arm(None)
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        rings.timer.close()

    in_a_thread(test)


@pytest.mark.skipif(not own_slice_ns(), reason="this kernel knows no slices")
def test_a_slice_survives_the_change_of_policy() -> None:
    async def test() -> None:
        slice_ns = own_slice_ns()
        rings = Rings()
        rings.timer.count(MANY)
        for at_ns in (None, 1):
            rings.timer.arm(at_ns)
            assert own_slice_ns() == slice_ns
        rings.timer.close()

    in_a_thread(test, before=use_short_slices)


def test_a_policy_set_by_the_operator_is_kept() -> None:
    async def test() -> None:
        rings = Rings()
        rings.timer.count(MANY)
        for at_ns in (1, time.monotonic_ns() + FAR_NS, None):
            rings.timer.arm(at_ns)
            assert os.sched_getscheduler(0) == os.SCHED_IDLE
        rings.timer.close()

    in_a_thread(test, before=lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)))
