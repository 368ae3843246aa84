"""One graph after another in processes of their own: made, judged, put to the store, some of them served.

A process that a graph ends or holds up is replaced by another, which goes on with the next.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.rows import asking
from benchmarks.rows.generator import graph_of
from benchmarks.rows.judge import Refused, judge, session_of, specs_of

PATIENCE_S = 90
"""How long one graph may take."""
SEEDS_APART = 10_000_000
_SERVED_MEMORY = 16 << 20


@dataclass(slots=True)
class Tried:
    """What became of one graph.

    ``built`` and ``seen`` say how it mixes rows, by construction and by asking; ``faint`` that neighbours
    change no more than its rounding; ``ended`` what a process that did not come back was doing.
    """

    number: int
    refused: str = ""
    built: str = ""
    seen: str = ""
    faint: str = ""
    batched: bool = False
    why: str = ""
    operators: tuple[str, ...] = ()
    company: asking.Company = field(default_factory=asking.Company)
    served: bool = False
    ended: str = ""

    @property
    def mixes(self) -> bool:
        """By either."""
        return bool(self.built or self.seen)


class Prober:
    """What one process keeps between graphs."""

    def __init__(self, seed: int, served_share: float) -> None:
        self._seed = seed
        self._served_share = served_share
        self._store = asking.Store()

    def probe(self, number: int, doing: Callable[[str], None]) -> Tried:
        """All that is asked of one graph."""
        seed = self._seed * SEEDS_APART + number
        doing("made")
        made = graph_of(seed)
        data = made.model.SerializeToString()
        found = Tried(number, built="+".join(made.kinds) if made.mixes else "")
        found.operators = tuple(sorted({node.op_type for node in made.model.graph.node}))
        doing("judged")
        try:
            session = session_of(data)
            rows = asking.some_rows(specs_of(session), seed, made.lows)
            finding = judge(session, seed=seed, rows=rows)
        except Refused as error:
            found.refused = str(error)
            return found
        found.refused, found.seen, found.faint = finding.refused, finding.mixes, finding.faint
        if found.refused:
            return found
        doing("put to the store")
        said = self._store.ask(data)
        found.batched, found.why = said.batched, said.why
        if said.batched and said.served and random.Random(seed).random() < self._served_share:
            doing("served")
            found.served = True
            with asking.device(_SERVED_MEMORY) as on:
                found.company = asking.serve(on, said.served, data, rows, seed)
        return found

    def close(self) -> None:
        """Remove what was stored."""
        self._store.close()


def _work(pipe: Connection, seed: int, served_share: float, numbers: list[int]) -> None:
    """A process: says what it does, and what was found."""
    os.nice(5)
    prober = Prober(seed, served_share)
    try:
        for number in numbers:
            pipe.send(prober.probe(number, lambda what, at=number: pipe.send((at, what))))  # type: ignore[misc]
        pipe.send(None)
    finally:
        prober.close()


@dataclass(slots=True)
class _Worker:
    process: Any
    pipe: Connection
    numbers: list[int]
    at: tuple[int, str]
    heard: float


def probe_all(
    numbers: list[int], *, seed: int, jobs: int, served_share: float
) -> Generator[Tried, None, None]:
    """Every graph once, as they are done."""
    context = multiprocessing.get_context("spawn")

    def start(part: list[int]) -> _Worker:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, seed, served_share, part), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, part, (part[0], "started"), time.monotonic())

    workers = [start(numbers[job::jobs]) for job in range(jobs) if numbers[job::jobs]]
    try:
        while workers:
            ready = wait([worker.pipe for worker in workers], timeout=1.0)
            for worker in list(workers):
                found, over = _heard(worker, ready=worker.pipe in ready)
                yield from found
                if over:
                    workers.remove(worker)
                    worker.process.join()
                    if worker.numbers:
                        workers.append(start(worker.numbers))
    finally:
        for worker in workers:
            worker.process.kill()


def _heard(worker: _Worker, *, ready: bool) -> tuple[list[Tried], bool]:
    """What a worker says now, and whether it is over; ``numbers`` keeps what it has not done."""
    if not ready:
        if time.monotonic() - worker.heard < PATIENCE_S:
            return [], False
        worker.process.kill()
        return [_lost(worker, f"held up for {PATIENCE_S} s while {worker.at[1]}")], True
    found: list[Tried] = []
    try:
        while worker.pipe.poll():
            word = worker.pipe.recv()
            worker.heard = time.monotonic()
            if word is None:
                worker.numbers = []
                return found, True
            if isinstance(word, Tried):
                found.append(word)
                worker.numbers = worker.numbers[worker.numbers.index(word.number) + 1 :]
            else:
                worker.at = word
    except EOFError:
        worker.process.join()
        found.append(_lost(worker, f"ended ({worker.process.exitcode}) while {worker.at[1]}"))
        return found, True
    return found, False


def _lost(worker: _Worker, how: str) -> Tried:
    number = worker.at[0]
    worker.numbers = worker.numbers[worker.numbers.index(number) + 1 :]
    return Tried(number, ended=how)
