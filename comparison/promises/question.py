"""What a question is, how its figures are worded, and the table of all, for people, pages and machines.

Every figure of the table comes from a result's file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from comparison.peers.record import shown, spread
from harness.machine import machine_line
from harness.report import between_marks, page_row, table

if TYPE_CHECKING:
    from comparison.promises.rig import Rig

Figures = dict[str, Any]
Runs = Mapping[str, Mapping[int, Figures]]
"""By variant and repeat."""
MET, MISSED, TOLD, NONE = "met", "missed", "", "nothing to judge"
MARKS: Final = ("<!-- promises: begin -->", "<!-- promises: end -->")
HEAD: Final = ("question", "goal", "found", "", "others %")


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit for the median of repeats, or for ``every`` one of them."""

    limit: float
    most: bool
    every: bool = False

    def met(self, values: Sequence[float]) -> bool:
        """Whether they keep to it."""
        worst = max(values) if self.most else min(values)
        value = worst if self.every else median(values)
        return value <= self.limit if self.most else value >= self.limit

    def words(self, form: str) -> str:
        """For a table."""
        return f"{'at most' if self.most else 'at least'} {form.format(self.limit)}"


def at_most(limit: float, *, every: bool = False) -> Goal:
    """No more than that is good."""
    return Goal(limit, most=True, every=every)


def at_least(limit: float) -> Goal:
    """No less than that is good."""
    return Goal(limit, most=False)


@dataclass(frozen=True, slots=True)
class Row:
    """A figure: one value a repeat, and what it should be, if anything."""

    text: str
    values: Sequence[float | None]
    form: str
    goal: Goal | None = None

    @property
    def there(self) -> list[float]:
        """What was measured."""
        return [value for value in self.values if value is not None and not math.isnan(value)]

    @property
    def verdict(self) -> str:
        """Whether the goal was met; "" where there is none."""
        if not self.there:
            return NONE
        if self.goal is None:
            return TOLD
        return MET if self.goal.met(self.there) else MISSED

    @property
    def found(self) -> str:
        """The median, and least and most."""
        return shown(spread(self.there), self.form)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. ``variants`` are measured in turns, each on a server of its own."""

    name: str
    title: str
    variants: tuple[str, ...]
    measure: Callable[[Rig, str, int], Figures]
    rows: Callable[[Runs], list[Row]]


def column(runs: Runs, variant: str, key: str, scale: float = 1.0) -> list[float | None]:
    """A figure of all repeats of a variant."""
    found = [one.get(key) for _, one in sorted(runs.get(variant, {}).items())]
    return [None if value is None else scale * value for value in found]


def percent(runs: Runs, variant: str, key: str) -> list[float | None]:
    """A share of all repeats of a variant."""
    return column(runs, variant, key, 100.0)


def paired(runs: Runs, one: str, other: str, told: Callable[[Figures, Figures], float]) -> list[float | None]:
    """What is told of two variants of the same repeat, where both were measured."""
    there = sorted(set(runs.get(one, {})) & set(runs.get(other, {})))
    return [told(runs[one][repeat], runs[other][repeat]) for repeat in there]


# ------------------------------------------------------------
# The table.


def read(out: Path, question: Question) -> dict[str, dict[int, dict[str, Any]]]:
    """All that was measured of a question."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((out / "results" / question.name).glob("*.json")):
        one = json.loads(path.read_text())
        if one["status"] == "measured":
            runs.setdefault(one["variant"], {})[one["repeat"]] = one["figures"]
    return runs


def cells(row: Row, others: str) -> list[str]:
    """A line of the table."""
    goal = "" if row.goal is None else row.goal.words(row.form)
    return [row.text, goal, row.found, row.verdict, others]


def others_of(runs: Runs) -> str:
    """The most that others used of the two cores in any run of a question."""
    shares = [100 * one["others_share"] for variant in runs.values() for one in variant.values()]
    return f"{max(shares):.1f}" if shares else "-"


def lines(out: Path, questions: Iterable[Question]) -> list[tuple[Question, list[list[str]]]]:
    """Each question's lines."""
    found = []
    for question in questions:
        runs = read(out, question)
        if runs:
            others = others_of(runs)
            found.append((question, [cells(row, others) for row in question.rows(runs)]))
    return found


def text(out: Path, questions: Sequence[Question]) -> str:
    """For a terminal."""
    rows = [line for _, found in lines(out, questions) for line in found]
    return f"{machine_line()}\n\n{table(HEAD, rows)}"


def markdown(out: Path, questions: Sequence[Question]) -> str:
    """For a page: what has a goal."""
    parts = [f"Machine: {machine_line()}. Medians of the runs (least to most).", ""]
    for question, found in lines(out, questions):
        judged = [line for line in found if line[1]]
        parts += [
            f"### {question.title}",
            "",
            *(page_row(line) for line in (HEAD, ["---"] * len(HEAD), *judged)),
            "",
        ]
    return "\n".join(parts)


def machines(out: Path, questions: Iterable[Question]) -> dict[str, Any]:
    """For machines: the rows with all of their values, and the figures of all runs."""
    found: dict[str, Any] = {"machine": machine_line(), "questions": {}}
    for question in questions:
        runs = read(out, question)
        if not runs:
            continue
        found["questions"][question.name] = {
            "title": question.title, "runs": runs,
            "rows": [
                {"question": row.text, "goal": row.goal and row.goal.words(row.form),
                 "values": [value if value in row.there else None for value in row.values],
                 "found": spread(row.there), "verdict": row.verdict}
                for row in question.rows(runs)
            ],
        }  # fmt: skip
    return found


def missed(out: Path, questions: Iterable[Question]) -> list[str]:
    """The goals that were not met."""
    found = []
    for question in questions:
        runs = read(out, question)
        found += [row.text for row in question.rows(runs) if row.verdict == MISSED]
    return found


def write_page(page: Path, out: Path, questions: Sequence[Question]) -> None:
    """Into the page, between its marks."""
    page.write_text(between_marks(page.read_text(), markdown(out, questions), MARKS))
