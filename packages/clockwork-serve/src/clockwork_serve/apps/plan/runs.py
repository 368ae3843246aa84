"""Simulations of sets of devices: in processes of their own, kept in a file, never made twice."""

from __future__ import annotations

import ctypes
import hashlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from msgspec import Struct, structs

import clockwork_serve
from clockwork_serve.apps.plan.demand import BUSY, PlanMinutes, may_miss
from clockwork_serve.apps.simulate import DeviceReport, LoadReport, play, question_of, report
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.sim import Constants, read_constants
from clockwork_serve.sim.tally import CAUSES, MissCount
from clockwork_serve.telemetry.journal import sources_hash
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.traces import trace_files
from clockwork_serve.workload.zoo import Zoo

MODELS_NAMED: Final = 5
_DECIDE: Final = ("controller", "worker", "messages", "sim", "workload", "apps", "fence.py", "machine.py")
"""What a simulation's result follows from, beside its job."""
_SLOTS: Final = 256
_POLL_S: Final = 0.2
_PR_SET_PDEATHSIG: Final = 1


class PlanJob(Struct, frozen=True, kw_only=True):
    """One simulation: a scenario with the devices and deadlines that it is to have.

    ``allowed``: how many requests may miss in each minute; it is stopped after one that has more. None: it
    runs to its end.
    """

    scenario: Scenario
    zoo: Zoo
    config: ControllerConfig
    seed: int
    traces: str | None = None
    allowed: tuple[int, ...] | None = None
    constants: Constants | None = None

    def key(self) -> str:
        """A hash of all that its result follows from."""
        scenario = self.scenario
        base = [] if self.traces is None else [Path(self.traces)]
        beside = [] if scenario.source is None else [Path(scenario.source.file).parent]
        files = [file for load in scenario.loads for file in trace_files(load, [*base, *beside])]
        found = hashlib.sha256()
        for part in (
            clockwork_serve.__version__, _sources(),
            structs.replace(scenario, source=None, cluster=structs.replace(scenario.cluster, zoo="zoo")),
            list(self.zoo.models.values()), self.config,
            self.constants or read_constants(), self.seed, self.allowed,
        ):  # fmt: skip
            found.update(msgspec.json.encode(part))
        for path in files:
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()[:32]


@cache
def _sources() -> str:
    return sources_hash(Path(clockwork_serve.__file__).parent, _DECIDE)


class CauseCount(Struct, frozen=True, kw_only=True):
    """Requests that missed for one cause, and those of the models with most of them."""

    cause: str
    requests: int
    models: dict[str, int]


class PlanRun(Struct, frozen=True, kw_only=True):
    """How one simulation went: requests with an SLO by minute, those of all loads, and why some missed.

    ``quota``: requests refused by a tenant's quota, which no device would change; they are left out.
    ``stopped``: it was not played to its end, for a minute had missed the target.
    """

    ended: tuple[int, ...]
    in_time: tuple[int, ...]
    quota: int
    causes: tuple[CauseCount, ...]
    loads: tuple[LoadReport, ...]
    devices: DeviceReport
    stopped: bool

    @property
    def shares(self) -> tuple[float, ...]:
        """Share in time of each minute; of a stopped run, of those that had begun."""
        counts = zip(self.in_time, self.ended, strict=True)
        return tuple(good / ended if ended else 1.0 for good, ended in counts)

    def broken(self, target: float) -> list[int]:
        """The minutes that missed the target."""
        counts = enumerate(zip(self.in_time, self.ended, strict=True))
        return [at for at, (good, ended) in counts if ended - good > may_miss(target, ended)]

    def met(self, target: float) -> bool:
        """Whether the target was met in every minute."""
        return not self.stopped and not self.broken(target)

    def needed(self, target: float) -> float:
        """A guess: how many times as much it takes to just meet the target."""
        if self.broken(target):
            return 1 / max(0.05, min(self.shares))
        return min(1.0, max(self.devices.exec_busy, self.devices.load_busy) / BUSY)


def cause_counts(count: MissCount) -> tuple[CauseCount, ...]:
    """Why requests missed, the most frequent cause first."""
    found = []
    for cause in CAUSES:
        models = Counter({
            model.removesuffix("/1"): number for (why, model), number in count.missed.items() if why == cause
        })  # fmt: skip
        if models:
            named = dict(sorted(models.items(), key=lambda each: (-each[1], each[0]))[:MODELS_NAMED])
            found.append(CauseCount(cause=cause, requests=models.total(), models=named))
    return tuple(sorted(found, key=lambda each: -each.requests))


def run_job(
    job: PlanJob, tell: Callable[[float], None] = lambda seconds: None,
    stopped: Callable[[], bool] = lambda: False,
) -> PlanRun | None:  # fmt: skip
    """Simulate; None if somebody stopped it. ``tell`` is told how far it is, in simulated seconds."""
    question = question_of(
        job.scenario, job.zoo, config=job.config, seed=job.seed, traces=job.traces, constants=job.constants
    )
    minutes, hop_ns = PlanMinutes.of(job.scenario), question.constants.network.gateway_ns
    count = MissCount(minutes.from_ns, minutes.count, hop_ns, job.allowed)
    played = play(
        question.simulation(watchers=[count], stretches=False), tell=lambda now_s, took_s: tell(now_s),
        stopped=lambda: count.hopeless or stopped(),
    )  # fmt: skip
    if played.cut and not count.hopeless:
        return None
    made = report(question, played)
    urgent = zip(job.scenario.loads, played.tally.loads, strict=True)
    missed = sum(each.ended - each.ok for load, each in urgent if load.slo_ms is not None)
    count.add_unseen(missed - count.quota - sum(count.missed.values()))
    return PlanRun(
        ended=tuple(count.ended), in_time=tuple(count.in_time), quota=count.quota, causes=cause_counts(count),
        loads=made.loads, devices=made.devices, stopped=played.cut,
    )  # fmt: skip


# ------------------------------------------------------------
# Processes, and what they found before.


_shared: Any = None
"""In a process that simulates: [whether to stop, then by job: simulated seconds]."""


def _begin(shared: Any) -> None:
    global _shared  # noqa: PLW0603 - a process of a pool has nothing else
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is its parent's to hear
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _work(job: PlanJob, slot: int) -> PlanRun | None:
    def tell(seconds: float) -> None:
        _shared[slot] = seconds

    return None if _shared[0] else run_job(job, tell, lambda: bool(_shared[0]))


class PlanRuns:
    """Makes simulations in ``processes`` at once; their results are kept in ``file``, one a line.

    ``tell`` is told (finished, asked for, simulated seconds a second) now and then; ``stopped`` is asked.
    """

    def __init__(
        self, file: Path | None, processes: int, *,
        tell: Callable[[float, int, float], None] = lambda done, asked, speed: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._file, self._tell, self._stopped = file, tell, stopped
        self._known: dict[str, PlanRun] = {} if file is None else _read(file)
        self._context = get_context("spawn")
        self._shared: Any = self._context.RawArray("d", _SLOTS)
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._began = time.monotonic()
        self.made = self.reused = 0
        """Simulations that were made, and those that had been before."""
        self._used: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shared[0] = 1
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def play(self, jobs: Sequence[PlanJob]) -> list[PlanRun | None]:
        """The result of each, in their order; None where somebody stopped it."""
        keys = [(structs.replace(job, allowed=None).key(), job.key()) for job in jobs]
        left: dict[Future[PlanRun | None], tuple[int, int]] = {}
        for at, (whole, cut) in enumerate(keys):
            if whole in self._known or cut in self._known:
                self.reused += not self._used.intersection((whole, cut))
                self._used.update((whole, cut))
            else:
                left.update([self._submit(jobs[at], at)])
        while left:
            done, _ = wait(left, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                at, _ = left.pop(future)
                if (run := future.result()) is not None:
                    self._keep(keys[at][run.stopped], run)
            self._show(jobs[0].scenario.seconds, [slot for _, slot in left.values()])
            self._shared[0] = self._stopped()
        return [self._known.get(whole) or self._known.get(cut) for whole, cut in keys]

    def _submit(self, job: PlanJob, at: int) -> tuple[Future[PlanRun | None], tuple[int, int]]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=self._context, initializer=_begin, initargs=(self._shared,)
            )
        self.made += 1
        slot = 1 + self.made % (_SLOTS - 1)
        self._shared[slot] = 0.0
        return self._pool.submit(_work, job, slot), (at, slot)

    def _show(self, length_s: float, slots: Sequence[int]) -> None:
        under_way_s = sum(min(length_s, self._shared[slot]) for slot in slots)
        done = self.made - len(slots) + under_way_s / length_s
        took_s = time.monotonic() - self._began
        self._tell(done, self.made, done * length_s / took_s if took_s else 0.0)

    def _keep(self, key: str, run: PlanRun) -> None:
        self._known[key] = run
        self._used.add(key)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file:
                file.write(msgspec.json.encode(_KeptRun(key=key, run=run)) + b"\n")


class _KeptRun(Struct, frozen=True, kw_only=True):
    """A line of the file."""

    key: str
    run: PlanRun


def _read(file: Path) -> dict[str, PlanRun]:
    """What is there; a line that another version wrote, or that is cut short, is passed over."""
    found = {}
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            kept = msgspec.json.decode(line, type=_KeptRun)
        except msgspec.MsgspecError:
            continue
        found[kept.key] = kept.run
    return found
