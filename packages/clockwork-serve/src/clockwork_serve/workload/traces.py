"""Makes a load's trace ready: scaled, mapped to models, drawn as arrivals; it says in words what was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from clockwork_serve.errors import did_you_mean, printable
from clockwork_serve.units import NS_PER_S, counted, ms
from clockwork_serve.workload import processes as purposes
from clockwork_serve.workload.generated import GeneratedTrace
from clockwork_serve.workload.processes import (
    MOST_EXPECTED,
    Block,
    Floats,
    Indices,
    Ints,
    Popularity,
    Renewals,
    dice,
    in_order,
    steps_at,
)
from clockwork_serve.workload.tables import (
    DEFAULTS,
    MOST_RPS,
    NO_SLO_MS,
    Counts,
    FieldError,
    LoadTable,
    Ramp,
    unfit,
)
from clockwork_serve.workload.trace_files import (
    CallTrace,
    MinuteTrace,
    columns_of,
    is_2021,
    line_2019,
    read_minutes,
    rows_2021,
    rows_timestamps,
    survey,
    wrong,
)

# ------------------------------------------------------------
# Arrivals from a trace: calls per minute or single calls, scaled and mapped; it never holds a whole run.


MINUTE_NS: Final = 60 * NS_PER_S


class Minutes(Protocol):
    """Calls per minute of every function."""

    def minute(self, index: int) -> np.ndarray | None:
        """The calls of every function in a minute; None behind the last one."""
        ...


@dataclass(slots=True, frozen=True)
class Replay:
    """How a trace is played: from ``start_ns`` until before ``stop_ns``, function f as model ``models[f]``.

    ``share``: by what each function's calls are multiplied. ``ramp`` changes a rate of ``rate_rps`` in steps,
    and all calls with it. ``own_slos``: each call has an SLO of its own.
    """

    start_ns: int
    stop_ns: int
    models: Indices
    share: Floats
    rate_rps: float
    ramp: Ramp | None
    own_slos: bool = False

    def pieces(self, calls: np.ndarray, begin_ns: int) -> Iterator[tuple[int, int, Floats]]:
        """A minute in pieces of constant rates and bounded size: start, end, expected of each function."""
        flow = calls * self.share / MINUTE_NS
        total = float(flow.sum())
        now_ns, end_of_minute = begin_ns, min(begin_ns + MINUTE_NS, self.stop_ns)
        while now_ns < end_of_minute:
            end_ns, factor = end_of_minute, 1.0
            if self.ramp:
                steps = steps_at(self.ramp, now_ns - self.start_ns)
                factor = min(max(0.0, self.ramp.value(self.rate_rps, steps)), MOST_RPS) / self.rate_rps
                end_ns = min(end_ns, self.start_ns + (steps + 1) * self.ramp.every_ns)
            if total * factor > 0:
                end_ns = min(end_ns, now_ns + max(1, int(MOST_EXPECTED / (total * factor))))
            yield now_ns, end_ns, flow * (factor * (end_ns - now_ns))
            now_ns = end_ns


def as_rates(trace: Minutes, replay: Replay, cv: float | Floats, rng: np.random.Generator) -> Iterator[Block]:
    """A minute's calls are a rate: of a Poisson process as in the paper's client, of renewals if cv is not 1.

    Gaps are carried over the borders of minutes.
    """
    poisson = isinstance(cv, float) and cv == 1.0
    streams = None if poisson else Renewals(rng, cv, replay.models.size)
    for begin_ns, calls in _replayed_minutes(trace, replay):
        for start_ns, end_ns, expected in replay.pieces(calls, begin_ns):
            if streams is not None:
                places, functions = streams.advance(expected)
                yield in_order(start_ns, end_ns, places, replay.models[functions])
                continue
            active = np.flatnonzero(expected)
            models = np.repeat(replay.models[active], rng.poisson(expected[active]))
            rng.shuffle(models)
            times = rng.integers(start_ns, end_ns, models.size)
            times.sort()
            yield Block(end_ns, times, models)


def exactly(trace: Minutes, replay: Replay, cv: float | Floats, rng: np.random.Generator) -> Iterator[Block]:
    """A minute has exactly its calls (scaled, and rounded by chance), placed as a renewal process has them.

    The gaps of a function's calls in a minute are gamma gaps, stretched so that they fill it, from a point
    drawn at random: no place in the minute is preferred.
    """
    spread = np.broadcast_to(np.asarray(cv, dtype=np.float64), replay.models.shape)
    for begin_ns, calls in _replayed_minutes(trace, replay):
        wanted = calls * replay.share
        sizes = np.floor(wanted).astype(np.int64)
        sizes += rng.random(sizes.size) < wanted - sizes
        active = np.flatnonzero(sizes)
        places = _places(sizes[active], spread[active], rng)
        functions = np.repeat(active, sizes[active])
        block = in_order(begin_ns, begin_ns + MINUTE_NS, places, replay.models[functions])
        if block.end_ns > replay.stop_ns:
            last = int(np.searchsorted(block.times_ns, replay.stop_ns))
            block = Block(replay.stop_ns, block.times_ns[:last], block.models[:last])
        yield block


def _places(sizes: Ints, cv: Floats, rng: np.random.Generator) -> Floats:
    """For each function, so many places in 0..1, in no order between functions."""
    if not sizes.size:
        return np.empty(0)
    # Gaps of a single call say nothing, and tiny shapes all but vanish in floats: both fall on the point
    # drawn.
    gaps = rng.standard_gamma(np.repeat(cv**-2.0, sizes))
    sums = np.cumsum(gaps)
    ends = np.cumsum(sizes) - 1
    firsts = ends - sizes + 1
    before = sums[firsts] - gaps[firsts]
    whole = np.maximum(sums[ends] - before, np.finfo(np.float64).tiny)
    places: Floats = (sums - np.repeat(before, sizes)) / np.repeat(whole, sizes)
    turned: Floats = (places + np.repeat(rng.random(sizes.size), sizes)) % 1.0
    return turned


def _replayed_minutes(trace: Minutes, replay: Replay) -> Iterator[tuple[int, np.ndarray]]:
    """Where each minute begins on our axis, and its calls."""
    index = 0
    while (begin_ns := replay.start_ns + index * MINUTE_NS) < replay.stop_ns:
        calls = trace.minute(index)
        if calls is None:
            return
        yield begin_ns, calls
        index += 1


def as_called(
    trace: CallTrace, replay: Replay, faster: float, popularity: Popularity | None, rng: np.random.Generator
) -> Iterator[Block]:
    """Single calls at their own times, ``faster`` times as fast.

    A function's calls are kept with the probability of its ``share``. With ``popularity`` the trace has no
    functions, and each call goes to a model drawn by it.
    """
    for end_ns, called_ns, functions, slos in trace.chunks():
        times = replay.start_ns + np.minimum(called_ns / faster, replay.stop_ns).astype(np.int64)
        upto_ns = replay.start_ns + int(end_ns / faster) + 1
        stays = rng.random(times.size) < replay.share[functions]
        stays &= times < replay.stop_ns
        times = times[stays]
        if popularity is None:
            models = replay.models[functions[stays]]
        else:
            models = popularity.draw(rng, popularity.weights.size, times.size).astype(np.int32)
        own = np.where(slos > 0, slos, ms(NO_SLO_MS))[stays] if replay.own_slos else None
        yield Block(min(upto_ns, replay.stop_ns), times, models, own)
        if upto_ns >= replay.stop_ns:
            return


# ------------------------------------------------------------
# Which model each function of a trace stands for, and what of it is left out; it says so in words.
#
# The mapping is the experimenter's choice and decides the result (the paper's released client maps
# blocks of functions sorted by volume), so every report prints the notes made here.


@dataclass(slots=True)
class Assignment:
    """For every function of a trace, the busiest first: its model (of the load's, from 0) and the share kept.

    ``volume``: calls kept in all. ``notes`` say what was done, with numbers. A function left out keeps
    nothing.
    """

    models: Indices
    kept: Floats
    volume: float
    notes: tuple[str, ...]


def assign(
    volumes: Floats, load: LoadTable, models: int, rng: np.random.Generator, named: Ints | None = None
) -> Assignment:
    """Map functions, given by their volumes in descending order, to models as the load asks.

    ``block``: function i of F goes to model floor(i * M / F). ``stripe``: to i mod M. ``shuffled``: striped
    after a shuffle. ``named``: to the one that is given. Raises :class:`FieldError`.
    """
    functions = volumes.size
    if load.drop_top >= functions:
        raise unfit("drop_top", f"less than the trace's {functions} functions", load.drop_top, "drop fewer")
    kept = np.ones(functions)
    kept[: load.drop_top] = 0.0
    notes: list[str] = []
    total = float(volumes.sum())
    if load.drop_top:
        share = float(volumes[: load.drop_top].sum()) / total
        notes.append(f"left out the {counted(load.drop_top, 'busiest function')} ({share:.1%} of all calls)")
    if load.cap_share is not None:
        notes.append(_cap(volumes, kept, load.cap_share))
    mapped = functions - load.drop_top
    places = np.arange(mapped, dtype=np.int64)
    if named is not None:
        chosen = named[load.drop_top :]
    elif load.mapping == "block":
        chosen = places * models // mapped
    else:
        chosen = (rng.permutation(mapped) if load.mapping == "shuffled" else places) % models
    of_function = np.zeros(functions, dtype=np.int32)
    of_function[load.drop_top :] = chosen
    flow = np.bincount(of_function, weights=volumes * kept, minlength=models)
    hit = int(np.count_nonzero(np.bincount(chosen, minlength=models)))
    notes.append(
        f"mapping {load.mapping}: {counted(mapped, 'function')} to {hit} of {counted(models, 'model')}; "
        f"the busiest model gets {float(flow.max() / flow.sum()):.1%} of the calls"
    )
    return Assignment(of_function, kept, float(flow.sum()), tuple(notes))


def _cap(volumes: Floats, kept: Floats, share: float) -> str:
    """Reduce ``kept`` so that no function carries more than ``share`` of what is left."""
    alive = volumes * kept
    present = int(np.count_nonzero(alive))
    if share * present < 1:
        raise FieldError(
            "cap_share",
            f"expected at least 1 / {present}, for {present} functions, found {share:g}; raise it",
        )
    before = float(alive.sum())
    # The k busiest are cut to the same level; it is their share of a total that has shrunk with them.
    order = np.argsort(-alive, kind="stable")
    rest = before
    level, capped = before, 0
    for index in order.tolist():
        assert share * capped < 1, "one of the functions left is at most their sum"
        level = share * rest / (1.0 - share * capped)
        if alive[index] <= level * (1 + 1e-12):
            break
        rest -= float(alive[index])
        capped += 1
    if not capped:
        return f"cap of {share:.1%} of the calls per function: none reaches it"
    busiest = order[:capped]
    kept[busiest] *= level / alive[busiest]
    dropped = 1.0 - float((volumes * kept).sum()) / before
    cut = f"{counted(capped, 'function')} cut, {dropped:.1%} of all calls dropped"
    return f"cap of {share:.1%} of the calls per function: {cut}"


# ------------------------------------------------------------
# Makes a load's trace ready: reads it, scales it, maps it, and says what was done; it draws no arrival.


RowsOf = Callable[[bytes], tuple[Path, int]]  # where a function is named first: file and line


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


def trace_load(load: LoadTable, models: Sequence[str], files: list[Path], place: Place) -> TraceLoad:
    """Read the trace of a load of models of these names. Raises :class:`ConfigError`."""
    if load.arrivals == "generated":
        return _generated(load, len(models), place)
    if load.arrivals == "azure" and not is_2021(files[0]):
        return _azure_2019(load, models, files, place)
    return _called(load, models, files, place)


def _by_name(load: LoadTable, models: Sequence[str], names: Sequence[bytes], rows: RowsOf) -> Ints | None:
    """With mapping ``named``, the models of functions; None with another. Raises :class:`ConfigError`."""
    if load.mapping != "named":
        return None
    places = {name.encode(): at for at, name in enumerate(models)}
    found = [places.get(name.rpartition(b",")[2], -1) for name in names]
    if -1 in found:
        unknown = names[found.index(-1)]
        path, line = rows(unknown)
        called = printable(unknown.rpartition(b",")[2].decode("utf-8", "replace"))
        raise wrong(
            path, line, "function", "the name of one of the load's models", called,
            f"add it to [[models]] and to the load; {did_you_mean(called, models)}",
        )  # fmt: skip
    return np.array(found, dtype=np.int64)


def _generated(load: LoadTable, models: int, place: Place) -> TraceLoad:
    assert load.functions is not None
    if load.mapping == "named":
        raise unfit(
            "mapping", "block, stripe or shuffled", load.mapping, "functions that are drawn have no names"
        )
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


def _azure_2019(load: LoadTable, models: Sequence[str], files: list[Path], place: Place) -> TraceLoad:
    wanted = -(-(place.stop_ns - place.start_ns) // MINUTE_NS)
    trace: MinuteTrace = read_minutes(files, load.first_minute, load.minutes, wanted)
    calls = trace.volumes.sum()
    source = (
        f"{', '.join(file.name for file in files)}: minutes {load.first_minute} to "
        f"{load.first_minute + trace.minutes - 1}, {trace.volumes.size:,} functions, {calls:,.0f} calls "
        f"({calls / trace.minutes / 60:,.1f}/s)"
    )
    named = _by_name(load, models, trace.names, partial(line_2019, files))
    given = assign(trace.volumes, load, len(models), _mapping_dice(place), named)
    cv = 1.0 if load.cv is None else load.cv
    natural = given.volume / trace.minutes / 60
    process = Process(cv, load.counts or "rates", source, f"{cv:g}")
    return _minutes(load, place, trace, given, process, natural_rps=natural)


def _minutes(
    load: LoadTable, place: Place, trace: Minutes, given: Assignment, process: Process, *, natural_rps: float
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


def _called(load: LoadTable, models: Sequence[str], files: list[Path], place: Place) -> TraceLoad:
    """Traces of single calls."""
    if len(files) > 1:
        raise unfit("trace", "one file of single calls", [file.name for file in files], "join the files")
    file = files[0]
    azure = load.arrivals == "azure"
    if azure:
        _refuse(load, ("cv", "counts", "rate_ramp"), "a trace of single calls has its own times")
    rows = partial(rows_2021 if azure else rows_timestamps, file)
    trace = survey(file, rows, load.first_minute, load.minutes)
    columns = None if azure else columns_of(file)
    popularity: Popularity | None = None
    if azure or (columns is not None and columns.function is not None):
        _refuse(load, ("popularity", "zipf_s"), "the trace's functions are mapped to models")
    else:
        _refuse(load, ("drop_top", "cap_share", "mapping"), "the trace has no column `function`")
        popularity = Popularity(len(models), (load.zipf_s or 1.0) if load.popularity == "zipf" else None)
    named = _by_name(
        load, models, trace.names, lambda name: (file, next(row[0] for row in rows() if row[2] == name))
    )
    given = assign(trace.volumes, load, len(models), _mapping_dice(place), named)
    natural_rps = given.volume * NS_PER_S / trace.length_ns
    faster = _scale(load, natural_rps)
    own_slos = load.slo_ms is None and columns is not None and columns.slo is not None
    replay = Replay(
        place.start_ns, place.stop_ns, given.models, given.kept, natural_rps * faster, None, own_slos
    )
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
        _named(load, (source, *how, speed, *(["SLOs as the trace has them"] if own_slos else []))),
    )


def _refuse(load: LoadTable, fields: tuple[str, ...], why: str) -> None:
    for field in fields:
        if getattr(load, field) != DEFAULTS[field]:
            raise unfit(field, "no value with this trace", getattr(load, field), why)


def _scale(load: LoadTable, natural_rps: float) -> float:
    if load.rate_rps is not None:
        return load.rate_rps / natural_rps
    return 1.0 if load.rate_scale is None else load.rate_scale


def _mapping_dice(place: Place) -> np.random.Generator:
    return dice(place.seed, place.load, purposes.MAPPING)


def _named(load: LoadTable, notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{load.name}: {note}" for note in notes)


def trace_files(load: LoadTable, folders: list[Path]) -> list[Path]:
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
