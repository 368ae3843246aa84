"""A scenario as what is sent when: rows of open loads, clients of closed ones. It sends nothing.

A scenario is taken as it is; a caller may only play it at another rate or end it early. Everything is drawn
before the run, so that no dice are rolled while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec import structs

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.dice import dice
from clockwork_serve.workload.problems import FieldError
from clockwork_serve.workload.scenario import Scenario
from clockwork_serve.workload.stream import ClosedLoad, Workload, build
from clockwork_serve.workload.tables import Load, Ramp

REQUESTS_MAX: Final = 50_000_000
"""Of one run: 64 bytes each."""
STEPS_MAX: Final = 10_000
CLIENTS: Final = 16
"""The purpose of the dice that say when a closed load's clients start; the workload's own are below it."""
_TRACES: Final = ("azure", "timestamps", "generated")

Column = npt.NDArray[Any]


@dataclass(slots=True)
class Schedule:
    """Requests of open loads in order of time, as columns, and the workload that they are of.

    ``end_ns``: when the last request may be sent; ``warmup_ns``: from when on they are counted.
    """

    workload: Workload
    times_ns: Column
    models: Column
    slos_ns: Column
    loads: Column
    end_ns: int
    warmup_ns: int

    def part(self, number: int, parts: int) -> Schedule:
        """Every ``parts``-th request from ``number`` on: what one of several processes sends."""
        cut = slice(number, None, parts)
        return Schedule(
            self.workload, self.times_ns[cut], self.models[cut], self.slos_ns[cut], self.loads[cut],
            self.end_ns, self.warmup_ns,
        )  # fmt: skip

    def models_asked(self) -> list[int]:
        """The models that can get a request, in the scenario's order."""
        asked = set(np.unique(self.models).tolist())
        for load in self.workload.closed:
            asked.update(load.models)
        return sorted(asked)

    def most_at_once(self, within_ns: int) -> int:
        """The most requests that are due within such a time."""
        if not self.times_ns.size:
            return 0
        first = np.searchsorted(self.times_ns, self.times_ns - within_ns, side="right")
        return int((np.arange(self.times_ns.size) - first).max()) + 1


def make_schedule(
    scenario: Scenario,
    *,
    seed: int,
    traces: Path | None = None,
    rate_scale: float = 1.0,
    seconds: float | None = None,
    most: int = REQUESTS_MAX,
) -> Schedule:
    """Draw everything, ``most`` requests in all. Raises :class:`ConfigError`."""
    if seconds is not None and scenario.warmup_s >= seconds:
        raise ConfigError(
            f"duration: expected more than the scenario's warmup_s = {scenario.warmup_s:g}, found "
            f"{seconds:g}; raise it"
        )
    workload = build(scaled(scenario, rate_scale), seed, traces)
    end_ns = workload.duration_ns if seconds is None else min(workload.duration_ns, round(seconds * NS_PER_S))
    columns: dict[str, list[Column]] = {"times_ns": [], "models": [], "slos_ns": [], "loads": []}
    total = 0
    for arrivals in workload.open():
        total += len(arrivals.times_ns)
        if total > most:
            raise ConfigError(
                f"{scenario.name}: expected at most {most:,} requests in one run, found more; "
                "give --duration or a smaller --rate-scale"
            )
        for name, parts in columns.items():
            kind = np.int64 if name.endswith("_ns") else np.int32
            parts.append(np.array(getattr(arrivals, name), dtype=kind))
        if arrivals.times_ns and arrivals.times_ns[-1] >= end_ns:
            break
    joined = {
        name: np.concatenate(parts) if parts else np.zeros(0, np.int64) for name, parts in columns.items()
    }
    before = int(np.searchsorted(joined["times_ns"], end_ns))
    return Schedule(
        workload=workload,
        **{name: column[:before] for name, column in joined.items()},
        end_ns=end_ns,
        warmup_ns=workload.warmup_ns,
    )


def slo_steps(load: ClosedLoad, end_ns: int) -> list[tuple[int, int]]:
    """From when on which SLO holds for a closed load, both in ns."""
    steps = [(0, load.slo_at(load.start_ns))]
    if load.slo.ramp is not None:
        every_ns = load.slo.ramp.every_ns
        for step in range(1, min(STEPS_MAX, max(0, end_ns - load.start_ns) // every_ns + 1)):
            at_ns = load.start_ns + step * every_ns
            if (slo_ns := load.slo_at(at_ns)) != steps[-1][1]:
                steps.append((at_ns, slo_ns))
    return steps


def clients(workload: Workload, seed: int) -> Iterator[tuple[int, int, int]]:
    """Every client of every closed load: (index of the closed load, model, when it starts in ns)."""
    for index, load in enumerate(workload.closed):
        total = len(load.models) * load.concurrency
        jitter = dice(seed, load.load, CLIENTS).random(total) * load.start_jitter_ns
        starts = load.start_ns + jitter.astype(np.int64)
        for number, start_ns in enumerate(starts.tolist()):
            yield index, load.models[number // load.concurrency], start_ns


def scaled(scenario: Scenario, factor: float) -> Scenario:
    """The scenario with all rates of its open loads times ``factor``. Raises :class:`ConfigError`."""
    if factor == 1.0:
        return scenario
    loads = []
    for index, load in enumerate(scenario.loads):
        try:
            loads.append(_scaled(load, factor))
        except FieldError as error:
            raise ConfigError(f"rate_scale: {factor:g} makes loads[{index}].{error}") from None
    return structs.replace(scenario, loads=tuple(loads))


def _scaled(load: Load, factor: float) -> Load:
    if load.arrivals == "closed":
        return load
    changed: dict[str, Any] = {}
    if load.rate_rps is not None:
        changed["rate_rps"] = load.rate_rps * factor
        if load.rate_ramp is not None:
            changed["rate_ramp"] = _scaled_ramp(load.rate_ramp, factor)
    elif load.arrivals in _TRACES:
        changed["rate_scale"] = (load.rate_scale or 1.0) * factor
    return structs.replace(load, **changed)


def _scaled_ramp(ramp: Ramp, factor: float) -> Ramp:
    return structs.replace(
        ramp,
        add=None if ramp.add is None else ramp.add * factor,
        until=None if ramp.until is None else ramp.until * factor,
    )
