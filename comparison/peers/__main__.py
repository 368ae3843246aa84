"""Other servers under the same load as ours.

python -m comparison.peers install            all of them, or those named
python -m comparison.peers check              each serves right answers
python -m comparison.peers run --out DIR      the comparison; goes on where it stopped
python -m comparison.peers table --out DIR    its tables, from what was measured
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from comparison.peers import run, table
from comparison.peers.install import install
from comparison.peers.loads import LOADS
from comparison.peers.measure import Failed
from comparison.peers.run import isolate
from comparison.peers.servers import PEERS

NAMES = tuple(PEERS)


def _names(text: str) -> list[str]:
    found = NAMES if text == "all" else tuple(text.split(","))
    unknown = [name for name in found if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(NAMES)}; found {', '.join(unknown)}")
    return list(found)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m comparison.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True)
    one = commands.add_parser("install", help="each into its own Python under build/peers")
    one.add_argument("names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(NAMES)}")
    one = commands.add_parser("check", help="start each, ask it, compare its answers")
    one.add_argument("--servers", type=_names, default=list(NAMES))
    one.add_argument("--kinds", default="mobilenet_v3_small,gpu_like")
    one = commands.add_parser("run", help="the comparison")
    one.add_argument("--servers", type=_names, help="default: all that are installed")
    one.add_argument("--loads", help=f"default: all of {', '.join(sorted(LOADS))}")
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument(
        "--out", type=Path, required=True, help="folder of results; what is there is not done again"
    )
    one.add_argument("--short", action="store_true", help="two servers, three loads: within 15 minutes")
    one.add_argument("--again-noisy", action="store_true", help="do those runs again that others disturbed")
    one = commands.add_parser("table", help="tables of what was measured")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--page", type=Path, help="also put them into this page, between its marks")
    return made


def main() -> int:
    """Run it; the exit status."""
    given = _parser().parse_args()
    if given.command == "install":
        worst = 0
        for name in given.names or NAMES:
            said = install(PEERS[name])
            worst |= said.startswith("failed")
            print(f"{name:<12} {said}", flush=True)
        return worst
    if given.command == "table":
        print(table.write(given.out, given.page))
        return 0
    if why := isolate():
        print(f"note: {why}; servers that listen on all interfaces are left out", file=sys.stderr)
    if given.command == "check":
        with tempfile.TemporaryDirectory() as folder:
            return run.check_all(given.servers, given.kinds.split(","), Path(folder))
    try:
        return run.run(given)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
