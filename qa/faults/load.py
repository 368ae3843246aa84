"""The load of one row: the project's own open-loop generator, and what a fault sees of it while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clockwork_lab.bench.job import SenderMessage
from clockwork_lab.bench.plan import Options, make_plan
from clockwork_lab.bench.records import Records
from clockwork_lab.bench.run import Crew
from qa.faults.setups import Setup

DRAIN_S = 6.0
"""After the last request: who has no answer by then has none."""


@dataclass(slots=True)
class Played:
    """All requests, and what the generator says of itself. ``start_ns``: of CLOCK_MONOTONIC."""

    records: Records
    messages: list[SenderMessage]
    start_ns: int


def scenario(setup: Setup, seconds: float, quiet: tuple[float, float] | None) -> str:
    """As TOML; ``quiet``: from when until when nothing is sent."""
    spans = [(0.0, seconds)] if quiet is None else [(0.0, quiet[0]), (quiet[1], seconds)]
    lines = ['name = "faults"', f"seconds = {seconds}"]
    for name in setup.models:
        lines += ["[[models]]", f'name = "{name}"', 'kind = "any"']
    for number, (start, stop) in enumerate(spans):
        lines += [
            "[[loads]]", f'name = "load{number}"', f"models = {list(setup.models)}".replace("'", '"'),
            'arrivals = "poisson"', f"rate_rps = {setup.rate_rps}", f"slo_ms = {setup.slo_ms}",
            f"start_s = {start}", f"stop_s = {stop}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def play(
    url: str, text: str, folder: Path, seed: int, *, began: Callable[[int], None], stopped: Callable[[], bool]
) -> Played:
    """Send it all; ``began`` is told the instant of the run's start, and may not wait.

    Raises what :func:`make_plan` and :class:`Crew` raise.
    """
    path = folder / "scenario.toml"
    path.write_text(text)
    plan = make_plan(path, Options(url=url, seed=seed, drain_s=DRAIN_S, max_lateness_ms=1e6))
    with Crew(plan) as crew:
        crew.begin()
        began(crew.start_ns)
        stopping = False
        while not crew.over:
            for process in crew.processes:
                process.poll()
            if stopped() and not stopping:
                stopping = True
                crew.stop()
            time.sleep(0.02)
        messages = [process.final for process in crew.processes if process.final is not None]
        return Played(crew.records(), messages, crew.start_ns)


def lateness_ms(played: Played) -> float:
    """How late the generator itself sent, p99; waiting for a connection is part of it."""
    table = played.records.table
    late = (table["sent_ns"] - table["scheduled_ns"])[table["sent_ns"] > 0]
    return float(np.quantile(late, 0.99)) / 1e6 if late.size else 0.0
