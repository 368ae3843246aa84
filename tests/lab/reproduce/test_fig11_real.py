"""Fig 11 in real time, in its short form: every request has one answer, and no process is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import cache

import pytest
import uvloop

from clockwork_lab.reproduce.fig11 import fig11
from clockwork_lab.reproduce.fig11_real import (
    GOAL_RPS,
    SHORT_DEVICES,
    RateStep,
    best,
    claims,
    measure,
    panels,
)
from clockwork_lab.reproduce.figure import SeriesRole
from clockwork_lab.reproduce.players import players
from clockwork_lab.reproduce.real_controller import processes
from clockwork_lab.reproduce.real_requests import Accounting
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ClockworkError


@cache
def measured() -> dict[int, list[RateStep]]:
    return measure(FigureRun(seed=1, short=True), players((8,))[-1])


def step(devices: int, good: int, offered: int = 1000, controller_s: float = 0.05) -> RateStep:
    accounting = Accounting(offered=offered, good=good, rejected=offered - good)
    return RateStep(devices, 2.0, accounting, controller_s, workers_s=0.1, generator_s=0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.system
def test_each_request_has_exactly_one_answer():
    found = measured()

    assert tuple(found) == SHORT_DEVICES
    for accounting in (each.accounting for steps in found.values() for each in steps):
        assert accounting.offered > 0
        assert accounting.good + accounting.late + accounting.rejected == accounting.offered
        assert (accounting.failed, accounting.unanswered, accounting.twice) == (0, 0, 0)
        assert accounting.balanced


@pytest.mark.system
def test_all_processes_used_their_cpu():
    for each in (one for steps in measured().values() for one in steps):
        assert min(each.controller_s, each.workers_s, each.generator_s) > 0
        assert each.controller_s + each.workers_s + each.generator_s < 10 * each.seconds


@pytest.mark.system
def test_the_figure_holds_both_halves():
    figure = fig11(FigureRun(seed=1, short=True))

    names = [f"{panel.name}: {series.name}" for panel in figure.panels for series in panel.series]
    assert len(set(names)) == len(names)
    assert {"goodput: real time, good answers", "controller CPU: real time, controller process"} <= set(names)
    assert any(name.startswith("peak goodput: paper as released") for name in names)
    assert "in real time" in figure.setup
    assert [claim.target for claim in figure.claims if "through sockets" in claim.name] == [GOAL_RPS] * 2


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


def test_the_best_step_is_shown_and_claimed():
    found = {1: [step(1, 400), step(1, 900)], 8: [step(8, 980, controller_s=0.04), step(8, 100)]}

    goodput, cpu = panels(found)
    assert best(found[8]).accounting.good == 980
    good = next(each for each in goodput.series if each.name == "real time, good answers")
    assert [(point.x, point.y) for point in good.points] == [(1, 450), (8, 490)]
    beyond = next(each for each in goodput.series if each.name == "real time, good answers, more offered")
    assert [(point.x, point.y) for point in beyond.points] == [(1, None), (8, 50)]
    controller = cpu.series[0]
    assert (controller.role, controller.at(8)) == (SeriesRole.REAL, pytest.approx(40.0))
    whole, alone = claims(found)
    assert (whole.ours, whole.target, whole.met) == (490, GOAL_RPS, False)
    assert (alone.ours, alone.met) == (pytest.approx(25_000), False)


def test_a_step_is_kept_while_nearly_all_are_answered_well():
    assert step(1, 950).kept
    assert not step(1, 949).kept
