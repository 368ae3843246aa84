"""What verdicts at the door cost: this server with several ``decide_ms``, under all loads of the comparison.

python -m comparison.peers.verdicts measure --out DIR    in turns; goes on where it stopped
python -m comparison.peers.verdicts table --out DIR      asked, found, met; the smallest that costs little
python -m comparison.peers.verdicts keep --out DIR       writes docs/measured/verdicts.jsonl
python -m comparison.peers.verdicts draw                 docs/figures/verdicts.svg, from what is kept

A run's goodput is compared with that of the run of the same repeat without verdicts at the door.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from clockwork_serve.controller.promises import AT_ONCE, AT_ONCE_NS
from clockwork_serve.units import NS_PER_MS
from comparison.chart import Chart, Curve, picture
from comparison.peers import loads, run
from comparison.peers.install import version
from comparison.peers.loads import EMULATED, LOADS
from comparison.peers.measure import Point, cores, measure
from comparison.peers.models import Kinds
from comparison.peers.peer import HOST, ROOT, Setup
from comparison.peers.servers import Clockwork
from harness.machine import machine_line
from harness.report import Outcome, finish
from harness.serving import read_metrics

KEPT_FILE: Final = ROOT / "docs" / "measured" / "verdicts.jsonl"
FIGURE: Final = ROOT / "docs" / "figures" / "verdicts.svg"
NONE: Final = -1.0
"""Instead of a ``decide_ms``: without verdicts at the door."""
DECIDE_MS: Final = (NONE, 0.0, 40.0, 80.0)

GOODPUT: Final = 0.97
"""The share of the goodput without verdicts at the door that a default has to keep under each load."""
PROMISES: Final = 0.999
"""The share of promises to be kept."""
NO_MS: Final = {EMULATED: 5.0}
NO_SHARED_MS: Final = 25.0
"""How much later than ``decide_ms`` refusals may be (p99): where models use no core, and where they do."""

AXIS: Final = "decide_ms, how long a verdict may take"

Result = dict[str, Any]


class Deciding(Clockwork):
    """This server with a ``decide_ms``, or :data:`NONE`."""

    def __init__(self, decide_ms: float) -> None:
        self.decide_ms = decide_ms

    def command(self, setup: Setup) -> Sequence[str]:
        """As always, and that."""
        said = "off" if self.decide_ms == NONE else f"{self.decide_ms:g}"
        return [*super().command(setup), "--decide-ms", said]

    def counted(self, setup: Setup) -> Mapping[str, float]:
        """Promises, and those of them that were broken, by cause."""
        found: dict[str, float] = {}
        for (name, labels), value in read_metrics(f"http://{HOST}:{setup.port + 2}/metrics").items():
            if name.startswith("clockwork_model_promises"):
                key = dict(labels).get("cause", "promised")
                found[key] = found.get(key, 0.0) + value
        return found


@dataclass(frozen=True, slots=True)
class Variant:
    """A point of the comparison with a ``decide_ms``."""

    point: Point
    decide_ms: float

    @classmethod
    def of(cls, load: loads.Load, decide_ms: float, repeat: int) -> Variant:
        """Its server is named by the time."""
        name = "none" if decide_ms == NONE else f"{decide_ms:g}"
        return cls(Point(f"decide-{name}", load, repeat), decide_ms)


def variants(of: Sequence[loads.Load], decide_ms: Sequence[float], repeats: int) -> list[Variant]:
    """All runs: values take turns, and each repeat begins with another."""
    return [
        Variant.of(load, value, repeat)
        for repeat in range(1, repeats + 1)
        for load in of
        for value in run.turns(tuple(decide_ms), repeat)
    ]


def measured(one: Variant, kinds: Kinds, out: Path) -> Result:
    """Measure one, or say why not."""
    asked = Deciding(one.decide_ms)
    facts: Result = {
        "server": one.point.server, "load": one.point.load.name, "repeat": one.point.repeat,
        "decide_ms": one.decide_ms,
    }  # fmt: skip
    return run.attempt(facts, lambda: {**version(asked), **measure(one.point, asked, kinds, out)})


def measure_all(given: argparse.Namespace) -> int:
    """All that is not there yet; the exit status."""
    out = given.out.resolve()
    todo = variants([LOADS[name] for name in given.loads], given.decide_ms, given.repeats)
    left = [one for one in todo if not run.done(run.result_path(out, one.point))]
    kinds = Kinds()
    return run.run_all(
        left,
        lambda one: measured(one, kinds, out),
        lambda one: f"{one.point.load.name:<22} {one.point.server:<12} repeat {one.point.repeat}",
        lambda one: run.result_path(out, one.point),
        run.line_of,
    )


# ------------------------------------------------------------
# What was found.


def line_of(result: Result, machine: str) -> Result:
    """What is kept of a run."""
    names = ("load", "decide_ms", "repeat", "version", "figures", "counted", "others_share", "noise")
    return {**{name: result[name] for name in names}, "machine": machine}


def runs(out: Path) -> list[Result]:
    """All that were measured."""
    found = [json.loads(path.read_text()) for path in sorted((out / "results").glob("*/decide-*.json"))]
    return [line_of(one, machine_line()) for one in found if one["status"] == "measured"]


def kept() -> list[Result]:
    """The runs that are kept."""
    return [json.loads(line) for line in KEPT_FILE.read_text().splitlines()]


def in_time(line: Result) -> float:
    """Goodput, per second, of the load that a table is about."""
    figures = line["figures"]
    return float(figures.get("by_load", {}).get("hot", figures)["in_time_per_s"])


def shares(lines: Sequence[Result]) -> dict[float, dict[str, float]]:
    """By ``decide_ms`` and load: goodput by that without verdicts at the door, the median of the repeats."""
    without = {(one["load"], one["repeat"]): in_time(one) for one in lines if one["decide_ms"] == NONE}
    ratios: dict[float, dict[str, list[float]]] = {}
    for one in lines:
        base = without.get((one["load"], one["repeat"]))
        if one["decide_ms"] != NONE and base:
            ratios.setdefault(one["decide_ms"], {}).setdefault(one["load"], []).append(in_time(one) / base)
    return {
        value: {load: median(found) for load, found in sorted(by_load.items())}
        for value, by_load in sorted(ratios.items())
    }


def under_all(lines: Sequence[Result], of: Collection[str] = tuple(LOADS)) -> dict[float, dict[str, float]]:
    """The shares of each ``decide_ms`` measured under all loads: others prove nothing of the worst."""
    return {value: by_load for value, by_load in shares(lines).items() if by_load.keys() >= set(of)}


def smallest(lines: Sequence[Result], of: Collection[str] = tuple(LOADS)) -> float | None:
    """The smallest ``decide_ms`` from which on every load keeps its goodput; None if there is none."""
    found = None
    for value, by_load in sorted(under_all(lines, of).items(), reverse=True):
        if min(by_load.values()) < GOODPUT:
            break
        found = value
    return found


def kept_share(lines: Sequence[Result]) -> tuple[float, float]:
    """Promises that were kept, and all of them."""
    promised = sum(one["counted"].get("promised", 0.0) for one in lines)
    broken = sum(value for one in lines for cause, value in one["counted"].items() if cause != "promised")
    return promised - broken, promised


def judge(lines: Sequence[Result], outcome: Outcome) -> None:
    """Rows of what was asked, found and met, for each value; and the smallest that costs little."""
    for value, by_load in shares(lines).items():
        for load, share in by_load.items():
            own = [one for one in lines if one["load"] == load and one["decide_ms"] == value]
            name = f"decide_ms {value:g}, {load}"
            outcome.at_least(f"{name}: goodput", GOODPUT, share, digits=3)
            late = [one["figures"]["no_p99_ms"] for one in own if one["figures"]["no_p99_ms"] is not None]
            if late:
                about = LOADS[load]
                due_ms = max(value, min(AT_ONCE_NS / NS_PER_MS, about.slo_ms / AT_ONCE))
                limit_ms = due_ms + NO_MS.get(about.kind, NO_SHARED_MS)
                outcome.at_most(f"{name}: refusals, p99", limit_ms, median(late), "ms", digits=1)
            good, promised = kept_share(own)
            if promised:
                outcome.at_least(
                    f"{name}: kept", PROMISES, good / promised, digits=5, more=f"of {promised:.0f}"
                )
    found = smallest(lines)
    asked = f"{GOODPUT:.0%} of goodput under every load"
    said = "none of these" if found is None else f"{found:g} ms"
    outcome.judge("the smallest decide_ms that keeps it", asked=asked, found=said, good=found is not None)
    outcome.figures = {"shares": {f"{value:g}": by_load for value, by_load in shares(lines).items()}}


def drawing(lines: Sequence[Result]) -> str:
    """The share of goodput kept against ``decide_ms``: the worst load, the middle one, and what is asked."""
    found = under_all(lines)
    worst: Curve = [(value, 100 * min(by_load.values())) for value, by_load in found.items()]
    middle: Curve = [(value, 100 * median(by_load.values())) for value, by_load in found.items()]
    x_max = max(found)
    chart = Chart(x_max, 120, step=20)
    asked: Curve = [(0, 100 * GOODPUT), (x_max, 100 * GOODPUT)]
    words = f"% of that without verdicts at the door; {len(LOADS)} loads; dashed: {GOODPUT:.0%}, as asked"
    return picture("Goodput against decide_ms", [
        *chart.axes("Goodput that verdicts at the door keep", words, AXIS),
        *chart.curve("limit", "", asked, marks=False),
        *chart.curve("clockwork", "the middle load", middle),
        *chart.curve("triton", "the worst load", worst),
    ])  # fmt: skip


def _values(text: str) -> list[float]:
    return [NONE if one == "none" else float(one) for one in text.split(",")]


def main() -> int:
    """Measure, keep or draw; the exit status."""
    made = argparse.ArgumentParser(
        prog="python -m comparison.peers.verdicts", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("what", choices=["measure", "table", "keep", "draw"])
    made.add_argument("--out", type=Path, default=ROOT / "build" / "verdicts", help="folder of results")
    made.add_argument(
        "--decide-ms", type=_values, default=list(DECIDE_MS), metavar="MS,MS", help="none, or a time"
    )
    made.add_argument("--loads", type=lambda text: text.split(","), default=sorted(LOADS))
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--json", type=Path, metavar="FILE", help="table: write the result there too")
    given = made.parse_args()
    if given.what == "measure":
        if why := cores():
            print(f"error: {why}", file=sys.stderr)
            return 2
        return measure_all(given)
    if given.what == "table":
        outcome = Outcome("comparison.peers.verdicts")
        judge(runs(given.out), outcome)
        return finish(outcome, given.json)
    if given.what == "keep":
        KEPT_FILE.write_text("".join(json.dumps(line) + "\n" for line in runs(given.out)))
    FIGURE.write_text(drawing(kept()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
