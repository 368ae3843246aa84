"""The results of rows: records for a file and for the judge; as a table for a terminal, and for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from harness.report import between_marks, page_row, table

KEPT, BROKEN, NOT_MEASURED = "kept", "BROKEN", "not measured"


class Ends(Struct, frozen=True, kw_only=True):
    """How requests ended, each once. docs/develop/faults.md says what each is."""

    sent: int = 0
    good: int = 0
    late: int = 0
    rejected: int = 0
    expired: int = 0
    failed: int = 0
    reset: int = 0
    refused: int = 0
    lost: int = 0


class Goodput(Struct, frozen=True, kw_only=True):
    """Good answers a second, and the share of what was asked: before, while, after."""

    per_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    share: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Holding(Struct, kw_only=True):
    """Of one process: before and after. ``pid`` changes if it was replaced."""

    pid: tuple[int, int]
    rss_mib: tuple[float, float]
    files: tuple[int, int]
    threads: tuple[int, int]


class Result(Struct, kw_only=True):
    """One row's. Times in ms; None is "not within the run".

    ``back_ms``: of each thing done, until the first good answer to a request that came after it;
    ``restarts_ms``: until a killed process's successor
    runs; a worker's, until the controller counts its device.
    """

    name: str
    what: str
    when: str
    setup: str
    status: str = NOT_MEASURED
    wrong: list[str] = []
    notes: list[str] = []
    ends: Ends = Ends()
    in_flight: int = 0
    twice: int = 0
    late_as_good: int = 0
    overdue: int = 0
    reasons: dict[str, int] = {}
    first_good_ms: float | None = None
    whole_ms: float | None = None
    goodput: Goodput = Goodput()
    holdings: dict[str, Holding] = {}
    segments: tuple[int, int] = (0, 0)
    books: dict[str, int] = {}
    back_ms: list[float | None] = []
    restarts_ms: list[float] = []
    tracebacks: int = 0
    sent_late_ms: float = 0.0
    seconds: float = 0.0


SLACK_MS: Final = 50.0
"""After its deadline a request may hear of it so much later: the way of an answer, on a busy machine."""

# ------------------------------------------------------------
# Tables and files.

HEAD: Final = (
    "fault", "what", "when", "sent", "good", "no", "lost", "reset", "no door", "twice", "late", "overdue",
    "first good ms", "90 % ms", "in time % before, during, after", "MiB", "files", "verdict",
)  # fmt: skip
PAGE_HEAD: Final = ("fault", "what, when", "good of sent", "no", "connections", "first good ms", "90 % ms")
_PAGE_RULE: Final = ("---", "---", "--:", "--:", "--:", "--:", "--:")


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


def page_cells(one: Result) -> list[str]:
    """One row of a page, which has only the columns that differ between faults; see :func:`elsewhere`."""
    begin = [one.name, f"{one.what}, {one.when}"]
    if one.status == NOT_MEASURED:
        return [*begin, *["-"] * (len(PAGE_HEAD) - len(begin))]
    ends = one.ends
    cut = [f"{ends.reset} reset"] * bool(ends.reset) + [f"{ends.refused} no door"] * bool(ends.refused)
    return [
        *begin, f"{ends.good}/{ends.sent}", f"{ends.rejected + ends.expired + ends.failed}", ", ".join(cut),
        _ms(one.first_good_ms), _ms(one.whole_ms),
    ]  # fmt: skip


def elsewhere(results: Sequence[Result]) -> str:
    """What is 0 for nearly every fault, and for which it is not."""
    counts: dict[str, Callable[[Result], int]] = {
        "lost": lambda one: one.ends.lost, "twice": lambda one: one.twice,
        "late": lambda one: one.late_as_good, "overdue": lambda one: one.overdue,
    }  # fmt: skip
    found = []
    for what, count in counts.items():
        where = [f"{count(one)} (`{one.name}`)" for one in results if count(one)]
        found.append(f"{what}: {', '.join(where) or '0 in every row'}")
    return f"{'; '.join(found)}."


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
        lines += [page_row(PAGE_HEAD), page_row(_PAGE_RULE), *map(page_row, map(page_cells, record.results))]
        lines += ["", f"- {elsewhere(record.results)}"]
        broken = [one for one in record.results if one.wrong]
        lines += [f"- `{one.name}` BROKEN: {'; '.join(map(_line, one.wrong))}" for one in broken]
        skipped = [one for one in record.results if one.status == NOT_MEASURED]
        lines += [f"- `{one.name}` was not measured: {'; '.join(one.notes)}" for one in skipped]
    for kills in record.kills:
        rows = [
            f"{what}: {found} (asked {asked}{'' if good else '; **BROKEN**'})"
            for what, asked, found, good in kills.rows
        ]
        lines.append(f"- **{kills.name}**: {'; '.join(rows)}.")
    return "\n".join(lines) + "\n"


def _line(words: str) -> str:
    return " ".join(words.split())


def into_page(files: Sequence[Path], page: Path) -> None:
    """Everything that these files hold, between the page's marks."""
    found = "\n".join(markdown(read(path)) for path in files)
    page.write_text(between_marks(page.read_text(), found))
