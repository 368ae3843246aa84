"""How many requests a second `clockwork bench` can send from one core before it is late itself.

Steps of load to a server that answers at once, on a core of its own, until the requests are sent more than a
millisecond late (p99), or the server no longer keeps up. The sender has the other core.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from clockwork_lab.bench.plan import Options, make_plan
from clockwork_lab.bench.report import Report
from clockwork_lab.bench.run import run
from harness.report import Outcome, finish, parser

ROOT = Path(__file__).parents[2]
STEPS = {"http": (5, 10, 20, 25, 30, 40, 50), "grpc": (5, 10, 15, 20, 25, 30, 40)}
"""Thousands of requests a second."""
ASKED_RPS = 20_000
LATE_MS = 1.0
SCENARIO = """
name = "flat"
seconds = {seconds}
warmup_s = 1
[[models]]
name = "m"
kind = "any"
[[loads]]
name = "flat"
models = ["m"]
arrivals = "poisson"
rate_rps = 1000
slo_ms = 100
"""


@contextmanager
def trivial_server(kind: str, core: int, *, realtime: bool) -> Iterator[str]:
    """Where it is."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.generator_capacity.trivial_server", kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    os.sched_setaffinity(process.pid, {core})
    if realtime:
        os.sched_setscheduler(process.pid, os.SCHED_RR, os.sched_param(1))
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.communicate()


def measured(scenario: Path, url: str, kind: str, thousands: int, *, realtime: bool) -> Report:
    """One step."""
    protocol: Any = kind
    core = max(os.sched_getaffinity(0))
    options = Options(
        url=url,
        protocol=protocol,
        rate_scale=thousands,
        cores=(core,),
        realtime=realtime,
        max_lateness_ms=LATE_MS,
    )
    return run(make_plan(scenario, options)).report


def steps(outcome: Outcome, kind: str, given: Any) -> float:
    """The most requests a second that were sent in time, in the best of some rounds."""
    most = 0.0
    print(f"\n{kind}: requests/s sent late p50, p99, max ms  answered  p99 ms  core  us each")
    core = min(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory() as folder,
        trivial_server(kind, core, realtime=given.realtime) as url,
    ):
        scenario = Path(folder) / "flat.toml"
        scenario.write_text(SCENARIO.format(seconds=1 + given.seconds))
        for thousands in STEPS[kind]:
            reports = [
                measured(scenario, url, kind, thousands, realtime=given.realtime) for _ in range(given.rounds)
            ]
            late_ms = median(report.lateness.p99_ms or 0.0 for report in reports)
            report = min(reports, key=lambda one: one.lateness.p99_ms or 0.0)
            late, answers, share = report.lateness, report.total.answers, report.sending.cpu_share
            print(
                f"  {report.total.offered_rps:>15,.0f}  {late.p50_ms:7.3f} {late.p99_ms:7.3f}"
                f" {late.max_ms:7.2f}"
                f"  {answers.count / report.total.offered:>11.1%}  {answers.p99_ms:6.2f}  {share:4.0%}"
                f"  {share * 1e6 / report.total.offered_rps:5.1f}   (median p99: {late_ms:.3f})"
            )
            outcome.figures[f"{kind}_{thousands}k"] = {
                "offered_rps": report.total.offered_rps, "lateness_p99_ms": [
                    one.lateness.p99_ms for one in reports
                ], "answers_p99_ms": answers.p99_ms, "cpu_share": share,
            }  # fmt: skip
            if (late.p99_ms or 0.0) > LATE_MS:
                break
            most = report.total.offered_rps
    return most


def main() -> int:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=4.0, help="of each step, after one of warm-up")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--realtime", action="store_true", help="sender and server go before all others")
    options.add_argument("--protocol", choices=sorted(STEPS), nargs="*", default=sorted(STEPS, reverse=True))
    given = options.parse_args()
    outcome = Outcome("benchmarks.generator_capacity")
    if len(os.sched_getaffinity(0)) < 2:
        outcome.invalid = "it takes two cores"
        return finish(outcome, given.json)
    for kind in given.protocol:
        most = steps(outcome, kind, given)
        outcome.judge(
            f"{kind}: requests/s of 1 kB from one core, sent at most {LATE_MS:g} ms late (p99)",
            asked=f">= {ASKED_RPS * 0.98:,.0f}" if kind == "http" else "what it reaches",
            found=f"{most:,.0f}", good=kind != "http" or most >= ASKED_RPS * 0.98,
        )  # fmt: skip
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
