"""The near future of a server on so many devices: its likely load, simulated by the code that serves.

What is loaded now is loaded before the load begins, by requests that nobody waits for: so it comes to lie as
the policy would have it on that number of devices, and whoever was cold stays so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct, structs

from clockwork_serve.apps.learned import LearnedServer, places
from clockwork_serve.apps.plan.runs import cause_counts
from clockwork_serve.apps.scaling.demand import LikelyLoad
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import ControllerEffect, ControllerEvent, Quota
from clockwork_serve.sim import Cluster, Constants, Simulation
from clockwork_serve.sim.tally import MissCount
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload.processes import Block
from clockwork_serve.workload.stream import OpenLoad, Slo, Workload
from clockwork_serve.workload.tables import NO_SLO_MS
from clockwork_serve.workload.zoo import Zoo

BEGIN_NS: Final = 5 * NS_PER_S
"""The load runs for so long before it counts: queues and batches are then as they would be."""
CHANCE: Final = 2.0
"""So many standard deviations of what may miss are taken for chance: a window has few requests."""
HOPELESS: Final = 0.1
"""If this share of all has missed, the rest is not simulated."""
_FOREVER: Final = Slo(NO_SLO_MS, None, 0)


class FutureWorld(Struct, frozen=True, kw_only=True):
    """What a simulation needs beside the load: models by key with their rows in ``zoo``, one kind of device.

    ``cluster``: a device's memory; its number does not count. ``loaded``: keys of models whose weights are on
    some device. ``constants``: delays and noise; None: the usual ones.
    """

    kinds: dict[str, str]
    zoo: Zoo
    cluster: Cluster
    config: ControllerConfig
    quotas: tuple[Quota, ...] = ()
    loaded: tuple[str, ...] = ()
    constants: Constants | None = None

    @staticmethod
    def of(learned: LearnedServer, config: ControllerConfig, loaded: Sequence[str]) -> FutureWorld | None:
        """As a journal told it; None as long as no model or device is known."""
        specs = learned.present()
        rows = learned.rows() if specs else []
        if not rows:
            return None
        zoo, spec, named = Zoo.of("served", places(Path("journal"), rows)), specs[0], learned.kinds()
        kinds = {key: named[learned.name_of(key)] for key in learned.models}
        return FutureWorld(
            kinds={key: kind for key, kind in kinds.items() if kind in zoo.models}, zoo=zoo, config=config,
            cluster=Cluster(pages=spec.pages, page_bytes=spec.page_bytes, lanes_share=spec.lanes_share),
            quotas=tuple(learned.quotas.values()), loaded=tuple(loaded),
            constants=learned.delays.constants() if learned.delays.known else None,
        )  # fmt: skip


class Judged(Struct, frozen=True, kw_only=True):
    """What so many devices would give: of the requests with an SLO, how many would not be in time.

    ``busy``: the share of their time that devices would execute. ``model`` is the one with most of those
    that miss, ``cause`` why; empty: none would.
    """

    devices: int
    requests: int
    missed: int
    busy: float = 0.0
    model: str = ""
    cause: str = ""

    @property
    def in_time(self) -> float:
        """Their share."""
        return 1 - self.missed / self.requests if self.requests else 1.0

    def met(self, target: float) -> bool:
        """Whether at least that share is in time, unless what misses beyond that may well be chance."""
        allowed = (1 - target) * self.requests
        return self.missed <= allowed + CHANCE * math.sqrt(allowed)


class _Hopeless(Exception):
    """More would miss than anybody wants to count."""


class _Misses:
    """Ends its simulation if more than ``most`` miss, for overload is slow to simulate, or if told to."""

    def __init__(self, count: MissCount, most: int, stopped: Callable[[], bool]) -> None:
        self._count, self._most, self._stopped = count, most, stopped

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        self._count.on_step(now_ns, events, effects)
        if self._count.ended[0] - self._count.in_time[0] > self._most or self._stopped():
            raise _Hopeless


def judge(
    load: LikelyLoad, world: FutureWorld, devices: int, stopped: Callable[[], bool] = lambda: False
) -> Judged:
    """Simulate it; the same load and world give the same result.

    It ends early where very many miss, or once it is ``stopped``.
    """
    workload = _workload(load, world, devices)
    simulation = Simulation(
        workload=workload, zoo=world.zoo, cluster=structs.replace(world.cluster, devices=devices),
        config=structs.replace(world.config, expected_devices=devices), constants=world.constants, seed=1,
    )  # fmt: skip
    count = MissCount(workload.warmup_ns, 1, simulation.constants.network.gateway_ns)
    simulation.watchers.append(_Misses(count, max(1, round(HOPELESS * load.times_ns.size)), stopped))
    with suppress(_Hopeless):
        simulation.run()
    causes, requests = cause_counts(count), count.ended[0]
    ran_ns = min(simulation.now_ns, workload.duration_ns) - workload.warmup_ns
    return Judged(
        devices=devices, requests=requests, missed=requests - count.in_time[0],
        busy=simulation.tally.busy.exec_ns / max(1, devices * ran_ns),
        model=next(iter(causes[0].models)) if causes else "", cause=causes[0].cause if causes else "",
    )  # fmt: skip


def _workload(load: LikelyLoad, world: FutureWorld, devices: int) -> Workload:
    """The load after a beginning that repeats its end, and before both whatever is loaded."""
    names = [name for name in load.names if name in world.kinds]
    loaded = [key for key in world.loaded if key in world.kinds]
    keys = list(dict.fromkeys([*names, *loaded]))
    numbers = {key: number for number, key in enumerate(keys)}
    numbered = np.array([numbers.get(name, -1) for name in load.names], np.int64)
    gap_ns = max([world.zoo[world.kinds[key]].load_ns for key in loaded], default=0) // devices + NS_PER_MS
    begin_ns = min(BEGIN_NS, load.window_ns)
    from_ns = gap_ns * len(loaded) + begin_ns
    at_ns = np.concatenate([load.times_ns - load.window_ns, load.times_ns]) + from_ns
    models = np.tile(numbered[load.models], 2)
    slos_ns, whose = np.tile(load.slos_ns, 2), np.tile(load.whose, 2)
    kept = (at_ns >= from_ns - begin_ns) & (models >= 0)
    end_ns = from_ns + load.window_ns
    first = Block(
        end_ns, np.arange(len(loaded), dtype=np.int64) * gap_ns,
        np.array([numbers[key] for key in loaded], np.int64),
    )  # fmt: skip
    blocks = [first]
    for number in range(len(load.classes)):
        own = kept & (whose == number)
        blocks.append(Block(end_ns, at_ns[own], models[own], slos_ns[own]))
    priorities, tenants, decides_ns = zip((0, "", -1), *load.classes, strict=True)
    return Workload(
        models=tuple((key.removesuffix("/1"), world.kinds[key]) for key in keys),
        loads=tuple(str(number) for number in range(len(blocks))), closed=(),
        priorities=priorities, tenants=tenants, decides_ns=decides_ns,
        duration_ns=end_ns, warmup_ns=from_ns, quotas=world.quotas,
        streams=tuple(OpenLoad(at, _FOREVER, _once(block)) for at, block in enumerate(blocks)),
    )  # fmt: skip


def _once(block: Block) -> Callable[[], Iterator[Block]]:
    return lambda: iter((block,))
