"""One table of all questions, for people, pages and machines: every figure comes from a result's file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from comparison.peers.summary import spread
from comparison.promises.question import HEAD, MISSED, Question, Row, Runs
from harness.machine import machine_line
from harness.report import between_marks, page_row, table

MARKS: Final = ("<!-- promises: begin -->", "<!-- promises: end -->")


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
    """For a page."""
    parts = [f"Machine: {machine_line()}. Medians of the runs (least to most).", ""]
    for question, found in lines(out, questions):
        parts += [
            f"### {question.title}",
            "",
            *(page_row(line) for line in (HEAD, ["---"] * len(HEAD), *found)),
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
