"""Plots as SVG, drawn by a few lines: curves and areas over an axis of numbers. It knows no load test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDE, HIGH = 480, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 42
_INK, _GRID, _SHADE, _MARK = "#555", "#e6e6e6", "#f3f3f3", "#c0392b"
_TEXT_HIGH, _LETTER_WIDE = 12, 6.5
_HALO: Final = 'paint-order="stroke" stroke="#fff" stroke-width="6" stroke-opacity=".85"'
"""Text on top of curves can be read."""

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in order of x; None in y cuts the line. An area is filled down to zero."""

    name: str
    colour: str
    points: Sequence[tuple[float, float | None]]
    area: bool = False
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """How values are placed: ``ticks`` are (value, text); ``log``: by their logarithm."""

    title: str
    least: float
    most: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def scale(self, start: float, end: float) -> Scale:
        """Where a value is between two places."""
        place: Callable[[float], float] = math.log if self.log else float
        least, most = place(self.least), place(self.most)
        span = most - least or 1.0

        def at(value: float) -> float:
            held = min(max(value, self.least), self.most)
            return start + (place(held) - least) / span * (end - start)

        return at


def linear(title: str, values: Sequence[float]) -> Axis:
    """From zero to a round number above all values."""
    most = max((*values, 0.0)) or 1.0
    step = 10 ** math.floor(math.log10(most))
    for part in (0.2, 0.5, 1.0, 2.0):
        if most / (step * part) <= 6:
            step *= part
            break
    top = math.ceil(most / step - 1e-9) * step
    return Axis(
        title, 0.0, top, [(tick * step, f"{tick * step:,.6g}") for tick in range(round(top / step) + 1)]
    )


def logarithmic(title: str, values: Sequence[float]) -> Axis:
    """Decades around all values, which are above 0."""
    found = [value for value in values if value > 0] or [1.0]
    first, last = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    last = max(last, first + 1)
    ticks = [(10.0**power, f"{10.0**power:,g}") for power in range(first, last + 1)]
    return Axis(title, 10.0**first, 10.0**last, ticks, log=True)


def plot(
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    marks: Sequence[tuple[float, str]] = (),
    shaded: tuple[float, str] | None = None,
) -> str:
    """The picture; ``marks`` are lines across it at some y, ``shaded`` is grey from the left up to some x."""
    across = x.scale(_LEFT, WIDE - _RIGHT)
    down = y.scale(HIGH - _BOTTOM, _TOP)
    said = escape(f"{y.title} over {x.title}")
    looks = f'font-size="{_TEXT_HIGH}" font-family="inherit"'
    parts = [f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{said}" {looks}>']
    if shaded is not None:
        parts.append(
            f'<rect x="{_LEFT}" y="{_TOP}" width="{across(shaded[0]) - _LEFT:.1f}" '
            f'height="{HIGH - _BOTTOM - _TOP}" fill="{_SHADE}"><title>{escape(shaded[1])}</title></rect>'
        )
    parts += _grid(x, y, across, down)
    parts += [_drawn(curve, across, down) for curve in curves]
    parts += _marked(marks, down)
    return "".join((*parts, "</svg>"))


def _grid(x: Axis, y: Axis, across: Scale, down: Scale) -> list[str]:
    parts = []
    floor, middle = HIGH - _BOTTOM, (HIGH - _BOTTOM + _TOP) / 2
    for value, text in y.ticks:
        at = down(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDE - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{_GRID}"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" fill="{_INK}">{text}</text>'
        )
    for value, text in x.ticks:
        at = across(value)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{floor}" y2="{floor + 4}" stroke="{_INK}"/>'
            f'<text x="{at:.1f}" y="{floor + 17}" text-anchor="middle" fill="{_INK}">{text}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + WIDE - _RIGHT) / 2:.0f}" y="{HIGH - 6}" text-anchor="middle" fill="{_INK}">'
        f"{escape(x.title)}</text>"
        f'<text x="12" y="{middle:.0f}" fill="{_INK}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle:.0f})">{escape(y.title)}</text>'
    )
    return parts


def _marked(marks: Sequence[tuple[float, str]], down: Scale) -> list[str]:
    """Lines across, each with its text above it; beside the one below where there is no room."""
    parts: list[str] = []
    left, below = 0.0, math.inf
    for value, text in sorted(marks):
        at = down(value)
        left = left if below - at < _TEXT_HIGH else _LEFT + 4.0
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDE - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{_MARK}" '
            f'stroke-dasharray="3 3"/><text x="{left:.0f}" y="{at - 3:.1f}" fill="{_MARK}" {_HALO}>'
            f"{escape(text)}</text>"
        )
        left, below = left + _LETTER_WIDE * (len(text) + 1), at
    return parts


def legend(curves: Sequence[Curve]) -> str:
    """The names of curves beside what they look like."""
    return "".join(
        f'<span class="key"><i style="border-top:{"3px dashed" if curve.dashed else "3px solid"} '
        f'{curve.colour}"></i>{escape(curve.name)}</span>'
        for curve in curves
    )


def _drawn(curve: Curve, across: Scale, down: Scale) -> str:
    drawn = []
    floor: Final = down(0.0)
    for run in _runs(curve.points):
        if len(run) == 1:
            ((at, value),) = run
            drawn.append(
                f'<circle cx="{across(at):.1f}" cy="{down(value):.1f}" r="2.5" fill="{curve.colour}"/>'
            )
            continue
        line = " ".join(f"{across(at):.1f},{down(value):.1f}" for at, value in run)
        if curve.area:
            ends = f"{across(run[-1][0]):.1f},{floor:.1f} {across(run[0][0]):.1f},{floor:.1f}"
            drawn.append(f'<polygon points="{line} {ends}" fill="{curve.colour}" fill-opacity=".25"/>')
        dashes = ' stroke-dasharray="5 3"' if curve.dashed else ""
        drawn.append(
            f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-width="1.8"{dashes}/>'
        )
    return "".join(drawn)


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[Point]]:
    """Pieces without a gap."""
    runs: list[list[Point]] = [[]]
    for at, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((at, value))
    return [run for run in runs if run]
