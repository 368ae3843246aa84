"""The requests of a scenario, merged by time and streamed; it never holds a whole run and asks no clock.

    workload = build(read_scenario("fig5.toml"), seed=1)
    for arrivals in workload.open(): ...            open loads
    for load in workload.closed: ...                closed loads, which their driver runs

The same scenario and seed give the same stream in any process (with the same numpy). Every load has dice of
its own: what one draws never changes another. Blocks are cut by the loads alone, so there is no window whose
length could change the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from clockwork_serve.errors import did_you_mean
from clockwork_serve.messages import Quota
from clockwork_serve.units import NS_PER_MS, NS_PER_S, ms
from clockwork_serve.workload.processes import (
    ARRIVALS,
    BURSTS,
    LONGEST_NS,
    Block,
    Popularity,
    dice,
    gathered,
    pieces,
    poisson,
    renewals,
)
from clockwork_serve.workload.scenario import ALL_KINDS, Scenario
from clockwork_serve.workload.tables import NO_SLO_MS, FieldError, LoadTable, Ramp, Retry
from clockwork_serve.workload.traces import Place, trace_files, trace_load
from clockwork_serve.workload.zoo import Zoo

_MOST: Final = 1 << 16  # requests in one ``Arrivals``: lists of this length cost about 7 MB

Blocks = Callable[[], Iterator[Block]]


@dataclass(slots=True)
class Arrivals:
    """Requests in order of time: four lists of one length.

    ``times_ns``: ascending; ``models``: indices into ``Workload.models``; ``slos_ns``: time until the
    deadline; ``loads``: indices into ``Workload.loads``. Requests of one instant are in the order of their
    loads.
    """

    times_ns: list[int]
    models: list[int]
    slos_ns: list[int]
    loads: list[int]


@dataclass(slots=True, frozen=True)
class Slo:
    """Time until the deadline of a load's requests, which may change in steps from ``start_ns`` on."""

    slo_ms: float
    ramp: Ramp | None
    start_ns: int

    def at(self, now_ns: int) -> int:
        """The SLO of a request that comes at ``now_ns``, in ns; at least 1."""
        if self.ramp is None:
            return max(1, ms(self.slo_ms))
        return self._after(max(0, now_ns - self.start_ns) // self.ramp.every_ns)

    def of(self, times_ns: np.ndarray) -> int | np.ndarray:
        """The SLOs of requests that come at these times: one number if they are all alike."""
        if self.ramp is None or not times_ns.size:
            return self.at(self.start_ns)
        steps = (times_ns - self.start_ns) // self.ramp.every_ns
        first = int(steps[0])
        if first == int(steps[-1]):
            return self._after(first)
        values = [self._after(step) for step in range(first, int(steps[-1]) + 1)]
        return np.array(values, dtype=np.int64)[steps - first]  # type: ignore[no-any-return]

    def _after(self, steps: int) -> int:
        assert self.ramp is not None
        return max(1, ms(min(self.ramp.value(self.slo_ms, steps), NO_SLO_MS)))


@dataclass(slots=True, frozen=True)
class ClosedLoad:
    """A closed load as data: each model has ``concurrency`` clients that send, wait for the answer, repeat.

    Clients start within ``start_jitter_ns`` after ``start_ns``, evenly spread by the driver's dice, and send
    nothing from ``stop_ns`` on. After a refusal a client waits ``retry_ns`` (None: the driver's default), or
    with ``retry`` "retry_after" as long as the refusal says.
    """

    load: int
    models: tuple[int, ...]
    concurrency: int
    slo: Slo
    start_ns: int
    stop_ns: int
    start_jitter_ns: int
    retry: Retry
    retry_ns: int | None


@dataclass(slots=True)
class OpenLoad:
    """An open load: its index, its SLO, and how to begin its blocks anew."""

    load: int
    slo: Slo
    blocks: Blocks


@dataclass(slots=True)
class Workload:
    """A scenario made ready: models with their kinds, loads with their classes, streams, clients, quotas.

    ``notes`` say in words how traces were mapped and scaled; every report prints them.
    """

    models: tuple[tuple[str, str], ...]
    loads: tuple[str, ...]
    priorities: tuple[int, ...]
    tenants: tuple[str, ...]
    decides_ns: tuple[int, ...]
    closed: tuple[ClosedLoad, ...]
    duration_ns: int
    warmup_ns: int
    notes: tuple[str, ...] = ()
    quotas: tuple[Quota, ...] = ()
    streams: tuple[OpenLoad, ...] = field(default=(), repr=False)

    def open(self) -> Iterator[Arrivals]:
        """All requests of the open loads, each time anew; a minute and 65,536 of them at once at most."""
        heads = [_Head(stream) for stream in self.streams]
        reached_ns = 0
        while heads := [head for head in heads if head.fill()]:
            horizon_ns = min(*(head.end_ns for head in heads), reached_ns + LONGEST_NS)
            reached_ns = max(reached_ns, horizon_ns)
            yield from _merged([part for head in heads if (part := head.take(horizon_ns)) is not None])


@dataclass(slots=True)
class _Part:
    """Requests of one load."""

    load: int
    times_ns: np.ndarray
    models: np.ndarray
    slos: int | np.ndarray


class _Head:
    """The block of a load that is being merged."""

    __slots__ = ("_block", "_blocks", "_stream", "_taken")

    def __init__(self, stream: OpenLoad) -> None:
        self._stream = stream
        self._blocks = stream.blocks()
        self._block: Block | None = None
        self._taken = 0

    @property
    def end_ns(self) -> int:
        assert self._block is not None
        return self._block.end_ns

    def fill(self) -> bool:
        """Have a block in hand; False: the load is over."""
        if self._block is None:
            self._block, self._taken = next(self._blocks, None), 0
        return self._block is not None

    def take(self, horizon_ns: int) -> _Part | None:
        """The requests before ``horizon_ns``, which is not beyond the block's end; None if there are none."""
        block = self._block
        assert block is not None
        first = self._taken
        if horizon_ns == block.end_ns:
            self._block, last = None, block.times_ns.size
        else:
            self._taken = last = int(np.searchsorted(block.times_ns, horizon_ns))
        if first == last:
            return None
        times = block.times_ns[first:last]
        slos = self._stream.slo.of(times) if block.slos_ns is None else block.slos_ns[first:last]
        return _Part(self._stream.load, times, block.models[first:last], slos)


def _merged(parts: list[_Part]) -> Iterator[Arrivals]:
    """Requests of several loads in order of time."""
    if not parts:
        return
    if len(parts) == 1:
        times, models, order = parts[0].times_ns, parts[0].models, None
    else:
        times = np.concatenate([part.times_ns for part in parts])
        order = np.argsort(times, kind="stable")
        times, models = times[order], np.concatenate([part.models for part in parts])[order]
    loads = _column([part.load for part in parts], parts, order)
    slos = _column([part.slos for part in parts], parts, order)
    for first in range(0, times.size, _MOST):
        piece = slice(first, min(first + _MOST, times.size))
        size = piece.stop - first
        yield Arrivals(
            times[piece].tolist(),
            models[piece].tolist(),
            slos[piece].tolist() if isinstance(slos, np.ndarray) else [slos] * size,
            loads[piece].tolist() if isinstance(loads, np.ndarray) else [loads] * size,
        )


def _column(
    values: list[int] | list[int | np.ndarray], parts: list[_Part], order: np.ndarray | None
) -> int | np.ndarray:
    """One value per request; one number if all are alike, which costs least."""
    first = values[0]
    if isinstance(first, int) and all(isinstance(value, int) and value == first for value in values):
        return first
    spread = [
        np.full(part.times_ns.size, value) if isinstance(value, int) else value
        for value, part in zip(values, parts, strict=True)
    ]
    joined = np.concatenate(spread)
    return joined if order is None else joined[order]


def build(scenario: Scenario, seed: int, base: Path | None = None) -> Workload:
    """Make a scenario ready; traces are looked for in ``base``, then beside the scenario.

    Raises :class:`ConfigError` for what only shows now: names given twice, a missing or broken trace.
    """
    names, members = _models(scenario)
    known = {name for name, _ in names}
    for index, fault in enumerate(scenario.faults):
        if fault.model is not None and fault.model not in known:
            advice = did_you_mean(fault.model, known)
            raise scenario.wrong(
                f"faults[{index}].model", f"expected a model, found {fault.model!r}; {advice}"
            )
    streams: list[OpenLoad] = []
    closed: list[ClosedLoad] = []
    notes: list[str] = []
    duration_ns = round(scenario.seconds * NS_PER_S)
    for index, load in enumerate(scenario.loads):
        models = np.concatenate([members[name] for name in load.models])
        stop_ns = duration_ns if load.stop_s is None else round(load.stop_s * NS_PER_S)
        slo = Slo(load.slo_ms or NO_SLO_MS, load.slo_ramp, round(load.start_s * NS_PER_S))
        if load.arrivals == "closed":
            closed.append(_closed(index, load, models, slo, stop_ns))
            continue
        place = Place(seed, index, slo.start_ns, stop_ns)
        if load.arrivals in ("azure", "timestamps", "generated"):
            called = [names[at][0] for at in models.tolist()]
            blocks, said = _trace_blocks(scenario, load, called, place, base)
            notes += said
        else:
            blocks = _open_blocks(load, models.size, place)
        streams.append(OpenLoad(index, slo, _with_models(blocks, models)))
    return Workload(
        models=names,
        loads=tuple(load.name for load in scenario.loads),
        priorities=tuple(load.priority for load in scenario.loads),
        tenants=tuple(load.tenant or "" for load in scenario.loads),
        decides_ns=tuple(
            -1 if load.decide_ms is None else round(load.decide_ms * NS_PER_MS) for load in scenario.loads
        ),
        quotas=tuple(tenant.quota() for tenant in scenario.tenants),
        closed=tuple(closed),
        duration_ns=duration_ns,
        warmup_ns=round(scenario.warmup_s * NS_PER_S),
        notes=tuple(notes),
        streams=tuple(streams),
    )


def _models(scenario: Scenario) -> tuple[tuple[tuple[str, str], ...], dict[str, np.ndarray]]:
    """Names and kinds of all models, and the indices of each set's."""
    models: dict[str, str] = {}
    members: dict[str, np.ndarray] = {}
    for index, entry in enumerate(scenario.models):
        kinds = [(entry.name, entry.kind)]
        if entry.kind == ALL_KINDS:
            kinds = [(one.kind, one.kind) for one in Zoo.read(scenario.cluster.zoo).paper_models()]
        first = len(models)
        for name, kind in kinds:
            for copy in range(entry.copies):
                full = name if entry.copies == 1 else f"{name}-{copy:04d}"
                if full in models:
                    raise scenario.wrong(
                        f"models[{index}].name",
                        f"expected each model once, found {full!r} again; rename a set",
                    )
                models[full] = kind
        members[entry.name] = np.arange(first, len(models), dtype=np.int32)
    return tuple(models.items()), members


def _closed(index: int, load: LoadTable, models: np.ndarray, slo: Slo, stop_ns: int) -> ClosedLoad:
    assert load.concurrency is not None
    return ClosedLoad(
        load=index, models=tuple(models.tolist()), concurrency=load.concurrency, slo=slo,
        start_ns=round(load.start_s * NS_PER_S), stop_ns=stop_ns,
        start_jitter_ns=round(load.start_jitter_s * NS_PER_S), retry=load.retry,
        retry_ns=None if load.retry_ms is None else round(load.retry_ms * NS_PER_MS),
    )  # fmt: skip


def _open_blocks(load: LoadTable, models: int, place: Place) -> Blocks:
    """How to begin the blocks of an open load that is no trace."""
    popularity = Popularity(models, (load.zipf_s or 1.0) if load.popularity == "zipf" else None)
    cv = (load.cv or 1.0) if load.arrivals == "gamma" else 0.0

    def blocks() -> Iterator[Block]:
        parts = pieces(load, models, place.stop_ns, dice(place.seed, place.load, BURSTS))
        rng = dice(place.seed, place.load, ARRIVALS)
        if load.arrivals == "poisson":
            return poisson(parts, popularity, rng)
        return renewals(parts, popularity, cv, rng)

    return blocks


def _trace_blocks(
    scenario: Scenario, load: LoadTable, models: list[str], place: Place, base: Path | None
) -> tuple[Blocks, tuple[str, ...]]:
    """How to begin the blocks of a trace, and the notes about it."""
    beside = Path(scenario.source.file).parent if scenario.source else Path()
    try:
        files = trace_files(load, [beside] if base is None else [base, beside])
        ready = trace_load(load, models, files, place)
    except FieldError as error:
        raise scenario.wrong(f"loads[{place.load}].{error.field}", error.what) from None
    return ready.blocks, ready.notes


def _with_models(begin: Blocks, models: np.ndarray) -> Blocks:
    """The same blocks, gathered, with the workload's models in place of the load's."""

    def blocks() -> Iterator[Block]:
        for block in gathered(begin()):
            yield Block(block.end_ns, block.times_ns, models[block.models], block.slos_ns)

    return blocks
