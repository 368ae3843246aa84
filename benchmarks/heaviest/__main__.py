"""The message that holds a gateway's loop longest, searched for by protocol; then what it does to others.

A gateway's front end with a controller that answers at once gets messages made by grammars with knobs. The
score is the longest turn of its loop, in CPU time; the worst are bred. Then ten clients send the worst of all
to a real server, one a second each, beside honest clients.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random
from typing import Final

from benchmarks.heaviest import beside
from benchmarks.heaviest.gateway import Measured, measured_gateway
from benchmarks.heaviest.search import Search, keep, kept, search
from clockwork_serve.units import MIB
from harness.report import Outcome, finish, parser, table

LOOP_MS: Final = 5.0
GROWTH_BYTES: Final = 100 * MIB
SETTLE_S: Final = 25.0
"""A gateway gives memory back to the system every ten seconds, if it is much."""
SECONDS: Final = 1200.0
SHORT_SECONDS: Final = 240.0


def judge(outcome: Outcome, searches: dict[str, Search]) -> None:
    """A row for each protocol."""
    rows = []
    for protocol, one in searches.items():
        for each in one.best[:3]:
            told = {name: value for name, value in each.recipe.items() if value not in ("", 0, 1)}
            rows.append(
                (protocol, f"{each.loop_ms:.2f}", f"{each.lock_ms:.2f}", each.nbytes, each.answer[:60], told)
            )
        worst = one.best[0]
        outcome.judge(
            f"{protocol}: the worst of {one.tried} messages, ms of the loop",
            asked=f"<= {LOOP_MS:g}", found=f"{worst.loop_ms:.2f}", good=worst.loop_ms <= LOOP_MS,
        )  # fmt: skip
        outcome.figures[protocol] = {
            "tried": one.tried,
            "worst": [
                {"recipe": each.recipe, "loop_ms": each.loop_ms, "lock_ms": each.lock_ms,
                 "bytes": each.nbytes, "answer": each.answer}
                for each in one.best
            ],
        }  # fmt: skip
    print(table(("", "loop ms", "lock ms", "bytes", "answer", "recipe"), rows))


def judge_memory(outcome: Outcome, before_bytes: int, measured: Measured) -> None:
    """What the gateway and its processes kept of all that."""
    growth = measured.memory_bytes - before_bytes
    outcome.judge(
        "memory kept after the search, MiB", asked=f"<= {GROWTH_BYTES // MIB}", found=f"{growth / MIB:.0f}",
        good=growth <= GROWTH_BYTES,
    )  # fmt: skip


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, help=f"of searching (default {SECONDS:g})")
    options.add_argument("--short", action="store_true", help=f"search for {SHORT_SECONDS:g} s")
    options.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="try what is there first; write the worst there"
    )
    options.add_argument("--alone", action="store_true", help="search only; no real server")
    given = options.parse_args()
    seconds = given.seconds or (SHORT_SECONDS if given.short else SECONDS)
    outcome = Outcome("benchmarks.heaviest")
    with measured_gateway() as measured:
        before_bytes = measured.memory_bytes
        searches = search(measured, seconds, Random(given.seed), kept(given.keep))
        time.sleep(SETTLE_S)
        judge_memory(outcome, before_bytes, measured)
    judge(outcome, searches)
    if given.keep is not None:
        keep(given.keep, searches)
    if not given.alone:
        worst = [one.best[0].recipe for one in searches.values() if one.best]
        beside.judge(outcome, worst, min(60.0, max(20.0, seconds / 4)))
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
