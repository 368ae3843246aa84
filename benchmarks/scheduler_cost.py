"""The CPU time of the controller's brain per request; its workers are simulated in memory and not timed.

Poisson arrivals, 1000 requests a second for each device, uniform over the models, SLO 100 ms; INFER takes
1.2 ms (batch 1) to 8.2 ms (batch 16), LOAD 4 ms; a device has room for 200 models. Each run has three parts:
the *cold* one begins with nothing on any device; then every model still missing is requested until the
weights of all are resident (not timed); then the *warm* part is measured, and judged by the mean of its
tenths' better half: on a shared machine other programs evict caches, which CPU time does not show. A *call*
is the work of one instant: observe its events, decide, get the next wake-up. One row is measured with
verdicts at the door (``decide_ms`` 0), too.
"""

from __future__ import annotations

import gc
import itertools
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from clockwork_serve.controller import POLICIES, Controller, ControllerConfig, belief
from clockwork_serve.messages import (
    Answer,
    CodeAdded,
    CodeReady,
    ControllerEffect,
    ControllerEvent,
    Infer,
    Load,
    ModelAdded,
    Quota,
    QuotasSet,
    Request,
    Result,
    Status,
    Unload,
    WorkerJoined,
)
from clockwork_serve.units import NS_PER_S, ms
from harness import records
from harness.report import Outcome, finish, parser, quantile, table

ROWS: dict[str, tuple[int, int, float | None, float | None]] = {
    "1x15": (1, 15, None, None), "6x15": (6, 15, None, None), "6x1000": (6, 1000, 8, 4),
    "64x1000": (64, 1000, None, None), "64x10000": (64, 10_000, 14, 8), "256x10000": (256, 10_000, 30, 14),
}  # fmt: skip
"""Devices, models, and what is promised in us a request: pure Python, compiled."""

AT_THE_DOOR = "6x1000"
DOOR_RATIO = 1.3
"""The row that is measured with verdicts at the door, and what that may cost, by what it costs without."""

RATE = 1000
"""Requests a second and device."""
SLOTS = 200
SLO_NS = ms(100)
NETWORK_NS = ms(0.1)
LOAD_NS = ms(4)
INFER_NS = {1: ms(1.2), 2: ms(1.67), 4: ms(2.6), 8: ms(4.47), 16: ms(8.2)}
TENTHS = 10
SETTLE = 0.25
"""Before the warm part, so much of its traffic passes untimed."""

CODE = records.code(sizes=tuple(INFER_NS), inputs=(), outputs=())
PROFILE = records.profile("c", INFER_NS, load_ns=LOAD_NS)


@dataclass(slots=True)
class Part:
    """What was counted in one part of a run; times in ns of this thread's CPU."""

    requests: int = 0
    calls_ns: list[int] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)

    def tenths_us(self) -> list[float]:
        """CPU per request in each tenth of the calls, least first."""
        calls, requests = len(self.calls_ns), max(1, self.requests)
        cuts = [calls * at // TENTHS for at in range(TENTHS + 1)]
        sums = [sum(self.calls_ns[start:end]) for start, end in itertools.pairwise(cuts)]
        return sorted(TENTHS * spent / requests / 1e3 for spent in sums)

    def figures(self) -> dict[str, Any]:
        """As plain data."""
        requests, tenths = max(1, self.requests), self.tenths_us()
        return {
            "requests": self.requests, "us_per_request": sum(self.calls_ns) / requests / 1e3,
            "better_half_us": sum(tenths[: TENTHS // 2]) / (TENTHS // 2),
            "calls_per_request": len(self.calls_ns) / requests,
            "call_us": {str(q): quantile(self.calls_ns, q) / 1e3 for q in (0.5, 0.99, 0.999)},
            "actions_per_request": sum(self.actions.values()) / requests,
            "actions": dict(self.actions), "outcomes": dict(self.outcomes),
        }  # fmt: skip


def timer_cost_ns() -> int:
    """What two readings of the timer add to what is between them."""
    readings = []
    for _ in range(20_001):
        before = time.thread_time_ns()
        readings.append(time.thread_time_ns() - before)
    return int(quantile(readings, 0.5))


class Bench:
    """One controller and honest workers, on a virtual clock."""

    def __init__(
        self, devices: int, models: int, policy: str, seed: int, tenants: int = 0, slots: int = SLOTS,
        *, decide_ns: int = -1,
    ) -> None:  # fmt: skip
        self.models = models
        self.tenants = tenants
        self.rate_ns = devices * RATE / NS_PER_S
        self.controller = Controller(ControllerConfig(policy=policy, decide_ns=decide_ns))
        self.part = Part()
        self.placed = [0] * models
        """On how many devices the weights of each model are."""
        self.missing = models
        """Models whose weights are on no device."""
        self._timed = False
        self._timer_ns = timer_cost_ns()
        self._rng = random.Random(seed)
        self._now_ns = ms(1)
        self._count = 0
        self._free_ns: dict[tuple[str, bool], int] = {}
        self._inbox: list[tuple[int, int, Result]] = []
        self._flying: dict[int, Load] = {}
        self._join(devices, slots)

    def _join(self, devices: int, slots: int) -> None:
        specs = tuple(records.device(f"d{at}", slots) for at in range(devices))
        events: list[ControllerEvent] = [CodeAdded(code=CODE, profiles=(PROFILE,))]
        for at in range(self.models):
            model = records.model(f"m{at}", sizes=CODE.batch_sizes, queue_limit=1 << 30)
            events.append(ModelAdded(model=model))
        if self.tenants:
            ample = {
                "burst_ns": NS_PER_S,
                "device_ns_per_s": devices * NS_PER_S,
                "loaded_bytes_per_s": 1 << 50,
            }
            quotas = [Quota(tenant=f"t{at}", **ample) for at in range(self.tenants)]
            events.append(QuotasSet(quotas=tuple(quotas)))
        events.append(WorkerJoined(worker="w", devices=specs))
        events += [CodeReady(device=spec.device, code_id="c") for spec in specs]
        self._call(events)

    def traffic(self, requests: int, *, timed: bool, settle: bool = True) -> Part:
        """So many requests at random; what they cost. ``settle``: until all are answered."""
        self.part, self._timed = Part(requests=requests), timed
        arrival_ns = self._now_ns
        for _ in range(requests):
            arrival_ns += max(1, round(self._rng.expovariate(self.rate_ns)))
            self._until(arrival_ns)
            self._call([self._request(self._rng.randrange(self.models), arrival_ns, SLO_NS)])
        if settle:
            self._until(self._now_ns + 2 * SLO_NS)
        return self.part

    def place_all(self) -> int:
        """Ask, without haste, for each model whose weights are on no device; how many there were."""
        self.part, self._timed = Part(), False
        absent = [at for at, devices in enumerate(self.placed) if not devices]
        for at in absent:
            self._until(self._now_ns + round(8 / self.rate_ns))
            self._call([self._request(at, self._now_ns, 20 * SLO_NS)])
        self._until(self._now_ns + 30 * SLO_NS)
        return len(absent)

    def _request(self, model: int, arrival_ns: int, slo_ns: int) -> Request:
        self._count += 1
        return Request(
            request_id=f"r{self._count}", gateway="g", model=f"m{model}/1", arrival_ns=arrival_ns,
            deadline_ns=arrival_ns + slo_ns,
            tenant=f"t{self._count % self.tenants}" if self.tenants else "",
        )  # fmt: skip

    def _until(self, end_ns: int) -> None:
        """Let time pass: results come, and wake-ups that were asked for."""
        while True:
            at_ns = self._inbox[0][0] if self._inbox else end_ns + 1
            wakeup_ns = self._wakeup_ns
            if wakeup_ns is not None and wakeup_ns < at_ns:
                at_ns = wakeup_ns
            if at_ns > end_ns:
                self._now_ns = end_ns
                return
            self._now_ns = at_ns
            events: list[ControllerEvent] = []
            while self._inbox and self._inbox[0][0] <= at_ns:
                result = heappop(self._inbox)[2]
                self._placed(self._flying.pop(result.action_id, None))
                events.append(result)
            self._call(events)

    def _placed(self, load: Load | None) -> None:
        if load is not None:
            at = int(load.model[1:-2])
            self.missing -= not self.placed[at]
            self.placed[at] += 1

    def _call(self, events: list[ControllerEvent]) -> None:
        """One instant: the only place where the core is called."""
        controller, now_ns = self.controller, self._now_ns
        before_ns = time.thread_time_ns()
        for event in events:
            controller.observe(event, now_ns)
        effects = controller.decide(now_ns)
        self._wakeup_ns = controller.next_wakeup_ns()
        spent_ns = time.thread_time_ns() - before_ns
        if self._timed:
            self.part.calls_ns.append(max(0, spent_ns - self._timer_ns))
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: ControllerEffect) -> None:
        if isinstance(effect, Answer):
            self.part.outcomes[effect.outcome.value] += 1
        elif isinstance(effect, Infer | Load | Unload):
            self.part.actions[type(effect).__name__] += 1
            self._execute(effect)

    def _execute(self, action: Infer | Load | Unload) -> None:
        lane = (action.device, isinstance(action, Infer))
        lasts_ns = 0
        outputs: tuple[bytes, ...] = ()
        if isinstance(action, Infer):
            lasts_ns, outputs = INFER_NS[action.batch], (b"",) * len(action.calls)
        elif isinstance(action, Load):
            lasts_ns = LOAD_NS
            self._flying[action.action_id] = action
        else:
            at = int(action.model[1:-2])
            self.placed[at] -= 1
            self.missing += not self.placed[at]
        start_ns = max(self._now_ns + NETWORK_NS, self._free_ns.get(lane, 0))
        assert start_ns <= action.window.latest_ns, f"{action} came too late for an honest worker"
        self._free_ns[lane] = end_ns = start_ns + lasts_ns
        result = Result(
            action_id=action.action_id, device=action.device, status=Status.OK, started_ns=start_ns,
            ended_ns=end_ns, outputs=outputs,
        )  # fmt: skip
        heappush(self._inbox, (end_ns + NETWORK_NS, action.action_id, result))


def measure(
    devices: int, models: int, policy: str, seed: int, requests: int | None, tenants: int = 0,
    *, decide_ns: int = -1,
) -> dict[str, Any]:  # fmt: skip
    """One row: its cold and its warm part."""
    gc.collect()
    bench = Bench(devices, models, policy, seed, tenants, decide_ns=decide_ns)
    gc.collect()
    gc.freeze()
    usual = gc.get_threshold()
    gc.set_threshold(100_000, 50, 1000)
    warm_requests = requests or max(20_000, 2 * models, 500 * devices)
    cold = bench.traffic(min(3 * models, warm_requests), timed=True)
    asked = bench.place_all()
    bench.traffic(int(warm_requests * SETTLE), timed=False)
    missing = bench.missing
    warm = bench.traffic(warm_requests, timed=True)
    gc.set_threshold(*usual)
    gc.unfreeze()
    return {
        "cold": cold.figures(), "placed_after": asked, "missing_when_warm": missing, "warm": warm.figures(),
    }  # fmt: skip


def screen_row(name: str, part: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    call = " / ".join(f"{found['call_us'][q]:.1f}" for q in ("0.5", "0.99", "0.999"))
    actions = " ".join(f"{count} {kind}" for kind, count in sorted(found["actions"].items()))
    ends = " ".join(f"{count} {end}" for end, count in sorted(found["outcomes"].items()))
    return (
        name, part, f"{found['us_per_request']:.1f}", f"{found['better_half_us']:.1f}",
        f"{found['calls_per_request']:.2f}", call,
        f"{found['actions_per_request']:.2f}: {actions}", ends,
    )  # fmt: skip


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    options.add_argument("--policy", choices=POLICIES, default=ControllerConfig().policy)
    options.add_argument("--requests", type=int, help="measured in the warm part; default: 20000 or more")
    options.add_argument("--tenants", type=int, default=0, help="tenants with quotas that are never used up")
    given = options.parse_args()
    if unknown := set(given.rows) - ROWS.keys():
        options.error(f"rows: expected some of {', '.join(ROWS)}; found {', '.join(sorted(unknown))}")
    compiled = not belief.__file__.endswith(".py")
    outcome = Outcome("benchmarks.scheduler_cost")
    lines = []
    for name in given.rows or ROWS:
        devices, models, pure_us, compiled_us = ROWS[name]
        found = measure(devices, models, given.policy, given.seed, given.requests, given.tenants)
        outcome.figures[name] = found
        lines += [screen_row(name, part, found[part]) for part in ("cold", "warm")]
        limit_us = compiled_us if compiled else pure_us
        spent_us = found["warm"]["better_half_us"]
        if limit_us is not None:
            outcome.at_most(f"{name}: CPU of the core per request", limit_us, spent_us, "us", digits=1)
        if name == AT_THE_DOOR and given.policy == "default":
            door = measure(
                devices, models, given.policy, given.seed, given.requests, given.tenants, decide_ns=0
            )
            outcome.figures[f"{name}, verdicts at the door"] = door
            lines.append(screen_row(name, "warm, verdicts at the door", door["warm"]))
            ratio = door["warm"]["better_half_us"] / spent_us
            outcome.at_most(
                f"{name}: with verdicts at the door, of that without", DOOR_RATIO, ratio, digits=2
            )
        if found["missing_when_warm"]:
            outcome.invalid = f"{name}: the weights of {found['missing_when_warm']} models were not placed"
    outcome.figures["brains"] = brains = "compiled by mypyc" if compiled else "pure Python"
    outcome.figures["policy"] = given.policy
    print(f"  Python {sys.version.split()[0]}; brains: {brains}; policy: {given.policy}\n")
    head = (
        "devices x models",
        "part",
        "us/request",
        "better half",
        "calls",
        "us a call p50/p99/p99.9",
        "actions",
        "ends",
    )
    print(table(head, lines))
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
