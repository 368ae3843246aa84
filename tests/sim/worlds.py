"""Small simulations that the tests of this folder run, and a watcher that remembers their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import ControllerEffect, ControllerEvent
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.tables import ClusterTable, FaultTable
from clockwork_serve.workload.zoo import Zoo

KIND = "resnet50_v2"
Message = TypeVar("Message")


class Steps:
    """Remembers all that a controller observed and decided, and when."""

    def __init__(self) -> None:
        self.events: list[tuple[int, ControllerEvent]] = []
        self.effects: list[tuple[int, ControllerEffect]] = []

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        self.events += [(now_ns, event) for event in events]
        self.effects += [(now_ns, effect) for effect in effects]

    def seen(self, kind: type[Message]) -> list[tuple[int, Message]]:
        """Events of one kind, and when they were observed."""
        return [(now_ns, event) for now_ns, event in self.events if isinstance(event, kind)]

    def done(self, kind: type[Message]) -> list[tuple[int, Message]]:
        """Effects of one kind, and when they were decided."""
        return [(now_ns, effect) for now_ns, effect in self.effects if isinstance(effect, kind)]


def scenario(
    *faults: FaultTable,
    seconds: float = 2.0,
    rate_rps: float = 200.0,
    slo_ms: float = 100.0,
    models: tuple[ModelSet, ...] = (ModelSet(name="m", kind=KIND, copies=2),),
    devices: int = 1,
) -> Scenario:
    """A steady load on a few models."""
    load = LoadTable(
        name="web",
        models=tuple(one.name for one in models),
        arrivals="fixed",
        rate_rps=rate_rps,
        slo_ms=slo_ms,
    )
    return Scenario(
        name="small", seconds=seconds, models=models, loads=(load,), faults=faults,
        cluster=ClusterTable(devices=devices),
    )  # fmt: skip


def simulation(
    made: Scenario, *, pages: int = 64, seed: int = 1, checks: bool = True, **config: object
) -> tuple[Simulation, Steps]:
    """A simulation of it without noise, before it begins, and its steps."""
    steps = Steps()
    made_simulation = Simulation(
        workload=build(made, seed), zoo=Zoo.read("v100"),
        cluster=Cluster(devices=made.cluster.devices, pages=pages),
        config=msgspec.convert(config, ControllerConfig), seed=seed, faults=made.faults, checks=checks,
        noise=False, watchers=(steps,),
    )  # fmt: skip
    return made_simulation, steps


def played(made: Scenario, **settings: object) -> tuple[Simulation, Steps]:
    """The same, when it is over."""
    made_simulation, steps = simulation(made, **settings)  # type: ignore[arg-type]
    made_simulation.run()
    return made_simulation, steps
