"""Arrivals from a trace: calls per minute or single calls, scaled and mapped; it never holds a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.processes import Block, Floats, Indices, Ints, Popularity, Renewals, in_order
from clockwork_serve.workload.schedule import MOST_EXPECTED, steps_at
from clockwork_serve.workload.tables import MOST_RPS, Ramp
from clockwork_serve.workload.timestamps import CallTrace

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
    and all calls with it.
    """

    start_ns: int
    stop_ns: int
    models: Indices
    share: Floats
    rate_rps: float
    ramp: Ramp | None

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
    for begin_ns, calls in _minutes(trace, replay):
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
    for begin_ns, calls in _minutes(trace, replay):
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


def _minutes(trace: Minutes, replay: Replay) -> Iterator[tuple[int, np.ndarray]]:
    """Where each minute begins on our axis, and its calls."""
    index = 0
    while (begin_ns := replay.start_ns + index * MINUTE_NS) < replay.stop_ns:
        calls = trace.minute(index)
        if calls is None:
            return
        yield begin_ns, calls
        index += 1


def as_called(
    trace: CallTrace,
    replay: Replay,
    faster: float,
    popularity: Popularity | None,
    rng: np.random.Generator,
) -> Iterator[Block]:
    """Single calls at their own times, ``faster`` times as fast.

    A function's calls are kept with the probability of its ``share``. With ``popularity`` the trace has no
    functions, and each call goes to a model drawn by it.
    """
    for end_ns, called_ns, functions in trace.chunks():
        times = replay.start_ns + np.minimum(called_ns / faster, replay.stop_ns).astype(np.int64)
        upto_ns = replay.start_ns + int(end_ns / faster) + 1
        stays = rng.random(times.size) < replay.share[functions]
        stays &= times < replay.stop_ns
        times = times[stays]
        if popularity is None:
            models = replay.models[functions[stays]]
        else:
            models = popularity.draw(rng, popularity.weights.size, times.size).astype(np.int32)
        yield Block(min(upto_ns, replay.stop_ns), times, models)
        if upto_ns >= replay.stop_ns:
            return
