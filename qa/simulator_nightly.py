"""Ten thousand scenarios by chance, with faults and all checks on, in pieces: what failed, what faults hit.

make nightly                                    all of them, about an hour on two cores
python -m qa.simulator_nightly --minutes 4      goes on where the last one stopped, for so long
... --again                                     begins anew
... --from 20000 --count 1000 --done FILE       other seeds, remembered elsewhere

Each seed that was played is a line of the file of ``--done``, so an interrupted night goes on. The file
belongs to one version of the code: where that differs, it begins anew.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final

import clockwork_serve
from clockwork_serve.telemetry.journal import sources_hash
from harness.report import Outcome, finish, parser
from harness.seeds import KINDS, REQUESTS, PlayedSeed, play_seeds
from qa.simulator_seeds import conclude

SEEDS: Final = 10_000
CHUNK: Final = 40
"""Seeds between two looks at the clock."""
PLAIN_EVERY_S: Final = 15.0


def code_hash() -> str:
    """Of all that a seed's course depends on."""
    package = Path(clockwork_serve.__file__).parent
    parts = ("controller", "messages", "worker", "sim", "workload", "fence.py", "machine.py")
    return sources_hash(package, parts) + sources_hash(Path(__file__).parents[1], ("harness/seeds.py",))


def read_done(path: Path, code: str, requests: int) -> dict[int, PlayedSeed]:
    """Seeds that this very code has played, by number."""
    if not path.exists():
        return {}
    with path.open() as file:
        head = json.loads(file.readline() or "{}")
        if head != {"code": code, "requests": requests}:
            return {}
        found = [PlayedSeed(**json.loads(line)) for line in file if line.endswith("\n")]
    return {one.seed: one for one in found}


def write_done(path: Path, done: dict[int, PlayedSeed], code: str, requests: int) -> IO[str]:
    """The file, with what is known so far; to be appended to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(json.dumps({"code": code, "requests": requests}) + "\n")
        file.writelines(_line(one) for one in done.values())
    new.replace(path)
    return path.open("a")


def _line(one: PlayedSeed) -> str:
    return json.dumps(asdict(one), separators=(",", ":")) + "\n"


class Night:
    """Plays what is left, tells how it goes, and stops when it is told to or time is over."""

    def __init__(self, given: Any, done: dict[int, PlayedSeed], file: IO[str]) -> None:
        self._given, self._file = given, file
        self.done = done
        self.wanted = range(given.first, given.first + given.count)
        self._began = self._told = time.monotonic()
        self._new = 0
        self.stopped = False

    def run(self) -> None:
        """Until all are played, time is over, or Ctrl-C."""
        left = [seed for seed in self.wanted if seed not in self.done]
        for at in range(0, len(left), CHUNK):
            if self.stopped or time.monotonic() - self._began > self._given.minutes * 60:
                return
            for one in play_seeds(left[at : at + CHUNK], self._given.jobs, self._given.requests):
                self.done[one.seed] = one
                self._file.write(_line(one))
                self._new += 1
                if one.failure:
                    print(f"\n  {one.failure}\n", flush=True)
                self._tell()
            self._file.flush()

    def _tell(self) -> None:
        now, tty = time.monotonic(), sys.stderr.isatty()
        done = sum(seed in self.done for seed in self.wanted)
        if not tty and now - self._told < PLAIN_EVERY_S and done < len(self.wanted):
            return
        self._told = now
        rate = self._new / max(1e-3, now - self._began)
        failed = sum(bool(one.failure) for one in self.done.values())
        left_s = (len(self.wanted) - done) / rate
        line = (
            f"{done} of {len(self.wanted)} seeds, {failed} failed, {rate:.1f}/s, {left_s / 60:.0f} min left"
        )
        print(f"\r{line}  " if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True)


def concluded(night: Night, requests: int) -> Outcome:
    """The summary of all that was played, today and before."""
    played = [night.done[seed] for seed in night.wanted if seed in night.done]
    outcome = conclude("qa.simulator_nightly", len(night.wanted), played, requests)
    good = [one for one in played if not one.failure]
    pairs = Counter((a, b) for one in good for a in one.faults for b in one.faults if a < b)
    possible = len(KINDS) * (len(KINDS) - 1) // 2
    outcome.judge(
        "pairs of faults in one seed", asked=f"{possible}", found=str(len(pairs)), good=len(pairs) == possible
    )
    outcome.figures["rarest_pairs"] = [[*pair, count] for pair, count in pairs.most_common()[-5:]]
    if len(played) < len(night.wanted):
        left = len(night.wanted) - len(played)
        outcome.invalid = f"{left} seeds are not played yet: the same command goes on"
    return outcome


def main() -> int:
    """Run it; returns the exit status: 2 while seeds are left."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--from", dest="first", type=int, default=0, metavar="SEED", help="the first seed")
    options.add_argument("--count", type=int, default=SEEDS)
    options.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--requests", type=int, default=REQUESTS, help="of each seed, at least")
    options.add_argument(
        "--minutes", type=float, default=1e9, help="stop after so long; the next run goes on"
    )
    options.add_argument("--done", type=Path, default=Path("build/nightly.jsonl"), metavar="FILE")
    options.add_argument("--again", action="store_true", help="begin anew")
    given = options.parse_args()
    code = code_hash()
    done = {} if given.again else read_done(given.done, code, given.requests)
    with write_done(given.done, done, code, given.requests) as file:
        night = Night(given, done, file)

        def stop(*_: object) -> None:
            night.stopped = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, stop)
        night.run()
    return finish(concluded(night, given.requests), given.json)


if __name__ == "__main__":
    sys.exit(main())
