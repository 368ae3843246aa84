"""The speed of a simulation on one core: the paper's Fig 9 load, checks off, and a breakdown by component.

    python -m benchmarks.simulator_speed [--minutes 3] [--rate 10000] [--policy paper] [--json FILE]
    python -m benchmarks.simulator_speed --plan [--minutes 60]

12 devices, 66 copies of each of the paper's 61 models, a generated trace of 46,000 functions, SLO 100 ms,
noise on; the rate keeps the devices about 80 % busy. A run is measured by its CPU time. In shorter runs each
brain is replaced by a timed one (not if the loop is compiled, where that is impossible); the arrivals are
drawn once more alone; the simulated world is the remainder. Memory is the process's largest size after each
simulated interval. ``--plan``: instead an hour of 300 requests a second is planned over 1 to 16 devices, so
that most requests run alone.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from clockwork_serve.apps.plan.demand import DeviceKind
from clockwork_serve.apps.plan.report import PlanQuestion, PlanReport, make_plan
from clockwork_serve.apps.plan.runs import PlanRuns
from clockwork_serve.controller import POLICIES, ControllerConfig, belief
from clockwork_serve.sim import Cluster, Simulation, simulation
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import Workload, build
from clockwork_serve.workload.zoo import Zoo
from harness.report import Outcome, finish, parser, table

DEVICES, COPIES, FUNCTIONS, RATE_RPS, SLO_MS = 12, 66, 46_000, 10_000.0, 100.0
COMPILED = not belief.__file__.endswith(".py")
clock = time.perf_counter_ns
GOAL_RPS = 150_000 if COMPILED else 60_000
"""Simulated requests per CPU second."""

WORLD_GOAL_US = 4.0
"""The world's own share of a request."""

STRETCH_S = 10
"""Memory is looked at so often, in simulated time."""

WARM_S = 70
"""Until then memory may grow: queues and estimates fill, and the second minute of arrivals is drawn while the
first one's is still there."""

GROWTH_MAX_MIB = 1.0
"""What a simulated minute may add to the process; Python's allocator is not exact."""

PARTS_S = 10
REPEATS = 3

PLAN_MINUTES, PLAN_FEW_MINUTES, PLAN_RPS, PLAN_MOST = 60.0, 6.0, 300.0, 16
PLAN_LIMIT_S = 60.0 if COMPILED else 300.0
PLAN_GOAL_RPS = 160_000 if COMPILED else 40_000
PLAN_SIMULATIONS_MOST = 7
PLAN_GROWTH_MIB = 30.0
"""What an hour may take more than six minutes: their arrivals are drawn by the minute."""


def workload_of(seconds: float, rate_rps: float, seed: int) -> Workload:
    """The load of Fig 9."""
    kinds = sorted(model.kind for model in Zoo.read("v100").paper_models())
    models = tuple(ModelSet(name=kind, kind=kind, copies=COPIES) for kind in kinds)
    load = LoadTable(
        name="calls", models=tuple(kinds), arrivals="generated", functions=FUNCTIONS, rate_rps=rate_rps,
        slo_ms=SLO_MS,
    )  # fmt: skip
    return build(Scenario(name="speed", seconds=seconds, models=models, loads=(load,)), seed)


class Idle:
    """A machine that costs nothing."""

    def observe(self, event: object, now_ns: int) -> None:
        """Nothing."""


class Timed:
    """A machine that adds up how long it took, by the clock."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self.ns = self.calls = 0

    def observe(self, event: object, now_ns: int) -> None:
        """Let it observe."""
        began = clock()
        self._machine.observe(event, now_ns)
        self.ns += clock() - began
        self.calls += 1

    def decide(self, now_ns: int) -> Any:
        """Let it decide."""
        began = clock()
        effects = self._machine.decide(now_ns)
        self.ns += clock() - began
        self.calls += 1
        return effects

    def next_wakeup_ns(self) -> int | None:
        """Let it tell."""
        began = clock()
        wake_ns: int | None = self._machine.next_wakeup_ns()
        self.ns += clock() - began
        self.calls += 1
        return wake_ns


def simulation_of(workload: Workload, config: ControllerConfig) -> Simulation:
    """A simulation of it, before it begins."""
    zoo, cluster = Zoo.read("v100"), Cluster(devices=DEVICES)
    return Simulation(workload=workload, zoo=zoo, cluster=cluster, config=config, seed=1)


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of it."""
    began = time.process_time()
    work()
    return time.process_time() - began


def memory_mib() -> float:
    """The largest size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def whole(seconds: float, rate_rps: float, config: ControllerConfig, seed: int) -> dict[str, Any]:
    """One run: its speed, what it was, and how its memory grew."""
    run = simulation_of(workload_of(seconds, rate_rps, seed), config)
    gc.collect()
    gc.freeze()
    sizes, stretches = [], []
    for end_s in range(STRETCH_S, int(seconds) + 1, STRETCH_S):
        before = run.tally.total().offered
        spent_s = cpu_s(lambda end_s=end_s: run.run(end_s * NS_PER_S))  # type: ignore[misc]
        stretches.append((run.tally.total().offered - before, spent_s))
        sizes.append(memory_mib())
    gc.unfreeze()
    total, busy = run.tally.total(), run.tally.busy
    spent_s = sum(spent for _, spent in stretches)
    warm = [size for at, size in enumerate(sizes, start=1) if at * STRETCH_S >= WARM_S]
    minutes = (len(warm) - 1) * STRETCH_S / 60
    growth_mib = (warm[-1] - warm[0]) / minutes if minutes > 0 else math.nan
    return {
        "requests": total.offered, "cpu_s": spent_s, "rps": total.offered / spent_s,
        "us_per_request": spent_s / total.offered * 1e6, "ok": total.ok, "late": total.late,
        "others": dict(total.others), "cold_share": total.cold / max(1, total.ok),
        "busy": busy.exec_ns / DEVICES / run.now_ns, "infers": busy.infers, "loads": busy.loads,
        "memory_mib": sizes, "growth_mib_per_minute": growth_mib,
    }  # fmt: skip


def parts(rate_rps: float, config: ControllerConfig, seed: int) -> dict[str, float]:
    """CPU us of a request by who takes it, in the fastest of some runs.

    The machines are timed by the clock, for that is cheap to read; what they take of the time that passed is
    then their part of the CPU time.
    """
    workload = workload_of(PARTS_S, rate_rps, seed)
    end_ns = PARTS_S * NS_PER_S
    splits = [_split(simulation_of(workload, config), end_ns) for _ in range(REPEATS)]
    split = min(splits, key=lambda one: one["controller"] + one["workers"] + one["world"])
    arrivals_s = min(cpu_s(lambda: list(workload.open())) for _ in range(REPEATS))
    requests = sum(len(arrivals.times_ns) for arrivals in workload.open())
    split["arrivals"] = arrivals_s / requests * 1e6
    split["world"] -= split["arrivals"]
    return split


def _split(run: Simulation, end_ns: int) -> dict[str, float]:
    controller = Timed(run.controller)
    workers = [Timed(host.machine) for host in run.hosts.values()]
    vars(run)["controller"] = controller
    for host, worker in zip(run.hosts.values(), workers, strict=True):
        object.__setattr__(host, "machine", worker)
    gc.collect()
    began = clock()
    spent_s = cpu_s(lambda: run.run(end_ns))
    passed_ns = clock() - began
    inside_ns, outside_ns = _cost_of_timing()
    calls = controller.calls + sum(worker.calls for worker in workers)
    controller_ns = controller.ns - inside_ns * controller.calls
    workers_ns = sum(worker.ns - inside_ns * worker.calls for worker in workers)
    world_ns = passed_ns - controller.ns - sum(worker.ns for worker in workers) - outside_ns * calls
    us = spent_s / passed_ns / run.tally.total().offered * 1e6
    return {"controller": controller_ns * us, "workers": workers_ns * us, "world": world_ns * us}


def _cost_of_timing() -> tuple[float, float]:
    """What a timed call adds to what is measured, and to the rest; in ns."""
    calls = 50_000
    timed, plain = Timed(Idle()), Idle()
    began = clock()
    for _ in range(calls):
        timed.observe(None, 0)
    timed_ns = clock() - began
    began = clock()
    for _ in range(calls):
        plain.observe(None, 0)
    plain_ns = clock() - began
    inside_ns = timed.ns / calls
    return inside_ns, (timed_ns - plain_ns) / calls - inside_ns


# ------------------------------------------------------------
# A plan: few requests a second on several devices.


def plan_question(minutes: float) -> PlanQuestion:
    """So many minutes of 300 requests a second for all of the paper's models, on devices half as fast."""
    load = LoadTable(
        name="people", models=("all",), arrivals="poisson", popularity="zipf", zipf_s=0.9, rate_rps=PLAN_RPS,
        slo_ms=SLO_MS,
    )  # fmt: skip
    scenario = Scenario(
        name="hour", seconds=60 * minutes, warmup_s=60, loads=(load,),
        models=(ModelSet(name="all", kind="*", copies=4),),
    )  # fmt: skip
    return PlanQuestion(
        scenario=scenario, zoo=Zoo.read("v100"), kinds=(DeviceKind(name="slow", speed=0.5),), target=0.999,
        seeds=(1,), config=ControllerConfig(), most=PLAN_MOST,
    )  # fmt: skip


def planned(minutes: float) -> tuple[PlanReport, float, float, float]:
    """A plan of it, seconds by the clock, CPU seconds of its processes, the largest of these in MiB."""
    began, before = time.monotonic(), os.times()
    with PlanRuns(None, len(os.sched_getaffinity(0))) as runs:
        made = make_plan(plan_question(minutes), runs)
    after = os.times()
    size_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return made, time.monotonic() - began, after.children_user - before.children_user, size_mib


def judge_plan(outcome: Outcome, minutes: float) -> None:
    """Plan a few minutes, then so many."""
    *_, few_mib = planned(PLAN_FEW_MINUTES)
    made, took_s, spent_s, size_mib = planned(minutes)
    assert made.answer is not None, "no number of devices does"
    print(f"  {minutes:g} minutes: {made.answer.devices}, {made.requests:,} requests simulated")
    outcome.figures = {"took_s": took_s, "cpu_s": spent_s, "requests": made.requests}
    outcome.at_most(f"planning {minutes:g} minutes, by the clock", PLAN_LIMIT_S, took_s, "s", digits=0)
    outcome.at_most("simulations", PLAN_SIMULATIONS_MOST, made.simulations, digits=0)
    rps = made.requests / spent_s
    outcome.at_least("simulated requests per CPU second", PLAN_GOAL_RPS, rps, digits=0)
    growth_mib = size_mib - few_mib
    outcome.at_most("memory beyond that of six minutes", PLAN_GROWTH_MIB, growth_mib, "MiB", digits=1)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument(
        "--minutes", type=float, help="of simulated time; at least 2 [default: 3, or an hour]"
    )
    options.add_argument("--plan", action="store_true", help="a plan instead")
    options.add_argument("--rate", type=float, default=RATE_RPS, help="requests a second")
    options.add_argument("--policy", choices=POLICIES, default=ControllerConfig().policy)
    given = options.parse_args()
    config = ControllerConfig(policy=given.policy)
    gc.set_threshold(100_000, 50, 1000)
    outcome = Outcome("benchmarks.simulator_speed")
    if given.plan:
        judge_plan(outcome, given.minutes or PLAN_MINUTES)
        return finish(outcome, given.json)
    found = whole((given.minutes or 3.0) * 60, given.rate, config, given.seed)
    sim_compiled = not simulation.__file__.endswith(".py")
    split = {} if sim_compiled else parts(given.rate, config, given.seed)
    outcome.figures = {
        "brains": "compiled" if COMPILED else "pure", "driver": "compiled" if sim_compiled else "pure",
        "policy": given.policy, "run": found, "us_per_request_by_part": split,
    }  # fmt: skip
    print(
        f"  brains {outcome.figures['brains']}, driver {outcome.figures['driver']}; policy {given.policy}; "
        f"{found['requests']} requests, devices {found['busy']:.0%} busy, {found['ok']} in time, "
        f"{found['cold_share']:.1%} cold, {found['infers']} INFERs, {found['loads']} LOADs\n"
    )
    if split:
        print(table(("part", "us a request"), [(name, f"{us:.2f}") for name, us in split.items()]))
    outcome.at_least("simulated requests per CPU second", GOAL_RPS, found["rps"], digits=0)
    if split:
        outcome.at_most("the world's own share of a request", WORLD_GOAL_US, split["world"], "us", digits=1)
    growth_mib = found["growth_mib_per_minute"]
    outcome.at_most("memory added by a simulated minute", GROWTH_MAX_MIB, growth_mib, "MiB")
    if not 0.5 <= found["busy"] <= 0.97:
        outcome.invalid = f"the devices are {found['busy']:.0%} busy; choose another --rate"
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
