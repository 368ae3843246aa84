"""Searches the simulator for metastable failures: overloads that outlast their cause. Each case has a seed.

Each case has a steady load that a cluster can serve (55 to 70 % of its capacity), and a temporary
disturbance: a crowd of clients that retry whatever they are advised, tighter deadlines, models that evict
each other, a worker that restarts with empty memory. After it, the steady load must soon be served as before:
within two seconds plus the time to reload what had to be evicted.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.tables import ClusterTable, FaultTable, Ramp
from clockwork_serve.workload.zoo import Zoo
from harness.report import Outcome, finish, parser, quantile, table

KINDS: Final = ("resnet50_v2", "densenet121", "googlenet")
BUCKET_MS: Final = 250
BEFORE_S, AFTER_S = 2.0, 5.0
"""The steady load alone, before the trouble, and how long it is watched after it."""
SOON_S: Final = 2.0
GOOD: Final = 0.99
WINDOW: Final = 4
"""Buckets over which the share of good answers is taken: a second."""


@dataclass(slots=True, frozen=True)
class Case:
    """One case: the steady loads are all but those named ``trouble...``, which are over at ``end_s``."""

    name: str
    scenario: Scenario
    cluster: Cluster
    config: ControllerConfig
    end_s: float
    allowed_s: float
    """How soon it must be good."""


@dataclass(slots=True, frozen=True)
class Found:
    """What came of one case."""

    family: str
    seed: int
    recovered_s: float
    """From the end of the trouble until all that follows is good; inf if it never is."""
    allowed_s: float
    before: float
    """The share of good answers before the trouble."""
    worst: float
    """The worst second after ``allowed_s``."""

    @property
    def held(self) -> bool:
        """Whether it recovered in time."""
        return self.recovered_s <= self.allowed_s


class Dice:
    """What cases are made of."""

    def __init__(self, family: str, seed: int) -> None:
        self.rng = np.random.default_rng([seed, FAMILIES_ORDER.index(family)])
        self.zoo = Zoo.read("v100")
        self.kind = str(self.rng.choice(KINDS))
        self.devices = int(self.rng.integers(1, 4))
        self.batch = int(self.rng.choice((1, 4, 16)))
        self.profile = self.zoo.profile(self.kind, "emulated:v100")
        self.one_ms = self.profile.infer_ns[1] / NS_PER_MS
        best = max(size * NS_PER_S / ns for size, ns in self.profile.infer_ns.items() if size <= self.batch)
        self.capacity_rps = self.devices * best
        self.slo_ms = float(self.rng.uniform(20, 40)) * self.one_ms
        self.pulse_s = float(self.rng.uniform(0.5, 3))

    def share(self) -> float:
        """What the steady load takes."""
        return float(self.rng.uniform(0.55, 0.7))

    def steady(self, models: tuple[str, ...], rate_rps: float, **fields: Any) -> LoadTable:
        """A load that can be served."""
        return LoadTable(
            name="steady", models=models, arrivals="poisson", rate_rps=rate_rps, slo_ms=self.slo_ms, **fields
        )

    def case(
        self, name: str, models: tuple[ModelSet, ...], loads: tuple[LoadTable, ...], pages: int,
        *faults: FaultTable, allowed_s: float = SOON_S, end_s: float | None = None,
    ) -> Case:  # fmt: skip
        """A case of these."""
        over_s = BEFORE_S + self.pulse_s if end_s is None else end_s
        scenario = Scenario(
            name=name, seconds=over_s + allowed_s + AFTER_S, models=models, loads=loads, faults=faults,
            cluster=ClusterTable(devices=self.devices),
        )  # fmt: skip
        config = ControllerConfig(max_batch=self.batch, expected_devices=self.devices)
        return Case(name, scenario, Cluster(devices=self.devices, pages=pages), config, over_s, allowed_s)

    def crowd(self, models: tuple[str, ...], times: float = 10, **fields: Any) -> LoadTable:
        """Clients in a closed loop, so many times what can be served within the SLO, for the pulse."""
        clients = times * self.capacity_rps * self.slo_ms / 1000 / len(models)
        plain: dict[str, Any] = {"slo_ms": self.slo_ms, "retry_ms": 1.0, "start_jitter_s": 0.05}
        return LoadTable(
            name="trouble", models=models, arrivals="closed", concurrency=max(1, min(400, round(clients))),
            start_s=BEFORE_S, stop_s=BEFORE_S + self.pulse_s, **(plain | fields),
        )  # fmt: skip

    def pages(self, models: int) -> int:
        """Memory for so many models on each device."""
        size = self.zoo.model("x", self.kind).weights.size
        return models * -(-size // (16 << 20))

    def load_s(self) -> float:
        """How long one LOAD takes."""
        return self.profile.load_ns(self.zoo.model("x", self.kind).weights.size) / NS_PER_S


def retries(dice: Dice) -> Case:
    """A crowd that comes again 1 ms after each refusal, or as told."""
    names = ("m",)
    retry = str(dice.rng.choice(("fixed", "retry_after")))
    loads = (dice.steady(names, dice.share() * dice.capacity_rps), dice.crowd(names, retry=retry))
    return dice.case("retries", (ModelSet(name="m", kind=dice.kind),), loads, 64)


def short_deadlines(dice: Dice) -> Case:
    """The crowd's deadlines are shorter than the queue of the others."""
    slo_ms = float(dice.rng.uniform(1.5, 6)) * dice.one_ms + 2
    loads = (dice.steady(("m",), dice.share() * dice.capacity_rps), dice.crowd(("m", "other"), slo_ms=slo_ms))
    models = (ModelSet(name="m", kind=dice.kind), ModelSet(name="other", kind=dice.kind))
    return dice.case("short deadlines", models, loads, 64)


def tighter(dice: Dice) -> Case:
    """Who is refused comes again with a deadline that is tighter each time."""
    ramp = Ramp(every_s=0.1, factor=float(dice.rng.uniform(0.6, 0.9)))
    loads = (dice.steady(("m",), dice.share() * dice.capacity_rps), dice.crowd(("m",), slo_ramp=ramp))
    return dice.case("tighter", (ModelSet(name="m", kind=dice.kind),), loads, 64)


def thrashing(dice: Dice) -> Case:
    """Many models, memory for few; the crowd asks for all of them, then only a few are asked for."""
    few, many = int(dice.rng.integers(2, 6)), int(dice.rng.integers(20, 60))
    models = (
        ModelSet(name="few", kind=dice.kind, copies=few),
        ModelSet(name="many", kind=dice.kind, copies=many),
    )
    loads = (
        dice.steady(("few",), dice.share() * dice.capacity_rps * 0.8),
        dice.crowd(("few", "many"), times=float(dice.rng.uniform(3, 10))),
    )
    allowed_s = SOON_S + 2 * few * dice.load_s()
    return dice.case("thrashing", models, loads, dice.pages(few + 2), allowed_s=allowed_s)


def shifting(dice: Dice) -> Case:
    """Those who are popular change at once, again and again; then they stay."""
    few = int(dice.rng.integers(2, 5))
    turns = int(dice.rng.integers(3, 8))
    every_s = float(dice.rng.uniform(0.2, 0.6))
    dice.pulse_s = turns * every_s
    rate_rps = dice.share() * dice.capacity_rps * 0.8
    models = [ModelSet(name="few", kind=dice.kind, copies=few)]
    loads = [dice.steady(("few",), rate_rps, start_s=BEFORE_S + dice.pulse_s)]
    for turn in range(turns):
        models.append(ModelSet(name=f"turn{turn}", kind=dice.kind, copies=few))
        loads.append(
            LoadTable(
                name=f"trouble{turn}", models=(f"turn{turn}",), arrivals="poisson", rate_rps=2 * rate_rps,
                slo_ms=dice.slo_ms, start_s=BEFORE_S + turn * every_s, stop_s=BEFORE_S + (turn + 1) * every_s,
            )
        )  # fmt: skip
    allowed_s = SOON_S + 2 * few * dice.load_s()
    return dice.case("shifting", tuple(models), tuple(loads), dice.pages(few + 1), allowed_s=allowed_s)


def restart(dice: Dice) -> Case:
    """A worker is gone and comes back with empty memory, while many models are asked for."""
    many = int(dice.rng.integers(5, 40))
    loads = (dice.steady(("many",), dice.share() * dice.capacity_rps * 0.5),)
    fault = FaultTable(kind="crash", at_s=BEFORE_S, worker=0)
    # It joins again after 0.3 s; then all must be loaded once, while others wait.
    allowed_s = SOON_S + 0.3 + 2 * many * dice.load_s()
    models = (ModelSet(name="many", kind=dice.kind, copies=many),)
    return dice.case("restart", models, loads, dice.pages(many), fault, allowed_s=allowed_s, end_s=BEFORE_S)


FAMILIES: Final[dict[str, Callable[[Dice], Case]]] = {
    "retries": retries,
    "short deadlines": short_deadlines,
    "tighter": tighter,
    "thrashing": thrashing,
    "shifting": shifting,
    "restart": restart,
}
FAMILIES_ORDER: Final = tuple(FAMILIES)


def play(family: str, seed: int) -> Found:
    """Play one case on virtual time."""
    case = FAMILIES[family](Dice(family, seed))
    simulation = Simulation(
        workload=build(case.scenario, seed), zoo=Zoo.read("v100"), cluster=case.cluster, config=case.config,
        seed=seed, faults=case.scenario.faults, bucket_ns=BUCKET_MS * NS_PER_MS,
    )  # fmt: skip
    tally = simulation.run()
    steady = [at for at, name in enumerate(tally.names) if not name.startswith("trouble")]
    counts = [
        (sum(row[at].ok for at in steady), sum(row[at].ended for at in steady)) for row in tally.rows
    ]  # fmt: skip
    return judged(family, seed, counts, case)


def judged(family: str, seed: int, counts: list[tuple[int, int]], case: Case) -> Found:
    """When all seconds that follow are good, and what was before."""
    last = int(case.scenario.seconds * 1000) // BUCKET_MS
    shares = []
    for at in range(last - WINDOW + 1):
        window = counts[at : at + WINDOW]
        asked = sum(ended for _, ended in window)
        shares.append(sum(ok for ok, _ in window) / asked if asked else 1.0)
    first = -(-int(case.end_s * 1000) // BUCKET_MS)
    bad = [at for at in range(first, len(shares)) if shares[at] < GOOD]
    recovered_s = (bad[-1] + 1 - first) * BUCKET_MS / 1000 if bad else 0.0
    if bad and bad[-1] == len(shares) - 1:
        recovered_s = float("inf")
    allowed = first + round(case.allowed_s * 1000) // BUCKET_MS
    before = shares[: int(BEFORE_S * 1000) // BUCKET_MS - WINDOW + 1]
    return Found(
        family=family, seed=seed, recovered_s=recovered_s, allowed_s=case.allowed_s, before=before[-1],
        worst=min(shares[allowed:], default=1.0),
    )  # fmt: skip


def _play(one: tuple[str, int]) -> Found:
    return play(*one)


def search(families: Iterable[str], seeds: range, jobs: int) -> list[Found]:
    """Play all, in so many processes."""
    work = [(family, seed) for family in families for seed in seeds]
    if jobs == 1:
        return [_play(one) for one in work]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return pool.map(_play, work, chunksize=4)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--family", choices=FAMILIES_ORDER, action="append")
    options.add_argument("--from", dest="first", type=int, default=0, metavar="SEED")
    options.add_argument("--count", type=int, default=100, help="seeds of each family")
    options.add_argument("--jobs", type=int, default=2)
    given = options.parse_args()
    outcome = Outcome("qa.metastable")
    found = search(given.family or FAMILIES_ORDER, range(given.first, given.first + given.count), given.jobs)
    rows = []
    for family in given.family or FAMILIES_ORDER:
        own = [one for one in found if one.family == family]
        failed = [one for one in own if not one.held]
        times = [one.recovered_s for one in own]
        rows.append(
            (family, len(own), f"{quantile(times, 0.5):.2f} s", f"{max(times):.2f} s",
             f"{max(one.allowed_s for one in own):.1f} s", f"{min(one.before for one in own):.2%}",
             " ".join(f"{one.seed} ({one.recovered_s:.2f} of {one.allowed_s:.2f} s)" for one in failed[:8]))
        )  # fmt: skip
        outcome.judge(
            f"{family}: served again in time", asked=f"{len(own)} of {len(own)}",
            found=str(len(own) - len(failed)), good=not failed,
        )  # fmt: skip
    print(table(("family", "seeds", "p50", "longest", "allowed up to", "before, worst", "failed"), rows))
    outcome.figures = {"found": [(one.family, one.seed, one.recovered_s, one.allowed_s) for one in found]}
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
