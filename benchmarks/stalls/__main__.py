"""Is a late response ever counted as good? Stopped processes, heavy messages, impatient clients; with clocks.

A client with its own clock measures each response. Whatever was late by that clock must not have been
reported as good: not to the client (200), nor in the server's metrics. ``--part`` runs one part alone.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

from benchmarks.stalls import hasty, stops
from harness.report import Outcome, finish, parser

PARTS = ("stops", "heavy", "hasty", "stuck")


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--short", action="store_true", help="below ten minutes")
    options.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    given = options.parse_args()
    outcome = Outcome("benchmarks.stalls")
    parts = given.part or PARTS
    with tempfile.TemporaryDirectory(prefix="cw-") as folder:
        if "stops" in parts:
            stops.stopped(outcome, Path(folder) / "stops", 60 if given.short else 300, given.seed)
        if "heavy" in parts:
            stops.heavy(outcome, Path(folder) / "heavy", given.seed)
        if "hasty" in parts:
            hasty.rows(outcome, Path(folder) / "hasty", 20 if given.short else 60)
    if "stuck" in parts and importlib.util.find_spec("benchmarks.stalls.stuck") is not None:
        importlib.import_module("benchmarks.stalls.stuck").rows(outcome, short=given.short)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
