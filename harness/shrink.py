"""Shrinks a failing seed to a small case that fails the same check (delta debugging).

shrunk = shrink(case_of(random_scenario(17)), seconds=60)
play_case(shrunk.case)          the same violation

Requests, faults, clients, models, devices and settings are removed, half of them at a time, then fewer.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from clockwork_serve import messages
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import ControllerEffect, ControllerEvent, Profile, Quota
from clockwork_serve.sim.constants import Cluster
from clockwork_serve.sim.simulation import Simulation
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.stream import Arrivals, ClosedLoad, Workload
from clockwork_serve.workload.tables import FaultTable
from clockwork_serve.workload.zoo import Zoo
from harness.seeds import BEATS_MAX, Chance, run_through

Request = tuple[int, int, int, int]
"""When it is sent in ns, its model, its SLO in ns, its load."""


BEATS_TRIED: Final = 6
"""While shrinking, a case that still runs after this many pulses counts as endless, to save time."""


class Case(Struct, frozen=True, kw_only=True):
    """A random scenario with every request listed; ``seed`` decides only noise and choices of faults."""

    seed: int
    models: tuple[tuple[str, str], ...]
    loads: tuple[str, ...]
    priorities: tuple[int, ...]
    tenants: tuple[str, ...]
    decides_ns: tuple[int, ...]
    quotas: tuple[Quota, ...]
    requests: tuple[Request, ...]
    closed: tuple[ClosedLoad, ...]
    faults: tuple[FaultTable, ...]
    duration_ns: int
    cluster: Cluster
    config: ControllerConfig
    truth: dict[str, Profile]
    noise: bool

    def size(self) -> str:
        """Its size in words."""
        clients = sum(len(load.models) * load.concurrency for load in self.closed)
        return (
            f"{len(self.requests)} requests, {clients} closed clients, {len(self.faults)} faults, "
            f"{len(self.models)} models, {self.cluster.devices} devices, {self.duration_ns / NS_PER_S:.3f} s"
        )


class Violation(Struct, frozen=True, kw_only=True):
    """A failed check: ``kind`` is the exception and the function that raised it, and identifies the check."""

    kind: str
    at_ns: int
    text: str


@dataclass(slots=True)
class Shrunk:
    """The smallest case that was found, and the check that it fails."""

    case: Case
    violation: Violation
    attempts: int
    over: bool
    """Nothing more could be removed; False: the time limit ended the search."""


@dataclass(slots=True)
class _Listed(Workload):
    """A workload with given requests."""

    requests: tuple[Request, ...] = ()

    def open(self) -> Iterator[Arrivals]:
        """All requests as one chunk."""
        if self.requests:
            times_ns, models, slos_ns, loads = (list(column) for column in zip(*self.requests, strict=True))
            yield Arrivals(times_ns, models, slos_ns, loads)


def case_of(chance: Chance) -> Case:
    """The scenario of a seed as a case, which runs as the seed does."""
    workload = chance.workload
    requests = tuple(
        request
        for part in workload.open()
        for request in zip(part.times_ns, part.models, part.slos_ns, part.loads, strict=True)
    )
    return Case(
        seed=chance.seed, models=workload.models, loads=workload.loads, priorities=workload.priorities,
        tenants=workload.tenants, decides_ns=workload.decides_ns, quotas=workload.quotas, requests=requests,
        closed=workload.closed, faults=tuple(chance.scenario.faults), duration_ns=workload.duration_ns,
        cluster=chance.cluster,
        config=chance.config, truth=chance.truth, noise=chance.noise,
    )  # fmt: skip


class ReceivedRequests:
    """A watcher that lists the requests that reach the controller."""

    def __init__(self, case: Case) -> None:
        self._place = {name: at for at, (name, _) in enumerate(case.models)}
        self._closed = {model: load.load for load in case.closed for model in load.models}
        self._loads = {(at_ns, model): load for at_ns, model, _, load in case.requests}
        self.requests: list[Request] = []

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Add the requests of one step."""
        for event in events:
            if isinstance(event, messages.Request):
                model, at_ns = self._place[event.model.partition("/")[0]], event.arrival_ns
                load = self._loads.get((at_ns, model), self._closed.get(model, 0))
                self.requests.append((at_ns, model, event.deadline_ns - at_ns, load))


def play_case(
    case: Case, beats_max: int = BEATS_MAX, watcher: ReceivedRequests | None = None
) -> Violation | None:
    """Run a case with all checks; returns the failed check, if any."""
    workload = _Listed(
        models=case.models, loads=case.loads, priorities=case.priorities, tenants=case.tenants,
        decides_ns=case.decides_ns, closed=case.closed, duration_ns=case.duration_ns, warmup_ns=0,
        quotas=case.quotas,
        requests=case.requests,
    )  # fmt: skip
    simulation = None
    try:
        simulation = Simulation(
            workload=workload, zoo=Zoo.read("v100"), cluster=case.cluster, config=case.config, seed=case.seed,
            truth=case.truth or None, noise=case.noise, faults=case.faults, checks=True,
            watchers=[] if watcher is None else [watcher],
        )  # fmt: skip
        run_through(simulation, case.faults, beats_max)
    except Exception as error:  # noqa: BLE001 - whatever a broken brain raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {Path(where.filename).name}:{where.name}"
        at_ns = 0 if simulation is None else simulation.now_ns
        return Violation(kind=kind, at_ns=at_ns, text=repr(error))
    return None


def write_case(path: Path, case: Case) -> None:
    """Write a case as JSON, to be read and edited by hand."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(case), indent=1) + b"\n")


def read_case(path: Path) -> Case:
    """Read what :func:`write_case` wrote. Raises :class:`ConfigError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Case)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"case: expected a file that a shrinker wrote, found {path}: {error}") from None


def shrink(
    case: Case, *, seconds: float = 60.0, tell: Callable[[Case, int], None] = lambda case, attempts: None
) -> Shrunk:
    """The smallest case found in ``seconds``. Raises :class:`ConfigError` if ``case`` does not fail."""
    violation = play_case(case)
    if violation is None:
        raise ConfigError(
            "shrink: expected a scenario that fails; found one that holds: nothing to make smaller"
        )
    return _Shrinker(case, violation, time.monotonic() + seconds, tell).run()


class _Shrinker:
    """The best case so far, and attempts to make it smaller."""

    def __init__(
        self, case: Case, violation: Violation, end_s: float, tell: Callable[[Case, int], None]
    ) -> None:
        self._best, self._violation = case, violation
        self._end_s, self._send_to_controller = end_s, tell
        self._attempts = 0

    def run(self) -> Shrunk:
        """Shrink until nothing more can be removed, or the time limit."""
        steps = (
            self._cut, self._plainer, partial(self._fewer, "faults"), partial(self._fewer, "closed"),
            self._no_clients, partial(self._fewer, "requests"), self._fewer_models, self._fewer_devices,
            self._usual_settings, self._sooner,
        )  # fmt: skip
        before = None
        while before != self._best and not self._late:
            before = self._best
            for step in steps:
                step()
        return Shrunk(self._best, self._violation, self._attempts, over=not self._late)

    @property
    def _late(self) -> bool:
        return time.monotonic() > self._end_s

    def _try(self, **fields: Any) -> bool:
        """Whether the best case with other fields fails the same check; if so, it becomes the best one."""
        case = replace(self._best, **fields)
        if case == self._best or self._late:
            return False
        self._attempts += 1
        found = play_case(case, BEATS_TRIED)
        good = found is not None and found.kind == self._violation.kind
        if good and found is not None:
            self._best, self._violation = case, found
        self._send_to_controller(self._best, self._attempts)
        return good

    def _fewer(self, field: str) -> None:
        """Remove as many entries of a field as still fail, half of them at a time, then fewer."""
        kept: tuple[Any, ...] = getattr(self._best, field)
        size = len(kept)
        while size and kept and not self._late:
            at = 0
            while at < len(kept) and not self._late:
                fewer = kept[:at] + kept[at + size :]
                if self._try(**{field: fewer}):
                    kept = fewer
                else:
                    at += size
            size //= 2

    def _cut(self) -> None:
        """Drop requests and faults after the violation; they cannot matter."""
        at_ns = self._violation.at_ns
        requests = tuple(one for one in self._best.requests if one[0] <= at_ns)
        faults = tuple(one for one in self._best.faults if one.at_s * NS_PER_S <= at_ns)
        duration_ns = min(self._best.duration_ns, at_ns + 1)
        if not self._try(requests=requests, faults=faults, duration_ns=duration_ns):
            self._try(requests=requests, faults=faults)

    def _plainer(self) -> None:
        self._try(noise=False)
        self._try(truth={})
        self._try(quotas=(), tenants=("",) * len(self._best.loads))
        self._try(priorities=(0,) * len(self._best.loads))

    def _no_clients(self) -> None:
        """Replace closed-loop clients by the requests that they sent."""
        if self._best.closed:
            heard = ReceivedRequests(self._best)
            play_case(self._best, BEATS_TRIED, heard)
            self._try(requests=tuple(sorted(heard.requests)), closed=())

    def _fewer_models(self) -> None:
        """Drop models that no request and no fault names."""
        best = self._best
        asked = {one[1] for one in best.requests} | {model for load in best.closed for model in load.models}
        named = {fault.model for fault in best.faults}
        used = [at for at, (name, _) in enumerate(best.models) if at in asked or name in named]
        place = {at: number for number, at in enumerate(used)}
        self._try(
            models=tuple(best.models[at] for at in used),
            requests=tuple((at_ns, place[model], slo, load) for at_ns, model, slo, load in best.requests),
            closed=tuple(
                dataclasses.replace(load, models=tuple(place[model] for model in load.models))
                for load in best.closed
            ),
        )

    def _fewer_devices(self) -> None:
        for devices in range(1, self._best.cluster.devices):
            if self._try(cluster=replace(self._best.cluster, devices=devices, devices_per_worker=1)):
                return
        self._try(cluster=replace(self._best.cluster, devices_per_worker=1))
        self._try(cluster=replace(self._best.cluster, lanes_share=False))

    def _usual_settings(self) -> None:
        usual = ControllerConfig()
        for field in msgspec.structs.fields(ControllerConfig):
            value = getattr(usual, field.name)
            if value == getattr(self._best.config, field.name):
                continue
            try:
                config = replace(self._best.config, **{field.name: value})
            except ConfigError:
                continue  # this default contradicts another setting of the case
            self._try(config=config)

    def _sooner(self) -> None:
        """Halve all instants; faults keep their durations."""
        best = self._best
        self._try(
            requests=tuple((at_ns // 2, *rest) for at_ns, *rest in best.requests),
            faults=tuple(replace(fault, at_s=fault.at_s / 2) for fault in best.faults),
            duration_ns=best.duration_ns // 2,
        )
