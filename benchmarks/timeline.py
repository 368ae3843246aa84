"""What a timeline of a million requests costs in CPU, bytes and memory, and whether everything is in it.

A simulation of an overload on twelve GPUs writes the journal, and counts what it holds. `clockwork timeline`
draws it, as a command of its own; a tenth of it, too, which shows whether memory grows with the journal.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import ControllerEffect, ControllerEvent, Infer, Load, Request, Unload
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.telemetry import Journal, head_of
from clockwork_serve.units import GIB, MIB
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.tables import ClusterTable
from clockwork_serve.workload.zoo import Zoo
from harness.report import Outcome, finish, parser

RATE_RPS = 14_000.0
DEVICES = 12
CPU_US = 100.0
BYTES = 500.0
GROWTH_MIB = 16.0


class Held:
    """A watcher that counts what a journal holds."""

    def __init__(self) -> None:
        self.requests = self.actions = 0

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Count a step."""
        self.requests += sum(isinstance(event, Request) for event in events)
        self.actions += sum(isinstance(effect, Load | Unload | Infer) for effect in effects)


def written(path: Path, requests: int, seed: int) -> Held:
    """The journal of a simulation: models of three sizes, by Zipf's law, more than memory holds."""
    kinds = ("resnet18_v2", "resnet50_v2", "densenet121")
    models = tuple(ModelSet(name=f"m{at}", kind=kind, copies=200) for at, kind in enumerate(kinds))
    load = LoadTable(
        name="web", models=tuple(one.name for one in models), arrivals="poisson", popularity="zipf",
        rate_rps=RATE_RPS, slo_ms=50,
    )  # fmt: skip
    scenario = Scenario(
        name="timeline", seconds=requests / RATE_RPS, models=models, loads=(load,),
        cluster=ClusterTable(devices=DEVICES),
    )  # fmt: skip
    config = ControllerConfig()
    held, journal = Held(), Journal(path, head_of(config), file_bytes=64 * GIB)
    simulation = Simulation(
        workload=build(scenario, seed), zoo=Zoo.read("v100"), cluster=Cluster(devices=DEVICES), config=config,
        seed=seed, watchers=(held, journal),
    )  # fmt: skip
    simulation.run()
    journal.close()
    assert not journal.dropped, f"{journal.dropped} steps were not written"
    return held


def drawn(path: Path, out: Path, *more: str) -> tuple[dict[str, Any], float, float]:
    """What the command says, its CPU in s and its largest memory in MiB."""
    command = [
        sys.executable,
        "-m",
        "clockwork_serve",
        "timeline",
        str(path),
        "--out",
        str(out),
        "--json",
        *more,
    ]
    child = Popen(command, stdout=PIPE)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"{command} ended with {child.returncode}"
    return json.loads(said), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / MIB


def measure(folder: Path, requests: int, seed: int) -> Outcome:
    """Write a journal, draw a tenth of it, then all."""
    outcome = Outcome("benchmarks.timeline")
    path, out = folder / "journal", folder / "trace"
    held = written(path, requests, seed)
    _, _, tenth_mib = drawn(path, out, "--until", str(requests / RATE_RPS / 10))
    report, cpu_s, whole_mib = drawn(path, out)
    cpu_us, size = cpu_s / held.requests * 1e6, report["bytes"] / held.requests
    outcome.at_most("CPU of a request", CPU_US, cpu_us, "us", digits=1)
    outcome.at_most("bytes of a request", BYTES, size, digits=0)
    beside = f"({tenth_mib:.0f} for a tenth of it, {whole_mib:.0f} for all)"
    what = "memory for all of a journal more than for a tenth"
    outcome.at_most(what, GROWTH_MIB, whole_mib - tenth_mib, "MiB", digits=0, more=beside)
    for name, count in (("requests", held.requests), ("actions", held.actions)):
        found = report[name]
        outcome.judge(f"{name} drawn", asked=f"{count:,}", found=f"{found:,}", good=found == count)
    outcome.judge(
        "unmatched results and answers",
        asked="0",
        found=str(report["unmatched"]),
        good=not report["unmatched"],
    )
    outcome.figures = {
        "report": report, "cpu_us": cpu_us, "bytes": size, "journal_bytes": path.stat().st_size,
        "mib": {"tenth": tenth_mib, "whole": whole_mib},
    }  # fmt: skip
    return outcome


def run(description: str | None, measure: Callable[[Path, int, int], Outcome]) -> int:
    """Measure a journal of some requests in a folder, as the command line says; returns the exit status."""
    options = parser(description)
    options.add_argument("--requests", type=int, default=1_000_000)
    options.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="leave the journal and what is made there"
    )
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        folder.mkdir(exist_ok=True)
        outcome = measure(folder, given.requests, given.seed)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(run(__doc__, measure))
