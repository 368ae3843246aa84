"""What a journal costs a request: CPU of the controller with and without one, in turns, and bytes on disk.

A server with an emulated device answers clients in a closed loop; one with a journal and one without take
turns. Beside that, the steps of the real journal, and those of a simulated overload, are written once more in
this process, by both threads of a journal, which leaves out everything but the journal itself; and without
their effects, which a replay makes again.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import ControllerEffect, ControllerEvent, Request
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.sim.replay import replay
from clockwork_serve.telemetry import Journal, Step, head_of, read_journal
from clockwork_serve.units import GIB
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.tables import ClusterTable
from clockwork_serve.workload.zoo import Zoo
from harness import machine, repositories
from harness.http_load import closed_loop, infer_message, run
from harness.report import Outcome, finish, parser
from harness.serving import Serving, serve

Figures = dict[str, float]
LIMIT_US = 2.0
LIMIT_BYTES = 150.0
SIMULATED = 100_000
"""Requests of the simulation."""
SIMULATED_RPS = 14_000.0
DEVICES = 12


class Counted:
    """A watcher that counts requests."""

    def __init__(self) -> None:
        self.requests = 0

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Count a step."""
        self.requests += sum(isinstance(event, Request) for event in events)


def simulated(path: Path) -> int:
    """Write the journal of a simulated overload, of more models than memory holds; how many requests."""
    kinds = ("resnet18_v2", "resnet50_v2", "densenet121")
    models = tuple(ModelSet(name=f"m{at}", kind=kind, copies=200) for at, kind in enumerate(kinds))
    load = LoadTable(
        name="web", models=tuple(one.name for one in models), arrivals="poisson", popularity="zipf",
        rate_rps=SIMULATED_RPS, slo_ms=50,
    )  # fmt: skip
    cluster = ClusterTable(devices=DEVICES)
    seconds = SIMULATED / SIMULATED_RPS
    scenario = Scenario(name="journal", seconds=seconds, models=models, loads=(load,), cluster=cluster)
    config = ControllerConfig()
    counted, journal = Counted(), Journal(path, head_of(config), file_bytes=64 * GIB)
    Simulation(
        workload=build(scenario, 1), zoo=Zoo.read("v100"), cluster=Cluster(devices=DEVICES), config=config,
        seed=1, watchers=(counted, journal),
    ).run()  # fmt: skip
    journal.close()
    assert not journal.dropped, f"{journal.dropped} steps were not written"
    return counted.requests


def controller_us(serving: Serving, requests: int, connections: int) -> float:
    """CPU of the controller for each request."""
    pid = serving.server.pid("controller")
    assert pid is not None
    message = infer_message(serving.http_url, "m", [("x", "FP32", (1, 4), bytes(16))], slo_ms=1000)
    before_ns = machine.cpu_ns(pid)
    report = run(
        closed_loop(serving.http_url, lambda index: message, requests=requests, connections=connections)
    )
    assert not report.unanswered, f"{report.unanswered} requests without a response"
    time.sleep(1.5)  # the journal is written at leisure
    return (machine.cpu_ns(pid) - before_ns) / requests / 1e3


def writing(steps: Sequence[Step], requests: int, path: Path, *, effects: bool = True) -> tuple[float, float]:
    """CPU of writing these steps, both threads, and bytes on disk, for each request."""
    best, size = float("inf"), 0.0
    for number in range(5):
        again = path.with_name(f"again-{number}-{effects}")
        began_ns = time.process_time_ns()
        journal = Journal(again, file_bytes=GIB)
        for step in steps:
            journal.on_step(step.now_ns, step.events, step.effects if effects else ())
        journal.close()
        best = min(best, (time.process_time_ns() - began_ns) / requests / 1e3)
        assert not journal.dropped
        size = again.stat().st_size / requests
        again.unlink()
    return best, size


def judge_writing(outcome: Outcome, what: str, steps: Sequence[Step], requests: int, path: Path) -> Figures:
    """Two rows about a journal: with and without its effects."""
    found_us, size = writing(steps, requests, path)
    bare_us, bare_size = writing(steps, requests, path, effects=False)
    outcome.at_most(
        f"CPU of a request, {what}", LIMIT_US, found_us, "us", digits=2,
        more=f"({bare_us:.2f} without effects)",
    )  # fmt: skip
    outcome.at_most(
        f"bytes of a request, {what}", LIMIT_BYTES, size, digits=0, more=f"({bare_size:.0f} without effects)"
    )
    steps_each = len(steps) / requests
    return {
        "us": found_us, "bytes": size, "us_events": bare_us, "bytes_events": bare_size, "steps": steps_each
    }  # fmt: skip


def measure(folder: Path, rounds: int, requests: int, connections: int) -> Outcome:
    """Turns, then the journal alone."""
    outcome = Outcome("benchmarks.journal_cost")
    repositories.emulated(folder / "models", "m", {1: 0.2, 2: 0.3, 4: 0.4, 8: 0.6})
    path = folder / "journal"
    found: dict[str, list[float]] = {"with": [], "without": []}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(serve(folder / "models", device="emulated", journal=book))
            for name, book in (("with", path), ("without", None))
        }
        for serving in servers.values():
            controller_us(serving, 500, connections)
        for _ in range(rounds):
            for name, serving in servers.items():
                found[name].append(controller_us(serving, requests, connections))
    steps = list(read_journal(path))
    total = 500 + rounds * requests
    figures = {"real": judge_writing(outcome, "a server's", steps, total, path)}
    began = time.process_time()
    replayed = replay(path)
    replay_s = time.process_time() - began
    with_us, without_us = median(found["with"]), median(found["without"])
    beside = f"({with_us:.1f} us with, {without_us:.1f} us without)"
    what = "CPU of the controller for a request more than without, medians"
    outcome.at_most(what, LIMIT_US, with_us - without_us, "us", digits=1, more=beside)
    outcome.judge(
        "decisions that replay", asked=f"{len(steps)}", found=f"{replayed.decisions} in {replay_s:.1f} s",
        good=replayed.agrees and replayed.decisions == len(steps),
    )  # fmt: skip
    asked = simulated(folder / "simulated")
    steps = list(read_journal(folder / "simulated"))
    figures["simulated"] = judge_writing(outcome, "a simulation's", steps, asked, path)
    outcome.figures = {
        "controller_us": found, "journal": figures, "replayed_per_s": replayed.decisions / replay_s
    }  # fmt: skip
    return outcome


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--connections", type=int, default=16)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        outcome = measure(Path(name), given.rounds, given.requests, given.connections)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
