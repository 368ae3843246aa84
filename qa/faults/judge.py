"""What a row promises, held against what it showed."""

from __future__ import annotations

import re
from typing import Final

from qa.faults.result import BROKEN, KEPT, Result
from qa.faults.rows import Row

GROWTH_MIB: Final = 48.0
"""More than any process's memory differs by itself: the C library may keep 32 MiB of what one body took."""
GROWTH_FILES: Final = 8
"""A worker keeps a file open for each model in its memory."""
GROWTH_THREADS: Final = 4
FIRST_MS: Final = 2000.0
_KNOWN: Final = re.compile(r"failed: 500 (worker_lost|model_raised|device_fault|quarantined)")
"""What a request of a good model may be told while workers die; an invalid or unknown one it never is."""


def conclude(result: Result, row: Row) -> None:
    """Add what is wrong, and the status."""
    ends = result.ends
    result.wrong += [
        f"{count} {words}"
        for count, words in (
            (ends.lost, "requests lost"),
            (result.twice, "answered twice"),
            (0 if row.cuts else ends.refused, "found no connection"),
            (max(0, ends.reset - result.in_flight), "more reset than were in flight"),
            (0 if row.slow else result.late_as_good, "late answers sent as good ones"),
            (0 if row.slow else result.overdue, "heard more than 50 ms after their deadline"),
            (result.tracebacks, "tracebacks in the log"),
        )
        if count
    ]
    for words, count in result.reasons.items():
        if words.startswith("failed") and not _KNOWN.match(words):
            result.wrong.append(f"{count} were told {words.removeprefix('failed: ')}")
    for what, count in result.books.items():
        if count:
            result.wrong.append(f"books: {what}: {count}")
    limit_ms = max(FIRST_MS, row.whole_s * 1000)
    if result.first_good_ms is None or result.first_good_ms > limit_ms:
        result.wrong.append(f"first good answer {shown_ms(result.first_good_ms)}")
    if result.whole_ms is None or result.whole_ms > row.whole_s * 1000:
        result.wrong.append(f"90 % of goodput {shown_ms(result.whole_ms)}, asked: {row.whole_s:g} s")
    result.wrong += grown(result)
    result.status = BROKEN if result.wrong else KEPT


def grown(result: Result) -> list[str]:
    """Processes that hold more than before."""
    found = []
    for name, held in result.holdings.items():
        more = [after - before for before, after in (held.rss_mib, held.files, held.threads)]
        if held.pid[0] != held.pid[1]:
            more[0] = 0.0  # a new process takes its memory as it warms
        if more[0] > GROWTH_MIB or more[1] > GROWTH_FILES or more[2] > GROWTH_THREADS:
            found.append(f"{name} grew: {more[0]:+.0f} MiB, {more[1]:+.0f} files, {more[2]:+.0f} threads")
    before, after = result.segments
    if after > before:
        found.append(f"{after - before} more segments of shared memory")
    return found


def shown_ms(found: float | None) -> str:
    """Milliseconds, or never."""
    return "not within the run" if found is None else f"after {found:.0f} ms"
