"""What a journal's history costs: a request of a million found, and a controller brought back to it.

A simulation of an overload on twelve GPUs writes the journal. Its index and checkpoints are written by
deciding it again; then requests drawn at random are found, and a controller is brought back to just before
each.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from benchmarks.timeline import written
from clockwork_serve.messages import Request
from clockwork_serve.sim.history import History, folder_of, write_history
from clockwork_serve.sim.replay import decided_again, first_difference
from clockwork_serve.telemetry import read_journal
from clockwork_serve.units import MIB
from harness.report import Outcome, finish, parser

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


def measure(folder: Path, requests: int, seed: int) -> Outcome:
    """Write a journal and its history, then look."""
    outcome, path = Outcome("benchmarks.history"), folder / "journal"
    held = written(path, requests, seed)
    began_s = time.process_time()
    write_history(path)
    written_s = time.process_time() - began_s
    ids = some_ids(path, seed)
    history = History.open(path)
    find_s, back_s, same = list[float](), list[float](), 0
    for request_id in ids:
        began_s = time.perf_counter()
        moment = history.find(request_id)
        find_s.append(time.perf_counter() - began_s)
        assert moment is not None, request_id
        began_s = time.perf_counter()
        controller, steps = history.controller_at(moment)
        back_s.append(time.perf_counter() - began_s)
        same += all(
            first_difference(step.effects, decided_again(controller, step)) is None
            for step, _ in zip(steps, range(FOLLOWED), strict=False)
        )
    outcome.at_most("find a request, slowest", LIMIT_S, max(find_s), "s", digits=2)
    median = f"(median {sorted(back_s)[len(back_s) // 2]:.2f} s)"
    outcome.at_most("a controller before it, slowest", LIMIT_S, max(back_s), "s", digits=2, more=median)
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


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=1_000_000)
    options.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="leave the journal and its history there"
    )
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        folder.mkdir(exist_ok=True)
        outcome = measure(folder, given.requests, given.seed)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
