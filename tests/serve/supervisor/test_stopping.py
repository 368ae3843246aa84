"""The first signal asks, the second insists, and what is under way is cancelled by either."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from clockwork_serve.serve.supervisor.server import Stopping, unless


async def send(number: signal.Signals, heard: asyncio.Event) -> None:
    os.kill(os.getpid(), number)
    await asyncio.wait_for(heard.wait(), 10)


def test_the_first_signal_asks_and_the_second_insists() -> None:
    async def run() -> None:
        stopping = Stopping()
        await send(signal.SIGINT, stopping.asked)
        assert (stopping.signal, stopping.status) == (signal.SIGINT, 130)
        assert not stopping.insisted.is_set()
        await send(signal.SIGTERM, stopping.insisted)
        assert stopping.status == 143

    asyncio.run(run())


def test_work_ends_or_is_cancelled() -> None:
    async def run() -> None:
        event, ended = asyncio.Event(), []

        async def work(seconds: float) -> None:
            try:
                await asyncio.sleep(seconds)
            finally:
                ended.append(seconds)

        assert await unless(event, work(0))
        asyncio.get_running_loop().call_later(0.01, event.set)
        assert not await unless(event, work(3600))
        assert ended == [0, 3600]

    asyncio.run(run())


def test_work_that_fails_says_so() -> None:
    async def run() -> None:
        async def work() -> None:
            raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            await unless(asyncio.Event(), work())

    asyncio.run(run())
