"""A server as its host sees it: its processes, what they hold, how they are killed. It asks nothing."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from harness import machine
from harness.process_tree import descendants
from harness.server_process import Start

ROOT: Final = Path(__file__).parents[1]
START_S: Final = 120.0
STOP_S: Final = 25.0
_BOX_LANE_BYTES: Final = 256
"""Of one lane in a worker's crash report (``serve.worker.crash_report``): first its action, then the last."""
LOAD_LANE, EXEC_LANE = 0, 1
_MODULE: Final = "clockwork_serve.serve."


@dataclass(frozen=True, slots=True)
class Held:
    """What one process holds. ``regions``: identities of the shared memory that it maps."""

    pid: int
    rss_bytes: int
    files: int
    threads: int
    regions: frozenset[str]


def held(pid: int) -> Held | None:
    """Now; None if it is gone."""
    try:
        files, threads = (len(os.listdir(f"/proc/{pid}/{what}")) for what in ("fd", "task"))  # noqa: PTH208
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        rss = machine.rss_bytes(pid)
    except OSError:
        return None
    regions = frozenset(line.split()[4] for line in maps if "memfd:clockwork-region" in line)
    return Held(pid, rss, files, threads, regions)


def alive(pid: int) -> bool:
    """Whether it runs, or could: a process that is dead and not buried does not."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def until(what: str, condition: Callable[[], Any], timeout_s: float = 20.0, every_s: float = 0.005) -> Any:
    """Wait for a condition; what it gave. TimeoutError names it when it does not come."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:g} s in vain until {what}")
        time.sleep(every_s)
    return found


class Server:
    """One server; leaving the block ends it and all that it started."""

    def __init__(self, start: Start, log: Path) -> None:
        self.start, self.log = start, log
        self.facts: dict[str, str] = {}
        self._tree: dict[int, int] = {}
        with log.open("ab") as file:
            settings = msgspec.json.encode(start).decode()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.server_process", settings], cwd=ROOT,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True,
            )  # fmt: skip

    @property
    def http_url(self) -> str:
        """``http://host:port``."""
        return self.facts["http"]

    @property
    def http_port(self) -> int:
        """The port of it."""
        return int(self.http_url.rpartition(":")[2])

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Return once it serves. RuntimeError with its last words if it does not."""
        out = self.process.stdout
        assert out is not None
        end = time.monotonic() + timeout_s
        while not select.select([out], [], [], 0.1)[0]:
            if time.monotonic() > end:
                raise RuntimeError(f"the server was not ready within {timeout_s:g} s:\n{self.last_words()}")
        line = out.readline()
        if not line:
            raise RuntimeError(f"the server did not start:\n{self.last_words()}")
        self.facts = json.loads(line)

    def last_words(self, lines: int = 12) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # Its processes

    def pids(self, *, deep: bool = False) -> dict[str, int]:
        """All that run now by name: ``keeper``, ``controller``, ``worker-cpu:0``, ``gateway-0``.

        ``deep``: also what its children started (``profile``), which takes longer.
        """
        found = {"keeper": self.process.pid} if alive(self.process.pid) else {}
        for pid in self._remember() if deep else machine.children(self.process.pid):
            if name := name_of(pid):
                found[name] = pid
        return found

    def _remember(self) -> dict[int, int]:
        found = descendants(self.process.pid)
        self._tree.update(found)
        return found

    def pid(self, name: str, timeout_s: float = 20.0) -> int:
        """Of the process of that name, once it runs."""
        found: int = until(f"{name} runs", lambda: self.pids().get(name), timeout_s)
        return found

    def signal(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send it a signal; its pid."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def gone(self, pid: int, timeout_s: float = 10.0) -> None:
        """Return once that process is no more."""
        until(f"process {pid} is gone", lambda: not alive(pid), timeout_s, 0.001)

    def busy(self, lane: int) -> str | None:
        """The name of a worker whose lane does something right now."""
        return next(
            (n for n, pid in self.pids().items() if n[:6] == "worker" and self.lane(n, pid, lane)[0]), None
        )

    def lane(self, name: str, pid: int, lane: int) -> tuple[int, int]:
        """The action that a worker's lane is at, and the one before; 0 is none."""
        box = Path(self.facts["run_dir"]) / f"{name}.{pid}.box"
        try:
            now, before = struct.unpack_from("<qq", box.read_bytes(), lane * _BOX_LANE_BYTES)
        except (OSError, struct.error):
            return 0, 0
        return now, before

    def held(self) -> dict[str, Held]:
        """What each process holds now."""
        return {name: one for name, pid in self.pids().items() if (one := held(pid)) is not None}

    # Its end

    def stop(self) -> list[str]:
        """End it as an operator would; what was wrong with that."""
        self._remember()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        wrong = []
        try:
            code = self.process.wait(STOP_S)
            if code not in (0, -signal.SIGKILL):
                wrong.append(f"the server ended with {code}")
        except subprocess.TimeoutExpired:
            wrong.append(f"the server did not stop within {STOP_S:g} s")
        left = self._left(1.0)
        if left:
            wrong.append(f"{len(left)} processes were left")
        return wrong

    def _left(self, patience_s: float) -> list[int]:
        def those() -> list[int]:
            return [pid for pid, started in self._tree.items() if alive(pid) and _started(pid) == started]

        with contextlib.suppress(TimeoutError):
            until("all are gone", lambda: not those(), patience_s)
        return those()

    def close(self) -> None:
        """Kill what is left of it."""
        self._remember()
        for pid in (self.process.pid, *self._left(0.0)):
            if pid != self.process.pid or self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(STOP_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def name_of(pid: int) -> str:
    """A process's own name, or that of what it runs; empty if it is gone or none of a server's."""
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    module = next((part.decode() for part in parts if part.startswith(_MODULE.encode())), "")
    if not module:
        return ""
    plain = module.rpartition(".")[2].removesuffix("_process")
    for part in parts:
        if part.startswith(b"{"):
            with contextlib.suppress(ValueError):
                return str(json.loads(part).get("name") or plain)
    return plain


def _started(pid: int) -> int:
    return descendants(pid).get(pid, -1)
