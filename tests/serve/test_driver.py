"""The driver: one ``now`` per turn, observe all, decide once, perform in order, wake on time."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest
import uvloop

from clockwork_serve.serve.driver import Driver
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from tests.serve.links import until


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


def test_events_of_one_turn_share_one_now_and_one_decision() -> None:
    async def main() -> None:
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

    uvloop.run(main())


def test_events_posted_while_performing_belong_to_the_next_turn() -> None:
    async def main() -> None:
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
        assert machine.calls[2:] == [
            ("decide", None, 1),
            ("observe", "again", 2),
            ("decide", None, 2),
        ]
        driver.close()

    uvloop.run(main())


def test_the_machine_is_woken_when_it_asked_and_not_before() -> None:
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

    async def main() -> None:
        assert any([await woken_after(ms) for ms in (5, 50, 500)])

    uvloop.run(main())


def test_a_wakeup_that_is_not_later_raises() -> None:
    async def main() -> None:
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

    uvloop.run(main())


def test_the_journal_gets_each_turn_unchanged() -> None:
    async def main() -> None:
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

    uvloop.run(main())


def test_a_closed_driver_does_not_call_the_machine() -> None:
    async def main() -> None:
        machine = Echo()
        driver = Driver(machine, lambda effect: None)
        driver.post("a")
        driver.close()
        driver.post("b")
        await asyncio.sleep(0.01)
        assert machine.calls == []

    uvloop.run(main())


def test_the_lateness_of_each_wakeup_is_reported() -> None:
    async def main() -> None:
        machine, late = Echo(), list[int]()
        far_ns = time.monotonic_ns() + 3600 * NS_PER_S  # the timer itself never rings
        times = iter([far_ns + 10, far_ns + 40, far_ns + 55, far_ns + 70])
        driver = Driver(machine, lambda effect: None, clock=lambda: next(times), woke=late.append)
        for asked_ns, calls in ((far_ns + 30, 1), (far_ns + 60, 2), (far_ns + 65, 3), (None, 4)):
            machine.wakeup_ns = asked_ns
            driver.wake()
            await until(lambda calls=calls: len(machine.calls) == calls)
        assert late == [10, 5], (
            "at 40 what was asked for at 30; nothing at 55; at 70 what was asked for at 65"
        )
        driver.close()

    uvloop.run(main())
