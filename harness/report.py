"""How a benchmark shows its result: a table for people, JSON for machines, an exit status for scripts."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from harness.machine import machine_line

PASSED, MISSED, INVALID = "passed", "missed", "invalid"
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
"""Lines of a page between which what was measured stands."""


@dataclass(slots=True)
class Verdict:
    """One promise: what was asked, what was found, and whether that is enough."""

    question: str
    asked: str
    found: str
    good: bool


@dataclass(slots=True)
class Outcome:
    """The result of a benchmark. ``invalid`` says why the run proves nothing, if it does not."""

    name: str
    verdicts: list[Verdict] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    invalid: str = ""

    def judge(self, question: str, *, asked: str, found: str, good: bool) -> None:
        """Add a promise."""
        self.verdicts.append(Verdict(question, asked, found, good))

    def at_most(
        self, question: str, limit: float, found: float, unit: str = "", *, digits: int = 2, more: str = ""
    ) -> None:
        """Add a promise of an upper bound; ``more`` is said beside what was found."""
        self._bound(question, ("<=", limit), found, unit, digits, more, good=found <= limit)

    def at_least(
        self, question: str, limit: float, found: float, unit: str = "", *, digits: int = 2, more: str = ""
    ) -> None:
        """Add a promise of a lower bound; ``more`` is said beside what was found."""
        self._bound(question, (">=", limit), found, unit, digits, more, good=found >= limit)

    def _bound(
        self, question: str, asked: tuple[str, float], found: float, unit: str, digits: int, more: str,
        *, good: bool,
    ) -> None:  # fmt: skip
        sign, limit = asked
        unit = unit if unit in ("", "x") else f" {unit}"
        bound = f"{sign} {limit:,.12g}{unit}" if limit else "0"
        value = f"{found:,.{digits}f}{unit}"
        self.judge(question, asked=bound, found=f"{value} {more}".rstrip(), good=good)

    def none(self, question: str, found: Sequence[object], *, more: str = "") -> None:
        """Add a promise that there is nothing of a kind; what there is is shown."""
        shown = f"{len(found)}: {', '.join(map(str, found[:3]))}" if found else "0"
        self.judge(question, asked="0", found=f"{shown} {more}".rstrip(), good=not found)

    @property
    def verdict(self) -> str:
        """``passed``, ``missed`` or ``invalid``."""
        if self.invalid:
            return INVALID
        return PASSED if all(one.good for one in self.verdicts) else MISSED


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with what every benchmark takes, described by the first line of its docstring."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    made.add_argument("--seed", type=int, default=1)
    return made


def finish(outcome: Outcome, json_path: Path | None) -> int:
    """Print the result; returns the exit status: 0 passed, 1 missed, 2 invalid."""
    command = f"python -m {outcome.name} {shlex.join(sys.argv[1:])}".strip()
    print(f"\n{outcome.name}: {outcome.verdict.upper()}{f' ({outcome.invalid})' if outcome.invalid else ''}")
    print(f"  machine  {machine_line()}\n  command  {command}\n")
    rows = [(one.question, one.asked, one.found, "yes" if one.good else "NO") for one in outcome.verdicts]
    print(table(("", "asked", "found", "good"), rows))
    if json_path is not None:
        record = {
            "benchmark": outcome.name, "command": command, "machine": machine_line(),
            "verdict": outcome.verdict,
            "invalid": outcome.invalid, "figures": outcome.figures,
            "verdicts": [
                {"question": one.question, "asked": one.asked, "found": one.found, "good": one.good}
                for one in outcome.verdicts
            ],
        }  # fmt: skip
        json_path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return {PASSED: 0, MISSED: 1, INVALID: 2}[outcome.verdict]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns."""
    lines = [list(head), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def page_row(cells: Sequence[str]) -> str:
    """A line of a table for a page."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def between_marks(page: str, text: str, marks: tuple[str, str] = MARKS) -> str:
    """The page with this text between its marks."""
    before, begin, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise SystemExit(
            f"error: the page: expected lines {marks[0]} and {marks[1]}, found none; "
            "put them where tables belong"
        )
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def in_turns(
    sides: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int
) -> tuple[dict[str, list[Mapping[str, float]]], dict[str, dict[str, float]]]:
    """All sides measured again and again, in turns: what each found, and the medians of it."""
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            found[name].append(measure())
    medians = {
        name: {field: median(one[field] for one in each) for field in each[0]} for name, each in found.items()
    }
    return found, medians


def quantile(values: Iterable[float], share: float) -> float:
    """The least value that ``share`` of all do not exceed (nan if there are none)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def milliseconds(nanoseconds: float) -> str:
    """For a table."""
    return "-" if math.isnan(nanoseconds) else f"{nanoseconds / 1e6:.2f} ms"


def percent(part: float, whole: float) -> str:
    """For a table."""
    return f"{100 * part / whole:.2f} %" if whole else "-"
