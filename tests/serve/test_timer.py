"""The timer fires once, not before its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import uvloop

from clockwork_serve.serve.driver import LoopTimer
from clockwork_serve.units import NS_PER_MS, NS_PER_S


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
            await asyncio.wait_for(rings.rang.wait(), 20)
            await asyncio.sleep(0.01)
            assert len(rings.times) == 1
            assert rings.times[0] >= at_ns
            timer.close()

    run(main())


@pytest.mark.parametrize("past_ns", [0, -5, 1, 1000])
def test_a_past_time_fires_at_once(past_ns: int) -> None:
    async def main() -> None:
        rings = Rings()
        timer = LoopTimer(rings)
        timer.arm(past_ns)
        await asyncio.wait_for(rings.rang.wait(), 20)
        timer.arm(past_ns)
        await asyncio.sleep(0.02)
        assert len(rings.times) == 2, "the same time may be armed again once it rang"
        timer.close()

    uvloop.run(main())


def test_the_last_arming_wins_and_none_disarms() -> None:
    async def main() -> None:
        rings = Rings()
        timer = LoopTimer(rings)
        timer.arm(time.monotonic_ns() + 20 * NS_PER_MS)
        timer.arm(None)
        await asyncio.sleep(0.05)
        assert rings.times == []
        timer.arm(time.monotonic_ns() + 1000 * NS_PER_S)
        soon_ns = time.monotonic_ns() + NS_PER_MS
        timer.arm(soon_ns)
        await asyncio.wait_for(rings.rang.wait(), 20)
        assert rings.times[0] >= soon_ns
        timer.close()
        timer.close()

    uvloop.run(main())
