"""The emulated device's record of its executions, and inputs that carry their request's number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from comparison.peers.peer import APPS, Floats, Setup
from comparison.peers.servers import Clockwork

MOST: Final = 1 << 24
"""Whole numbers that FP32 tells apart."""


class Numbered(Clockwork):
    """This server, with models that write down which requests they run, and when."""

    model = APPS / "clockwork_numbered_model.py"


NUMBERED: Final = Numbered()


@dataclass(frozen=True, slots=True)
class Execution:
    """One batch; instants of CLOCK_MONOTONIC."""

    began_ns: int
    ended_ns: int
    model: str
    numbers: tuple[int, ...]


def numbered(x: Floats, number: int) -> Floats:
    """The input of the request of that number."""
    assert number < MOST
    found: Floats = np.array(x)
    found[0, 0] = number
    return found


def log_of(setup: Setup) -> Path:
    """Where the device writes."""
    return setup.device_log.with_name("executions.log")


def executions(lines: Iterable[str]) -> list[Execution]:
    """In the order in which they began."""
    found = []
    for line in lines:
        began, ended, model, numbers = line.split()
        found.append(Execution(int(began), int(ended), model, tuple(map(int, numbers.split(",")))))
    return sorted(found, key=lambda one: one.began_ns)


def started(found: Iterable[Execution]) -> Mapping[int, int]:
    """When each request's execution began, for the first time."""
    instants: dict[int, int] = {}
    for one in found:
        for number in one.numbers:
            instants.setdefault(number, one.began_ns)
    return instants
