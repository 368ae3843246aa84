"""The result of one row: a record for the table, for a file, and for the judge."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

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
