"""Ten times as many clients as can be served: goodput, memory and CPU of each process, and the recovery.

An emulated model takes 10 ms, one request at a time, so its profile determines the capacity. Clients in a
closed loop, ten times as many as it can serve within their SLO, retry as advised, or after 1 ms regardless.
Then they stop, and an open load at half the capacity remains, which must be served as if nothing had
happened.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from clockwork_lab.bench import child
from clockwork_lab.bench.plan import Options, make_plan
from clockwork_lab.bench.records import ANSWERED, Records
from clockwork_lab.bench.run import run
from clockwork_serve.units import MIB, NS_PER_S
from harness import machine, repositories
from harness.report import Outcome, finish, parser, quantile, table
from harness.serving import Serving, serve

MODEL: Final = "busy"
SERVICE_MS: Final = 10.0
SLO_MS: Final = 100.0
TIMES: Final = 10
CLIENTS: Final = round(TIMES * SLO_MS / SERVICE_MS)
WIDTH: Final = 256
"""FP32 in a row: 1 kB."""
SETTLE_S, CALM_S, AFTER_S = 2.0, 2.0, 30.0
"""Not counted at the beginning; allowed for recovery; watched after that."""
GOODPUT: Final = {"told": 0.95, "at once": 0.85}
GREW_MIB: Final = 2
GENERATOR: Final = "generator"
FULL: Final = 0.9
"""A process that uses so much of a core is what limits."""


@dataclass(slots=True)
class Seen:
    """CPU and memory of one process, once a second: (when, CPU seconds, bytes)."""

    name: str
    samples: list[tuple[float, float, int]] = field(default_factory=list)

    def share(self, first_s: float, last_s: float) -> float:
        """Cores that it used between two instants."""
        inside = [one for one in self.samples if first_s <= one[0] <= last_s]
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0]) if len(inside) > 1 else 0.0

    def grew_bytes(self, first_s: float, last_s: float) -> int:
        """The median of the last quarter of a stretch less that of its second."""
        sizes = [size for at_s, _, size in self.samples if first_s <= at_s <= last_s]
        quarter = len(sizes) // 4
        if not quarter:
            return 0
        return int(np.median(sizes[-quarter:]) - np.median(sizes[quarter : 2 * quarter]))


class Watching(threading.Thread):
    """Looks at processes once a second, until stopped."""

    def __init__(self, pids: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self.seen = {pid: Seen(name) for name, pid in pids.items()}
        self.start_s = time.monotonic()
        self._over = threading.Event()

    def run(self) -> None:
        """Look."""
        while not self._over.wait(1.0):
            for pid in senders():
                self.seen.setdefault(pid, Seen(GENERATOR))
            for pid, one in self.seen.items():
                try:
                    size = machine.rss_bytes(pid)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                one.samples.append((time.monotonic() - self.start_s, machine.cpu_s(pid), size))

    def stop(self) -> list[Seen]:
        """What was seen."""
        self._over.set()
        self.join()
        return list(self.seen.values())


def senders() -> list[int]:
    """The load generator's processes: children of ours that run its module."""
    found = []
    for pid in machine.children("self"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if child.__name__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@dataclass(slots=True)
class Findings:
    """What one kind of clients met."""

    kind: str
    capacity_rps: float
    windows: list[float]
    """Good answers per second in each window of the overload."""
    asked: int
    ends: Counter[str]
    late: int
    refused_ms: list[float]
    """From a request to its refusal."""
    after: tuple[int, int]
    """Requests, and those served well, from two seconds after the load dropped."""
    seen: list[Seen]
    seconds: float

    @property
    def worst(self) -> float:
        """The worst window as a share of capacity."""
        return min(self.windows) / self.capacity_rps


def scenario(kind: str, seconds: float, after_s: float) -> str:
    """The load: clients until ``seconds``, and half of capacity from then on."""
    retry = 'retry = "retry_after"' if kind == "told" else 'retry = "fixed"\nretry_ms = 1'
    return f"""
name = "ten times as many"
seconds = {seconds + CALM_S + after_s}

[[models]]
name = "{MODEL}"
kind = "resnet50_v2"

[[loads]]
name = "crowd"
models = ["{MODEL}"]
arrivals = "closed"
concurrency = {CLIENTS}
start_jitter_s = 0.5
slo_ms = {SLO_MS}
stop_s = {seconds}
{retry}

[[loads]]
name = "calm"
models = ["{MODEL}"]
arrivals = "poisson"
rate_rps = {500 / SERVICE_MS}
slo_ms = {SLO_MS}
start_s = {seconds}
"""


def judged(kind: str, records: Records, seen: list[Seen], seconds: float, window_s: float) -> Findings:
    """What the generator logged, by windows."""
    rows: npt.NDArray[Any] = records.table
    crowd = rows["load"] == 0
    answered = rows["end"] == ANSWERED
    good = answered & (rows["last_ns"] - rows["scheduled_ns"] <= rows["slo_ns"])
    edges = np.arange(SETTLE_S, seconds + 1e-9, window_s) * NS_PER_S
    counts, _ = np.histogram(rows["last_ns"][good], edges)
    names = [end.reason or end.kind.name.lower() for end in records.ends]
    codes, numbers = np.unique(rows["end"][crowd], return_counts=True)
    refused = crowd & ~answered & (rows["last_ns"] > 0)
    since_ns = (seconds + CALM_S) * NS_PER_S
    after = ~crowd & (rows["scheduled_ns"] >= since_ns)
    return Findings(
        kind=kind, capacity_rps=1000 / SERVICE_MS, windows=(counts / window_s).tolist(),
        asked=int(crowd.sum()),
        ends=Counter(dict(zip([names[code] for code in codes.tolist()], numbers.tolist(), strict=True))),
        late=int((answered & ~good).sum()),
        refused_ms=((rows["last_ns"] - rows["scheduled_ns"])[refused] / 1e6).tolist(),
        after=(int(after.sum()), int((after & good).sum())), seen=seen, seconds=seconds,
    )  # fmt: skip


def conclude(outcome: Outcome, found: Findings) -> None:
    """The promises, one by one, for one kind of clients."""
    kind, least = found.kind, GOODPUT[found.kind]
    outcome.judge(
        f"{kind}: worst window", asked=f">= {least:.0%} of {found.capacity_rps:g}/s",
        found=f"{found.worst:.1%} of {len(found.windows)}", good=found.worst >= least,
    )  # fmt: skip
    asked, good = found.after
    outcome.at_least(
        f"{kind}: in time once it is over", 99.9, 100 * good / max(1, asked), "%", more=f"of {asked}"
    )
    server = [one for one in found.seen if one.name != GENERATOR]  # that keeps a row of each request
    grown = {one.name: one.grew_bytes(SETTLE_S, found.seconds) for one in server}
    most = max(grown, key=lambda name: grown[name])
    grew_mib = grown[most] / MIB
    outcome.at_most(f"{kind}: memory that grew most", GREW_MIB, grew_mib, "MiB", more=f"({most})")
    used = {one.name: one.share(SETTLE_S, found.seconds) for one in found.seen}
    outcome.figures[kind] = {
        "capacity_rps": found.capacity_rps, "windows_rps": found.windows, "asked": found.asked,
        "ends": dict(found.ends), "late": found.late, "after": found.after, "cores": used,
        "grew_bytes": grown,
        "refused_ms": {str(share): quantile(found.refused_ms, share) for share in (0.5, 0.99, 1.0)},
    }  # fmt: skip


def show(found: Findings) -> None:
    """The windows, the ends, and who used the cores."""
    print(f"\n{CLIENTS} clients that come again {'as told' if found.kind == 'told' else 'after 1 ms'}:")
    print("  good/s by window  " + " ".join(f"{one:.0f}" for one in found.windows))
    ends = ", ".join(f"{number} {name}" for name, number in found.ends.most_common())
    print(f"  {found.asked / found.seconds:.0f} requests/s ({found.late} late): {ends}")
    print(
        f"  refusals heard after p50 {quantile(found.refused_ms, 0.5):.1f} ms, "
        f"p99 {quantile(found.refused_ms, 0.99):.1f} ms"
    )
    rows = []
    for one in found.seen:
        used = one.share(SETTLE_S, found.seconds)
        size = one.samples[-1][2] / MIB if one.samples else 0.0
        grew = one.grew_bytes(SETTLE_S, found.seconds) / MIB
        rows.append((one.name, f"{used:.2f}", f"{size:.0f}", f"{grew:+.2f}", "full" if used >= FULL else ""))
    print(table(("process", "cores", "MiB", "grew", ""), rows))


def measure(serving: Serving, kind: str, seconds: float, after_s: float, window_s: float) -> Findings:
    """Run one kind of clients on a server."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(scenario(kind, seconds, after_s))
        file.flush()
        plan = make_plan(file.name, Options(url=serving.http_url, connections=2 * CLIENTS))
    pids = {name: serving.server.pid(name) for name in serving.server.names}
    watching = Watching({name: pid for name, pid in pids.items() if pid is not None})
    watching.start()
    ran = run(plan)
    return judged(kind, ran.records, watching.stop(), seconds, window_s)


def main() -> int:
    """Run both; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=120, help="of overload, for each kind of clients")
    options.add_argument("--short", action="store_true", help="20 s of overload, 10 s after it")
    options.add_argument("--gateways", type=int, default=1)
    options.add_argument("--kind", choices=tuple(GOODPUT), help="only these clients")
    given = options.parse_args()
    seconds, after_s = (20.0, 10.0) if given.short else (given.seconds, AFTER_S)
    outcome = Outcome("benchmarks.overload_10x")
    for kind in [given.kind] if given.kind else GOODPUT:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name) / "models"
            repositories.emulated(root, MODEL, {1: SERVICE_MS}, width=WIDTH)
            with serve(root, device="emulated", gateways=given.gateways) as serving:
                found = measure(serving, kind, seconds + SETTLE_S, after_s, min(10.0, seconds))
        show(found)
        conclude(outcome, found)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
