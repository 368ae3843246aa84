"""Random scenarios with faults, for property testing: each is a function of its seed.

played = play_seed(17)          AssertionError, with the command that repeats it, if a check fails
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from typing import Final, get_args

import msgspec
import numpy as np
from msgspec.structs import replace

from clockwork_lab import released
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import ControllerEffect, ControllerEvent, Profile
from clockwork_serve.sim.constants import Cluster
from clockwork_serve.sim.simulation import Simulation, Watcher
from clockwork_serve.units import MIB, NS_PER_S, ms
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import Workload, build
from clockwork_serve.workload.tables import ClusterTable, FaultKind, FaultTable, TenantTable
from clockwork_serve.workload.zoo import Zoo, ZooModel

PLAYED: Final = ("default", "paper")
"""Policies that seeds draw from. One more would change what every seed plays: others are played by name."""
REQUESTS: Final = 2_000
"""The least number of requests of a seed."""

KINDS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)
"""In the order in which they are drawn."""
FAULTS_MAX: Final = 8
PAGE_BYTES: Final = 16 * MIB
SLOW_NS: Final = ms(12)
"""Models with a longer batch of one are left out: they would make seeds long."""

_PR_SET_PDEATHSIG: Final = 1

FAULT_SCHEDULE_STREAM: Final = 1 << 17
"""The random stream that a seed's scenario is drawn from; those after it belong to parts of it."""
BEATS_MAX: Final = 40
"""A seed takes a few pulses of its simulation; one that takes this many is taken for a livelock."""

QUIET_NS: Final = 3 * NS_PER_S
"""Lost workers have joined again after this time."""

PATIENCE_MAX: Final = 200
GRACES_MAX: Final = 6
"""A hung worker is detected within ``PATIENCE_MAX * hang_ns``, and killed within ``GRACES_MAX`` graces."""

SKEW_STAYS_MS: Final = 1.0
"""Clock skews above this end: a worker with such a clock refuses every action, and requests without a
deadline would be sent to it for ever."""

REPLAY: Final = "python -m qa.simulator_seeds"


@dataclass(slots=True, frozen=True)
class Chance:
    """A random scenario, and the cluster and controller that serve it; ``truth``: true durations by code."""

    seed: int
    scenario: Scenario
    workload: Workload
    cluster: Cluster
    config: ControllerConfig
    truth: dict[str, Profile]
    noise: bool


@dataclass(slots=True)
class PlayedSeed:
    """The result of a seed: requests sent, faults that had an effect by kind, actions by kind.

    ``failure`` is empty, or holds the command that repeats the seed, and the failed check.
    """

    seed: int
    requests: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    actions: dict[str, int] = field(default_factory=dict)
    failure: str = ""


class Digest:
    """A watcher that hashes every step of a simulation in the journal's encoding."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._hash = hashlib.sha256()

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Add one step to the hash."""
        self._hash.update(self._encoder.encode((now_ns, events, effects, 0)))

    def hex(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


@cache
def _zoo() -> Zoo:
    return Zoo.read("v100")


def random_scenario(
    seed: int, requests: int = REQUESTS, policy: str | None = None, *, frozen: bool = False
) -> Chance:
    """The scenario of a seed, with at least that many requests; ``policy`` replaces the one it draws.

    ``frozen``: without the kinds of faults that came after ``benchmarks.frozen`` was first recorded.
    """
    rng = np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM]))
    kinds = _kinds(rng)
    sets = [
        ModelSet(name=f"m{at}", kind=model.kind, copies=int(rng.integers(1, 9)))
        for at, model in enumerate(kinds)
    ]
    devices = int(rng.integers(1, 5))
    cluster = Cluster(
        devices=devices,
        devices_per_worker=2 if devices % 2 == 0 and rng.random() < 0.5 else 1,
        pages=_pages(rng, kinds, sets, devices),
        page_bytes=PAGE_BYTES,
        lanes_share=shared_lanes(seed),
    )
    mean_s = float(np.mean([model.infer_ns[1] for model in kinds])) / NS_PER_S
    rate_rps = devices / mean_s * rng.uniform(0.4, 1.6)
    tenants, loads = _with_tenants(seed, _loads(rng, sets, rate_rps), devices)
    scenario, workload = _long_enough(
        seed, sets, verdicts(seed, loads), tenants, requests / rate_rps, requests
    )
    table = ClusterTable(devices=devices, devices_per_worker=cluster.devices_per_worker)
    faults = _faults(rng, workload, cluster)
    config = replace(_config(rng), quarantine_after=losses_allowed(seed), **hang_settings(seed))
    if config.policy == "released":
        faults = [_delay_ends(fault, workload) for fault in faults]
    if policy is not None:
        config = replace(config, policy=policy)
    more = (*faults, *killers(seed, workload), *stops(seed, workload, cluster))
    whole = with_restarts(seed, workload, more)
    if not frozen:
        whole = (*whole, *depositions(seed, workload), *busy_spells(seed, workload))
    return Chance(
        seed=seed,
        scenario=replace(scenario, cluster=table, faults=whole),
        workload=workload,
        cluster=cluster,
        config=config,
        truth=_truth(rng, kinds),
        noise=rng.random() < 0.8,
    )


def simulation_of(chance: Chance, *, checks: bool = True, watchers: Sequence[Watcher] = ()) -> Simulation:
    """The simulation of a random scenario, not yet run."""
    return Simulation(
        workload=chance.workload, zoo=_zoo(), cluster=chance.cluster, config=chance.config, seed=chance.seed,
        truth=chance.truth, noise=chance.noise, faults=chance.scenario.faults, checks=checks,
        watchers=watchers,
    )  # fmt: skip


def play_seed(
    seed: int, requests: int = REQUESTS, watchers: Sequence[Watcher] = (), policy: str | None = None,
    *, frozen: bool = False,
) -> PlayedSeed:  # fmt: skip
    """Play one seed with all checks. Raises AssertionError with the command that repeats it."""
    chance = random_scenario(seed, requests, policy, frozen=frozen)
    simulation = simulation_of(chance, watchers=watchers)
    try:
        run_through(simulation, chance.scenario.faults)
    except Exception as error:
        again = f"{REPLAY} {seed}" + (f" --requests {requests}" if requests != REQUESTS else "")
        again += "" if policy is None else f" --policy {policy}"
        raise AssertionError(f"{again}: at {simulation.now_ns} ns: {error!r}") from error
    tally = simulation.tally
    busy, faults = tally.busy, simulation.faults
    return PlayedSeed(
        seed=seed,
        requests=tally.total().offered,
        faults={} if faults is None else dict(faults.executed),
        actions={
            "infer": busy.infers, "load": busy.loads, "unload": busy.unloads, "refused": busy.refused
        },
    )  # fmt: skip


def run_through(simulation: Simulation, faults: Sequence[FaultTable], beats_max: int = BEATS_MAX) -> None:
    """Run a simulation to its end and some seconds more, with all checks; raises what they raise."""
    beats: list[int] = []

    def pulse(now_ns: int) -> None:
        beats.append(now_ns)
        assert len(beats) < beats_max, "the simulation does not end"

    simulation.run(pulse=pulse)
    simulation.run(_quiet_ns(faults, simulation.controller.config, simulation.now_ns), pulse=pulse)
    assert simulation.checks is not None
    simulation.checks.check_quiet()


def _quiet_ns(faults: Sequence[FaultTable], config: ControllerConfig, now_ns: int) -> int:
    """An instant by which all faults and recoveries are over, and some seconds without a request."""
    ends_s = [fault.at_s + (fault.for_s or 0.0) for fault in faults]
    recovery_ns = PATIENCE_MAX * config.hang_ns + GRACES_MAX * config.hang_grace_ns
    return max(now_ns, round(max(ends_s, default=0.0) * NS_PER_S)) + QUIET_NS + recovery_ns


def play_seeds(
    seeds: Iterable[int], jobs: int, requests: int = REQUESTS, policy: str | None = None
) -> Iterator[PlayedSeed]:
    """Play seeds in ``jobs`` processes; yields in order. A failed check is in ``failure``."""
    work = partial(_attempt, requests=requests, policy=policy)
    with process_pool(jobs) as pool:
        yield from pool.map(work, seeds, chunksize=4)


def process_pool(jobs: int) -> ProcessPoolExecutor:
    """A pool of processes that end with the thread that gives them work, however it ends."""
    # By themselves they would wait for more work forever: each holds both ends of the queue.
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _attempt(seed: int, requests: int, policy: str | None) -> PlayedSeed:
    try:
        return play_seed(seed, requests, policy=policy)
    except AssertionError as error:
        return PlayedSeed(seed, failure=str(error))


def _kinds(rng: np.random.Generator) -> list[ZooModel]:
    models = [model for model in _zoo().paper_models() if model.infer_ns[1] <= SLOW_NS]
    chosen = rng.choice(len(models), size=int(rng.integers(2, 6)), replace=False)
    return [models[at] for at in sorted(chosen.tolist())]


def _pages(rng: np.random.Generator, kinds: list[ZooModel], sets: list[ModelSet], devices: int) -> int:
    """Pages of a device: mostly too few for all models, rarely too few for the largest."""
    sizes = [-(-model.weights_bytes // PAGE_BYTES) for model in kinds]
    largest = max(sizes)
    if rng.random() < 0.04:
        return max(1, largest - 1)
    total = sum(size * entry.copies for size, entry in zip(sizes, sets, strict=True))
    return max(largest + int(rng.integers(0, largest + 1)), round(total / devices * rng.uniform(0.2, 1.5)))


def _loads(rng: np.random.Generator, sets: list[ModelSet], rate_rps: float) -> list[LoadTable]:
    """One to three open loads, with SLOs of their own, and perhaps closed clients."""
    count = int(rng.integers(1, 4))
    shares = rng.dirichlet(np.full(count, 2.0))
    loads = [_open(rng, f"open{at}", sets, rate_rps * float(share)) for at, share in enumerate(shares)]
    if rng.random() < 0.4:
        entry = sets[int(rng.integers(len(sets)))]
        loads.append(
            LoadTable(
                name="closed", models=(entry.name,), arrivals="closed", slo_ms=_slo_ms(rng),
                concurrency=int(rng.integers(1, 5)), retry="fixed" if rng.random() < 0.5 else "retry_after",
                retry_ms=float(rng.uniform(5, 50)), start_jitter_s=float(rng.uniform(0, 0.2)),
            )
        )  # fmt: skip
    return loads


def _with_tenants(
    seed: int, loads: list[LoadTable], devices: int
) -> tuple[tuple[TenantTable, ...], list[LoadTable]]:
    """The loads, some with a priority or of a tenant with a quota; from a random stream of its own."""
    rng = np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 1]))
    tenants = tuple(
        TenantTable(
            name=name, burst_s=log_uniform(rng, 0.01, 2),
            device_ms_per_s=log_uniform(rng, 20, 1000 * devices) if rng.random() < 0.8 else None,
            loaded_bytes_per_s=round(log_uniform(rng, MIB, 4096 * MIB)) if rng.random() < 0.5 else None,
        )
        for name in ("t", "u")
        if rng.random() < 0.4
    )  # fmt: skip
    changed = []
    for load in loads:
        priority = int(rng.integers(1, 16)) if rng.random() < 0.3 else 0
        tenant = _of(rng, "", *[one.name for one in tenants]) or None
        changed.append(replace(load, priority=priority, tenant=tenant))
    return tenants, changed


def _open(rng: np.random.Generator, name: str, sets: list[ModelSet], rate_rps: float) -> LoadTable:
    arrivals = _of(rng, "poisson", "gamma", "fixed")
    popular = rng.random() < 0.6
    bursts = rng.random() < 0.3
    on_s, off_s = (float(rng.uniform(0.05, 0.5)), float(rng.uniform(0.05, 0.5))) if bursts else (None, None)
    chosen = [entry.name for entry in sets if rng.random() < 0.7] or [sets[0].name]
    return LoadTable(
        name=name, models=tuple(chosen), arrivals=arrivals,  # type: ignore[arg-type]
        rate_rps=max(1.0, rate_rps), cv=float(rng.uniform(0.5, 4)) if arrivals == "gamma" else None,
        popularity="zipf" if popular else "uniform", zipf_s=float(rng.uniform(0.5, 1.5)) if popular else None,
        on_s=on_s, off_s=off_s, slo_ms=_slo_ms(rng),
    )  # fmt: skip


def _slo_ms(rng: np.random.Generator) -> float | None:
    return None if rng.random() < 0.08 else log_uniform(rng, 4, 600)


def _long_enough(
    seed: int,
    sets: list[ModelSet],
    loads: list[LoadTable],
    tenants: tuple[TenantTable, ...],
    seconds: float,
    requests: int,
) -> tuple[Scenario, Workload]:
    """The scenario, made longer until its open loads alone send enough."""
    while True:
        scenario = Scenario(
            name=f"seed {seed}", seconds=seconds, models=tuple(sets), loads=tuple(loads), tenants=tenants
        )
        workload = build(scenario, seed)
        sent = sum(len(arrivals.times_ns) for arrivals in workload.open())
        if sent >= requests:
            return scenario, workload
        seconds *= max(1.1, min(4.0, 1.05 * requests / max(1, sent)))


def _config(rng: np.random.Generator) -> ControllerConfig:
    max_batch = int(rng.choice((1, 4, 8, 16)))
    if rng.random() < 0.2:
        return released.settings(max_batch=max_batch)
    config = ControllerConfig(
        policy=_of(rng, *PLAYED), reject_infeasible=rng.random() < 0.7, max_batch=max_batch,
        look_ahead_ns=ms(rng.uniform(1, 10)), slack_ns=ms(rng.uniform(0, 4)),
        network_ns=ms(rng.uniform(0, 0.4)), retries=int(rng.integers(0, 3)),
        min_batch_gain=float(rng.choice((0.0, 0.05))),
    )  # fmt: skip
    rng.random(2)  # two settings were drawn here that are gone: what is drawn next stays the same
    return config


def _truth(rng: np.random.Generator, kinds: list[ZooModel]) -> dict[str, Profile]:
    """True durations: in 80 % of seeds, those of the profiles."""
    wrong = rng.random() < 0.2
    truth = {}
    for model in kinds:
        profile = _zoo().profile(model.kind)
        factor = float(rng.uniform(0.7, 1.6)) if wrong else 1.0
        truth[model.kind] = replace(
            profile, infer_ns={size: round(lasts_ns * factor) for size, lasts_ns in profile.infer_ns.items()}
        )
    return truth


def _faults(rng: np.random.Generator, workload: Workload, cluster: Cluster) -> list[FaultTable]:
    count = int(rng.integers(0, FAULTS_MAX + 1))
    others = KINDS[:-6]  # the last six are drawn from random streams of their own
    kinds = [others[at] for at in rng.integers(len(others), size=count).tolist()]
    names = [name for name, _ in workload.models]
    seconds = workload.duration_ns / NS_PER_S
    return [_fault(rng, kind, names, seconds, cluster) for kind in kinds]


def _fault(
    rng: np.random.Generator, kind: FaultKind, names: list[str], seconds: float, cluster: Cluster
) -> FaultTable:
    start = 0.6 if kind == "drain" else 0.02
    for_s: float | None = seconds * log_uniform(rng, 0.02, 0.5)
    if kind in {"drain", "gateway"} or rng.random() < (0.4 if kind in {"hang", "crash"} else 0.15):
        for_s = None
    factors = {
        "slow": log_uniform(rng, 1.2, 8),
        "loss": log_uniform(rng, 1e-3, 0.2),
        "cancel": float(rng.uniform(0.05, 0.8)),
    }
    delays_ms = {
        "delay": log_uniform(rng, 0.05, 30),
        "skew": log_uniform(rng, 0.02, 60) * float(rng.choice((-1, 1))),
    }
    if kind == "skew" and abs(delays_ms["skew"]) > SKEW_STAYS_MS:
        for_s = for_s or seconds * 0.1
    device = worker = None
    if kind == "slow" and rng.random() < 0.8:
        device = int(rng.integers(cluster.devices))
    elif kind in {"crash", "hang", "loss", "delay", "skew"} and rng.random() < 0.8:
        worker = int(rng.integers(cluster.devices // cluster.devices_per_worker))
    return FaultTable(
        kind=kind,
        at_s=seconds * float(rng.uniform(start, 0.9)),
        for_s=for_s,
        device=device,
        worker=worker,
        model=str(rng.choice(names)) if kind in {"remove_model", "add_model"} else None,
        factor=factors.get(kind),
        ms=delays_ms.get(kind),
    )


def _delay_ends(fault: FaultTable, workload: Workload) -> FaultTable:
    """Let a delay end: on a link slower than windows are long, every action is late (see SKEW_STAYS_MS)."""
    if fault.kind != "delay" or fault.for_s is not None:
        return fault
    return replace(fault, for_s=workload.duration_ns / NS_PER_S * 0.1)


def _of(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]


# ------------------------------------------------------------
# Random faults of seeds. Each function draws from a random stream of its own, so that adding one changes no
# other choice of a seed.


def losses_allowed(seed: int) -> int:
    """``quarantine_after`` of a seed: how many workers a model may take down."""
    return int(np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 2])).integers(0, 4))


def shared_lanes(seed: int) -> bool:
    """Whether the lanes of a seed's devices share cores."""
    return bool(np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 7])).random() < 0.3)


def verdicts(seed: int, loads: Sequence[LoadTable]) -> list[LoadTable]:
    """In 40 % of seeds, some loads want their yes or no at the door, or within a share of their SLO."""
    rng = np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 8]))
    if rng.random() > 0.4:
        return list(loads)
    shares = rng.choice((-1.0, 0.0, 0.1, 0.5), size=len(loads)).tolist()
    return [
        load if share < 0 else replace(load, decide_ms=share * (load.slo_ms or 0.0))
        for load, share in zip(loads, shares, strict=True)
    ]


def killers(seed: int, workload: Workload) -> list[FaultTable]:
    """In 30 % of seeds, a model that kills the workers that run it."""
    rng = np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 3]))
    if rng.random() > 0.3:
        return []
    seconds = workload.duration_ns / NS_PER_S
    name = str(rng.choice([name for name, _ in workload.models]))
    at_s, for_s = seconds * float(rng.uniform(0.02, 0.9)), seconds * log_uniform(rng, 0.02, 0.5)
    return [FaultTable(kind="kills", at_s=at_s, for_s=for_s, model=name)]


def hang_settings(seed: int) -> dict[str, int]:
    """``hang_ns`` and ``hang_grace_ns`` of a seed: often so short that slow workers count as hung, too."""
    rng = np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 4]))
    hang_ms, grace_ms = log_uniform(rng, 15, 500), log_uniform(rng, 5, 1000)
    return {"hang_ns": 0 if rng.random() < 0.15 else ms(hang_ms), "hang_grace_ns": ms(grace_ms)}


def stops(seed: int, workload: Workload, cluster: Cluster) -> list[FaultTable]:
    """Up to two faults of kind ``stop`` or ``hangs``."""
    rng = np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 5]))
    seconds = workload.duration_ns / NS_PER_S
    names = [name for name, _ in workload.models]
    found: list[FaultTable] = []
    for _ in range(int(rng.integers(0, 3))):
        at_s, for_s = seconds * float(rng.uniform(0.02, 0.9)), seconds * log_uniform(rng, 0.005, 0.5)
        if rng.random() < 0.6:
            found.append(FaultTable(kind="hangs", at_s=at_s, for_s=for_s, model=str(rng.choice(names))))
            continue
        worker = int(rng.integers(cluster.devices // cluster.devices_per_worker))
        found.append(
            FaultTable(
                kind="stop", at_s=at_s, for_s=None if rng.random() < 0.3 else for_s,
                worker=None if rng.random() < 0.2 else worker,
            )
        )  # fmt: skip
    return found


def with_restarts(seed: int, workload: Workload, faults: tuple[FaultTable, ...]) -> tuple[FaultTable, ...]:
    """In 30 % of seeds, one to three deaths of the controller, often close to another fault."""
    rng = np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 6]))
    if rng.random() > 0.3:
        return faults
    seconds = workload.duration_ns / NS_PER_S
    restarts = []
    for _ in range(int(rng.integers(1, 4))):
        at_s = seconds * float(rng.uniform(0.02, 0.9))
        if faults and rng.random() < 0.5:
            at_s = max(0.0, faults[int(rng.integers(len(faults)))].at_s + float(rng.uniform(-0.01, 0.01)))
        for_s = None if rng.random() < 0.3 else log_uniform(rng, 0.01, 1)
        restarts.append(FaultTable(kind="controller", at_s=at_s, for_s=for_s))
    return (*faults, *restarts)


def depositions(seed: int, workload: Workload) -> list[FaultTable]:
    """In 20 % of seeds, one or two controllers that lose the lead and do not know it."""
    rng = np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 9]))
    if rng.random() > 0.2:
        return []
    seconds = workload.duration_ns / NS_PER_S
    return [
        FaultTable(
            kind="deposed", at_s=seconds * float(rng.uniform(0.02, 0.9)), for_s=log_uniform(rng, 0.001, 0.5)
        )
        for _ in range(int(rng.integers(1, 3)))
    ]


def busy_spells(seed: int, workload: Workload) -> list[FaultTable]:
    """In 30 % of seeds, up to four spells in which the controller counts as busy, or it does all the time."""
    rng = np.random.Generator(np.random.PCG64([seed, FAULT_SCHEDULE_STREAM + 10]))
    if rng.random() > 0.3:
        return []
    seconds = workload.duration_ns / NS_PER_S
    if rng.random() < 0.3:
        return [FaultTable(kind="busy", at_s=0.0)]
    return [
        FaultTable(kind="busy", at_s=seconds * float(rng.uniform(0, 0.9)), for_s=log_uniform(rng, 0.01, 2))
        for _ in range(int(rng.integers(1, 5)))
    ]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A random number between two bounds, uniform on a logarithmic scale."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))
