"""Starts this server for a question; what 100 % is, and what the device ran. It judges nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from comparison.peers.loads import EMULATED, MOBILENET, SLO_MS, Load, names, poisson
from comparison.peers.measure import SERVER_CORE, Serving, free_port, serving
from comparison.peers.models import Kinds
from comparison.peers.peer import APPS, Floats, Peer, Setup
from comparison.peers.record import Played
from comparison.peers.run import write_result
from comparison.peers.servers import CLOCKWORK, Clockwork

STEP_S: Final = 4.0
SETTLE_S: Final = 1.0
"""Of each step, not counted: what the step before left in queues."""
STEPS: Final[Mapping[str, Sequence[float]]] = {
    MOBILENET: (250, 300, 350, 400, 450, 500),
    EMULATED: (60, 80, 100, 130, 170, 220),
}
"""Requests a second: from what is easy to what is too much."""


def staircase(kind: str, copies: int, **more: Any) -> Load:
    """One load for each step."""
    loads = [
        poisson(
            ["m"], rate, SLO_MS[kind], **more, name=f"step {number}", start_s=number * STEP_S,
            stop_s=(number + 1) * STEP_S,
        )
        for number, rate in enumerate(STEPS[kind])
    ]  # fmt: skip
    return Load("staircase", "staircase", [("m", kind, copies)], loads, STEP_S * len(loads), 0)


def top(played: Played) -> dict[str, Any]:
    """The best step: ``per_s`` answers in time, and what each step gave."""
    steps = []
    for number, name in enumerate(played.head.loads):
        rows = played.of(name)
        rows = rows[rows["scheduled_ns"] >= (number * STEP_S + SETTLE_S) * 1e9]
        seconds = STEP_S - SETTLE_S
        good = float(np.count_nonzero(played.in_time(rows)))
        steps.append({"asked_per_s": len(rows) / seconds, "good_per_s": good / seconds})
    return {"per_s": max(step["good_per_s"] for step in steps), "steps": steps}


@dataclass(slots=True)
class Rig:
    """Where results and scratch files go, and the models that there are."""

    out: Path
    kinds: Kinds = field(default_factory=Kinds)

    @contextmanager
    def serving(
        self, kind: str, models: Sequence[str], *, memory_mib: float | None = None, asked: Peer = CLOCKWORK,
        cores: Sequence[int] = (SERVER_CORE,),
    ) -> Iterator[Serving]:  # fmt: skip
        """The server with these models; its answers are checked before, and after if nothing went wrong."""
        folder = self.out / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        setup = self.kinds.setup(
            kind, models, slo_ms=SLO_MS[kind], folder=folder, port=free_port(), memory_mib=memory_mib
        )
        with serving(asked, setup, self.kinds, cores=cores) as up:
            yield up

    def limit(self, kind: str, copies: int, repeat: int, **more: Any) -> float:
        """Answers in time a second that are 100 % in this repeat, all models in memory; measured once.

        They are the most that the server gives on a staircase of rates.
        """
        path = self.out / "limits" / f"{kind}-{copies}-{repeat}.json"
        if not path.is_file():
            with self.serving(kind, names(copies)) as up:
                write_result(path, top(up.play(staircase(kind, copies, **more), repeat)))
        return float(json.loads(path.read_text())["per_s"])


# ------------------------------------------------------------
# The emulated device's record of its executions, and inputs that carry their request's number.

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
