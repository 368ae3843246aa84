"""The published numbers, from package data."""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files
from typing import Final

from clockwork_lab.reproduce.figure import Point, Role, Series

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
        name=name or f"published: {series}",
        role=Role.PAPER,
        points=_table()[figure, series, y_name],
        variant=variant,
    )


def value(figure: str, series: str, y_name: str, x: float) -> float:
    """One published number; KeyError if there is none there."""
    found = curve(figure, series, y_name).at(x)
    if found is None:
        raise KeyError((figure, series, y_name, x))
    return found
