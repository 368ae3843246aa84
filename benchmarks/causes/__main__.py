"""Cases on virtual time that policy ``default`` once served worse than it should, by cause.

    python -m benchmarks.causes                      every case
    python -m benchmarks.causes --short              ten minutes of CPU at most
    python -m benchmarks.causes --only copies,room   cases of these names, or whose names begin so

Each row has what was asked for when its cause was found, what is found now, and what the best sketch reaches
that knows true durations and has no noise, delays or LOADs (``sketches``).
"""

from __future__ import annotations

import sys
import time
from typing import Final

from benchmarks.causes import classes, copies, eviction, few_devices, herds, room, slack, starved, unequal
from benchmarks.causes.cases import Case, Found, Given
from harness.report import Outcome, finish, parser, table

CASES: Final[tuple[Case, ...]] = (
    *copies.CASES, *eviction.CASES, *room.CASES, *few_devices.CASES, *unequal.CASES, *slack.CASES,
    *classes.CASES, *herds.CASES, *starved.CASES,
)  # fmt: skip
"""A cause is a file beside this one and its name here."""


def row(case: Case, found: Found) -> tuple[str, ...]:
    """A case as a line of the table."""
    sketch = "" if found.sketch is None else f"{found.sketch:.3f}"
    return case.name, f"{case.before:.3f}", f"{found.value:.3f}", sketch, found.more, case.note


def main() -> int:
    """Run it; returns the exit status: 0 if every case reaches what is asked for."""
    options = parser(__doc__)
    options.add_argument("--only", metavar="NAME,...", default="", help="cases whose names begin so")
    options.add_argument("--short", action="store_true", help="shorter loads")
    given = options.parse_args()
    names = tuple(given.only.split(","))
    cases = [case for case in CASES if case.name.startswith(names)]
    if not cases:
        options.error(f"--only: expected some of {', '.join(case.name for case in CASES)}")
    outcome = Outcome("benchmarks.causes")
    rows: list[tuple[str, ...]] = []
    for case in cases:
        began = time.monotonic()
        found = case.play(Given(given.seed, given.short))
        print(f"{case.name}: {case.words}: {found.value:.3f} ({time.monotonic() - began:.0f} s)", flush=True)
        rows.append(row(case, found))
        outcome.judge(
            case.name, asked=f"{'<=' if case.at_most else '>='} {case.asked:.3f}", found=f"{found.value:.3f}",
            good=case.met(found),
        )  # fmt: skip
        outcome.figures[case.name] = {
            "asked": case.asked, "before": case.before, "found": found.value, "sketch": found.sketch,
            "met": case.met(found), "more": found.more, "note": case.note,
        }  # fmt: skip
    print("\n" + table(("", "before", "found", "best sketch", "", "note"), rows))
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
