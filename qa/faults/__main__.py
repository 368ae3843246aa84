"""Faults done to real processes under load.

python -m qa.faults --short              the short form, under five minutes
python -m qa.faults                      every row, as long as it takes
python -m qa.faults --only worker-kill-infer worker-stop
python -m qa.faults kills [--short]      workers killed every 5 s, controllers every 10 s
python -m qa.faults table FILE... --page docs/develop/faults.md
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clockwork_serve.errors import ClockworkError
from harness.machine import machine_line
from harness.report import table as aligned
from qa.faults import kills
from qa.faults.result import BROKEN, NOT_MEASURED, Record, Result, into_page, text, write
from qa.faults.rows import ROWS, Row
from qa.faults.run import play_row

INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m qa.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("what", nargs="*", metavar="rows | kills | table FILE...", help="default: rows")
    made.add_argument("--short", action="store_true", help="fewer rows, or fewer kills; shorter loads")
    made.add_argument("--only", nargs="+", metavar="NAME", choices=ROWS, help="these rows; --list shows all")
    made.add_argument("--list", action="store_true", help="show the rows and do nothing")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there too, after each row")
    made.add_argument("--page", type=Path, help="table: the page to write into")
    made.add_argument("--seed", type=int, default=1)
    return made


def chosen(only: Sequence[str] | None, *, short: bool) -> list[Row]:
    """The rows to play, in the table's order."""
    if only:
        return [ROWS[name] for name in only]
    return [row for row in ROWS.values() if row.quick or not short]


def play_rows(
    rows: Sequence[Row], *, short: bool, seed: int, stopped: threading.Event, done: Callable[[Result], None]
) -> None:
    """One after the other; ``done`` hears of each. A row that cannot be played is a broken one."""
    with tempfile.TemporaryDirectory(prefix="faults-") as cache:
        for number, row in enumerate(rows, 1):
            if stopped.is_set():
                return
            print(f"[{number}/{len(rows)}] {row.name}: {row.what}, {row.when} ...", end=" ", flush=True)
            try:
                result = play_row(row, short=short, seed=seed, cache=Path(cache), stopped=stopped)
            except (ClockworkError, OSError, RuntimeError) as error:
                result = Result(name=row.name, what=row.what, when=row.when, setup=row.setup, status=BROKEN)
                result.wrong.append(f"it could not be played: {error}")
            if stopped.is_set():
                print("stopped")
                return
            print(f"{result.status}, {result.seconds:.1f} s", flush=True)
            for words in (*(f"! {wrong}" for wrong in result.wrong), *result.notes):
                print(f"      {words}")
            done(result)


def _rows(given: argparse.Namespace, record: Record, stopped: threading.Event) -> int:
    def done(result: Result) -> None:
        record.results.append(result)
        if given.json is not None:
            write(given.json, record)

    rows = chosen(given.only, short=given.short)
    play_rows(rows, short=given.short, seed=given.seed, stopped=stopped, done=done)
    print(f"\n{text(record.results)}\n  machine  {record.machine}")
    if stopped.is_set():
        return INTERRUPTED
    return int(any(one.status not in (NOT_MEASURED, "kept") for one in record.results))


def _kills(given: argparse.Namespace, record: Record, stopped: threading.Event) -> int:
    with tempfile.TemporaryDirectory(prefix="faults-") as cache:
        about: dict[str, Any] = {
            "short": given.short,
            "seed": given.seed,
            "cache": Path(cache),
            "stopped": stopped,
        }
        for setup in ("two", "two70", ""):
            found = kills.workers(setup, **about) if setup else kills.controllers(**about)
            if stopped.is_set():
                return INTERRUPTED
            record.kills.append(found)
            if given.json is not None:
                write(given.json, record)
            print(f"\n{found.name}")
            rows = [(what, asked, seen, "yes" if good else "NO") for what, asked, seen, good in found.rows]
            print(aligned(("", "asked", "found", "kept"), rows), flush=True)
    return int(not all(good for one in record.kills for *_, good in one.rows))


def main() -> int:
    """Do what is asked; 0 if every promise was kept, 1 if not, 130 after Ctrl-C."""
    parser = _parser()
    given = parser.parse_args()
    what, *files = given.what or ["rows"]
    if what not in ("rows", "kills", "table") or (files and what != "table"):
        parser.error(f"expected rows, kills or table FILE..., found {' '.join(given.what)}")
    if given.list:
        print(aligned(("name", "what", "when", "short"), [
            (row.name, row.what, row.when, "yes" if row.quick else "") for row in ROWS.values()
        ]))  # fmt: skip
        return 0
    if what == "table":
        if not files or given.page is None:
            parser.error("table: expected FILE... and --page PAGE")
        into_page([Path(file) for file in files], given.page)
        return 0
    stopped = threading.Event()
    signal.signal(signal.SIGINT, lambda number, frame: stopped.set())
    command = f"python -m qa.faults {shlex.join(sys.argv[1:])}".strip()
    record = Record(machine=machine_line(), command=command, short=given.short)
    return (_rows if what == "rows" else _kills)(given, record, stopped)


if __name__ == "__main__":
    sys.exit(main())
