"""How late the controller wakes up under the load of a front end, relative to the time that it requested.

One gateway, one emulated device (it sleeps), default priorities. Small and large requests are sent at a fixed
rate by another process. The same load again, with a process beside it that only wakes up, shows how much of
the lateness is the machine's: it sleeps and wakes as the controller does (uvloop, timerfd), every millisecond
or so, without any work, and is run by ``--probe SECONDS``.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import uvloop

from clockwork_serve.serve.driver import LoopTimer
from clockwork_serve.telemetry import Histogram
from harness import repositories
from harness.http_load import infer_message
from harness.lean_load import SHARES, Found, Generator, Plan, undisturbed
from harness.machine import cpu_s, stolen_s, used_s
from harness.report import Outcome, finish, milliseconds, parser, table
from harness.serving import Serving, serve

ROOT = Path(__file__).parents[1]
LIMIT_MS = 0.5
WAKES_MIN = 1000
"""So many, or there is no p99 to speak of."""


class Probe:
    """The process, as the benchmark that starts it sees it."""

    def __init__(self, seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.wakeup_lateness", "--probe", str(seconds)],
            stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid

    def result(self) -> Histogram:
        """Wait for its end."""
        output, _ = self._process.communicate()
        return msgspec.json.decode(output, type=Histogram)


async def probe(seconds: float) -> Histogram:
    """Wake every 0.5 to 1.5 ms, never in step with anything, for so long."""
    found, over, dice = Histogram(), asyncio.Event(), random.Random(1)
    end_ns = time.monotonic_ns() + round(seconds * 1e9)
    asked_ns = 0

    def sleep(now_ns: int) -> None:
        nonlocal asked_ns
        asked_ns = now_ns + dice.randrange(500_000, 1_500_000)
        timer.arm(asked_ns)

    def woke() -> None:
        now_ns = time.monotonic_ns()
        found.add(now_ns - asked_ns)
        if now_ns > end_ns:
            over.set()
        else:
            sleep(now_ns)

    timer = LoopTimer(woke)
    sleep(time.monotonic_ns())
    await over.wait()
    timer.close()
    return found


@dataclass(frozen=True, slots=True)
class Case:
    """A load: requests per second of so many bytes."""

    name: str
    rate: float
    width: int

    @property
    def text(self) -> str:
        """For a table."""
        return f"{self.rate:,.0f} r/s of {self.width * 4 / 1000:g} kB"


CASES = (Case("small", 5000, 256), Case("large", 1000, 150_000))


@dataclass(frozen=True, slots=True)
class Phase:
    """What a load did; CPU as shares of one core. ``late`` is the controller's or the probe's."""

    late: Histogram
    found: Found
    cpu: dict[str, float]
    others: float
    stolen: float

    @property
    def invalid(self) -> str:
        """Why it proves nothing, if it does not."""
        if why := self.found.why_invalid(self.others, answered=0.99):
            return why
        if self.late.count < WAKES_MIN:
            return f"{self.late.count} wake-ups are too few"
        return ""


def less(after: Histogram, before: Histogram) -> Histogram:
    """What came in between."""
    counts = [one - other for one, other in zip(after.counts, before.counts, strict=True)]
    return Histogram(counts, after.sum_ns - before.sum_ns)


def quantiles(late: Histogram) -> list[str]:
    """For a table: by the shares of ``SHARES``, and how many."""
    found = [late.quantile_ns(share) for share in SHARES]
    return [*(milliseconds(float("nan") if ns is None else ns) for ns in found), f"{late.count:,}"]


def under_load(serving: Serving, plan: Plan, *, probed: bool) -> Phase:
    """Run the load once; ``late`` is the controller's, or that of a probe beside it."""
    pids = {name: serving.server.pid(name) or 0 for name in serving.server.names}
    with closing(Generator(plan)) as generator:
        pids |= {"generator": generator.pid, "keeper": os.getpid()}
        _sleep_until(generator.started.start_ns + round(plan.warmup_s * 1e9))
        probe = Probe(plan.seconds - 1) if probed else None
        if probe:
            pids["probe"] = probe.pid
        before, used, stolen = {name: cpu_s(pid) for name, pid in pids.items()}, used_s(), stolen_s()
        counters = serving.server.counters()
        seconds = plan.seconds - 0.2
        time.sleep(seconds)
        after = serving.server.counters()
        cpu = {name: (cpu_s(pid) - before[name]) / seconds for name, pid in pids.items()}
        others = (used_s() - used) / seconds - sum(cpu.values())
        stolen = (stolen_s() - stolen) / seconds
        late = probe.result() if probe else less(after.wakeup, counters.wakeup)
        found = generator.result()
    return Phase(late, found, cpu, max(0.0, others), stolen)


def _sleep_until(at_ns: int) -> None:
    time.sleep(max(0.0, (at_ns - time.monotonic_ns()) / 1e9))


def plan_of(serving: Serving, folder: Path, case: Case) -> Callable[..., Plan]:
    """What the generator is told, but for what the command line says."""
    x = np.random.default_rng(0).standard_normal((1, case.width), dtype=np.float32)
    inputs = [("x", "FP32", x.shape, x.tobytes())]
    file = folder / f"{case.name}.http"
    file.write_bytes(infer_message(serving.http_url, case.name, inputs, slo_ms=1000))
    parts = urlsplit(serving.http_url)

    def plan(**more: Any) -> Plan:
        return Plan(
            host=parts.hostname or "", port=parts.port or 80, message=str(file), rate=case.rate, **more
        )

    return plan


def measure(outcome: Outcome, serving: Serving, case: Case, plan: Plan, given: Any) -> None:
    """One load, with and without the probe."""
    bare, probed = (
        undisturbed(
            functools.partial(under_load, serving, plan, probed=beside), lambda phase: phase.invalid,
            retries=given.retries, patience_s=given.patience,
        )
        for beside in (False, True)
    )  # fmt: skip
    found = bare.found
    print(
        f"\n  {case.text}: {found.ends.get(200, 0) / found.seconds:,.0f} answered a second, "
        f"latency p50 {milliseconds(found.latency_ns[0])}, p99 {milliseconds(found.latency_ns[2])}; "
        f"generator late p99 {milliseconds(found.late_ns[2])}, {found.waited} found no free connection\n"
    )
    names = ("p50", "p90", "p99", "p99.9", "max", "wakes")
    print(table(("lateness", *names), [
        ("controller", *quantiles(bare.late)), ("a process that only wakes", *quantiles(probed.late)),
    ]))  # fmt: skip
    cpu = bare.cpu | {"others": bare.others, "stolen": bare.stolen}
    print("\n" + table(("share of a core", *cpu), [("", *(f"{share:.1%}" for share in cpu.values()))]))
    p99_ns = bare.late.quantile_ns(0.99) or 0
    what, wakes = f"{case.text}: the controller's wake-ups late (p99)", f"({bare.late.count:,} wakes)"
    outcome.at_most(what, LIMIT_MS, p99_ns / 1e6, "ms", more=wakes)
    outcome.invalid = outcome.invalid or bare.invalid
    outcome.figures[case.name] = {
        name: {
            "late ms": {str(share): (phase.late.quantile_ns(share) or 0) / 1e6 for share in SHARES},
            "wakes": phase.late.count, "cpu": phase.cpu, "others": phase.others, "stolen": phase.stolen,
            "answered": phase.found.ends.get(200, 0), "seconds": phase.found.seconds,
            "latency ms": {str(s): ns / 1e6 for s, ns in zip(SHARES, phase.found.latency_ns, strict=True)},
            "invalid": phase.invalid,
        }
        for name, phase in (("controller", bare), ("probe", probed))
    }  # fmt: skip


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=20, help="of each of the four runs")
    options.add_argument("--connections", type=int, default=64)
    options.add_argument("--only", choices=[case.name for case in CASES])
    options.add_argument("--retries", type=int, default=3, help="times that a disturbed run is made again")
    options.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    options.add_argument("--generator-nice", type=int, default=0, metavar="N")
    options.add_argument("--generator-core", type=int, action="append", default=[], metavar="N")
    options.add_argument("--probe", type=float, metavar="SECONDS", help="only be the process that wakes up")
    given = options.parse_args()
    if given.probe:
        gc.collect()
        gc.freeze()
        sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(probe(given.probe))))
        return 0
    cases = [case for case in CASES if given.only in (None, case.name)]
    outcome = Outcome("benchmarks.wakeup_lateness")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases:
            repositories.emulated(folder / "models", case.name, {1: 2.0, 16: 2.0}, width=case.width)
        with serve(folder / "models", device="emulated") as serving:
            for case in cases:
                plan = plan_of(serving, folder, case)(
                    seconds=given.seconds, connections=given.connections, seed=given.seed,
                    nice=given.generator_nice, cores=tuple(given.generator_core),
                )  # fmt: skip
                measure(outcome, serving, case, plan, given)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
