"""``clockwork plan``: is it fast, and is it right? Predictions are written down before they are played.

    python -m benchmarks.plan [--short] [--rounds 1] [--seconds 40] [--json FILE]

Fast: an hour of 300 requests a second, 61 kinds of models, planned over 1 to 16 devices; its simulations, its
memory against that of six minutes. Right: scenarios that are bound by time or by memory are planned; then a
real server with emulated devices plays them with as many devices as the plan says, and with one less: the
first meets the target, the second does not, and the goodput of each model is near what was predicted.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clockwork_serve.apps.plan.check import (
    NEAR,
    CheckReport,
    check_report,
    measured_ends,
    predicted_ends,
)
from clockwork_serve.apps.plan.demand import DeviceKind, kinds_of
from clockwork_serve.apps.plan.report import PlanQuestion, PlanReport, make_plan
from clockwork_serve.apps.plan.runs import PlanRuns
from clockwork_serve.apps.simulate import read_with_zoo
from clockwork_serve.config import Settings
from clockwork_serve.controller import ControllerConfig, belief
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import ServerConfig, running_server
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness import repositories
from harness.report import Outcome, finish, parser

COMPILED: Final = not belief.__file__.endswith(".py")
LIMIT_S: Final = 60.0 if COMPILED else 300.0
SIMULATIONS_MOST: Final = 7
RPS_LEAST: Final = 150_000 if COMPILED else 40_000
GROWTH_MIB: Final = 30.0
"""What an hour may take more than six minutes: their arrivals are drawn by the minute."""
TARGET: Final = 0.99
SLOW: Final = DeviceKind(name="slow", speed=0.5)
"""Half as fast as the profile, so that the hour takes several."""
PAGE_BYTES: Final = 256 * 1024

HOUR = """name = "hour"
seconds = {seconds}
warmup_s = 60

[[models]]
name = "all"
kind = "*"
copies = 4

[[loads]]
name = "people"
models = ["all"]
arrivals = "poisson"
popularity = "zipf"
zipf_s = 0.9
rate_rps = 300
slo_ms = 100
"""

PLAYED = """name = "{name}"
seconds = {seconds}
warmup_s = 5

[cluster]
zoo = "{name}.csv"
memory_mib = {memory_mib}
page_mib = 1

[[models]]
name = "net"
kind = "net"
copies = {copies}

[[loads]]
name = "people"
models = ["net"]
arrivals = "poisson"
rate_rps = {rate_rps}
slo_ms = {slo_ms}
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A scenario of one kind of model, whose weights take a page of a MiB; durations in ms."""

    name: str
    copies: int
    rate_rps: float
    slo_ms: float
    memory_mib: int
    infer_ms: dict[int, float]
    load_ms: float

    def write(self, folder: Path, seconds: float) -> Path:
        """Its scenario, the table of its model, and a repository of all copies."""
        sizes = ",".join(f"infer_b{size}_ms" for size in self.infer_ms)
        curve = ",".join(f"{value:g}" for value in self.infer_ms.values())
        (folder / f"{self.name}.csv").write_text(
            f"model,weights_mb,load_ms,{sizes}\nnet,1,{self.load_ms:g},{curve}\n"
        )
        for copy in range(self.copies):
            repositories.emulated(folder / self.name, f"net-{copy:04d}", self.infer_ms, load_ms=self.load_ms)
        path = folder / f"{self.name}.toml"
        path.write_text(
            PLAYED.format(
                name=self.name, seconds=seconds, memory_mib=self.memory_mib, copies=self.copies,
                rate_rps=self.rate_rps, slo_ms=self.slo_ms,
            )
        )  # fmt: skip
        return path


CASES: Final = (
    Case("time", 6, 150, 120, 64, {1: 20, 2: 28, 4: 44, 8: 76}, 5),
    Case("memory", 24, 45, 60, 10, {1: 15, 2: 24}, 70),
)
"""Neither has a limit that is near: a device more or less is a large step, and the target lies between."""


def question(path: Path, **changes: Any) -> PlanQuestion:
    """A plan's question of a scenario as it stands."""
    scenario, zoo = read_with_zoo(path)
    given: dict[str, Any] = {
        "scenario": scenario, "zoo": zoo, "kinds": kinds_of(scenario), "target": TARGET, "seeds": (1,),
        "config": ControllerConfig(), "most": 16,
    }  # fmt: skip
    return PlanQuestion(**given | changes)


def children_mib() -> float:
    """The largest size that a process had which this one started, and which has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def timed_plan(folder: Path, seconds: float) -> tuple[PlanReport, float, float]:
    """A plan of the hour, or of a part of it: itself, seconds of the clock, CPU seconds of its processes."""
    path = folder / f"hour-{seconds:g}.toml"
    path.write_text(HOUR.format(seconds=seconds))
    began, before = time.monotonic(), os.times()
    with PlanRuns(None, len(os.sched_getaffinity(0))) as runs:
        made = make_plan(question(path, target=0.999, kinds=(SLOW,)), runs)
    after = os.times()
    return made, time.monotonic() - began, after.children_user - before.children_user


def fast(outcome: Outcome, folder: Path, *, short: bool) -> None:
    """Plan six minutes, then an hour."""
    timed_plan(folder, 360)
    small_mib = children_mib()
    made, took_s, cpu_s = timed_plan(folder, 600 if short else 3600)
    print(f"  planned: {made.answer and made.answer.devices}; {made.simulations} simulations, {took_s:.0f} s")
    requests = made.requests
    outcome.judge(
        "a plan was found", asked="yes", found=str(made.answer is not None), good=made.answer is not None
    )
    outcome.at_most("planning it", LIMIT_S, took_s, "s", digits=0)
    outcome.at_most("simulations", SIMULATIONS_MOST, made.simulations, digits=0)
    outcome.at_least("simulated requests per CPU second", RPS_LEAST, requests / cpu_s, digits=0)
    outcome.at_most(
        "memory beyond that of six minutes", GROWTH_MIB, children_mib() - small_mib, "MiB", digits=1
    )


@contextmanager
def served(folder: Path, case: Case, devices: int) -> Iterator[str]:
    """A server with so many emulated devices; its URL."""
    settings = Settings(
        repository=str(folder / case.name), http_port=0, grpc_port=0, metrics_port=0, log_level="warning"
    )
    config = ServerConfig(
        settings=settings, store=StoreConfig(cache_dir=str(folder / "cache")), controller=ControllerConfig(),
        devices=tuple(
            DeviceConfig(
                device=f"emulated:{at}", kind="emulated", memory_bytes=case.memory_mib * MIB, page_bytes=MIB
            )
            for at in range(devices)
        ),
    )  # fmt: skip
    with running_server(config) as server:
        yield server.http_url


def right(outcome: Outcome, folder: Path, case: Case, seconds: float) -> None:
    """Plan a case, write its predictions down, play them."""
    path = case.write(folder, seconds)
    with PlanRuns(None, len(os.sched_getaffinity(0))) as runs:
        made = make_plan(question(path), runs)
    assert made.answer is not None, case.name
    count = made.answer.total
    predicted = {n: predicted_ends(question_with(path, n)) for n in (count, count - 1) if n}
    print(f"  {case.name}: {count} devices; in time {made.answer.in_time.mean:.3%}, with one less "
          f"{made.fewer.in_time.mean if made.fewer else 0:.3%}", flush=True)  # fmt: skip
    found: dict[int, CheckReport] = {}
    for devices, ends in predicted.items():
        with served(folder, case, devices) as url:
            measured, invalid = measured_ends(str(path), url, seed=1, traces=None)
        found[devices] = check_report(question_with(path, devices), ends, measured, url=url, invalid=invalid)
        outcome.invalid = outcome.invalid or invalid
    outcome.figures[case.name] = {str(devices): check for devices, check in found.items()}
    for devices, check in found.items():
        share = (check.both + check.only_measured) / max(1, check.total.requests)
        name = f"{case.name}, {devices} devices: in time"
        if devices == count:
            outcome.at_least(name, 100 * TARGET, 100 * share, "%")
        else:
            outcome.judge(name, asked=f"< {100 * TARGET:g} %", found=f"{share:.2%}", good=share < TARGET)
            worst = max(check.models, key=lambda model: abs(model.off))
            outcome.judge(
                f"{case.name}, {devices} devices: goodput by model", asked=f"within {NEAR:.0%}",
                found=f"{worst.off:+.1%} ({worst.name}); all {check.total.off:+.1%}",
                good=all(model.near for model in check.models),
            )  # fmt: skip


def question_with(path: Path, devices: int) -> PlanQuestion:
    """The question of a scenario on so many devices."""
    scenario, _ = read_with_zoo(path, devices=devices)
    return question(path, scenario=scenario)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--short", action="store_true", help="ten minutes for the hour")
    options.add_argument("--seconds", type=float, default=40.0, help="of each scenario that is played")
    given = options.parse_args()
    outcome = Outcome("benchmarks.plan")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fast(outcome, folder, short=given.short)
        for case in CASES:
            right(outcome, folder, case, given.seconds)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
