"""Starts a server on its core, finds all of its processes, and ends exactly those.

Processes whose parent ended become children of the server's first process (a subreaper), and of this program
once that has ended too: so its descendants are all processes that a server ever started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.machine import TICK_S

_LAUNCH: Final = Path(__file__).with_name("launch.py")


@dataclass(frozen=True, slots=True)
class _Row:
    state: str
    parent: int
    started: int
    ticks: int


def _rows() -> dict[int, _Row]:
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                ticks = sum(map(int, fields[11:15]))
                found[int(path.name)] = _Row(fields[0], int(fields[1]), int(fields[19]), ticks)
    return found


def descendants(pid: int) -> dict[int, int]:
    """All processes below ``pid`` and itself, with the instants of their starts."""
    rows = _rows()
    found = {pid} if pid in rows else set()
    grew = True
    while grew:
        more = {one for one, row in rows.items() if row.parent in found} - found
        found |= more
        grew = bool(more)
    return {one: rows[one].started for one in found}


def cpu_s(pids: Mapping[int, int]) -> float:
    """CPU that processes have used, with that of their children that ended."""
    rows = _rows()
    return sum(rows[pid].ticks for pid in pids if pid in rows) * TICK_S


def pss_bytes(pids: Mapping[int, int]) -> int:
    """Memory of processes, pages that several share counted once in all."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


class Server:
    """A running server, whose processes share one core, or as many as are given."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, *cores: int
    ) -> None:
        """Start it. All that it says goes to ``log``."""
        self.log = log
        launch = [sys.executable, str(_LAUNCH), ",".join(map(str, cores)), *command]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                launch, env=dict(environment), cwd=log.parent, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its first process."""
        return self._process.pid

    def ended(self) -> int | None:
        """The exit status, if it is no more."""
        return self._process.poll()

    def tree(self) -> dict[int, int]:
        """Its processes."""
        return descendants(self.pid)

    def stop(self, patience_s: float) -> bool:
        """End it; whether it went when asked. What is left of its tree is killed, each by its pid."""
        mine = self.tree()
        if self.ended() is None:
            self._process.send_signal(signal.SIGTERM)
        end_s = time.monotonic() + patience_s
        while _alive(mine) and time.monotonic() < end_s:
            mine |= {pid: started for pid, started in self.tree().items() if pid not in mine}
            time.sleep(0.05)
        left = _alive(mine)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while _alive(mine) and time.monotonic() < end_s + 10:
            time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        return not left


def _alive(pids: Mapping[int, int]) -> list[int]:
    """Those that run still; takes the exit statuses of those that were left to this program."""
    rows, found = _rows(), []
    for pid, started in pids.items():
        row = rows.get(pid)
        if row is None or row.started != started:
            continue
        if row.state == "Z":
            if row.parent == os.getpid():
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            continue
        found.append(pid)
    return found
