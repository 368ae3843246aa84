"""Promises at the door: when the yes or no comes, whether the yes is kept, and what it costs in goodput.

    python -m benchmarks.promises                 loads of 120 s, some 15 minutes of CPU
    python -m benchmarks.promises --short         20 s each
    python -m benchmarks.promises --curve         also goodput by how long the yes or no may take
    python -m benchmarks.promises --only real     real processes and sockets alone

Models take 16 + 4n ms for n of 1, 2, 4 and 8 requests; SLO 200 ms, some longer. On virtual time, with the
noise of the paper's Fig 10, each load is played twice with the same requests and the same luck: with verdicts
at the door, and without. Then a real server with an emulated device is asked by a client with its own clock,
in turns. "At most" is what nobody exceeds who says yes or no at the door, by arrivals and batches alone.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, factorial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from msgspec.structs import replace

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Answer, Cause, ControllerEffect, ControllerEvent, Outcome, Request
from clockwork_serve.sim import Simulation
from clockwork_serve.sim.constants import Cluster
from clockwork_serve.units import NS_PER_MS, ms
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo, ZooModel
from harness import report, repositories
from harness.http_load import Sample, Shot, infer_message, open_loop, poisson, run
from harness.serving import Serving, serve, total

KIND: Final = "gpu_like"
SIZES: Final = (1, 2, 4, 8)
SLO_MS: Final = 200.0
VERDICT_MS: Final = 10.0
VERDICT: Final = 10
"""How long a verdict at the door may take, by the client's clock: that, or 1 / ``VERDICT`` of the SLO."""

KEPT: Final = 0.9999
WORST: Final = 0.85
URGENT: Final = 0.999
"""Shares asked: of promises kept; of the mean model's share in time, of the worst model's; of urgent requests
in time."""

URGENT_PRIORITY: Final = 4

REAL_RPS: Final = 250
OK, REFUSED = 200, 429

CURVE_MS: Final = (0.0, 10.0, 20.0, 40.0, 80.0, 120.0)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests by chance; ``cost`` is the share of today's goodput that verdicts at the door have to keep."""

    name: str
    models: int
    rate_rps: float
    cost: float
    devices: int = 1
    cold: bool = False
    slo_ms: float = SLO_MS
    urgent_rps: float = 0.0
    """Requests of a more urgent class beside these, with an SLO of ``SLO_MS``."""

    @property
    def verdict_ms(self) -> float:
        """How long a verdict at the door may take."""
        return min(VERDICT_MS, (SLO_MS if self.urgent_rps else self.slo_ms) / VERDICT)

    def tables(self, decide_ms: float | None) -> tuple[LoadTable, ...]:
        """Its requests, with verdicts at the door or without."""
        usual = LoadTable(
            name="people", models=("m",), arrivals="poisson", rate_rps=self.rate_rps, slo_ms=self.slo_ms,
            decide_ms=decide_ms,
        )  # fmt: skip
        if not self.urgent_rps:
            return (usual,)
        more = replace(
            usual, name="urgent", rate_rps=self.urgent_rps, slo_ms=SLO_MS, priority=URGENT_PRIORITY
        )
        return usual, more


LOADS: Final = (
    Load("15 models, 60/s", 15, 60, 0.97),
    Load("15 models, 123/s", 15, 123, 0.95),
    Load("15 models, 250/s", 15, 250, 0.93),
    Load("15 models, 375/s", 15, 375, 0.93),
    Load("1 model, 60/s", 1, 60, 0.97),
    Load("1 model, 123/s", 1, 123, 0.95),
    Load("1 model, 250/s", 1, 250, 0.93),
    Load("1 model, 375/s", 1, 375, 0.93),
    Load("200 cold models on 6 devices, 250/s", 200, 250, 0.93, devices=6, cold=True),
    Load("200 cold models on 6 devices, 1500/s", 200, 1500, 0.93, devices=6, cold=True),
    Load("15 models, 250/s, SLO 1 s", 15, 250, 0.93, slo_ms=1000),
    Load("15 models, 250/s, SLO 20 s", 15, 250, 0.93, slo_ms=20_000),
    Load("1 model, 250/s, SLO 20 s", 1, 250, 0.93, slo_ms=20_000),
    Load("15 models, 250/s, SLO 1 s, urgent 20/s", 15, 250, 0.85, slo_ms=1000, urgent_rps=20),
)


@dataclass(slots=True)
class Seen:
    """What the clients of a load got, by their own clock; a watcher of the simulation."""

    warmup_ns: int
    hop_ns: int
    sent: dict[str, Request] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    good: Counter[str] = field(default_factory=Counter)
    promised: int = 0
    broken: Counter[Cause] = field(default_factory=Counter)
    no_ns: list[int] = field(default_factory=list)
    """How long each refusal took."""
    urgent: Counter[bool] = field(default_factory=Counter)
    """Requests of the urgent class, by whether they were in time."""

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Note requests and answers."""
        for event in events:
            if isinstance(event, Request) and event.arrival_ns >= self.warmup_ns:
                self.sent[event.request_id] = event
                self.asked[event.model] += 1
        for effect in effects:
            if isinstance(effect, Answer) and (request := self.sent.pop(effect.request_id, None)) is not None:
                self._answered(effect, request, now_ns + self.hop_ns)

    def _answered(self, answer: Answer, request: Request, delivered_ns: int) -> None:
        kept = answer.outcome is Outcome.OK and delivered_ns <= request.deadline_ns
        self.good[request.model] += kept
        if request.priority == URGENT_PRIORITY:
            self.urgent[kept] += 1
        if answer.promised:
            self.promised += 1
            if not kept:
                self.broken[answer.cause or Cause.DELIVERY_LATE] += 1
        elif answer.outcome is Outcome.REJECTED:
            self.no_ns.append(delivered_ns - request.arrival_ns)

    @property
    def worst(self) -> float:
        """Of the worst model, the share in time, by that of all."""
        least = min(self.good[model] / asked for model, asked in self.asked.items())
        return least / (self.good.total() / self.asked.total())


def lasts_ms(count: int) -> int:
    """How long so many requests take in the smallest batch that holds them."""
    return 16 + 4 * next(size for size in SIZES if size >= count)


def zoo() -> Zoo:
    """One kind of model that takes 16 + 4n ms; a LOAD takes as long as over PCIe."""
    infer_ns = {size: ms(lasts_ms(size)) for size in SIZES}
    model = ZooModel(
        kind=KIND, weights_bytes=100_000_000, input_bytes=602_000, output_bytes=4_000, load_ns=ms(9),
        infer_ns=infer_ns, rounded=False, in_paper=False,
    )  # fmt: skip
    return Zoo("promises", {KIND: model})


def play(load: Load, seed: int, seconds: float, decide_ms: float | None) -> Seen:
    """Play a load; ``decide_ms`` None: without verdicts at the door."""
    scenario = Scenario(
        name=load.name, seconds=seconds, warmup_s=seconds / 20,
        models=(ModelSet(name="m", kind=KIND, copies=load.models),),
        loads=load.tables(decide_ms),
    )  # fmt: skip
    simulation = Simulation(
        workload=build(scenario, seed=seed), zoo=zoo(), cluster=Cluster(devices=load.devices),
        config=ControllerConfig(), seed=seed,
    )  # fmt: skip
    seen = Seen(
        simulation.workload.warmup_ns if not load.cold else 0, simulation.constants.network.gateway_ns
    )
    simulation.watchers.append(seen)
    simulation.run()
    return seen


# ------------------------------------------------------------
# What nobody can exceed who has to say yes or no at the door to Poisson arrivals.
#
# By Lagrange's relaxation, for any price of lane time: what the lanes are worth, and, for each model by
# itself, the best average of requests less the price of their lane time. A model's batch has k requests when
# its first needs a verdict; then it runs, or waits for more as long as its first allows, or leaves its place
# to one that opens the next (a Markov decision process, by time left and size). Lanes are free whenever one
# is wanted, and nothing else takes time.

STEPS: Final = 200
"""So many in an SLO."""
LARGEST: Final = max(SIZES)
IMPOSSIBLE: Final = -1e9


def most_rps(load: Load) -> float:
    """A bound of the goodput of a load with verdicts at the door: by the price for which it is lowest."""
    low_ms, high_ms = lasts_ms(LARGEST) / LARGEST, float(lasts_ms(1))
    for _ in range(14):
        third_ms = (high_ms - low_ms) / 3
        if priced_rps(load, low_ms + third_ms) < priced_rps(load, high_ms - third_ms):
            high_ms -= third_ms
        else:
            low_ms += third_ms
    return min(load.rate_rps, priced_rps(load, low_ms))


def priced_rps(load: Load, each_ms: float) -> float:
    """The bound for a price: a request is worth so much lane time."""
    rate = load.rate_rps / load.models / 1000
    low, high = 0.0, rate
    for _ in range(20):
        middle = (low + high) / 2
        if surplus(load, rate, each_ms, middle) > 0:
            low = middle
        else:
            high = middle
    return 1000 * (load.devices / each_ms + load.models * high)


def surplus(load: Load, rate: float, each_ms: float, gain: float) -> float:
    """What a batch of a model is worth at best, if time until the next costs ``gain`` a ms."""
    step_ms = load.slo_ms / STEPS
    worth = [size - lasts_ms(size) / each_ms for size in range(LARGEST + 1)]
    best = [IMPOSSIBLE] * (LARGEST + 2)
    for left in range(STEPS - int(load.verdict_ms / step_ms) + 1):
        before, best = best, [IMPOSSIBLE] * (LARGEST + 2)
        for size in range(1, LARGEST + 1):
            if lasts_ms(size) <= left * step_ms:
                best[size] = worth[size]
            if before[size] > IMPOSSIBLE:
                comes = max(before[size + 1], before[size], best[size] + gain / rate)
                waits = before[size] + rate * step_ms * (comes - before[size]) - gain * step_ms
                best[size] = max(best[size], waits)
    more = rate * load.verdict_ms  # come while the first waits for its verdict
    shares = [exp(-more) * more**count / factorial(count) for count in range(LARGEST)]
    opened = sum(share * max(0.0, best[count + 1]) for count, share in enumerate(shares))
    return opened - gain * (1 / rate + load.verdict_ms)


def asked(serving: Serving, seed: int, seconds: float, parameters: dict[str, float]) -> list[Sample]:
    """Requests to a real server, to 15 models by chance."""
    rng, url = random.Random(seed), serving.http_url
    x = [("x", "FP32", (1, 4), bytes(16))]
    shots = [
        Shot(at_ns, infer_message(url, f"m{rng.randrange(15)}", x, slo_ms=SLO_MS, parameters=parameters))
        for at_ns in poisson(REAL_RPS, seconds, rng)
    ]
    return run(open_loop(url, shots)).samples


def in_time(samples: Sequence[Sample]) -> int:
    """How many were answered in time, by the client's clock."""
    return sum(one.status == OK and one.done_ns - one.sent_ns <= ms(SLO_MS) for one in samples)


def real(outcome: report.Outcome, seed: int, seconds: float, rounds: int) -> None:
    """A real server with and without verdicts at the door, in turns; medians over the rounds."""
    nos_ms: list[float] = []
    shares: list[float] = []
    with TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        for at in range(15):
            repositories.emulated(root, f"m{at}", {size: lasts_ms(size) for size in SIZES})
        with serve(root, device="emulated") as serving:
            asked(serving, seed, 2, {})  # weights are loaded
            for at in range(rounds):
                without = asked(serving, seed + at, seconds, {})
                samples = asked(serving, seed + at, seconds, {"decide_ms": 0.0})
                shares.append(in_time(samples) / in_time(without))
                took = [one.done_ns - one.sent_ns for one in samples if one.status == REFUSED]
                nos_ms.append(report.quantile(took, 0.99) / NS_PER_MS)
            metrics = serving.metrics()
    promised = total(metrics, "clockwork_model_promises_total")
    broken = total(metrics, "clockwork_model_promises_broken_total")
    name = f"real, 15 models, {REAL_RPS}/s"
    outcome.at_most(f"{name}: p99 of the no", VERDICT_MS + 5, median(nos_ms), "ms")
    outcome.at_least(f"{name}: promises kept, of {promised:,.0f}", 0.999, 1 - broken / promised, digits=5)
    outcome.at_least(f"{name}: goodput, of that without", 0.93, median(shares), digits=3)
    outcome.figures[name] = {"no_p99_ms": nos_ms, "goodput": shares, "promised": promised, "broken": broken}


def judge(outcome: report.Outcome, load: Load, seen: Seen, before: Seen) -> None:
    """Add what is asked of one load."""
    name = load.name
    outcome.at_most(f"{name}: the longest no", load.verdict_ms, max(seen.no_ns, default=0) / NS_PER_MS, "ms")
    if load.urgent_rps:
        share = seen.urgent[True] / seen.urgent.total()
        outcome.at_least(f"{name}: urgent ones in time", URGENT, share, digits=4)
    broken = seen.broken.total() - seen.broken[Cause.OUTRANKED]
    kept = 1 - broken / max(1, seen.promised)
    why = ", ".join(f"{count} {cause}" for cause, count in seen.broken.items())
    outcome.at_least(f"{name}: promises kept, of {seen.promised:,}", KEPT, kept, digits=5, more=why)
    outcome.judge(
        f"{name}: promises broken without a cause", asked="0", found=str(seen.broken[Cause.UNEXPLAINED]),
        good=not seen.broken[Cause.UNEXPLAINED],
    )  # fmt: skip
    share = seen.good.total() / before.good.total()
    outcome.at_least(f"{name}: goodput, of that without", load.cost, share, digits=3)
    outcome.at_least(
        f"{name}: in time of the worst model, by the mean", WORST, seen.worst, digits=2,
        more=f"{before.worst:.2f} without",
    )  # fmt: skip


def main() -> int:
    """Run it; returns the exit status."""
    options = report.parser(__doc__)
    options.add_argument("--short", action="store_true", help="20 s of each load instead of 120")
    options.add_argument("--curve", action="store_true", help="goodput by how long the yes or no may take")
    options.add_argument("--only", metavar="WORDS", default="", help="loads whose names begin so")
    given = options.parse_args()
    seconds = 20.0 if given.short else 120.0
    outcome = report.Outcome("benchmarks.promises")
    rows: list[tuple[str, ...]] = []
    for load in LOADS:
        if not load.name.startswith(given.only):
            continue
        before = play(load, given.seed, seconds, None)
        seen = play(load, given.seed, seconds, 0.0)
        judge(outcome, load, seen, before)
        line = [f"{seen.good.total() / before.good.total():.3f}"]
        for decide_ms in CURVE_MS[1:] if given.curve else ():
            more = play(load, given.seed, seconds, decide_ms)
            line.append(f"{more.good.total() / before.good.total():.3f}")
        took_ms = report.quantile(before.no_ns, 0.5) / NS_PER_MS if before.no_ns else 0.0
        in_time = before.good.total() / before.asked.total()
        most = ""
        if not load.urgent_rps and load.slo_ms == SLO_MS:
            most = f"{most_rps(load) / load.rate_rps / in_time:.3f}"
        rows.append((load.name, f"{in_time:.1%}", f"{took_ms:.0f}", most, *line))
        outcome.figures[load.name] = {
            "goodput": line, "before_in_time": rows[-1][1], "before_no_ms": took_ms, "at_most": most,
        }  # fmt: skip
        print("  ".join(rows[-1]), flush=True)
    if "real".startswith(given.only):
        real(outcome, given.seed, seconds / 4, 3 if given.short else 5)
    ways = [f"{each:g} ms" for each in (CURVE_MS if given.curve else CURVE_MS[:1])]
    print("\n" + report.table(("load", "in time", "its no, ms", "at most", *ways), rows))
    return report.finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
