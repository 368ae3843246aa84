"""Pictures of measurements as SVG: curves with spreads, one panel above the other. It measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

Curve = list[tuple[float, float]]

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 48, 150, 52, 52
STEP = 50
LABEL_PX: Final = 16
"""Names at the ends of curves are at least this far from one another."""
TICKS: Final = 8
_ROUND: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_STYLE: Final = """
  svg { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px }
  .paper { fill: #ffffff } .ink { fill: #1f2328 } .dim { fill: #59636e }
  .grid { stroke: #d8dee4 } .axis { stroke: #8c959f }
  .line { fill: none; stroke-width: 2.5; stroke-linejoin: round } .hollow { stroke-width: 2 }
  .clockwork { stroke: #0969da } .triton { stroke: #bc4c00 } .fastapi { stroke: #1a7f37 }
  .limit { stroke: #6e7781; stroke-dasharray: 6 4 }
  .clockwork-fill { fill: #0969da } .triton-fill { fill: #bc4c00 } .fastapi-fill { fill: #1a7f37 }
  .limit-fill { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .ink { fill: #e6edf3 } .dim { fill: #9198a1 }
    .grid { stroke: #2b3139 } .axis { stroke: #656c76 }
    .clockwork { stroke: #58a6ff } .triton { stroke: #f0883e } .fastapi { stroke: #3fb950 }
    .limit { stroke: #9198a1 }
    .clockwork-fill { fill: #58a6ff } .triton-fill { fill: #f0883e } .fastapi-fill { fill: #3fb950 }
    .limit-fill { fill: #9198a1 }
  }
"""


@dataclass(frozen=True, slots=True)
class Spread:
    """What several runs of one point found; ``hollow``: its mark is not filled."""

    x: float
    least: float
    median: float
    most: float
    hollow: bool = False


def round_step(most: float) -> int:
    """A step of an axis that gives it a few ticks."""
    return next((step for step in _ROUND if most / step <= TICKS), _ROUND[-1])


class Chart:
    """Where things are in a panel. ``top`` and ``bottom`` are its place in the picture, in pixels."""

    def __init__(
        self, x_max: float, y_max: float, step: int = STEP, *, x_step: int | None = None, top: int = TOP,
        bottom: int = HEIGHT - BOTTOM,
    ) -> None:  # fmt: skip
        self.x_max, self.y_max, self.step = x_max, y_max, step
        self.x_step = x_step or step
        self.top, self.bottom = top, bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point, in pixels."""
        across = LEFT + x / self.x_max * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(self.bottom - y / self.y_max * (self.bottom - self.top), 1)

    def axes(self, title: str, words: str, across: str) -> Iterator[str]:
        """Grid, ticks and words: what is shown upwards, of what, and what is across ("" for no words)."""
        yield f'<text class="ink" x="{LEFT}" y="{self.top - 32}" font-weight="600">{title}</text>'
        yield f'<text class="dim" x="{LEFT}" y="{self.top - 16}">{words}</text>'
        for y in range(0, int(self.y_max) + 1, self.step):
            (x1, y1), (x2, _) = self.at(0, y), self.at(self.x_max, y)
            yield f'<line class="{"grid" if y else "axis"}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y1}"/>'
            yield f'<text class="dim" x="{x1 - 8}" y="{y1 + 4}" text-anchor="end">{y}</text>'
        for x in range(0, int(self.x_max) + 1, self.x_step):
            x1, y1 = self.at(x, 0)
            yield f'<line class="axis" x1="{x1}" y1="{y1}" x2="{x1}" y2="{y1 + 5}"/>'
            yield f'<text class="dim" x="{x1}" y="{y1 + 20}" text-anchor="middle">{x}</text>'
        if across:
            middle = f'x="{self.at(self.x_max / 2, 0)[0]}" y="{self.bottom + 42}" text-anchor="middle"'
            yield f'<text class="dim" {middle}>{across}</text>'

    def line(self, name: str, curve: Curve) -> str:
        """Through these points."""
        points = " ".join(f"{x},{y}" for x, y in (self.at(*point) for point in curve))
        return f'<polyline class="line {name}" points="{points}"/>'

    def curve(self, name: str, words: str, curve: Curve, *, marks: bool = True) -> Iterator[str]:
        """A line with its name at its end; a mark at each point but the origin."""
        points = [self.at(x, y) for x, y in curve]
        yield self.line(name, curve)
        if marks:
            yield from (
                f'<circle class="{name}-fill" cx="{x}" cy="{y}" r="3.5"/>'
                for x, y in points
                if (x, y) != self.at(0, 0)
            )
        yield self.label(name, words, points[-1][1])

    def spreads(self, name: str, found: Sequence[Spread]) -> Iterator[str]:
        """A line through medians, and at each a bar from the least to the most."""
        for one in found:
            (x, low), (_, high) = self.at(one.x, one.least), self.at(one.x, one.most)
            yield f'<line class="{name}" stroke-width="1.5" x1="{x}" y1="{low}" x2="{x}" y2="{high}"/>'
        yield self.line(name, [(one.x, one.median) for one in found])
        for one in found:
            x, y = self.at(one.x, one.median)
            kind = f"paper hollow {name}" if one.hollow else f"{name}-fill"
            yield f'<circle class="{kind}" cx="{x}" cy="{y}" r="4"/>'

    def label(self, name: str, words: str, y: float) -> str:
        """A name to the right of the panel; ``y`` in pixels."""
        x = self.at(self.x_max, 0)[0] + 10
        return f'<text class="{name}-fill" x="{x}" y="{y + 4}">{words}</text>'

    def labels(self, ends: Iterable[tuple[str, str, float]]) -> Iterator[str]:
        """Names of curves (class, words, height of the last point), moved down where they would touch."""
        free = 0.0
        for y, name, words in sorted((self.at(0, value)[1], name, words) for name, words, value in ends):
            free = max(y, free + LABEL_PX)
            yield self.label(name, words, free)


def picture(label: str, parts: Iterable[str], height: int = HEIGHT) -> str:
    """An image of these parts. Colours follow the reader's light or dark scheme."""
    inside = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{label}">\n<style>{_STYLE}</style>\n'
        f'  <rect class="paper" width="{WIDTH}" height="{height}"/>\n{inside}\n</svg>\n'
    )
