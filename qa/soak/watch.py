"""What a server's processes hold, every few seconds: memory, descriptors, threads, shared memory, counts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Final

from harness.serving import Metrics
from qa.soak.servers import Up, processes

SHARED: Final = ("/memfd:", "/dev/shm/")  # noqa: S108 - names of mappings, not files of ours

KEPT: Final = "/weights/"
"""Files that a worker keeps open on purpose, the last 256 that it read: they are not counted."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one process holds. ``pss_kib``: its share of what it maps; ``own_kib``: without shared memory."""

    pid: int
    pss_kib: int
    own_kib: int
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Held | None:
        """Now; None if it is gone."""
        at = Path(f"/proc/{pid}")
        try:
            lines = (at / "smaps_rollup").read_text().splitlines()[1:]
            found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
            files = sum(KEPT not in _link(file) for file in (at / "fd").iterdir())
            threads = len(list((at / "task").iterdir()))
        except (OSError, IndexError):
            return None
        pss_kib = found.get("Pss", 0)
        return cls(pid, pss_kib, pss_kib - found.get("Pss_Shmem", 0), files, threads)


def _link(file: Path) -> str:
    """What a descriptor is; empty if it was closed meanwhile."""
    try:
        return str(file.readlink())
    except OSError:
        return ""


def segments(pids: list[int]) -> int:
    """How many different pieces of shared memory these processes map or hold open."""
    found: set[tuple[str, str]] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if any(part in line for part in SHARED):
                found.add((line.split()[3], line.split()[4]))
    return len(found)


@dataclass(slots=True)
class Quiet:
    """A moment at which nothing was asked: what all hold, and what the books say."""

    at_s: float
    leg: int
    held: dict[str, Held]
    segments: int
    books: dict[str, int] = field(default_factory=dict)
    error_ms: dict[str, float] = field(default_factory=dict)
    """Size of the error of predictions since the quiet moment before, by server and quantile."""


class Watch:
    """Samples in a thread, and writes each sample as a line of JSON."""

    def __init__(self, ups: list[Up], file: IO[str], every_s: float) -> None:
        self.latest: dict[str, Held] = {}
        self._ups, self._file, self._every_s = ups, file, every_s
        self._began = time.monotonic()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._counts: Callable[[], dict[str, int]] = dict
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, counts: Callable[[], dict[str, int]]) -> None:
        """Begin; ``counts`` is what else goes into each sample."""
        self._counts = counts
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._over.set()
        self._thread.join(10)

    @property
    def now_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def look(self) -> dict[str, Held]:
        """All processes now."""
        found = {name: Held.of(pid) for name, pid in processes(self._ups).items()}
        self.latest = {name: held for name, held in found.items() if held is not None}
        return self.latest

    def quiet(self, leg: int) -> Quiet:
        """A quiet moment, without its books."""
        held = self.look()
        return Quiet(self.now_s, leg, held, segments([one.pid for one in held.values()]))

    def write(self, kind: str, what: object) -> None:
        """A line of the file."""
        line = json.dumps({"t": round(self.now_s, 1), kind: what}, separators=(",", ":"), default=str)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            held = {name: [one.pid, one.pss_kib, one.files, one.threads] for name, one in self.look().items()}
            self.write("held", {**held, **self._counts()})


def as_json(quiet: Quiet) -> dict[str, object]:
    """For the file."""
    found = asdict(quiet)
    found["held"] = {name: [one.pid, one.own_kib, one.files, one.threads] for name, one in quiet.held.items()}
    found["at_s"] = round(quiet.at_s, 1)
    return found


class Errors:
    """Quantiles of prediction errors since the last look, from the server's histogram."""

    NAME: Final = "clockwork_prediction_error_seconds_bucket"

    def __init__(self) -> None:
        self._before: dict[float, float] = {}

    def since(self, metrics: Metrics) -> dict[str, float]:
        """In ms, by quantile; upper ends of buckets; empty without executions."""
        counts: dict[float, float] = {}
        for (name, labels), value in metrics.items():
            pairs = dict(labels)
            if name == self.NAME and pairs.get("action") == "infer":
                edge = float(pairs["le"])
                counts[edge] = counts.get(edge, 0.0) + value
        new = {edge: count - self._before.get(edge, 0.0) for edge, count in sorted(counts.items())}
        self._before = counts
        total = max(new.values(), default=0.0)
        if not total:
            return {}
        return {
            name: next(edge for edge, count in new.items() if count >= share * total) * 1e3
            for name, share in (("p50", 0.5), ("p99", 0.99))
        }


def growth_kib(points: list[int]) -> int:
    """How much more the last third is than the first, in the middle of each."""
    third = max(1, len(points) // 3)
    first, last = sorted(points[:third]), sorted(points[-third:])
    return last[len(last) // 2] - first[len(first) // 2]


def leaked(points: list[int]) -> int:
    """How much more the least of the last third is than the most of the first: what never came back."""
    third = max(1, len(points) // 3)
    return max(0, min(points[-third:]) - max(points[:third]))


def lives(quiets: list[Quiet], warm_points: int) -> dict[str, list[list[Held]]]:
    """By process name, each life that it had, without its first points."""
    found: dict[str, list[list[Held]]] = {}
    for quiet in quiets:
        for name, held in quiet.held.items():
            own = found.setdefault(name, [])
            if not own or own[-1][-1].pid != held.pid:
                own.append([])
            own[-1].append(held)
    return {
        name: [one[warm_points:] for one in own if len(one) > warm_points + 1] for name, own in found.items()
    }
