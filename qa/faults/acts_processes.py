"""Acts that kill or stop processes of the server, or exhaust the machine's resources, made for each row."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness.server import alive
from harness.serving import read_metrics, total, until
from qa.faults.stage import Act, NotMeasured, Stage

KILL, STOP, CONT, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM


def one(name: str, number: int = KILL) -> Act:
    """A signal to one process."""

    def act(stage: Stage) -> None:
        stage.kill(name, number)

    return act


def stopped(name: str, seconds: float | None) -> Act:
    """Stopped for so long; None: it is never told to go on."""

    def act(stage: Stage) -> None:
        pid = stage.kill(name, STOP)
        if seconds is not None:
            stage.sleep(seconds)
            if alive(pid):
                stage.server.signal(name, CONT)
            stage.mark()

    return act


def stuck(name: str) -> Act:
    """Stopped, until it is ended for not answering."""

    def act(stage: Stage) -> None:
        stage.stick(name)

    return act


def slowed(name: str, share: float, seconds: float, period_s: float = 0.01) -> Act:
    """Stopped for so much of each 10 ms: what computes there runs at ``1 - share`` of its speed."""

    def act(stage: Stage) -> None:
        handle = os.pidfd_open(stage.kill(name, STOP))
        end = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):  # it is ended if it counts as hung
            while time.monotonic() < end and not stage.stopped.is_set():
                stage.sleep(share * period_s)
                signal.pidfd_send_signal(handle, CONT)
                stage.sleep((1 - share) * period_s)
                signal.pidfd_send_signal(handle, STOP)
            signal.pidfd_send_signal(handle, CONT)
        os.close(handle)
        stage.mark()

    return act


def at_work(lane: str, *, both: bool = False) -> Act:
    """A worker is killed while that lane is at work; ``both``: the other one at the same instant."""

    def act(stage: Stage) -> None:
        names = [stage.busy(lane)]
        if both:
            names += [name for name in stage.workers() if name not in names]
        for name in names:
            stage.kill(name)

    return act


def together(*names: str) -> Act:
    """Several at once."""

    def act(stage: Stage) -> None:
        for name in names:
            stage.kill(name)

    return act


def newborn(name: str, after_s: float, times: int = 1) -> Act:
    """Killed, and so long after its successor was started that one too."""

    def act(stage: Stage) -> None:
        before = stage.kill(name)
        for _ in range(times):
            until(f"{name} is started again", partial(successor, stage, name, before))
            stage.sleep(after_s)
            before = stage.kill(name)

    return act


def within(seconds: float, *names: str) -> Act:
    """One after the other, so long apart."""

    def act(stage: Stage) -> None:
        for number, name in enumerate(names):
            if number:
                stage.sleep(seconds)
            stage.kill(name)

    return act


def during_start(worker: str, victim: str, after_s: float) -> Act:
    """A worker is killed, and while its successor starts another process is."""

    def act(stage: Stage) -> None:
        before = stage.kill(worker)
        until(f"{worker} is started again", lambda: successor(stage, worker, before))
        stage.sleep(after_s)
        stage.kill(victim)

    return act


def every(period_s: float, names: Callable[[Stage], list[str]], times: int, times_short: int) -> Act:
    """One after the other of these, again and again; how long each takes to come back is kept."""

    def act(stage: Stage) -> None:
        for number in range(times_short if stage.short else times):
            if stage.stopped.is_set():
                return
            due = time.monotonic() + period_s
            group = names(stage)
            name = group[number % len(group)]
            before = stage.kill(name)
            watch = threading.Thread(target=_back, args=(stage, name, before), daemon=True)
            watch.start()
            stage.sleep(max(0.0, due - time.monotonic()))
            watch.join(20)

    return act


def _back(stage: Stage, name: str, before: int) -> None:
    """Note how long it takes until a successor runs; for a worker, until the controller counts its device."""
    start = time.monotonic()
    try:
        until(f"{name} is back", lambda: successor(stage, name, before), 15)
        if name.startswith("worker"):
            device = name.removeprefix("worker-")
            until(f"{device} is up", lambda: device_is_up(stage, device), 15, 0.02)
    except TimeoutError as error:
        stage.wrong.append(str(error))
    else:
        stage.restarts_s.append(time.monotonic() - start)


def successor(stage: Stage, name: str, before: int) -> bool:
    """Whether another process of that name runs."""
    return stage.server.pids().get(name, before) != before


def device_is_up(stage: Stage, device: str) -> bool:
    """Whether the controller says so; while nobody answers, it is not."""
    try:
        page = read_metrics(f"{stage.server.http_url}/metrics", 5)
    except OSError:
        return False
    return total(page, "clockwork_device_up", device=device) == 1


def keeper_killed(stage: Stage) -> None:
    """Everything must end by itself; then the server is started again on the same files."""
    others = {name: pid for name, pid in stage.server.pids().items() if name != "keeper"}
    start = time.monotonic_ns()
    stage.kill("keeper")
    try:
        for pid in others.values():
            stage.server.gone(pid)
    except TimeoutError as error:
        stage.wrong.append(f"killing the keeper left processes: {error}")
    ended_ns = time.monotonic_ns()
    stage.resets.append((start, ended_ns))
    stage.notes.append(f"all {len(others)} children ended within {(ended_ns - start) / 1e6:.0f} ms")
    stage.restart()
    stage.marks[-1] = ended_ns


# ------------------------------------------------------------
# Acts on the machine: cores taken away, files out of the page cache, a stepped clock.


MAY_STEP_CLOCK = "CLOCKWORK_MAY_STEP_CLOCK"
"""Set by whoever owns the machine alone: everything on it sees the step."""


def hog(stage: Stage) -> None:
    """A program on each core that wants all of it."""
    cores = sorted(os.sched_getaffinity(0))
    code = "import os,sys\nos.sched_setaffinity(0,{int(sys.argv[1])})\nwhile True: pass"
    stage.mark()
    hogs = [subprocess.Popen([sys.executable, "-c", code, str(core)]) for core in cores]
    try:
        stage.sleep(2.0 if stage.short else 5.0)
    finally:
        for each in hogs:
            each.kill()
            each.wait()
    stage.mark()


def page_cache_dropped(stage: Stage) -> None:
    """The files of repository and cache, which must be read from the disk again."""
    for _ in range(3):
        stage.mark()
        for folder in (stage.root, stage.cache):
            for path in folder.rglob("*"):
                if path.is_file():
                    _drop(path)
        stage.sleep(0.3)


def _drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def clock_stepped(stage: Stage) -> None:
    """CLOCK_REALTIME an hour ahead, and back."""
    if not os.environ.get(MAY_STEP_CLOCK):
        raise NotMeasured(f"it steps the whole machine's clock: set {MAY_STEP_CLOCK}=1 to allow it")
    for seconds in (3600, -3600):
        now = time.clock_gettime(time.CLOCK_REALTIME)
        stage.mark()
        try:
            time.clock_settime(time.CLOCK_REALTIME, now + seconds)
        except PermissionError as error:
            raise NotMeasured(f"the clock may not be set here ({error.strerror})") from None
        stage.sleep(0.5)


def nothing(stage: Stage) -> None:
    """What the measuring itself costs."""
    stage.mark()
