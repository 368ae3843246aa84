"""Acts that kill or stop processes of the server, or exhaust the machine's resources, made for each row."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from clockwork_serve.serve.transport import OBSERVER_SOCKET
from harness.server import alive
from harness.serving import read_metrics, total, until
from qa.faults.stage import Act, NotMeasured, Stage, handle_of, made

STUCK_S = 10.0
EXPLAINED_S: Final = 30.0
"""The observer runs when a core has nothing else to do; so long after the last request of a load at most."""
KILL, STOP, CONT, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM


@made
def killed(stage: Stage, *names: str, number: int = KILL, apart_s: float = 0.0) -> None:
    """A signal to one process, or to one after the other, so long apart."""
    for at, name in enumerate(names):
        if at and apart_s:
            stage.sleep(apart_s)
        stage.kill(name, number)


@made
def stopped(stage: Stage, name: str, seconds: float | None) -> None:
    """Stopped for so long; None: it is never told to go on."""
    pid = stage.kill(name, STOP)
    if seconds is not None:
        stage.sleep(seconds)
        if alive(pid):
            stage.server.signal(name, CONT)
        stage.mark()


@made
def stuck(stage: Stage, name: str) -> None:
    """Stopped, until it is ended for not answering; that is marked, too."""
    with handle_of(stage.server.pid(name)) as handle:
        now_ns = time.monotonic_ns()
        stage.mark()
        signal.pidfd_send_signal(handle, STOP)
        if not select.select([handle], [], [], STUCK_S)[0]:
            stage.wrong.append(f"{name} was stopped for {STUCK_S:g} s and not ended")
        stage.mark()
        if name.startswith("gateway"):  # what it held went with it
            stage.resets.append((now_ns, time.monotonic_ns()))


@made
def slowed(stage: Stage, name: str, share: float, seconds: float, period_s: float = 0.01) -> None:
    """Stopped for so much of each 10 ms: what computes there runs at ``1 - share`` of its speed."""
    end = time.monotonic() + seconds
    # It is ended if it counts as hung.
    with handle_of(stage.kill(name, STOP)) as handle, contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end and not stage.stopped.is_set():
            stage.sleep(share * period_s)
            signal.pidfd_send_signal(handle, CONT)
            stage.sleep((1 - share) * period_s)
            signal.pidfd_send_signal(handle, STOP)
        signal.pidfd_send_signal(handle, CONT)
    stage.mark()


@made
def at_work(stage: Stage, lane: str, *, both: bool = False) -> None:
    """A worker is killed while that lane is at work; ``both``: the other one at the same instant."""
    names = [stage.busy(lane)]
    if both:
        names += [name for name in stage.workers() if name not in names]
    for name in names:
        stage.kill(name)


@made
def newborn(stage: Stage, name: str, after_s: float, times: int = 1, victim: str = "") -> None:
    """Killed, and so long after its successor was started that one too, or the victim."""
    before = stage.kill(name)
    for _ in range(times):
        until(f"{name} is started again", partial(successor, stage, name, before))
        stage.sleep(after_s)
        before = stage.kill(victim or name)


@made
def every(
    stage: Stage, period_s: float, names: Callable[[Stage], list[str]], times: int, times_short: int
) -> None:
    """One after the other of these, again and again; how long each takes to come back is kept."""
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
    return stage.server.find(name) not in (None, before)


def device_is_up(stage: Stage, device: str) -> bool:
    """Whether the controller says so; while nobody answers, it is not."""
    try:
        page = read_metrics(f"{stage.server.http_url}/metrics", 5)
    except OSError:
        return False
    return total(page, "clockwork_device_up", device=device) == 1


@made
def explained_after(stage: Stage, act: Act) -> None:
    """An act on the observer; then it has to explain a request, as it did before."""
    for done in (None, act):
        if done is not None:
            done(stage)
        request_id, began = _asked(stage), time.monotonic()
        try:
            told = until("a request is explained", partial(_explained, stage, request_id), EXPLAINED_S, 0.1)
        except TimeoutError as error:
            stage.wrong.append(f"{'before' if done is None else 'afterwards'}: {error}")
            return
        took_s = time.monotonic() - began
        stage.notes.append(f"{request_id} was explained within {took_s:.1f} s: {told['sentence']}")


def _asked(stage: Stage) -> str:
    """The id of a request that was answered."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}
    url = f"{stage.server.http_url}/v2/models/{stage.setup.models[0]}/infer"
    body = json.dumps({"inputs": [tensor], "parameters": {"slo_ms": 1000}}).encode()
    with urllib.request.urlopen(url, body, timeout=10) as response:  # noqa: S310 - a URL of ours
        return str(response.headers["Clockwork-Request-Id"])


def _explained(stage: Stage, request_id: str) -> dict[str, Any] | None:
    """What the observer says of a request; None while it does not."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(EXPLAINED_S)
        try:
            link.connect(str(Path(stage.server.facts["run_dir"]) / OBSERVER_SOCKET))
            link.sendall(json.dumps({"ask": "explain", "request_id": request_id}).encode() + b"\n")
            answer = link.makefile().readline()
        except OSError:
            return None
    told: dict[str, Any] | None = json.loads(answer) if answer else None
    if told is not None and "error" in told:
        raise RuntimeError(f"the observer said: {told['error']}")
    return told


def supervisor_killed(stage: Stage) -> None:
    """Everything must end by itself; then the server is started again on the same files."""
    others = {name: pid for name, pid in stage.server.pids().items() if name != "keeper"}
    start = time.monotonic_ns()
    stage.kill("keeper")
    try:
        for pid in others.values():
            stage.server.gone(pid)
    except TimeoutError as error:
        stage.wrong.append(f"killing the supervisor left processes: {error}")
    ended_ns = time.monotonic_ns()
    stage.resets.append((start, ended_ns))
    stage.notes.append(f"all {len(others)} children ended within {(ended_ns - start) / 1e6:.0f} ms")
    stage.restart()
    stage.marks[-1] = ended_ns


# ------------------------------------------------------------
# Acts on the machine: cores taken away, files out of the page cache, a stepped clock.


MAY_STEP_CLOCK = "CLOCKWORK_MAY_STEP_CLOCK"
"""Set by whoever owns the machine alone: everything on it sees the step."""


@made
def hog(stage: Stage, seconds: float, niceness: int = 0) -> None:
    """A program on each core that wants all of it, for so long; in the short form, less."""
    cores = sorted(os.sched_getaffinity(0))
    code = (
        "import os,sys\nos.nice(int(sys.argv[2]))\nos.sched_setaffinity(0,{int(sys.argv[1])})\n"
        "while True: pass"
    )
    stage.mark()
    hogs = [subprocess.Popen([sys.executable, "-c", code, str(core), str(niceness)]) for core in cores]
    try:
        stage.sleep(0.4 * seconds if stage.short else seconds)
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
