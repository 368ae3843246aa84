"""The first signal requests a stop, the second forces it; either cancels what is under way."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import pytest

from clockwork_serve.serve.supervisor.server import Stopping, run_unless


async def send(number: signal.Signals, received: asyncio.Event) -> None:
    os.kill(os.getpid(), number)
    await asyncio.wait_for(received.wait(), 60)


async def test_the_first_signal_requests_and_the_second_forces() -> None:
    stopping = Stopping()
    await send(signal.SIGINT, stopping.requested)
    assert (stopping.signal, stopping.status) == (signal.SIGINT, 130)
    assert not stopping.forced.is_set()
    await send(signal.SIGTERM, stopping.forced)
    assert stopping.status == 143


async def test_a_closed_terminal_requests_it_too_unless_its_signal_is_ignored() -> None:
    stopping = Stopping()
    await send(signal.SIGHUP, stopping.requested)
    assert stopping.status == 129
    asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ignoring = Stopping()
        os.kill(os.getpid(), signal.SIGHUP)
        await send(signal.SIGTERM, ignoring.requested)
        assert ignoring.status == 143
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_work_ends_or_is_cancelled() -> None:
    event, ended = asyncio.Event(), []

    async def work(seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            ended.append(seconds)

    assert await run_unless(event, work(0))
    asyncio.get_running_loop().call_later(0.01, event.set)
    assert not await run_unless(event, work(3600))
    assert ended == [0, 3600]


async def test_several_pieces_of_work_are_cancelled_without_a_word() -> None:
    event, said = asyncio.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
    event.set()
    assert not await run_unless(event, asyncio.gather(asyncio.sleep(3600), asyncio.sleep(3600)))
    gc.collect()
    assert said == []


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await run_unless(asyncio.Event(), work())
