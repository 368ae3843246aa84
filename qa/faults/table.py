"""Results as a table: for a terminal, as Markdown, and into a page between its marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from harness.report import between_marks, page_row, table
from qa.faults.result import KEPT, NOT_MEASURED, Result

HEAD: Final = (
    "fault", "what", "when", "sent", "good", "no", "lost", "reset", "no door", "twice", "late", "overdue",
    "first good ms", "90 % ms", "in time % before, during, after", "MiB", "files", "verdict",
)  # fmt: skip
_WORDS: Final = 2
"""Columns that are words, and are aligned to the left on a page; also the first."""


class Kills(Struct, kw_only=True):
    """One of the two longer scenarios: what was asked, what was found, and the arithmetic in words."""

    name: str
    rows: list[tuple[str, str, str, bool]]
    figures: dict[str, float | list[float]] = {}
    short: bool = False


class Record(Struct, kw_only=True):
    """A file of results."""

    machine: str
    command: str
    short: bool
    results: list[Result] = []
    kills: list[Kills] = []


def write(path: Path, record: Record) -> None:
    """The file, whole or as before."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    new.replace(path)


def read(path: Path) -> Record:
    """What :func:`write` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Record)


def _ms(found: float | None) -> str:
    return "never" if found is None else f"{found:.0f}"


def cells(one: Result) -> list[str]:
    """One row."""
    if one.status == NOT_MEASURED:
        return [one.name, one.what, one.when, *["-"] * (len(HEAD) - 4), NOT_MEASURED]
    ends = one.ends
    grown = [held.rss_mib[1] - held.rss_mib[0] for held in one.holdings.values()]
    files = sum(held.files[1] - held.files[0] for held in one.holdings.values())
    reset = f"{ends.reset} of {one.in_flight}" if one.in_flight else f"{ends.reset}"
    return [
        one.name, one.what, one.when, f"{ends.sent}", f"{ends.good}",
        f"{ends.rejected + ends.expired + ends.failed}", f"{ends.lost}", reset, f"{ends.refused}",
        f"{one.twice}", f"{one.late_as_good}", f"{one.overdue}", _ms(one.first_good_ms), _ms(one.whole_ms),
        ", ".join(f"{share * 100:.0f}" for share in one.goodput.share), f"{max(grown, default=0.0):+.0f}",
        f"{files:+d}", one.status,
    ]  # fmt: skip


def text(results: Sequence[Result]) -> str:
    """For a terminal, with what is wrong below."""
    narrow = [[row[0], *row[3:]] for row in map(cells, results)]
    lines = [table([HEAD[0], *HEAD[3:]], narrow), ""]
    for one in results:
        lines += [f"  {one.name}: {words}" for words in one.wrong]
    kept = sum(one.status == KEPT for one in results)
    broken = [one.name for one in results if one.status not in (KEPT, NOT_MEASURED)]
    lines.append(
        f"  {kept} of {len(results)} faults: every promise kept; broken: {', '.join(broken) or 'none'}"
    )
    return "\n".join(lines)


def markdown(record: Record) -> str:
    """For a page."""
    form = "the short form" if record.short else "the whole"
    lines = [f"Machine: {record.machine}. `{record.command}`, {form}.", ""]
    if record.results:
        rule = ["---"] * (_WORDS + 1) + ["--:"] * (len(HEAD) - _WORDS - 2) + ["---"]
        lines += [page_row(HEAD), page_row(rule)]
        lines += [page_row(cells(one)) for one in record.results]
        broken = [one for one in record.results if one.wrong]
        lines += ["", *(f"- `{one.name}`: {'; '.join(map(_line, one.wrong))}" for one in broken)]
        skipped = [one for one in record.results if one.status == NOT_MEASURED]
        lines += [f"- `{one.name}` was not measured: {'; '.join(one.notes)}" for one in skipped]
    for kills in record.kills:
        head = [("", "asked", "found", "kept"), ["---"] * 4]
        rows = [(what, asked, found, "yes" if good else "**no**") for what, asked, found, good in kills.rows]
        lines += ["", f"**{kills.name}**", "", *map(page_row, [*head, *rows])]
    return "\n".join(lines) + "\n"


def _line(words: str) -> str:
    return " ".join(words.split())


def into_page(files: Sequence[Path], page: Path) -> None:
    """Everything that these files hold, between the page's marks."""
    found = "\n".join(markdown(read(path)) for path in files)
    page.write_text(between_marks(page.read_text(), found))
