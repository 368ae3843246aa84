"""The driver in real time, its timer, and the kernel's scheduling policies."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import uvloop

from clockwork_serve.serve.driver import (
    BATCH_MESSAGES,
    MARGIN_NS,
    SHORT_NS,
    TURNS,
    Driver,
    LoopTimer,
    UrgentTimer,
    own_slice_ns,
    use_short_slices,
)
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from tests.serve.links import until

# The driver: one ``now`` per turn, observe all, decide once, perform in order, wake on time.


class Echo:
    """Decides one effect per event; asks to be woken at ``wakeups`` in turn. Keeps all calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, int]] = []
        self.waiting: list[str] = []
        self.wakeup_ns: int | None = None

    def observe(self, event: str, now_ns: int) -> None:
        self.calls.append(("observe", event, now_ns))
        self.waiting.append(event)

    def decide(self, now_ns: int) -> list[str]:
        self.calls.append(("decide", None, now_ns))
        if self.wakeup_ns is not None and self.wakeup_ns <= now_ns:
            self.wakeup_ns = None
        effects, self.waiting = [f"did {event}" for event in self.waiting], []
        return effects

    def next_wakeup_ns(self) -> int | None:
        return self.wakeup_ns

    def check(self) -> None:
        pass


async def test_events_of_one_turn_share_one_now_and_one_decision() -> None:
    machine, performed = Echo(), list[str]()
    ticks = itertools.count(100)
    driver = Driver(machine, performed.append, clock=lambda: next(ticks))
    driver.post("a", "b")
    driver.post("c")
    assert machine.calls == [], "nothing is decided in the middle of a turn"
    await until(lambda: performed)
    assert machine.calls == [
        ("observe", "a", 100), ("observe", "b", 100), ("observe", "c", 100), ("decide", None, 100),
    ]  # fmt: skip
    assert performed == ["did a", "did b", "did c"]
    driver.close()


async def test_events_posted_while_performing_belong_to_the_next_turn() -> None:
    machine, performed = Echo(), list[str]()
    ticks = itertools.count(1)

    def perform(effect: str) -> None:
        performed.append(effect)
        if effect == "did a":
            driver.post("again")

    driver = Driver(machine, perform, clock=lambda: next(ticks))
    driver.post("a", "b")
    await until(lambda: len(performed) == 3)
    assert performed == ["did a", "did b", "did again"]
    assert machine.calls[2:] == [("decide", None, 1), ("observe", "again", 2), ("decide", None, 2)]
    driver.close()


async def test_the_machine_is_woken_when_it_asked_and_not_before() -> None:
    async def woken_after(ms: int) -> bool:
        """False if this host was so late that no wake-up was necessary."""
        machine = Echo()
        driver = Driver(machine, lambda effect: None)
        at_ns = machine.wakeup_ns = time.monotonic_ns() + ms * NS_PER_MS
        driver.post("a")
        await until(lambda: len(machine.calls) >= 2)
        if machine.calls[1][2] < at_ns:
            await until(lambda: len(machine.calls) == 3)
            assert at_ns <= machine.calls[2][2]
        calls = len(machine.calls)
        await asyncio.sleep(0.02)
        assert len(machine.calls) == calls, "one wake-up is one decision"
        driver.close()
        return calls == 3

    assert any([await woken_after(ms) for ms in (5, 50, 500)])


async def test_a_wakeup_that_is_not_later_raises() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))

    class Stuck(Echo):
        def next_wakeup_ns(self) -> int | None:
            return 50

    driver = Driver(Stuck(), lambda effect: None, clock=lambda: 50)
    driver.wake()
    await until(lambda: reported)
    with pytest.raises(AssertionError, match="asked to wake at 50, not after 50"):
        raise reported[0]["exception"]
    driver.close()


async def test_the_journal_gets_each_turn_unchanged() -> None:
    journal: list[tuple[int, list[str], list[str]]] = []
    ticks = itertools.count(7)
    driver = Driver(
        Echo(),
        lambda effect: None,
        clock=lambda: next(ticks),
        journal=lambda now_ns, events, effects: journal.append((now_ns, events, effects)),
    )
    driver.post("a", "b")
    await until(lambda: journal)
    driver.wake()
    await until(lambda: len(journal) == 2)
    assert journal == [(7, ["a", "b"], ["did a", "did b"]), (8, [], [])]
    driver.close()


async def test_a_closed_driver_does_not_call_the_machine() -> None:
    machine = Echo()
    driver = Driver(machine, lambda effect: None)
    driver.post("a")
    driver.close()
    driver.post("b")
    await asyncio.sleep(0.01)
    assert machine.calls == []


async def test_the_lateness_of_each_wakeup_is_reported() -> None:
    machine, late = Echo(), list[int]()
    far_ns = time.monotonic_ns() + 3600 * NS_PER_S  # the timer itself never rings
    times = iter([far_ns + 10, far_ns + 40, far_ns + 55, far_ns + 70])
    driver = Driver(machine, lambda effect: None, clock=lambda: next(times), woke=late.append)
    for asked_ns, calls in ((far_ns + 30, 1), (far_ns + 60, 2), (far_ns + 65, 3), (None, 4)):
        machine.wakeup_ns = asked_ns
        driver.wake()
        await until(lambda calls=calls: len(machine.calls) == calls)
    assert late == [10, 5], "at 40 what was asked for at 30; nothing at 55; at 70 what was asked for at 65"
    driver.close()


# The timer fires once, not before its time.


class Rings:
    def __init__(self) -> None:
        self.times: list[int] = []
        self.rang = asyncio.Event()

    def __call__(self) -> None:
        self.times.append(time.monotonic_ns())
        self.rang.set()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_it_fires_once_and_never_early(run: Callable[..., None]) -> None:
    async def main() -> None:
        for delay_ns in (1, 300_000, 1_500_000, 7 * NS_PER_MS):
            rings = Rings()
            timer = LoopTimer(rings)
            at_ns = time.monotonic_ns() + delay_ns
            timer.arm(at_ns)
            await asyncio.wait_for(rings.rang.wait(), 60)
            await asyncio.sleep(0.01)
            assert len(rings.times) == 1
            assert rings.times[0] >= at_ns
            timer.close()

    run(main())


@pytest.mark.parametrize("past_ns", [0, -5, 1, 1000])
async def test_a_past_time_fires_at_once(past_ns: int) -> None:
    rings = Rings()
    timer = LoopTimer(rings)
    timer.arm(past_ns)
    await asyncio.wait_for(rings.rang.wait(), 60)
    timer.arm(past_ns)
    await asyncio.sleep(0.02)
    assert len(rings.times) == 2, "the same time may be armed again once it rang"
    timer.close()


async def test_the_last_arming_wins_and_none_disarms() -> None:
    rings = Rings()
    timer = LoopTimer(rings)
    timer.arm(time.monotonic_ns() + 20 * NS_PER_MS)
    timer.arm(None)
    await asyncio.sleep(0.05)
    assert rings.times == []
    timer.arm(time.monotonic_ns() + 1000 * NS_PER_S)
    soon_ns = time.monotonic_ns() + NS_PER_MS
    timer.arm(soon_ns)
    await asyncio.wait_for(rings.rang.wait(), 60)
    assert rings.times[0] >= soon_ns
    timer.close()
    timer.close()


# The timer's thread preempts others when its time is near, and uses the batch policy in bursts.


MANY = int(BATCH_MESSAGES) * TURNS
FAR_NS = 1000 * NS_PER_S

usual_policy = pytest.mark.skipif(
    os.sched_getscheduler(0) != os.SCHED_OTHER, reason="these tests were given another scheduling class"
)


class PolicyRings:
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
        await asyncio.wait_for(self.rang.wait(), 60)


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


@usual_policy
def test_in_a_burst_the_batch_policy_is_used_until_shortly_before_the_time() -> None:
    async def test() -> None:
        rings = PolicyRings()
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


@usual_policy
def test_the_batch_policy_is_left_for_a_time_that_is_near_or_past() -> None:
    async def test() -> None:
        rings = PolicyRings()
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


@usual_policy
def test_the_last_arming_wins_while_it_waits_and_none_disarms() -> None:
    async def test() -> None:
        rings = PolicyRings()
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


@usual_policy
def test_the_batch_policy_is_not_used_for_single_messages() -> None:
    async def test() -> None:
        rings = PolicyRings()
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


@usual_policy
@pytest.mark.skipif(not own_slice_ns(), reason="this kernel knows no slices")
def test_a_slice_survives_the_change_of_policy() -> None:
    async def test() -> None:
        slice_ns = own_slice_ns()
        rings = PolicyRings()
        rings.timer.count(MANY)
        for at_ns in (None, 1):
            rings.timer.arm(at_ns)
            assert own_slice_ns() == slice_ns
        rings.timer.close()

    in_a_thread(test, before=use_short_slices)


@usual_policy
def test_a_policy_set_by_the_operator_is_kept() -> None:
    async def test() -> None:
        rings = PolicyRings()
        rings.timer.count(MANY)
        for at_ns in (1, time.monotonic_ns() + FAR_NS, None):
            rings.timer.arm(at_ns)
            assert os.sched_getscheduler(0) == os.SCHED_IDLE
        rings.timer.close()

    in_a_thread(test, before=lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)))


# A thread gets the slice that it asked for, and a policy set by the operator is kept.


ASK = "from clockwork_serve.serve.driver import *; import os; {}; print(use_short_slices(), own_slice_ns())"


def told(before: str) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-c", ASK.format(before)], capture_output=True, text=True, check=True
    )
    return ran.stdout.split()


@pytest.mark.skipif(not own_slice_ns(), reason="this kernel knows no slices")
def test_a_short_slice_is_accepted_and_the_niceness_stays() -> None:
    taken, slice_ns = told("os.nice(3)")
    assert (taken, int(slice_ns)) == ("True", SHORT_NS)
    assert told("nice = os.nice(3); use_short_slices(); assert os.nice(0) == nice > 0")[0] == "True"


def test_a_policy_set_by_the_operator_gets_no_short_slices() -> None:
    batch = "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))"
    assert told(batch)[0] == "False"
    assert (
        told(f"{batch}; use_short_slices(); assert os.sched_getscheduler(0) == os.SCHED_BATCH")[0] == "False"
    )


def test_the_batch_policy_is_used_unless_the_operator_set_another() -> None:
    code = (
        "import os; from clockwork_serve.serve.driver import use_batch_policy; {}; "
        "print(use_batch_policy(), os.sched_getscheduler(0) == os.{})"
    )
    idle = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    for before, after, taken in (("pass", "SCHED_BATCH", "True"), (idle, "SCHED_IDLE", "False")):
        ran = subprocess.run(
            [sys.executable, "-c", code.format(before, after)], capture_output=True, text=True, check=True
        )
        assert ran.stdout.split() == [taken, "True"]
