"""More requests than the controller can process: those that it gets can still be served in time."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest
import uvloop

from benchmarks.past_saturation.processes import processes
from benchmarks.past_saturation.requests import Accounting, Requests
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ClockworkError
from clockwork_serve.units import ms
from tests.timing import Timing


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def flooded() -> tuple[Accounting, Accounting]:
    """Six thousand requests in a second, and sixty thousand."""
    rng = np.random.default_rng(1)
    async with processes(ControllerConfig(max_batch=8), devices=16, models=32, workers=1) as real:
        requests = Requests(real.socket, real.models, ms(100))
        try:
            await requests.ready()
            await requests.offer(rng, 500, 1.0)
            return await requests.offer(rng, 6_000, 1.0), await requests.offer(rng, 60_000, 1.0)
        finally:
            await requests.close()


async def hopeless() -> tuple[Accounting, Accounting]:
    """Twice what a device can do, for which the controller has time; forty times, for which it has not."""
    rng = np.random.default_rng(1)
    async with processes(ControllerConfig(max_batch=8), devices=1, models=2, workers=1) as real:
        requests = Requests(real.socket, real.models, ms(100))
        try:
            await requests.ready()
            await requests.offer(rng, 200, 1.0)
            return await requests.offer(rng, 2_000, 2.0), await requests.offer(rng, 40_000, 2.0)
        finally:
            await requests.close()


@pytest.mark.system
def test_a_gateway_refuses_by_the_summary_of_a_controller_that_has_no_time(timing: Timing) -> None:
    few, many = uvloop.run(hopeless())

    assert few.balanced
    assert many.balanced
    assert 0 < many.by_summary <= many.rejected
    with timing.judged():
        assert few.by_summary == 0
        assert few.rejected > few.offered / 4
        assert many.by_summary > many.rejected / 2
        assert many.good > few.good / 2


@pytest.mark.system
def test_goodput_does_not_collapse_and_hardly_any_answer_is_late(timing: Timing) -> None:
    few, accounting = uvloop.run(flooded())

    assert accounting.balanced
    with timing.judged():
        assert accounting.good > few.good / 3, "a few hundred, where all that is heard is stale"
        assert accounting.late < accounting.offered / 5


@pytest.mark.system
def test_whatever_interrupts_no_process_is_left():
    pids: list[int] = []

    async def interrupted() -> None:
        async with processes(ControllerConfig(), devices=3, models=2, workers=2) as real:
            pids.extend((real.controller, *real.workers))
            assert all(alive(pid) for pid in pids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uvloop.run(interrupted())
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)


@pytest.mark.system
def test_a_process_that_ends_by_itself_is_named():
    async def killed() -> None:
        async with processes(ControllerConfig(), devices=1, models=1, workers=2) as real:
            (worker,) = real.workers
            os.kill(worker, signal.SIGKILL)
            while alive(worker):
                await asyncio.sleep(0.01)

    with pytest.raises(ClockworkError, match="worker-0 ended before its time, killed by SIGKILL"):
        uvloop.run(killed())


def test_books_balance_only_if_each_request_has_one_answer():
    assert Accounting(offered=4, good=1, late=1, rejected=1, failed=1).balanced
    assert not Accounting(offered=4, good=1, late=1, rejected=1).balanced
    assert not Accounting(offered=1, good=1, twice=1).balanced
    assert not Accounting(offered=1, unanswered=1).balanced
