"""The context of an experiment: seed, length, and simulations that report progress."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from clockwork_lab.reproduce.players import Player
from clockwork_lab.reproduce.provenance import provenance
from clockwork_serve.sim import Cluster, Constants, Simulation, Tally, read_constants
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo

Progress = Callable[[int, int, str], None]
"""Called with (done, total, text)."""

_PARTS: Final = 100
"""Progress of one run is reported in this many parts."""


class Run:
    """One run of one figure's experiments.

    ``short`` asks for seconds instead of minutes; ``traces`` is a folder of real traces, if there is one.
    """

    def __init__(
        self,
        *,
        seed: int = 1,
        short: bool = False,
        progress: Progress | None = None,
        traces: Path | None = None,
    ) -> None:
        self.seed = seed
        self.short = short
        self.traces = traces
        self._progress = progress
        self._planned = 0
        self._done = 0
        self._notes: dict[str, None] = {}

    @cached_property
    def zoo(self) -> Zoo:
        """The paper's models."""
        return Zoo.read("v100")

    @cached_property
    def constants(self) -> Constants:
        """The constants of the simulation."""
        return read_constants()

    def plan(self, runs: int) -> None:
        """Announce further runs, for the progress."""
        self._planned += runs

    def report(self, part: float, text: str) -> None:
        """Report that a part (0 to 1) of the current run is done."""
        if self._progress is not None:
            done = self._done * _PARTS + int(part * _PARTS)
            self._progress(done, max(self._planned, self._done + 1) * _PARTS, text)

    def finished(self, text: str) -> None:
        """The current run has ended."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done * _PARTS, max(self._planned, self._done) * _PARTS, text)

    def simulate(
        self,
        scenario: Scenario,
        player: Player,
        *,
        devices: int,
        bucket_s: float = 0.0,
        cluster: Cluster | None = None,
        zoo: Zoo | None = None,
        base: Path | None = None,
    ) -> Tally:
        """Run the scenario under one policy on the paper's GPUs, cold; traces are in ``base``.

        ``cluster`` replaces the paper's GPUs.
        """
        workload = build(scenario, self.seed, base)
        self._notes.update(dict.fromkeys(workload.notes))
        text = f"{scenario.name}, {player.name}"
        simulation = Simulation(
            workload=workload,
            zoo=zoo or self.zoo,
            cluster=cluster or Cluster(devices=devices),
            config=player.config,
            seed=self.seed,
            constants=self.constants,
            bucket_ns=round(bucket_s * NS_PER_S),
        )
        length_ns = workload.duration_ns
        tally = simulation.run(pulse=lambda now_ns: self.report(min(1.0, now_ns / length_ns), text))
        self.finished(text)
        return tally

    def setup(self, *, simulated: bool = True, **more: Any) -> dict[str, Any]:
        """The provenance of the figure: its own entries, then those of every figure."""
        return {
            **more,
            **({"workload": list(self._notes)} if self._notes else {}),
            "seed": self.seed,
            "length": "short" if self.short else "full",
            **provenance(),
            **({"constants of the simulated world": list(self.constants.lines())} if simulated else {}),
        }
