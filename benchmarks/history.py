"""What a journal's history costs: a request of a million found, and a controller brought back to it.

A simulation of an overload on twelve GPUs writes the journal. Its index and checkpoints are written by
deciding it again; then requests drawn at random are found, and a controller is brought back to just before
each.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

from benchmarks.timeline import run, written
from clockwork_serve.messages import Request
from clockwork_serve.sim.history import History, folder_of, write_history
from clockwork_serve.sim.replay import decided_again, first_difference
from clockwork_serve.telemetry import read_journal
from clockwork_serve.units import MIB
from harness.report import Outcome

Took = tuple[float, float]
Result = TypeVar("Result")
LIMIT_S = 1.0
LIMIT_MIB = 500.0
DRAWN = 30
FOLLOWED = 100
"""Steps that each controller decides again, compared with the recorded ones."""


def some_ids(path: Path, seed: int) -> list[str]:
    """Ids of requests, drawn at random from all of the journal (a reservoir)."""
    dice, kept, seen = Random(seed), list[str](), 0
    for step in read_journal(path):
        for event in step.events:
            if isinstance(event, Request):
                seen += 1
                if len(kept) < DRAWN:
                    kept.append(event.request_id)
                elif (at := dice.randrange(seen)) < DRAWN:
                    kept[at] = event.request_id
    return kept


def timed(work: Callable[[], Result]) -> tuple[Result, Took]:
    """What it gives, and its seconds of CPU and by the clock."""
    began_s, wall_s = time.process_time(), time.perf_counter()
    found = work()
    return found, (time.process_time() - began_s, time.perf_counter() - wall_s)


def measure(folder: Path, requests: int, seed: int) -> Outcome:
    """Write a journal and its history, then look."""
    outcome, path = Outcome("benchmarks.history"), folder / "journal"
    held = written(path, requests, seed)
    began_s = time.process_time()
    write_history(path)
    written_s = time.process_time() - began_s
    ids = some_ids(path, seed)
    history = History.open(path)
    find_s, back_s, same = list[Took](), list[Took](), 0
    for request_id in ids:
        moment, took = timed(partial(history.find, request_id))
        find_s.append(took)
        assert moment is not None, request_id
        (controller, steps), took = timed(partial(history.controller_at, moment))
        back_s.append(took)
        same += all(
            first_difference(step.effects, decided_again(controller, step)) is None
            for step, _ in zip(steps, range(FOLLOWED), strict=False)
        )
    for what, found in (("find a request", find_s), ("a controller before it", back_s)):
        for clock, column in zip(("CPU", "by the clock"), zip(*found, strict=True), strict=True):
            took_s = sorted(column)
            median = f"(median {took_s[len(took_s) // 2]:.2f} s)"
            outcome.at_most(f"{what}, slowest, {clock}", LIMIT_S, took_s[-1], "s", digits=2, more=median)
    outcome.judge("which goes on the same", asked=f"{len(ids)}", found=f"{same}", good=same == len(ids))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    outcome.at_most("memory, of all this", LIMIT_MIB, peak_mib, "MiB", digits=0)
    sizes = {
        kind: sum(one.stat().st_size for one in folder_of(path).glob(f"*.{kind}")) / held.requests
        for kind in ("index", "state")
    }
    count = len(list(folder_of(path).glob("*.state")))
    outcome.figures = {
        "find_s": find_s, "back_s": back_s, "written_us": written_s / held.requests * 1e6,
        "bytes": sizes | {"journal": path.stat().st_size / held.requests}, "checkpoints": count,
        "requests": held.requests, "mib": peak_mib,
    }  # fmt: skip
    print(
        f"  written for {written_s / held.requests * 1e6:.0f} us of CPU a request; bytes a request: "
        f"{sizes['index']:.0f} of index, {sizes['state']:.0f} of {count} checkpoints"
    )
    return outcome


if __name__ == "__main__":
    sys.exit(run(__doc__, measure))
