"""Arrival processes: when requests come, in vectors of numbers, from seeded dice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.tables import MOST_RPS, LoadTable, Ramp

# ------------------------------------------------------------
# Pieces of time in which a load's rate does not change; it draws bursts and nothing else.


LONGEST_NS: Final = 60 * NS_PER_S
MOST_EXPECTED: Final = 1 << 16
"""Requests that one piece may be expected to hold: what bounds the memory of a stream."""


@dataclass(slots=True)
class RatePiece:
    """Until before ``end_ns``, ``rate_rps`` requests per second go to the first ``active`` models."""

    start_ns: int
    end_ns: int
    rate_rps: float
    active: int

    @property
    def expected(self) -> float:
        """Requests that it holds on average."""
        return self.rate_rps * (self.end_ns - self.start_ns) / NS_PER_S


def steps_at(ramp: Ramp | None, elapsed_ns: int) -> int:
    """Steps that a ramp has made ``elapsed_ns`` after its load's start."""
    return elapsed_ns // ramp.every_ns if ramp else 0


def pieces(load: LoadTable, models: int, until_ns: int, rng: np.random.Generator) -> Iterator[RatePiece]:
    """The life of an open load, gapless until ``until_ns``; bursts begin with one that is on."""
    assert load.rate_rps is not None
    start_ns = round(load.start_s * NS_PER_S)
    base = load.active_models or (1 if load.model_ramp else models)
    now_ns, on, switch_ns = start_ns, True, until_ns
    if load.on_s is not None:
        switch_ns = now_ns + _length(load.on_s, rng)
    while now_ns < until_ns:
        elapsed_ns = now_ns - start_ns
        rate, active = load.rate_rps, base
        end_ns = min(until_ns, switch_ns, now_ns + LONGEST_NS)
        if load.rate_ramp:
            steps = steps_at(load.rate_ramp, elapsed_ns)
            rate = min(max(0.0, load.rate_ramp.value(rate, steps)), MOST_RPS)
            end_ns = min(end_ns, start_ns + (steps + 1) * load.rate_ramp.every_ns)
        if load.model_ramp:
            steps = steps_at(load.model_ramp, elapsed_ns)
            active = int(min(models, max(1.0, load.model_ramp.value(base, steps))))
            end_ns = min(end_ns, start_ns + (steps + 1) * load.model_ramp.every_ns)
        if rate > 0:
            end_ns = min(end_ns, now_ns + max(1, int(MOST_EXPECTED * NS_PER_S / rate)))
        yield RatePiece(now_ns, end_ns, rate if on else 0.0, active)
        now_ns = end_ns
        if load.on_s is not None and load.off_s is not None and now_ns == switch_ns:
            on = not on
            switch_ns = now_ns + _length(load.on_s if on else load.off_s, rng)


def _length(mean_s: float, rng: np.random.Generator) -> int:
    return max(1, round(rng.exponential(mean_s) * NS_PER_S))


# ------------------------------------------------------------
# Arrival processes: when requests come, in vectors of numbers; they know no clock and no server.
#
# A *block* holds all requests of a load until before its end; blocks follow one another without a gap. Gaps
# between requests are drawn in *expected requests*, not in seconds: a process waits until its rate, summed
# over time, has reached the gap. So a gap is carried over every change of the rate, and a change is felt at
# once.


Ints = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

_ENOUGH: Final = 1 << 13  # requests worth handing on; fewer are gathered, up to a minute of them
_DUE: Final = 1e-6
"""Expected requests before the end of a while at which a regular stream's request counts as due after it."""


@dataclass(slots=True)
class Block:
    """All requests of a load until before ``end_ns``: ``times_ns`` ascending, and the model of each.

    ``slos_ns``: the SLO of each, where a trace has them; None: as the load says.
    """

    end_ns: int
    times_ns: Ints
    models: Indices
    slos_ns: Ints | None = None


class Popularity:
    """Which of the first n models a request goes to: all alike, or by rank (Zipf: rank r weighs 1/r**s)."""

    def __init__(self, models: int, zipf_s: float | None) -> None:
        """Rank ``models`` models; ``zipf_s`` None makes them all alike."""
        ranks = np.arange(1, models + 1, dtype=np.float64)
        self.weights: Floats = ranks ** -(zipf_s or 0.0)
        self._sums = np.cumsum(self.weights)
        self._uniform = zipf_s is None

    def draw(self, rng: np.random.Generator, active: int, size: int) -> Ints:
        """Ranks from 0, among the first ``active``."""
        if self._uniform:
            chosen: Ints = rng.integers(0, active, size)
            return chosen
        chosen = np.searchsorted(self._sums[:active], rng.random(size) * self._sums[active - 1], side="right")
        return np.minimum(chosen, active - 1)

    def shares(self, active: int) -> Floats:
        """The share of each model; those beyond ``active`` get none."""
        shares = np.zeros_like(self.weights)
        shares[:active] = self.weights[:active] / self._sums[active - 1]
        return shares


class Renewals:
    """Independent streams, each with gaps of mean 1 in expected requests and a coefficient of variation.

    ``cv`` may differ between streams; 0 makes a stream regular. Streams begin in equilibrium, as if they had
    run for ever, regular ones one after another.
    """

    def __init__(self, rng: np.random.Generator, cv: float | Floats, streams: int) -> None:
        """Begin ``streams`` streams."""
        self._rng = rng
        self._cv = np.broadcast_to(np.asarray(cv, dtype=np.float64), (streams,))
        self._regular = bool((self._cv == 0).all())
        assert self._regular or bool((self._cv > 0).all()), "regular streams have a process of their own"
        if self._regular:
            self._left: Floats = np.arange(streams, dtype=np.float64) / streams
        else:
            # The gap in which an observer falls is longer: its law is weighted by its length (gamma of shape
            # k + 1), and what is left of it is uniform.
            shape = self._cv**-2.0
            self._left = rng.gamma(shape + 1.0) / shape * rng.random(streams)

    def advance(self, expected: Floats) -> tuple[Floats, Ints]:
        """What comes while each stream expects so many: places in 0..1 of that while, and streams."""
        left = self._left
        # What is due at the very end comes with the next while, whatever the last bits of its sum say.
        reach = expected - _DUE if self._regular else expected
        alive = np.flatnonzero(left < reach)
        at = left[alive]
        places: list[Floats] = []
        streams: list[Ints] = []
        while alive.size:
            room = expected[alive]
            wanted = room - at
            draws = np.ceil(wanted + 2.0 * self._cv[alive] * np.sqrt(wanted) + 1.0).astype(np.int64)
            owner = np.repeat(np.arange(alive.size), draws)
            gaps = self._gaps(alive[owner])
            sums = np.cumsum(gaps)
            firsts = np.cumsum(draws) - draws
            after = at[owner] + (sums - (sums[firsts] - gaps[firsts])[owner])
            inside = after < reach[alive][owner]
            passed = np.add.reduceat(inside, firsts, dtype=np.int64)
            done = passed < draws
            # A stream that used up its draws goes on from its last request in the next round, which counts
            # it.
            inside[(firsts + draws - 1)[~done]] = False
            places += [at / room, after[inside] / room[owner[inside]]]
            streams += [alive, alive[owner[inside]]]
            following = after[firsts + np.minimum(passed, draws - 1)]
            left[alive[done]] = following[done]
            alive, at = alive[~done], following[~done]
        np.maximum(left - expected, 0.0, out=left)
        if not places:
            return np.empty(0), np.empty(0, dtype=np.int64)
        return np.concatenate(places), np.concatenate(streams)

    def _gaps(self, streams: Ints) -> Floats:
        if self._regular:
            return np.ones(streams.size)
        cv = self._cv[streams] if self._cv.strides[0] else self._cv[:1]
        shape = cv**-2.0
        if shape.size == 1:
            return self._rng.standard_gamma(float(shape[0]), streams.size) / float(shape[0])
        return self._rng.standard_gamma(shape) / shape


def in_order(start_ns: int, end_ns: int, places: Floats, models: Ints | Indices) -> Block:
    """A block of requests at ``places`` (0..1) between two instants, put in order."""
    times = np.rint(places * (end_ns - start_ns)).astype(np.int64) + start_ns
    np.minimum(times, end_ns - 1, out=times)
    order = np.argsort(times, kind="stable")
    return Block(end_ns, times[order], models[order].astype(np.int32, copy=False))


def poisson(parts: Iterable[RatePiece], popularity: Popularity, rng: np.random.Generator) -> Iterator[Block]:
    """A Poisson process over all models together, which makes every model's own stream Poisson too."""
    for part in parts:
        size = int(rng.poisson(part.expected))
        times = rng.integers(part.start_ns, part.end_ns, size)
        times.sort()
        yield Block(part.end_ns, times, popularity.draw(rng, part.active, size).astype(np.int32))


def renewals(
    parts: Iterable[RatePiece], popularity: Popularity, cv: float, rng: np.random.Generator
) -> Iterator[Block]:
    """A renewal process for every model: gamma gaps of that coefficient of variation, regular if it is 0."""
    streams = Renewals(rng, cv, popularity.weights.size)
    for part in parts:
        if part.rate_rps > 0:
            places, models = streams.advance(part.expected * popularity.shares(part.active))
            yield in_order(part.start_ns, part.end_ns, places, models)
        else:
            yield Block(part.end_ns, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32))


def gathered(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same requests in fewer blocks, none of them longer than a minute unless it was."""
    waiting: list[Block] = []
    size = 0
    first_ns: int | None = None
    for block in blocks:
        if waiting and first_ns is not None and block.end_ns - first_ns > LONGEST_NS:
            yield _joined(waiting)
            waiting, size, first_ns = [], 0, waiting[-1].end_ns
        waiting.append(block)
        size += block.times_ns.size
        if first_ns is None:
            first_ns = int(block.times_ns[0]) if block.times_ns.size else block.end_ns
        if size >= _ENOUGH:
            yield _joined(waiting)
            waiting, size, first_ns = [], 0, block.end_ns
    if waiting:
        yield _joined(waiting)


def _joined(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    times = np.concatenate([block.times_ns for block in blocks])
    slos = [block.slos_ns for block in blocks if block.slos_ns is not None]
    return Block(
        blocks[-1].end_ns, times, np.concatenate([block.models for block in blocks]),
        np.concatenate(slos) if slos else None,
    )  # fmt: skip


# ------------------------------------------------------------
# Seeded dice, one for each purpose of each load; nothing here depends on a process, a clock or a hash.


BURSTS: Final = 0
ARRIVALS: Final = 1
MAPPING: Final = 2
FUNCTIONS: Final = 3
MINUTES: Final = 4


def share_of(name: str) -> float:
    """A number from 0, below 1, that is a name's own."""
    return int.from_bytes(blake2b(name.encode(), digest_size=6).digest()) / (1 << 48)


def dice(seed: int, load: int, *purpose: int) -> np.random.Generator:
    """The generator of one purpose of one load: the same in every process, independent of all others."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(load, *purpose))))
