"""Pieces of time in which a load's rate does not change; it draws bursts and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.tables import MOST_RPS, Load, Ramp

LONGEST_NS: Final = 60 * NS_PER_S
MOST_EXPECTED: Final = 1 << 16
"""Requests that one piece may be expected to hold: what bounds the memory of a stream."""


@dataclass(slots=True)
class Piece:
    """Until before ``end_ns``, ``rate_rps`` requests per second go to the first ``active`` models."""

    start_ns: int
    end_ns: int
    rate_rps: float
    active: int

    @property
    def expected(self) -> float:
        """Requests that it holds on average."""
        return self.rate_rps * (self.end_ns - self.start_ns) / NS_PER_S


def steps_at(ramp: Ramp | None, elapsed_ns: int) -> int:
    """Steps that a ramp has made ``elapsed_ns`` after its load's start."""
    return elapsed_ns // ramp.every_ns if ramp else 0


def pieces(load: Load, models: int, until_ns: int, rng: np.random.Generator) -> Iterator[Piece]:
    """The life of an open load, gapless until ``until_ns``; bursts begin with one that is on."""
    assert load.rate_rps is not None
    start_ns = round(load.start_s * NS_PER_S)
    base = load.active_models or (1 if load.model_ramp else models)
    now_ns, on, switch_ns = start_ns, True, until_ns
    if load.on_s is not None:
        switch_ns = now_ns + _length(load.on_s, rng)
    while now_ns < until_ns:
        elapsed_ns = now_ns - start_ns
        rate, active = load.rate_rps, base
        end_ns = min(until_ns, switch_ns, now_ns + LONGEST_NS)
        if load.rate_ramp:
            steps = steps_at(load.rate_ramp, elapsed_ns)
            rate = min(max(0.0, load.rate_ramp.value(rate, steps)), MOST_RPS)
            end_ns = min(end_ns, start_ns + (steps + 1) * load.rate_ramp.every_ns)
        if load.model_ramp:
            steps = steps_at(load.model_ramp, elapsed_ns)
            active = int(min(models, max(1.0, load.model_ramp.value(base, steps))))
            end_ns = min(end_ns, start_ns + (steps + 1) * load.model_ramp.every_ns)
        if rate > 0:
            end_ns = min(end_ns, now_ns + max(1, int(MOST_EXPECTED * NS_PER_S / rate)))
        yield Piece(now_ns, end_ns, rate if on else 0.0, active)
        now_ns = end_ns
        if load.on_s is not None and load.off_s is not None and now_ns == switch_ns:
            on = not on
            switch_ns = now_ns + _length(load.on_s if on else load.off_s, rng)


def _length(mean_s: float, rng: np.random.Generator) -> int:
    return max(1, round(rng.exponential(mean_s) * NS_PER_S))
