"""Tests about time: what fails while the machine worked for others could not be judged, and is run again.

A test of behaviour asks with deadlines that a busy machine keeps, and needs nothing of this. Where time
itself is what a test is about, it takes the fixture ``timing``, which watches the machine from then on, and
asserts what is about time, and nothing else, inside ``with timing.judged():``. If that fails although the
machine was left in peace, the test fails. If it was not, the test is run again with fixtures of its own,
after a while that is longer each time, five times at most, while the other processes of the same run begin
no test; then it fails with the words *could not be judged*. It never passes unjudged.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from _pytest.runner import runtestprotocol

RUNS: Final = 5
TIMEOUT_S: Final = 300
"""For one run of a test; pytest-timeout counts all of them together."""
PAUSE_S = 2.0
"""Before the second run; three times that before the fourth: what disturbed may be over."""
BEAT_S: Final = 0.005
LATE_S: Final = 0.025
"""A thread that only sleeps and wakes is never so late on a machine that is left in peace."""
OTHERS_MOST: Final = 0.2
"""Of a core: what processes that take no part may use, stolen time included; as the benchmarks have it."""
AGAIN: Final = "run again"
TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


class CouldNotJudge(Exception):
    """An assertion about time failed on a machine that was busy with something else."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What others did to ``seconds`` of a test."""

    seconds: float
    late_s: float
    """The largest delay of a thread that only sleeps and wakes."""
    others_s: float
    """CPU time of processes that take no part, and time that a hypervisor gave to others."""

    def __str__(self) -> str:
        """Why nothing can be judged; empty where it can."""
        reasons = []
        if self.others_s > OTHERS_MOST * self.seconds:
            share = self.others_s / self.seconds
            reasons.append(f"other processes took {share:.2f} of a core, at most {OTHERS_MOST} is allowed")
        if self.late_s > LATE_S:
            late_ms, most_ms = self.late_s * 1000, LATE_S * 1000
            reasons.append(f"a thread woke {late_ms:.0f} ms late, at most {most_ms:.0f} ms is allowed")
        return "; ".join(reasons)


class Timing:
    """Watches the machine from its making until :meth:`close`."""

    def __init__(self, read: Callable[[], Disturbance] | None = None) -> None:
        """``read``: what to believe instead of a watch's own measurement."""
        self.read = read or self._read
        self._began_s = time.monotonic()
        self._busy_s, self._own_s = busy_s(), own_s()
        self._late_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @contextmanager
    def judged(self) -> Iterator[None]:
        """What fails inside is about time: CouldNotJudge where the machine was busy with others."""
        try:
            yield
        except Exception as error:
            if why := str(self.read()):
                what = str(error).partition("\n")[0]
                raise CouldNotJudge(f"could not be judged: {why}. What failed: {what}") from error
            raise

    def close(self) -> None:
        """End the watch."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.is_set():
            due_s = time.monotonic() + BEAT_S
            time.sleep(BEAT_S)
            self._late_s = max(self._late_s, time.monotonic() - due_s)

    def _read(self) -> Disturbance:
        own_s_now = own_s()
        return Disturbance(
            seconds=time.monotonic() - self._began_s,
            late_s=self._late_s,
            others_s=max(0.0, busy_s() - self._busy_s - (own_s_now - self._own_s)),
        )


class Room:
    """Tests of several processes go in together, or one alone: locks on two files that all of them know.

    Who wants to be alone waits at the door until all have left, and keeps it shut meanwhile. Locks are a
    process's own: those of one that died are gone, and those of servers that it started are none.
    """

    def __init__(self, folder: Path) -> None:
        """``folder``: of the run, the same for all its processes."""
        self._door, self._room = ((folder / name).open("a+b") for name in ("door", "room"))

    def enter(self, *, alone: bool) -> None:
        """Wait until one may; only after :meth:`leave`."""
        fcntl.lockf(self._door, fcntl.LOCK_EX)
        fcntl.lockf(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.lockf(self._door, fcntl.LOCK_UN)

    def leave(self) -> None:
        """Let others be alone."""
        fcntl.lockf(self._room, fcntl.LOCK_UN)


def busy_s() -> float:
    """Seconds, summed over cores, that anything ran since boot here, or elsewhere instead of this machine."""
    user, nice, system, _idle, _iowait, irq, softirq, stolen = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + stolen) * TICK_S


def own_s() -> float:
    """Seconds of CPU that this process and all that it started have used, those that ended included."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                used[int(entry.name)] = sum(map(int, fields[11:15]))
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(used.get(pid, 0) for pid in ours) * TICK_S


@pytest.fixture
def timing() -> Iterator[Timing]:
    """Watches the machine during a test that is about time."""
    found = Timing()
    yield found
    found.close()


# ---------------------------------------------------------------- hooks, which conftest.py takes over


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who may be run again needs the time for it."""
    for item in items:
        if _may_run_again(item) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(RUNS * TIMEOUT_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes in a report that nothing could be judged."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, CouldNotJudge):
        report.not_judged = str(call.excinfo.value)
    return report


ROOM: Final = pytest.StashKey[Room]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Processes of one run share a room; a run of one process needs none."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        session.config.stash[ROOM] = Room(Path(session.config.option.basetemp).parent)


class AroundTests:
    """What is done around each test: a plugin of its own, for a module has one hook of a name."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Waits, outside the test's time limit, while a test of another process wants to be alone."""
        room = item.config.stash.get(ROOM, None)
        if room is None:
            return (yield)
        room.enter(alone=False)
        try:
            return (yield)
        finally:
            room.leave()


def pytest_configure(config: pytest.Config) -> None:
    """Registers what a module cannot hold."""
    config.pluginmanager.register(AroundTests())


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Runs a test again that could not be judged, with fixtures of its own, and alone."""
    if not _may_run_again(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for run in range(1, RUNS + 1):
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        again = run < RUNS and any(hasattr(report, "not_judged") for report in reports)
        for report in reports:
            if again and hasattr(report, "not_judged"):
                report.outcome = AGAIN  # type: ignore[assignment]
            if not again or report.outcome != "passed":
                item.ihook.pytest_runtest_logreport(report=report)
        if not again:
            break
        room = item.config.stash.get(ROOM, None)
        if room is not None:
            room.leave()
            room.enter(alone=True)
        time.sleep(run * PAUSE_S)
        item._initrequest()  # type: ignore[attr-defined]
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """How a run that could not be judged is shown and counted."""
    return (AGAIN, "R", "COULD NOT BE JUDGED") if report.outcome == AGAIN else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which tests were run again, and why."""
    reports = terminalreporter.stats.get(AGAIN, [])
    if reports:
        terminalreporter.section("run again")
        for report in reports:
            terminalreporter.line(f"{report.nodeid}: {report.not_judged}")


def _may_run_again(item: pytest.Item) -> bool:
    return "timing" in getattr(item, "fixturenames", ())
