"""Seeded dice, one for each purpose of each load; nothing here depends on a process, a clock or a hash."""

from __future__ import annotations

from typing import Final

import numpy as np

BURSTS: Final = 0
ARRIVALS: Final = 1
MAPPING: Final = 2
FUNCTIONS: Final = 3
MINUTES: Final = 4


def dice(seed: int, load: int, *purpose: int) -> np.random.Generator:
    """The generator of one purpose of one load: the same in every process, independent of all others."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(load, *purpose))))
