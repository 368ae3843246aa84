"""What a measurement ran on, and whether it was left in peace: reads /proc, changes nothing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def machine_line() -> str:
    """One line that goes with every number."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("clockwork-serve", "onnxruntime", "uvloop"))
    return (
        f"{_cpu_model()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {packages}"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def stolen_s() -> float:
    """Seconds, summed over cores, that a hypervisor gave to others since boot."""
    return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]) * TICK_S


def busy_s() -> float:
    """Seconds, summed over cores, that anything at all ran since boot."""
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    )
    return (user + nice + system + irq + softirq) * TICK_S


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) * TICK_S


def cpu_ns(pid: int) -> int:
    """Nanoseconds of CPU that a process has used, all threads that still run; finer than :func:`cpu_s`."""
    return sum(
        int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()
    )


def used_s() -> float:
    """Seconds of CPU that all processes have used, those that ended included.

    Unlike ``busy_s``, which the kernel samples, it misses nothing that wakes in step with its clock.
    """
    used = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            used += sum(map(int, fields[11:15]))
    return used * TICK_S


def wait_for_peace(share: float, patience_s: float) -> None:
    """Return once everything together uses at most this share of a core, or patience is over."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        used = used_s()
        time.sleep(0.5)
        if used_s() - used <= share * 0.5:
            return


def children(pid: int | str) -> list[int]:
    """Processes that one (``self``: this one) started, as long as they are there; none once it is gone."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process's own, without what it shares with others. OSError if it is gone."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread's switches and CPU time so far."""

    tid: int
    name: str
    cpu_s: float
    involuntary: int
    waited_s: float
    """Time that it could have run but another thread had the core."""


def threads(pid: int) -> list[Thread]:
    """All threads of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            status = dict(
                line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line
            )
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.append(
            Thread(
                tid=int(task.name),
                name=status["Name"].strip(),
                cpu_s=(int(fields[11]) + int(fields[12])) * TICK_S,
                involuntary=int(status["nonvoluntary_ctxt_switches"]),
                waited_s=int((task / "schedstat").read_text().split()[1]) / 1e9,
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What others did to a run of ``seconds``."""

    seconds: float
    stolen_s: float
    others_s: float
    """CPU time of processes that took no part."""
    involuntary: int
    """Switches away from the lane's thread that it did not ask for."""
    waited_s: float
    """Time that the lane's thread could have run but another thread had the core."""

    def too_much(self, *, others: float, stolen: float) -> list[str]:
        """What others took more of than these shares of a core, in words."""
        parts = (("used by others", self.others_s, others), ("stolen", self.stolen_s, stolen))
        return [
            f"{used_s / self.seconds:.2%} of a core {what}"
            for what, used_s, most in parts
            if used_s > most * self.seconds
        ]


class Watch:
    """Measures the disturbance from its making until :meth:`read`; ``lane`` is a thread (pid, tid)."""

    def __init__(self, ours: Iterable[int], lane: tuple[int, int] | None = None) -> None:
        self._ours = list(ours)
        self._lane = lane
        self._started = time.monotonic()
        self._stolen, self._busy = stolen_s(), busy_s()
        self._own = sum(cpu_s(pid) for pid in self._ours)
        self._before = self._thread()

    def read(self) -> Disturbance:
        """What happened since."""
        own = sum(cpu_s(pid) for pid in self._ours) - self._own
        now = self._thread()
        return Disturbance(
            seconds=time.monotonic() - self._started,
            stolen_s=stolen_s() - self._stolen,
            others_s=max(0.0, busy_s() - self._busy - own),
            involuntary=now.involuntary - self._before.involuntary,
            waited_s=now.waited_s - self._before.waited_s,
        )

    def _thread(self) -> Thread:
        if self._lane is None:
            return Thread(tid=0, name="", cpu_s=0.0, involuntary=0, waited_s=0.0)
        pid, tid = self._lane
        return next(thread for thread in threads(pid) if thread.tid == tid)
