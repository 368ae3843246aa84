"""A load played with ``clockwork bench``: its command, the record of all requests, and its figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from clockwork_lab.bench.records import Head, Kind, read_records
from comparison.peers import peer
from comparison.peers.peer import HOST, ROOT, Floats, Peer, Setup
from harness.report import quantile

DRAIN_S: Final = 10
LATE_MS: Final = 5
NO_ANSWER: Final = "none"
_KINDS: Final[dict[Kind, peer.Kind]] = {Kind.REJECTED: "rejected", Kind.EXPIRED: "expired"}
"""Other ends with a response are ``failed``; ends without one are ``none``."""
_SILENT: Final = frozenset({Kind.OPEN, Kind.RESET, Kind.BROKEN, Kind.ABANDONED})
NS_PER_MS: Final = 1e6
NOISY_OTHERS: Final = 0.05
"""Share of the two cores that others may use in a run that counts as undisturbed."""
NOISY_LATE_MS: Final = 5.0
"""How late the load generator may send (p99) in such a run, where a connection was free."""
NOISY_OVERSLEEP_MS: Final = 2.0
"""How much longer than asked the emulated device may take (p99)."""
WAITING_SHARE: Final = 0.01
"""More requests than that without a free connection: they are late because the server is."""
FEW: Final = 20
"""Fewer values than that have no p99."""
REASONS: Final = 8
HOT: Final = "hot"
"""The load that a table is about where there is one of this name."""

Table = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Played:
    """The record of a load: its head, a row for each request, and what their ends mean.

    ``ends``: ``rejected``, ``expired``, ``failed``, ``ok`` or ``none``.
    """

    head: Head
    table: Table
    ends: Sequence[str]
    about: dict[str, Any] = field(default_factory=dict)
    """How it was played, and what the generator says of itself."""

    @property
    def counted(self) -> Table:
        """Requests that were due after the warm-up."""
        found: Table = self.table[self.table["scheduled_ns"] >= self.head.warmup_ns]
        return found

    @property
    def seconds(self) -> float:
        """In which they were due."""
        return float(self.head.end_ns - self.head.warmup_ns) / 1e9

    def of(self, load: str) -> Table:
        """Those of one load."""
        counted = self.counted
        found: Table = counted[counted["load"] == self.head.loads.index(load)]
        return found

    def is_end(self, rows: Table, *ends: str) -> Table:
        """Which of them ended so."""
        found: Table = np.isin(np.array(self.ends, object), ends)[rows["end"]]
        return found

    def in_time(self, rows: Table) -> Table:
        """Which of them were answered within their SLOs, by the client's clock."""
        found: Table = self.is_end(rows, "ok") & (ages_ns(rows) <= rows["slo_ns"])
        return found

    def count(self, end: str) -> int:
        """So many of all, those of the warm-up too."""
        return int(np.count_nonzero(self.is_end(self.table, end)))

    @property
    def good_per_s(self) -> float:
        """Goodput."""
        return float(np.count_nonzero(self.in_time(self.counted))) / self.seconds


def ages_ns(rows: Table) -> Table:
    """From when they were due to the last byte of what came."""
    found: Table = rows["last_ns"] - rows["scheduled_ns"]
    return found


def sent_late_ns(rows: Table) -> Table:
    """How long after they were due requests were sent, those that were."""
    found: Table = (rows["sent_ns"] - rows["scheduled_ns"])[rows["sent_ns"] > 0]
    return found


def quantile_ms(values_ns: Iterable[float], share: float, least: int = 1) -> float | None:
    """In milliseconds; None of fewer values than ``least``."""
    values = list(values_ns)
    return float(quantile(values, share)) / NS_PER_MS if len(values) >= least else None


# ------------------------------------------------------------
# Playing it.


def command(asked: Peer, setup: Setup, scenario: Path, x: Floats, *, seed: int, core: int) -> list[str]:
    """The command that plays it; writes the body of the requests into the server's folder."""
    request = asked.request(setup, x)
    found = [
        sys.executable, "-m", "clockwork_serve", "bench", str(scenario), "--seed", str(seed), "--quiet",
        "--cores", str(core), "--drain", str(DRAIN_S), "--max-lateness-ms", str(LATE_MS),
        "--record", str(setup.folder / "record"), "--json", str(setup.folder / "bench.json"),
        "--deadline", "none",
    ]  # fmt: skip
    body = setup.folder / "body"
    body.write_bytes(request.body)
    found += ["--protocol", "raw", "--url", f"http://{HOST}:{setup.port}", "--path", request.path]
    found += ["--body", str(body)]
    for name, value in request.headers:
        found += ["--header", f"{name}: {value}"]
    return found


def play(asked: Peer, setup: Setup, scenario: Path, x: Floats, *, seed: int, core: int) -> Played:
    """Run it. RuntimeError with its words if it did not work; late requests are for others to judge."""
    given = command(asked, setup, scenario, x, seed=seed, core=core)
    log = setup.folder / "bench.log"
    with log.open("wb") as file:
        done = subprocess.run(given, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
    if done.returncode not in {0, 1}:
        said = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"clockwork bench ended with status {done.returncode}; it said:\n{said}")
    played = read(setup.folder / "record", asked)
    return replace(played, about={"load_command": given, "generator": generator(setup.folder / "bench.json")})


def read(path: Path, asked: Peer) -> Played:
    """The record. Raises :class:`ConfigError` for another file."""
    head, records = read_records(path)
    return Played(head, records.table, [end_of(kind, words, asked) for kind, words in records.ends])


def end_of(kind: Kind, words: str, asked: Peer) -> str:
    """One end: what the server said, as it is understood."""
    if kind == Kind.ANSWERED:
        return "ok"
    return NO_ANSWER if kind in _SILENT else asked.understood(_KINDS.get(kind, "failed"), words)


def generator(path: Path) -> dict[str, Any]:
    """What the load generator says of itself: how late it was, and how many requests had to wait.

    It opens as many connections as it may; where a server answers on none of them, requests wait for one.
    They count from when they were due, and that is the server's doing.
    """
    told = json.loads(path.read_text())
    sending = told["sending"]
    return {
        "late_p99_ms": told["lateness"]["p99_ms"], "cpu_share": sending["cpu_share"],
        "connections": sending["connections"], "waited_for_connection": sending["waited_for_connection"],
        "version": told["version"],
    }  # fmt: skip


# ------------------------------------------------------------
# Its figures, and the median of several runs.


def figures(played: Played) -> dict[str, Any]:
    """Of the counted requests, those due after the warm-up; of each load too if one is ``hot``."""
    found = _figures(played, played.counted)
    if HOT in played.head.loads:
        found["by_load"] = {name: _figures(played, played.of(name)) for name in played.head.loads}
    return found


def _figures(played: Played, counted: Table) -> dict[str, Any]:
    ages = ages_ns(counted)
    answered = played.is_end(counted, "ok")
    refused = played.is_end(counted, "rejected", "expired", "failed")
    in_time, asked = int(np.count_nonzero(played.in_time(counted))), len(counted)
    return {
        "asked": asked, "asked_per_s": asked / played.seconds,
        "in_time": in_time, "in_time_per_s": in_time / played.seconds,
        "in_time_share": in_time / asked if asked else math.nan,
        "late": int(np.count_nonzero(answered)) - in_time,
        **{
            kind: int(np.count_nonzero(played.is_end(counted, kind)))
            for kind in ("rejected", "expired", "failed", NO_ANSWER)
        },
        "p50_ms": quantile_ms(ages[answered], 0.5), "p99_ms": quantile_ms(ages[answered], 0.99, FEW),
        "no_p50_ms": quantile_ms(ages[refused], 0.5), "no_p99_ms": quantile_ms(ages[refused], 0.99, FEW),
        "sent_late_p99_ms": quantile_ms(sent_late_ns(counted), 0.99, FEW),
    }  # fmt: skip


def reasons(played: Played) -> list[tuple[str, str, int]]:
    """The ends that most requests had, in the server's words, and how many had them."""
    ends = played.head.ends
    counts = np.bincount(played.table["end"], minlength=len(ends)).tolist()
    ranked = sorted(zip(ends, counts, strict=True), key=lambda pair: -pair[1])
    return [(kind, words, count) for (kind, words), count in ranked[:REASONS] if count]


def device(lines: Iterable[str]) -> dict[str, float]:
    """What the emulated device did, by its log: rows in the order of executions."""
    rows, over_ms = [], []
    for line in lines:
        count, wanted_ms, took_ms = line.split()
        rows.append(int(count))
        over_ms.append(float(took_ms) - float(wanted_ms))
    if not rows:
        return {}
    return {
        "executions": len(rows), "rows": sum(rows), "mean_batch": sum(rows) / len(rows),
        "oversleep_p50_ms": quantile(over_ms, 0.5), "oversleep_p99_ms": quantile(over_ms, 0.99),
    }  # fmt: skip


def noise(result: dict[str, Any]) -> list[str]:
    """What disturbed a run, in words; empty if nothing did."""
    found = []
    if result["others_share"] > NOISY_OTHERS:
        found.append(f"others used {result['others_share']:.0%} of the two cores")
    sender = result["generator"]
    late_ms = sender["late_p99_ms"] or 0.0
    waiting = sender["waited_for_connection"] > WAITING_SHARE * result["figures"]["asked"]
    if late_ms > NOISY_LATE_MS and not waiting:
        found.append(f"requests left {late_ms:.1f} ms late (p99)")
    oversleep_ms = result.get("device", {}).get("oversleep_p99_ms", 0.0)
    if oversleep_ms > NOISY_OVERSLEEP_MS:
        found.append(f"the emulated device took {oversleep_ms:.1f} ms too long (p99)")
    return found


def main_figures(result: dict[str, Any]) -> dict[str, Any]:
    """Those that a table shows."""
    found: dict[str, Any] = result["figures"]
    by_load: dict[str, dict[str, Any]] = found.get("by_load", {})
    return by_load.get(HOT, found)


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, least and most of what there is; None of nothing."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    if not there:
        return None
    return {"median": median(there), "least": min(there), "most": max(there)}


def shown(found: dict[str, float] | None, form: str) -> str:
    """A median with its spread, for a table."""
    if found is None:
        return "-"
    middle, least, most = (form.format(found[key]) for key in ("median", "least", "most"))
    return middle if least == most else f"{middle} ({least} to {most})"
