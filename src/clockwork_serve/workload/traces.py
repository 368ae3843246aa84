"""Makes a load's trace ready: reads it, scales it, maps it, and says what was done; it draws no arrival."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload import dice as purposes
from clockwork_serve.workload.azure import MinuteTrace, is_2021, read_minutes, rows_2021
from clockwork_serve.workload.dice import dice
from clockwork_serve.workload.generated import GeneratedTrace
from clockwork_serve.workload.mapping import Assignment, assign, counted
from clockwork_serve.workload.problems import FieldError, unfit
from clockwork_serve.workload.processes import Block, Floats, Popularity
from clockwork_serve.workload.replay import MINUTE_NS, Minutes, Replay, as_called, as_rates, exactly
from clockwork_serve.workload.tables import Counts, Load
from clockwork_serve.workload.timestamps import has_functions, rows_timestamps, survey


@dataclass(slots=True)
class TraceLoad:
    """A trace load made ready: how to begin its blocks (models counted from 0 within the load), and notes."""

    blocks: Callable[[], Iterator[Block]]
    notes: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class Process:
    """How minute counts become arrivals, and in words: where they are from, what the CV is."""

    cv: float | Floats
    counts: Counts
    source: str
    said: str


@dataclass(slots=True, frozen=True)
class Place:
    """Which load this is, and when it runs: what its dice and its axis need."""

    seed: int
    load: int
    start_ns: int
    stop_ns: int


def trace_load(load: Load, models: int, files: list[Path], place: Place) -> TraceLoad:
    """Read the trace of a load of ``models`` models. Raises :class:`ConfigError`."""
    if load.arrivals == "generated":
        return _generated(load, models, place)
    if load.arrivals == "azure" and not is_2021(files[0]):
        return _azure_2019(load, models, files, place)
    return _called(load, models, files, place)


def _generated(load: Load, models: int, place: Place) -> TraceLoad:
    assert load.functions is not None
    trace = GeneratedTrace(
        load.functions,
        lambda number: dice(
            place.seed, place.load, purposes.FUNCTIONS if number == 0 else purposes.MINUTES, number
        ),
        load.first_minute,
        load.minutes,
    )
    source = (
        f"generated trace of {load.functions:,} functions (expected {trace.per_h.sum() / 3600:,.1f} calls/s)"
    )
    given = assign(trace.per_h, load, models, _mapping_dice(place))
    cv = trace.cv if load.cv is None else load.cv
    how = "1.1, and 4 to 13 for a tenth of the functions" if load.cv is None else f"{load.cv:g}"
    process = Process(cv, load.counts or "exact", source, how)
    return _minutes(load, place, trace, given, process, natural_rps=given.volume / 3600)


def _azure_2019(load: Load, models: int, files: list[Path], place: Place) -> TraceLoad:
    wanted = -(-(place.stop_ns - place.start_ns) // MINUTE_NS)
    trace: MinuteTrace = read_minutes(files, load.first_minute, load.minutes, wanted)
    calls = trace.volumes.sum()
    source = (
        f"{', '.join(file.name for file in files)}: minutes {load.first_minute} to "
        f"{load.first_minute + trace.minutes - 1}, {trace.volumes.size:,} functions, {calls:,.0f} calls "
        f"({calls / trace.minutes / 60:,.1f}/s)"
    )
    given = assign(trace.volumes, load, models, _mapping_dice(place))
    cv = 1.0 if load.cv is None else load.cv
    natural = given.volume / trace.minutes / 60
    process = Process(cv, load.counts or "rates", source, f"{cv:g}")
    return _minutes(load, place, trace, given, process, natural_rps=natural)


def _minutes(
    load: Load, place: Place, trace: Minutes, given: Assignment, process: Process, *, natural_rps: float
) -> TraceLoad:
    """Calls per minute, scaled: from here on, traces read and generated are alike."""
    scale = _scale(load, natural_rps)
    replay = Replay(
        place.start_ns, place.stop_ns, given.models, given.kept * scale, natural_rps * scale, load.rate_ramp
    )
    draw = as_rates if process.counts == "rates" else exactly
    poisson = isinstance(process.cv, float) and process.cv == 1.0
    gaps = "Poisson" if poisson else f"gamma gaps of CV {process.said}"
    scaled = f"scaled by {scale:.4g} to a mean of {natural_rps * scale:,.1f} requests/s"
    inside = f"inside a minute: {gaps}; minute counts are {process.counts}"
    return TraceLoad(
        lambda: draw(trace, replay, process.cv, dice(place.seed, place.load, purposes.ARRIVALS)),
        _named(load, (process.source, *given.notes, scaled, inside)),
    )


def _called(load: Load, models: int, files: list[Path], place: Place) -> TraceLoad:
    """Traces of single calls."""
    if len(files) > 1:
        raise unfit("trace", "one file of single calls", [file.name for file in files], "join the files")
    file = files[0]
    azure = load.arrivals == "azure"
    if azure:
        _refuse(load, ("cv", "counts", "rate_ramp"), "a trace of single calls has its own times")
    rows = partial(rows_2021 if azure else rows_timestamps, file)
    trace = survey(file, rows, load.first_minute, load.minutes)
    named = azure or has_functions(file)
    popularity: Popularity | None = None
    if named:
        _refuse(load, ("popularity", "zipf_s"), "the trace's functions are mapped to models")
    else:
        _refuse(load, ("drop_top", "cap_share", "mapping"), "the trace has no column `function`")
        popularity = Popularity(models, (load.zipf_s or 1.0) if load.popularity == "zipf" else None)
    given = assign(trace.volumes, load, models, _mapping_dice(place))
    natural_rps = given.volume * NS_PER_S / trace.length_ns
    faster = _scale(load, natural_rps)
    replay = Replay(place.start_ns, place.stop_ns, given.models, given.kept, natural_rps * faster, None)
    calls = trace.volumes.sum()
    length_s = trace.length_ns / NS_PER_S
    source = (
        f"{file.name}: {length_s:,.0f} s from its minute {load.first_minute}, "
        f"{counted(trace.volumes.size, 'function')}, {calls:,.0f} calls ({calls / length_s:,.1f}/s)"
    )
    how = (
        given.notes
        if popularity is None
        else (f"models drawn {load.popularity}, as the trace has no functions",)
    )
    lasts = f"{natural_rps * faster:,.1f} requests/s for {length_s / faster:,.0f} s"
    speed = f"played {faster:.4g} times as fast: {lasts}"
    return TraceLoad(
        lambda: as_called(trace, replay, faster, popularity, dice(place.seed, place.load, purposes.ARRIVALS)),
        _named(load, (source, *how, speed)),
    )


def _refuse(load: Load, fields: tuple[str, ...], why: str) -> None:
    for field in fields:
        default = dict(zip(Load.__struct_fields__[3:], Load.__struct_defaults__, strict=True))[field]
        if getattr(load, field) != default:
            raise unfit(field, "no value with this trace", getattr(load, field), why)


def _scale(load: Load, natural_rps: float) -> float:
    if load.rate_rps is not None:
        return load.rate_rps / natural_rps
    return 1.0 if load.rate_scale is None else load.rate_scale


def _mapping_dice(place: Place) -> np.random.Generator:
    return dice(place.seed, place.load, purposes.MAPPING)


def _named(load: Load, notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{load.name}: {note}" for note in notes)


def trace_files(load: Load, folders: list[Path]) -> list[Path]:
    """The files of a load's trace, in the first folder that has them. Raises :class:`FieldError`."""
    files = []
    for path in load.traces:
        places = dict.fromkeys(folder / Path(path).expanduser() for folder in folders)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            looked = " nor ".join(str(place) for place in places)
            raise FieldError("trace", f"expected a trace file, found none at {looked}; correct the path")
        files.append(file)
    return files
