"""A reproduced figure as data: series in panels, claims, and provenance."""

from __future__ import annotations

import csv
import enum
from functools import cache
from importlib.resources import files
from typing import Any, Final

import msgspec
from msgspec import Struct


class SeriesRole(enum.StrEnum):
    """What a curve stands for; its colour follows from it."""

    PAPER = "paper"  # as published
    RELEASED = "released"  # policy ``paper`` with the constants of the authors' code
    MENDED = "mended"  # policy ``paper`` with corrected constants: the fair baseline
    DEFAULT = "default"  # our policy
    OTHER = "other"  # a policy that was asked for by name
    LIMIT = "limit"  # what no policy can exceed
    REAL = "real"  # measured on this machine


class Point(Struct, frozen=True):
    """One point. ``y`` is None if there is no value (no request ended in time, say)."""

    x: float
    y: float | None


class Series(Struct, frozen=True, kw_only=True):
    """One curve of a panel. ``variant`` tells curves of one role apart: 0 solid, 1 dotted, ... ."""

    name: str
    role: SeriesRole
    points: tuple[Point, ...]
    variant: int = 0

    def at(self, x: float) -> float | None:
        """The value at ``x``; None if there is none."""
        return next((point.y for point in self.points if abs(point.x - x) <= 1e-6 * abs(x)), None)


class Panel(Struct, frozen=True, kw_only=True):
    """One pair of axes. ``name`` goes before its series' names in the JSON where a figure has several."""

    name: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    y_max: float | None = None


class PaperClaim(Struct, frozen=True, kw_only=True):
    """A published value, our measured value, and the goal: ``ours`` is to be ``sense`` ``target``.

    ``sense`` is ``>=``, ``<=`` or ``+-`` (within ``tolerance`` of it).
    """

    name: str
    paper: float | None
    ours: float | None
    sense: str
    target: float
    tolerance: float = 0.0

    @classmethod
    def near(cls, name: str, paper: float, ours: float | None, tolerance: float) -> PaperClaim:
        """The goal of reproducing a published value."""
        return cls(name=name, paper=paper, ours=ours, sense="+-", target=paper, tolerance=tolerance)

    @property
    def met(self) -> bool:
        """Whether the goal is met; False if nothing was measured."""
        if self.ours is None:
            return False
        if self.sense == ">=":
            return self.ours >= self.target
        if self.sense == "<=":
            return self.ours <= self.target
        assert self.sense == "+-", self.sense
        return abs(self.ours - self.target) <= self.tolerance

    @property
    def wanted(self) -> str:
        """The target in words."""
        spread = f" ± {self.tolerance:.4g}" if self.sense == "+-" else ""
        return f"{'' if spread else self.sense + ' '}{self.target:.6g}{spread}"


class Figure(Struct, frozen=True, kw_only=True):
    """One figure of the paper, and the ``question`` that it answers.

    ``setup`` says how it was made, ``notes`` are remarks for the reader.
    """

    figure: str
    title: str
    question: str
    setup: dict[str, Any]
    panels: tuple[Panel, ...]
    claims: tuple[PaperClaim, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """The record as JSON, indented."""
        return msgspec.json.format(msgspec.json.encode(self.record()), indent=2)

    def record(self) -> dict[str, Any]:
        """The figure for machines: figure, setup, series and claims, as plain values."""
        several = len(self.panels) > 1
        record = {
            "figure": self.figure,
            "setup": {"title": self.title, "question": self.question, **self.setup, "notes": self.notes},
            "series": [
                {"name": f"{panel.name}: {series.name}" if several else series.name, "points": series.points}
                for panel in self.panels
                for series in panel.series
            ],
            "claims": [
                {
                    "name": claim.name, "paper": claim.paper, "ours": claim.ours, "target": claim.target,
                    "met": claim.met, "sense": claim.sense, "tolerance": claim.tolerance,
                }
                for claim in self.claims
            ],
        }  # fmt: skip
        rounded: dict[str, Any] = _rounded(msgspec.to_builtins(record))
        return rounded


def points(pairs: Any) -> tuple[Point, ...]:
    """Points of (x, y) pairs."""
    return tuple(Point(float(x), None if y is None else float(y)) for x, y in pairs)


def _rounded(value: Any) -> Any:
    """Floats to 6 significant digits: more are not significant, and would differ between machines."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------
# The published numbers, from package data.


Key = tuple[str, str, str]
_FILE: Final = "paper_figures.csv"


@cache
def _table() -> dict[Key, tuple[Point, ...]]:
    """Points by (figure, series, y_name), ascending in x as in the file."""
    text = (files("clockwork_lab.reproduce") / "data" / _FILE).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    table: dict[Key, list[Point]] = {}
    for row in csv.DictReader(lines):
        key = (row["figure"], row["series"], row["y_name"])
        table.setdefault(key, []).append(Point(float(row["x"]), float(row["y"])))
    return {key: tuple(found) for key, found in table.items()}


def curve(figure: str, series: str, y_name: str, *, name: str = "", variant: int = 0) -> Series:
    """One published curve; KeyError if there is none of that name."""
    return Series(
        name=name or f"published: {series}", role=SeriesRole.PAPER, points=_table()[figure, series, y_name],
        variant=variant,
    )  # fmt: skip


def value(figure: str, series: str, y_name: str, x: float) -> float:
    """One published number; KeyError if there is none there."""
    found = curve(figure, series, y_name).at(x)
    if found is None:
        raise KeyError((figure, series, y_name, x))
    return found
