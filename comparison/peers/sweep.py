"""Goodput against load: one of the peers' loads at several rates, and the picture of it in the README.

python -m comparison.peers.sweep measure --out DIR      a quarter of an hour; adds to what DIR has
python -m comparison.peers.sweep keep --out DIR         writes docs/measured/goodput.jsonl
python -m comparison.peers.sweep draw                   docs/figures/goodput.svg, from what is kept

The load is ``gpu_15_models``: 15 models share an emulated device on which a batch of n takes
16 + 4n ms, SLO 200 ms. Beside the servers stands the physical limit: every batch full, the device never idle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from comparison.peers import served
from comparison.peers.loads import shared_device
from comparison.peers.measure import Point
from comparison.peers.peer import ROOT
from comparison.peers.run import isolate, run_points

KEPT: Final = ROOT / "docs" / "measured" / "goodput.jsonl"
FIGURE: Final = ROOT / "docs" / "figures" / "goodput.svg"
SERVERS: Final = ("clockwork", "triton")
RATES: Final = (30, 60, 100, 150, 200, 250)
SECONDS: Final = 20
"""Of each run, warm-up included."""
BATCH_MAX: Final = 8
NAMES: Final = {"clockwork": "Clockwork Serve", "triton": "Triton"}


def limit_rps() -> float:
    """What the device answers at most: full batches, one after the other."""
    return BATCH_MAX / (served.BASE_MS + served.EACH_MS * BATCH_MAX) * 1000


def points(rates: Sequence[int], repeats: int) -> list[Point]:
    """Every server at every rate, in turns."""
    return [
        Point(server, shared_device(rate, SECONDS, f"gpu_15_models_{rate:03}"), repeat)
        for repeat in range(1, repeats + 1)
        for rate in rates
        for server in (SERVERS if repeat % 2 else reversed(SERVERS))
    ]


def keep(out: Path) -> None:
    """A line for each run: what was asked, what came in time, who disturbed it."""
    machine = json.loads((out / "facts.json").read_text())["machine"]
    lines = []
    for path in sorted((out / "results").glob("*/*.json")):
        found = json.loads(path.read_text())
        if found["status"] == "measured":
            rate = int(found["load"].rpartition("_")[2])
            lines.append({
                "server": found["server"], "rate_rps": rate, "repeat": found["repeat"],
                "version": found["version"], "figures": found["figures"], "machine": machine,
                "others_share": found["others_share"], "noise": found["noise"],
            })  # fmt: skip
    KEPT.write_text("".join(json.dumps(line) + "\n" for line in lines))


def kept() -> list[dict[str, Any]]:
    """The runs that are kept."""
    return [json.loads(line) for line in KEPT.read_text().splitlines()]


Curve = list[tuple[float, float]]


def curves(lines: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """By server: (asked, in time) a second, the medians of its runs at each rate."""
    runs: dict[str, dict[int, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        runs[line["server"]][line["rate_rps"]].append(line["figures"])
    return {
        server: [
            (
                statistics.median(one["asked_per_s"] for one in by_rate[rate]),
                statistics.median(one["in_time_per_s"] for one in by_rate[rate]),
            )
            for rate in sorted(by_rate)
        ]
        for server, by_rate in runs.items()
    }


WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 48, 150, 52, 52
STEP = 50
_STYLE: Final = """
  svg { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px }
  .paper { fill: #ffffff } .ink { fill: #1f2328 } .dim { fill: #59636e }
  .grid { stroke: #d8dee4 } .axis { stroke: #8c959f }
  .line { fill: none; stroke-width: 2.5; stroke-linejoin: round }
  .clockwork { stroke: #0969da } .triton { stroke: #bc4c00 } .limit { stroke: #6e7781; stroke-dasharray: 6 4 }
  .clockwork-fill { fill: #0969da } .triton-fill { fill: #bc4c00 } .limit-fill { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .ink { fill: #e6edf3 } .dim { fill: #9198a1 }
    .grid { stroke: #2b3139 } .axis { stroke: #656c76 }
    .clockwork { stroke: #58a6ff } .triton { stroke: #f0883e } .limit { stroke: #9198a1 }
    .clockwork-fill { fill: #58a6ff } .triton-fill { fill: #f0883e } .limit-fill { fill: #9198a1 }
  }
"""


class Chart:
    """Where things are in the picture: requests a second across, answers in time a second upwards."""

    def __init__(self, x_max: float, y_max: float, step: int = STEP) -> None:
        self.x_max, self.y_max, self.step = x_max, y_max, step

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point, in pixels."""
        across = LEFT + x / self.x_max * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - y / self.y_max * (HEIGHT - TOP - BOTTOM), 1)

    def axes(self, title: str, words: str, across: str) -> Iterator[str]:
        """Grid, ticks and words: what is shown upwards, of what, and what is across."""
        yield f'<text class="ink" x="{LEFT}" y="20" font-weight="600">{title}</text>'
        yield f'<text class="dim" x="{LEFT}" y="36">{words}</text>'
        for y in range(0, int(self.y_max) + 1, self.step):
            (x1, y1), (x2, _) = self.at(0, y), self.at(self.x_max, y)
            yield f'<line class="{"grid" if y else "axis"}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y1}"/>'
            yield f'<text class="dim" x="{x1 - 8}" y="{y1 + 4}" text-anchor="end">{y}</text>'
        for x in range(0, int(self.x_max) + 1, self.step):
            x1, y1 = self.at(x, 0)
            yield f'<line class="axis" x1="{x1}" y1="{y1}" x2="{x1}" y2="{y1 + 5}"/>'
            yield f'<text class="dim" x="{x1}" y="{y1 + 20}" text-anchor="middle">{x}</text>'
        middle = f'x="{self.at(self.x_max / 2, 0)[0]}" y="{HEIGHT - 10}" text-anchor="middle"'
        yield f'<text class="dim" {middle}>{across}</text>'

    def curve(self, name: str, words: str, curve: Curve, *, marks: bool = True) -> Iterator[str]:
        """A line with its name at its end; a mark at each point but the origin."""
        points = [self.at(x, y) for x, y in curve]
        yield f'<polyline class="line {name}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'
        if marks:
            yield from (
                f'<circle class="{name}-fill" cx="{x}" cy="{y}" r="3.5"/>'
                for x, y in points
                if (x, y) != self.at(0, 0)
            )
        x, y = self.at(self.x_max, 0)[0] + 10, points[-1][1] + 4
        yield f'<text class="{name}-fill" x="{x}" y="{y}">{words}</text>'


def drawing(found: dict[str, Curve]) -> str:
    """The picture, as text. Colours follow the reader's light or dark scheme."""
    top, furthest = limit_rps(), max(x for curve in found.values() for x, _ in curve)
    chart = Chart(10 * -(-furthest // 10), STEP * -(-top // STEP))
    limit: Curve = [(0, 0), (top, top), (chart.x_max, top)]
    title, words = "Answers within the SLO, a second", "15 models on one emulated device, SLO 200 ms"
    parts = [
        *chart.axes(title, words, "requests a second"),
        *chart.curve("limit", "ideal: full batches", limit, marks=False),
    ]
    for server in SERVERS:
        parts += chart.curve(server, NAMES[server], [(0.0, 0.0), *found[server]])
    return picture("Goodput against load", parts)


def picture(label: str, parts: Iterable[str]) -> str:
    """An image of these parts."""
    inside = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{label}">\n<style>{_STYLE}</style>\n'
        f'  <rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>\n{inside}\n</svg>\n'
    )


def main() -> int:
    """Measure, keep or draw; the exit status."""
    made = argparse.ArgumentParser(
        prog="python -m comparison.peers.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("what", choices=["measure", "keep", "draw"])
    made.add_argument("--out", type=Path, default=ROOT / "build" / "sweep", help="folder of results")
    made.add_argument("--rates", type=lambda text: [int(one) for one in text.split(",")], default=RATES)
    made.add_argument("--repeats", type=int, default=1)
    given = made.parse_args()
    if given.what == "keep":
        keep(given.out)
        return 0
    if given.what == "draw":
        FIGURE.write_text(drawing(curves(kept())))
        return 0
    if why := isolate("comparison.peers.sweep"):
        print(f"note: {why}", file=sys.stderr)
    return run_points(points(given.rates, given.repeats), given.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
