"""Plots as SVG, drawn by a few lines: curves and areas over an axis of numbers. It knows no load test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDE, HIGH = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 40
_INK, _GRID = "#555", "#e6e6e6"

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


def plot(curves: Sequence[Curve], x: Axis, y: Axis, marks: Sequence[tuple[float, str]] = ()) -> str:
    """The picture; ``marks`` are lines across it at some y."""
    across = x.scale(_LEFT, WIDE - _RIGHT)
    down = y.scale(HIGH - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" font-size="11" font-family="inherit">']
    for value, text in y.ticks:
        at = down(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDE - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{_GRID}"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" fill="{_INK}">{text}</text>'
        )
    for value, text in x.ticks:
        at = across(value)
        parts.append(
            f'<text x="{at:.1f}" y="{HIGH - _BOTTOM + 15}" text-anchor="middle" fill="{_INK}">{text}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + WIDE) / 2:.0f}" y="{HIGH - 6}" text-anchor="middle" fill="{_INK}">'
        f"{escape(x.title)}</text>"
        f'<text x="12" y="{(HIGH - _BOTTOM) / 2:.0f}" fill="{_INK}" text-anchor="middle" '
        f'transform="rotate(-90 12 {(HIGH - _BOTTOM) / 2:.0f})">{escape(y.title)}</text>'
    )
    parts += [_drawn(curve, across, down) for curve in curves]
    for value, text in marks:
        at = down(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDE - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#c0392b" '
            f'stroke-dasharray="3 3"/><text x="{_LEFT + 4}" y="{at - 3:.1f}" fill="#c0392b">'
            f"{escape(text)}</text>"
        )
    return "".join((*parts, "</svg>"))


def legend(curves: Sequence[Curve]) -> str:
    """The names of curves beside their colours."""
    return "".join(
        f'<span class="key"><i style="background:{curve.colour}"></i>{escape(curve.name)}</span>'
        for curve in curves
    )


def _drawn(curve: Curve, across: Scale, down: Scale) -> str:
    drawn = []
    floor: Final = down(0.0)
    for run in _runs(curve.points):
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
