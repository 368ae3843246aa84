"""What a journal costs a request: CPU of the controller with and without one, in turns, and bytes on disk.

A server with an emulated device answers clients in a closed loop; one with a journal and one without take
turns. Beside that, the steps of the real journal are written once more in this process, which leaves out
everything but the journal itself.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from clockwork_serve.sim.replay import replay
from clockwork_serve.telemetry import Journal, Step, read_journal
from clockwork_serve.telemetry.journal import journal_files
from harness import machine, repositories
from harness.http_load import closed_loop, infer_message, run
from harness.report import Outcome, finish, parser
from harness.serving import Serving, serve

LIMIT_US = 20.0
"""Of CPU for each request: a tenth of what the processes of a server use for one."""


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


def writing_us(steps: Sequence[Step], requests: int, path: Path) -> float:
    """CPU of writing these steps, all threads, for each request."""
    best = float("inf")
    for number in range(5):
        began_ns = time.process_time_ns()
        journal = Journal(path.with_name(f"again-{number}"))
        for step in steps:
            journal.on_step(step.now_ns, step.events, step.effects)
        journal.close()
        best = min(best, (time.process_time_ns() - began_ns) / requests / 1e3)
    return best


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
    size = sum(file.stat().st_size for file in journal_files(path)) / total
    alone_us = writing_us(steps, total, path)
    began = time.process_time()
    replayed = replay(path)
    replay_s = time.process_time() - began
    outcome.at_most("the journal alone, CPU of a request", LIMIT_US, alone_us, "us", digits=1)
    with_us, without_us = median(found["with"]), median(found["without"])
    beside = f"({with_us:.1f} us with, {without_us:.1f} us without)"
    what = "CPU of the controller for a request more than without, medians"
    outcome.at_most(what, LIMIT_US, with_us - without_us, "us", digits=1, more=beside)
    outcome.at_most("bytes of a request", 2000, size, digits=0)
    outcome.judge(
        "decisions that replay", asked=f"{len(steps)}", found=f"{replayed.decisions} in {replay_s:.1f} s",
        good=replayed.agrees and replayed.decisions == len(steps),
    )  # fmt: skip
    outcome.figures = {
        "controller_us": found, "alone_us": alone_us, "bytes": size, "steps_of_a_request": len(steps) / total,
        "replayed_per_s": replayed.decisions / replay_s,
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
