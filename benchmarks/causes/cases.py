"""What a case of this benchmark is, and how one is played on virtual time.

A cause is a file beside this one with its ``CASES``, which ``__main__`` lists.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.causes.sketches import Sketch
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import ControllerEffect, ControllerEvent, Infer, Result
from clockwork_serve.sim import Cluster, Constants, Simulation, Tally
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo

ZOO: Final = Zoo.read("v100")
"""The kinds of models of all cases."""
WARMUP_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Given:
    """How a case is to be played."""

    seed: int
    short: bool

    def seconds(self, full_s: float, short_s: float) -> float:
        """The length of what is counted, in seconds."""
        return short_s if self.short else full_s


@dataclass(frozen=True, slots=True)
class Found:
    """The figure of a case, and the same of the best sketch, if there is one."""

    value: float
    sketch: float | None = None
    more: str = ""
    """Further figures, to be shown beside it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row: the figure that is asked for, and how it is found.

    ``before`` is what the policy reached before the cause was seen to. ``note`` says what the figure means
    where that is not plain, or that the case could not be made such that ``before`` is found.
    """

    name: str
    words: str
    asked: float
    before: float
    play: Callable[[Given], Found]
    at_most: bool = False
    note: str = ""

    def met(self, found: Found) -> bool:
        """Whether what was found is what is asked for."""
        return found.value <= self.asked if self.at_most else found.value >= self.asked


class LaneTimes:
    """A watcher of a simulation: how long each device's exec lane was occupied from an instant on, in ns."""

    def __init__(self, from_ns: int) -> None:
        self._from_ns = from_ns
        self.by_device_ns: dict[str, int] = {}
        self._infers: set[int] = set()

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Add the results of INFERs."""
        for event in events:
            if isinstance(event, Result) and event.action_id in self._infers:
                self._infers.remove(event.action_id)
                if now_ns < self._from_ns:
                    continue
                total_ns = self.by_device_ns.get(event.device, 0)
                self.by_device_ns[event.device] = total_ns + event.lane_ns
        self._infers.update([effect.action_id for effect in effects if isinstance(effect, Infer)])


@dataclass(frozen=True, slots=True)
class Played:
    """A simulation that has ended: its counts after the warm-up, its CPU time, and the use of devices."""

    tally: Tally
    seconds: float
    """The length of what was counted."""
    cpu_s: float
    busy: list[float] = field(default_factory=list)
    """Share of the time during which each device's exec lane was occupied, the busiest first."""

    @property
    def in_time(self) -> float:
        """The share of requests that were answered in time."""
        return self.tally.total().satisfaction

    @property
    def good_rps(self) -> float:
        """Answers in time per second."""
        return self.tally.total().ok / self.seconds


def simulated(
    scenario: Scenario, cluster: Cluster, given: Given, config: ControllerConfig | None = None,
    constants: Constants | None = None,
) -> Played:  # fmt: skip
    """Play a scenario under policy ``default``, or as ``config`` says."""
    workload = build(scenario, given.seed)
    times = LaneTimes(workload.warmup_ns)
    simulation = Simulation(
        workload=workload, zoo=ZOO, cluster=cluster, config=config or ControllerConfig(),
        seed=given.seed, constants=constants, watchers=[times],
    )  # fmt: skip
    gc.collect()
    began = time.process_time()
    tally = simulation.run()
    cpu_s = time.process_time() - began
    seconds = scenario.seconds - scenario.warmup_s
    busy = [lane_ns / NS_PER_S / seconds for lane_ns in times.by_device_ns.values()]
    return Played(tally, seconds, cpu_s, sorted(busy, reverse=True))


def calls(rate_rps: float, slo_ms: float, zipf_s: float | None = None) -> LoadTable:
    """Poisson arrivals at all models of ``copies``, alike or by Zipf's law."""
    return LoadTable(
        name="calls", models=("model",), arrivals="poisson", rate_rps=rate_rps, slo_ms=slo_ms, zipf_s=zipf_s,
        popularity="uniform" if zipf_s is None else "zipf",
    )  # fmt: skip


def copies(kind: str, count: int, seconds: float, *loads: LoadTable) -> Scenario:
    """A scenario with copies of one kind of model, after a warm-up."""
    models = (ModelSet(name="model", kind=kind, copies=count),)
    return Scenario(name="calls", seconds=WARMUP_S + seconds, warmup_s=WARMUP_S, models=models, loads=loads)


def share_in_time(
    scenario: Callable[[float], Scenario], cluster: Cluster, sketches: Sequence[Sketch] = (),
    full_s: float = 30.0, short_s: float = 10.0,
) -> Callable[[Given], Found]:  # fmt: skip
    """The share of requests in time, beside that of the best of ``sketches``.

    ``scenario`` takes the length of what is counted, in seconds.
    """

    def play(given: Given) -> Found:
        made = scenario(given.seconds(full_s, short_s))
        played = simulated(made, cluster, given)
        workload = build(made, given.seed)
        rivals: dict[str, float] = {
            one.name: one.serve(workload, ZOO, cluster.devices).in_time for one in sketches
        }
        best = max(rivals, key=lambda name: rivals[name], default="")
        busy = sum(played.busy) / cluster.devices
        more = f"busy {busy:.2f}, {played.tally.busy.loads} LOADs{f', {best}' if best else ''}"
        return Found(played.in_time, rivals.get(best), more)

    return play
