"""Scenarios by chance, with faults, all checks on: how many hold, and what they went through.

python -m qa.simulator_seeds                    a thousand seeds, in two processes
python -m qa.simulator_seeds 17                 one seed, in this process: its traceback, if it fails
python -m qa.simulator_seeds --from 5000 --count 200 --jobs 4
python -m qa.simulator_seeds 17 --shrink        the smallest case that fails as seed 17 does
python -m qa.simulator_seeds --case FILE        plays such a file
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from clockwork_serve.controller.policies import is_policy, known_policies
from clockwork_serve.errors import ConfigError
from harness.report import Outcome, finish, parser, percent, table
from harness.seeds import KINDS, REQUESTS, Digest, PlayedSeed, play_seed, play_seeds, random_scenario
from harness.shrink import Case, case_of, play_case, read_case, shrink, write_case

TELL_EVERY_S = 1.0
SHARE_MIN = 0.05
"""Each kind of fault must hit something in this share of the seeds."""


def replay(seed: int, requests: int, policy: str | None) -> int:
    """Play one seed and show what it is."""
    chance, digest = random_scenario(seed, requests, policy), Digest()
    scenario, config = chance.scenario, chance.config
    print(f"seed {seed}: {scenario.seconds:.3f} s, {chance.cluster}\n{config}")
    for part in (*scenario.models, *scenario.loads, *scenario.faults):
        print(f"  {part}")
    print(f"it held: {play_seed(seed, requests, (digest,), policy)}\njournal {digest.hex()}")
    return 0


def make_small(seed: int, requests: int, seconds: float, path: Path, policy: str | None) -> int:
    """Find the smallest case that fails as a seed does, write it, and tell how to play it."""
    began = told = time.monotonic()

    def tell(case: Case, attempts: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_EVERY_S:
            told = time.monotonic()
            line = f"{told - began:.0f} of {seconds:.0f} s, {attempts} attempts: {case.size()}"
            print(line, file=sys.stderr, flush=True)

    try:
        shrunk = shrink(case_of(random_scenario(seed, requests, policy)), seconds=seconds, tell=tell)
    except ConfigError as error:
        print(f"error: seed {seed}: {error}", file=sys.stderr)
        return 2
    write_case(path, shrunk.case)
    why = "nothing more can be taken away" if shrunk.over else "time is over: --seconds gives more"
    print(f"seed {seed}: {shrunk.case.size()}, after {shrunk.attempts} attempts ({why})")
    for fault in shrunk.case.faults:
        print(f"  {fault}")
    print(f"{shrunk.violation.kind} at {shrunk.violation.at_ns} ns: {shrunk.violation.text}")
    print(f"again: python -m qa.simulator_seeds --case {path}")
    return 1


def replay_case(path: Path) -> int:
    """Play a case; 1 if it fails."""
    case = read_case(path)
    violation = play_case(case)
    print(f"{case.size()}\n{case.config}")
    print("it holds" if violation is None else f"{violation.kind} at {violation.at_ns} ns: {violation.text}")
    return 0 if violation is None else 1


def conclude(name: str, wanted: int, played: list[PlayedSeed], requests: int) -> Outcome:
    """What so many seeds promise, of those that were played."""
    outcome = Outcome(name)
    failed = [one.failure for one in played if one.failure]
    good = [one for one in played if not one.failure]
    hold = not failed and bool(good)
    outcome.judge("seeds that hold", asked=str(wanted), found=str(len(good)), good=hold)
    fewest = min((one.requests for one in good), default=0)
    outcome.judge("requests of a seed", asked=f">= {requests}", found=str(fewest), good=fewest >= requests)
    seeds: Counter[str] = Counter(kind for one in good for kind in one.faults)
    hits: Counter[str] = sum((Counter(one.faults) for one in good), Counter())
    actions: Counter[str] = sum((Counter(one.actions) for one in good), Counter())
    for kind in KINDS:
        outcome.judge(
            f"seeds in which {kind} hit something", asked=f">= {percent(SHARE_MIN, 1)}",
            found=f"{percent(seeds[kind], len(good))}, {hits[kind]:,} times",
            good=bool(good) and seeds[kind] >= SHARE_MIN * len(good),
        )  # fmt: skip
    total = sum(one.requests for one in good)
    rows = [("requests", f"{total:,}"), *((what, f"{n:,}") for what, n in sorted(actions.items()))]
    print(table(("what", "count"), rows))
    outcome.figures = {
        "played": len(played), "requests": total, "seeds_with": dict(seeds), "hits": dict(hits),
        "actions": dict(actions), "failed": failed,
    }  # fmt: skip
    return outcome


def options_of() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("replay", nargs="?", type=int, metavar="SEED", help="play this one alone")
    options.add_argument("--from", dest="first", type=int, default=0, metavar="SEED", help="the first seed")
    options.add_argument("--count", type=int, default=1000)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--requests", type=int, default=REQUESTS, help="of each seed, at least")
    options.add_argument("--policy", metavar="NAME", help="instead of the one that each seed draws")
    options.add_argument("--shrink", action="store_true", help="make the SEED, which fails, small")
    options.add_argument("--seconds", type=float, default=60, help="for that, at most")
    options.add_argument("--out", type=Path, metavar="FILE", help="for that [default: seed-SEED.json]")
    options.add_argument("--case", type=Path, metavar="FILE", help="play a file that --shrink wrote")
    given = options.parse_args()
    if given.policy is not None and not is_policy(given.policy):
        options.error(f"--policy: expected one of {known_policies()}; found {given.policy!r}")
    if given.shrink and given.replay is None:
        options.error("--shrink: expected the SEED that fails before it; found none")
    return given


def main() -> int:
    """Run it; returns the exit status."""
    given = options_of()
    if given.case is not None:
        return replay_case(given.case)
    if given.shrink:
        out = given.out or Path(f"seed-{given.replay}.json")
        return make_small(given.replay, given.requests, given.seconds, out, given.policy)
    if given.replay is not None:
        return replay(given.replay, given.requests, given.policy)
    began_s = time.monotonic()
    seeds = range(given.first, given.first + given.count)
    played = list(play_seeds(seeds, given.jobs, given.requests, given.policy))
    for one in played:
        if one.failure:
            print(f"  {one.failure}\n")
    outcome = conclude("qa.simulator_seeds", given.count, played, given.requests)
    outcome.figures["seconds"] = time.monotonic() - began_s
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
