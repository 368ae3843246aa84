"""Fig 11 in real time: real processes, emulated devices; the load rises until goodput falls behind it.

The paper has a machine for each worker and 18 cores for its controller; here the processes share the
available cores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import uvloop
from msgspec import structs

from clockwork_lab.reproduce.fig9 import SLO_MS
from clockwork_lab.reproduce.figure import Panel, PaperClaim, Series, SeriesRole, curve, points, value
from clockwork_lab.reproduce.players import Player
from clockwork_lab.reproduce.real_controller import Processes, processes
from clockwork_lab.reproduce.real_requests import Accounting, Requests
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.units import ms

DEVICES, SHORT_DEVICES = (1, 2, 4, 8, 16, 24, 32, 48, 64), (1, 2)
DEVICE_RPS: Final = 801.0  # the capacity of one device in consecutive batches of 8 (9.99 ms)
SHARES, SHORT_SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0), (0.4,)
"""Offered loads as shares of the devices' capacity, in order, until less than ``KEPT`` of one is good."""
STEP_S, SHORT_STEP_S, WARM_S, SHORT_WARM_S = 2.0, 1.0, 1.5, 0.5
WARM_SHARE, KEPT = 0.2, 0.95
MODELS, WORKERS = 4, 2
"""Models for each device, and the number of worker processes that the devices are distributed over."""
GOAL_RPS: Final = 60_000.0
US_PER_S: Final = 1e6
NOTES = (
    "In real time, requests enter by a gateway's link to the controller: HTTP and gRPC are left out.",
    "A request counts from when it should have been sent, so that a generator that is behind is no help.",
    "All processes share this machine's cores; what else runs on it is part of the result.",
)


@dataclass(slots=True, frozen=True)
class RateStep:
    """One offered rate on that many devices: the accounting, and CPU seconds of each kind of process."""

    devices: int
    seconds: float
    accounting: Accounting
    controller_s: float
    workers_s: float
    generator_s: float

    @property
    def good_rps(self) -> float:
        """Goodput in requests per second."""
        return self.accounting.good / self.seconds

    @property
    def kept(self) -> bool:
        """Whether nearly all of what was offered was good."""
        return self.accounting.good >= KEPT * self.accounting.offered


def measure(run: FigureRun, player: Player) -> dict[int, list[RateStep]]:
    """All steps for each number of devices. Raises :class:`ClockworkError` if a process ends by itself."""
    counts = SHORT_DEVICES if run.short else DEVICES
    run.plan(len(counts))
    return {count: uvloop.run(_measure(run, player, count)) for count in counts}


def best(steps: list[RateStep]) -> RateStep:
    """The step of the greatest goodput."""
    return max(steps, key=lambda step: step.good_rps)


def experiment(run: FigureRun, player: Player) -> str:
    """A description of the experiment."""
    return (
        f"one controller process, policy {player.name}, up to {WORKERS} worker processes of emulated devices "
        f"that take ResNet50's time on a V100, {MODELS} models for each device, SLO {SLO_MS:g} ms; requests "
        f"at random times, {', '.join(f'{share:.0%}' for share in _shares(run))} of what the devices can "
        f"answer in batches of {player.cap}, for {_step_s(run):g} s each, until less than {KEPT:.0%} of them "
        f"are answered well; {len(os.sched_getaffinity(0))} cores for all processes"
    )


def panels(found: dict[int, list[RateStep]]) -> tuple[Panel, ...]:
    """Goodput, and CPU time per request where it is greatest, against the number of devices."""
    most = max(found)
    published = curve("fig11", "Clockwork", "goodput_rps", name="published: Clockwork")
    shown = structs.replace(published, points=tuple(each for each in published.points if each.x <= most))
    tops = [best(steps) for steps in found.values()]
    return (
        Panel(
            name="goodput",
            x_label="workers (emulated devices)",
            y_label="requests/s",
            series=(
                *((shown,) if shown.points else ()),
                _series("good answers", 0, [(top.devices, top.good_rps) for top in tops]),
                _series(
                    "offered then", 1, [(top.devices, top.accounting.offered / top.seconds) for top in tops]
                ),
                _series("good answers, more offered", 2, [(each, _beyond(found[each])) for each in found]),
            ),
        ),
        Panel(
            name="controller CPU",
            x_label="workers (emulated devices)",
            y_label="us per request",
            series=(
                _cpu("controller process", 0, [(top, top.controller_s) for top in tops]),
                _cpu("worker processes", 1, [(top, top.workers_s) for top in tops]),
                _cpu("generator of requests", 2, [(top, top.generator_s) for top in tops]),
            ),
        ),
    )


def claims(found: dict[int, list[RateStep]]) -> list[PaperClaim]:
    """The goal for a whole machine, and what the controller alone could serve."""
    top = best([step for steps in found.values() for step in steps])
    paper = value("fig11", "Clockwork", "goodput_rps", 110.0)
    cores = len(os.sched_getaffinity(0))
    carried = top.accounting.offered / top.controller_s if top.controller_s else None
    return [
        PaperClaim(
            name=f"goodput in real time through sockets, at {top.devices} devices, {cores} cores for all",
            paper=paper, ours=top.good_rps, sense=">=", target=GOAL_RPS,
        ),
        PaperClaim(
            name="requests/s through sockets that one core carries, by the controller's CPU time then",
            paper=None, ours=carried, sense=">=", target=GOAL_RPS,
        ),
    ]  # fmt: skip


def _beyond(steps: list[RateStep]) -> float | None:
    """Goodput at the highest rate, if that is beyond the best one."""
    return None if steps[-1] is best(steps) else steps[-1].good_rps


def _series(name: str, variant: int, pairs: Sequence[tuple[int, float | None]]) -> Series:
    return Series(name=f"real time, {name}", role=SeriesRole.REAL, variant=variant, points=points(pairs))


def _cpu(name: str, variant: int, used: list[tuple[RateStep, float]]) -> Series:
    return _series(
        name, variant, [(step.devices, US_PER_S * used_s / step.accounting.offered) for step, used_s in used]
    )


def _shares(run: FigureRun) -> tuple[float, ...]:
    return SHORT_SHARES if run.short else SHARES


def _step_s(run: FigureRun) -> float:
    return SHORT_STEP_S if run.short else STEP_S


async def _measure(run: FigureRun, player: Player, devices: int) -> list[RateStep]:
    text = f"real time, {devices} devices"
    run.report(0.0, text)
    steps: list[RateStep] = []
    rng = np.random.default_rng([run.seed, devices])
    async with processes(player.config, devices=devices, models=MODELS * devices, workers=WORKERS) as real:
        requests = Requests(real.socket, real.models, ms(SLO_MS))
        try:
            await requests.ready()
            capacity = DEVICE_RPS * devices
            await requests.offer(rng, WARM_SHARE * capacity, SHORT_WARM_S if run.short else WARM_S)
            shares = _shares(run)
            for number, share in enumerate(shares):
                run.report((number + 1) / (len(shares) + 1), text)
                steps.append(await _step(requests, rng, real, devices, share * capacity, _step_s(run)))
                if not steps[-1].kept:
                    break
        finally:
            await requests.close()
    run.finished(text)
    return steps


async def _step(
    requests: Requests, rng: np.random.Generator, real: Processes, devices: int, rps: float, seconds: float
) -> RateStep:
    before = real.cpu_s()
    accounting = await requests.offer(rng, rps, seconds)
    used = [after - earlier for earlier, after in zip(before, real.cpu_s(), strict=True)]
    return RateStep(devices, seconds, accounting, *used)
