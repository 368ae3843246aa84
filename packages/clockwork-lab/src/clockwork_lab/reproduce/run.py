"""The context of an experiment: seed, length, and simulations that report progress."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import clockwork_serve
from clockwork_lab.reproduce.players import Player, named, players, soloists
from clockwork_serve.controller import controller
from clockwork_serve.sim import Cluster, Constants, Simulation, Tally, read_constants
from clockwork_serve.telemetry.journal import processor_name
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo

Progress = Callable[[int, int, str], None]  # called with (done, total, text)

Key = TypeVar("Key")

_PARTS: Final = 100  # progress of one run is reported in this many parts


class FigureRun:
    """One run of one figure's experiments.

    ``short`` asks for seconds instead of minutes; ``traces`` is a folder of real traces, if there is one;
    ``policies`` are compared beside ours and the paper's.
    """

    def __init__(
        self, *, seed: int = 1, short: bool = False, progress: Progress | None = None,
        traces: Path | None = None, policies: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.seed = seed
        self.policies = policies
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

    def everyone(self) -> tuple[Player, ...]:
        """The policies to compare, at each largest batch; in a short run those with claims or asked for."""
        return (*(soloists() if self.short else players()), *named(self.policies))

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
        self, scenario: Scenario, player: Player, *, devices: int, bucket_s: float = 0.0,
        cluster: Cluster | None = None, base: Path | None = None,
    ) -> Tally:  # fmt: skip
        """Run the scenario under one policy on the paper's GPUs, cold; traces are in ``base``.

        ``cluster`` replaces the paper's GPUs.
        """
        workload = build(scenario, self.seed, base)
        self._notes.update(dict.fromkeys(workload.notes))
        text = f"{scenario.name}, {player.name}"
        simulation = Simulation(
            workload=workload, zoo=self.zoo, cluster=cluster or Cluster(devices=devices),
            config=player.config, seed=self.seed, constants=self.constants,
            bucket_ns=round(bucket_s * NS_PER_S),
        )  # fmt: skip
        length_ns = workload.duration_ns
        tally = simulation.run(pulse=lambda now_ns: self.report(min(1.0, now_ns / length_ns), text))
        self.finished(text)
        return tally

    def compare(
        self, everyone: Sequence[Player], scenarios: Mapping[Key, Scenario], *, devices: int,
        bucket_s: float = 0.0,
    ) -> dict[tuple[str, Key], Tally]:  # fmt: skip
        """Run every scenario under every policy; the tallies by policy's name and scenario's key."""
        self.plan(len(everyone) * len(scenarios))
        return {
            (player.name, key): self.simulate(scenario, player, devices=devices, bucket_s=bucket_s)
            for key, scenario in scenarios.items()
            for player in everyone
        }

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


# ------------------------------------------------------------
# The provenance of a figure: commit, machine, versions.


def provenance() -> dict[str, str]:
    """The provenance of every figure, by name."""
    return {
        "version": f"clockwork-serve {clockwork_serve.__version__}",
        "commit": commit(Path(__file__).parent),
        "machine": machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "brains": "compiled" if str(controller.__file__).endswith(".so") else "pure Python",
    }


def commit(folder: Path) -> str:
    """The commit of the checkout that ``folder`` is in; says so if there is none, or files differ from it."""
    git = shutil.which("git")
    if git is None:
        return "unknown (no git)"
    found = _ask(git, folder, "rev-parse", "--short=12", "HEAD")
    if not found or not _ask(git, folder, "ls-files", "--", str(folder)):
        return "unknown (not a checkout)"
    return (
        f"{found} with changes"
        if _ask(git, folder, "status", "--porcelain", "-uno", "--", ":/packages")
        else found
    )


def machine() -> str:
    """The processor, its cores that we may use, and the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{processor_name()}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def _ask(git: str, folder: Path, *words: str) -> str:
    ended = subprocess.run(
        [git, *words], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return ended.stdout.strip() if ended.returncode == 0 else ""
