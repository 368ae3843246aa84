"""What goes wrong in seeds beside the usual faults, each by dice of its own: they change no other choice."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from clockwork_serve.sim.cluster import Cluster
from clockwork_serve.units import NS_PER_S, ms
from clockwork_serve.workload.stream import Workload
from clockwork_serve.workload.tables import FaultTable

STREAM: Final = 1 << 17


def losses_allowed(seed: int) -> int:
    """How many workers a model may take down, by dice of its own."""
    return int(np.random.Generator(np.random.PCG64([seed, STREAM + 2])).integers(0, 4))


def shared_lanes(seed: int) -> bool:
    """Whether LOADs are said to take the time of INFERs, by dice of its own."""
    return bool(np.random.Generator(np.random.PCG64([seed, STREAM + 7])).random() < 0.3)


def killers(seed: int, workload: Workload) -> list[FaultTable]:
    """Now and then a model kills who runs it, by dice of its own."""
    rng = np.random.Generator(np.random.PCG64([seed, STREAM + 3]))
    if rng.random() > 0.3:
        return []
    seconds = workload.duration_ns / NS_PER_S
    name = str(rng.choice([name for name, _ in workload.models]))
    at_s, for_s = seconds * float(rng.uniform(0.02, 0.9)), seconds * log_uniform(rng, 0.02, 0.5)
    return [FaultTable(kind="kills", at_s=at_s, for_s=for_s, model=name)]


def patience(seed: int) -> dict[str, int]:
    """When a worker counts as hung, by dice of its own: often so soon that some do which only are slow."""
    rng = np.random.Generator(np.random.PCG64([seed, STREAM + 4]))
    hang_ms, grace_ms = log_uniform(rng, 15, 500), log_uniform(rng, 5, 1000)
    return {"hang_ns": 0 if rng.random() < 0.15 else ms(hang_ms), "hang_grace_ns": ms(grace_ms)}


def stops(seed: int, workload: Workload, cluster: Cluster) -> list[FaultTable]:
    """Now and then a worker stops, or a model never ends, by dice of their own."""
    rng = np.random.Generator(np.random.PCG64([seed, STREAM + 5]))
    seconds = workload.duration_ns / NS_PER_S
    names = [name for name, _ in workload.models]
    found: list[FaultTable] = []
    for _ in range(int(rng.integers(0, 3))):
        at_s, for_s = seconds * float(rng.uniform(0.02, 0.9)), seconds * log_uniform(rng, 0.005, 0.5)
        if rng.random() < 0.6:
            found.append(FaultTable(kind="hangs", at_s=at_s, for_s=for_s, model=str(rng.choice(names))))
            continue
        worker = int(rng.integers(cluster.devices // cluster.devices_per_worker))
        found.append(
            FaultTable(
                kind="stop", at_s=at_s, for_s=None if rng.random() < 0.3 else for_s,
                worker=None if rng.random() < 0.2 else worker,
            )
        )  # fmt: skip
    return found


def with_restarts(seed: int, workload: Workload, faults: tuple[FaultTable, ...]) -> tuple[FaultTable, ...]:
    """Now and then the controller dies, often together with something else, by dice of its own."""
    rng = np.random.Generator(np.random.PCG64([seed, STREAM + 6]))
    if rng.random() > 0.3:
        return faults
    seconds = workload.duration_ns / NS_PER_S
    restarts = []
    for _ in range(int(rng.integers(1, 4))):
        at_s = seconds * float(rng.uniform(0.02, 0.9))
        if faults and rng.random() < 0.5:
            at_s = max(0.0, faults[int(rng.integers(len(faults)))].at_s + float(rng.uniform(-0.01, 0.01)))
        for_s = None if rng.random() < 0.3 else log_uniform(rng, 0.01, 1)
        restarts.append(FaultTable(kind="controller", at_s=at_s, for_s=for_s))
    return (*faults, *restarts)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between two, as likely to be twice as large as half as large."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))
