"""Faults of scenarios made by chance that have dice of their own: they change nothing else of a seed."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.stream import Workload
from clockwork_serve.workload.tables import FaultTable

STREAM: Final = 1 << 17


def after(seed: int) -> int:
    """How many workers a model may take down, by dice of its own."""
    return int(np.random.Generator(np.random.PCG64([seed, STREAM + 2])).integers(0, 4))


def killers(seed: int, workload: Workload) -> list[FaultTable]:
    """Now and then a model kills who runs it, by dice of its own."""
    rng = np.random.Generator(np.random.PCG64([seed, STREAM + 3]))
    if rng.random() > 0.3:
        return []
    seconds = workload.duration_ns / NS_PER_S
    name = str(rng.choice([name for name, _ in workload.models]))
    at_s, for_s = seconds * float(rng.uniform(0.02, 0.9)), seconds * log_uniform(rng, 0.02, 0.5)
    return [FaultTable(kind="kills", at_s=at_s, for_s=for_s, model=name)]


def with_restarts(seed: int, workload: Workload, faults: tuple[FaultTable, ...]) -> tuple[FaultTable, ...]:
    """Now and then the controller dies, often together with something else, by dice of its own."""
    rng = np.random.Generator(np.random.PCG64([seed, STREAM + 4]))
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
    """A number between two, small ones as likely as large ones."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))
