"""A server as its host sees it: its processes, what they hold, how they are killed. It asks nothing.

Run as a program, it is the supervisor of such a server, and may be killed like any other process. It prints
one line of JSON when it is ready, and stops at the end of its standard input, when its parent ended. Small
file systems are mounted in a namespace of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from clockwork_serve.errors import ClockworkError
from clockwork_serve.serve import child
from clockwork_serve.serve.lease import LEASE_NAME
from clockwork_serve.serve.supervisor.server import Server as Supervisor
from clockwork_serve.serve.supervisor.server import ServerConfig, run
from harness import machine
from harness.process_tree import descendants
from harness.serving import until

LEADER, STANDBY = "leader", "standby"
"""For the controller that leads, and the one that stands by: either has either process's name in turn."""
ROOT: Final = Path(__file__).parents[1]
START_S: Final = 120.0
STOP_S: Final = 25.0
_BOX_LANE_BYTES: Final = 256
"""Of one lane in a worker's crash report (``serve.worker.crash_report``): first its action, then the last."""
LOAD_LANE, EXEC_LANE = 0, 1
_MODULES: Final = (b"clockwork_serve.serve.", b"clockwork_serve.apps.observer")
_CLONE_NEWNS: Final = 0x20000
_MS_REC_PRIVATE: Final = 0x4000 | 0x40000


class Start(Struct, frozen=True, kw_only=True):
    """``small``: folders by how many bytes there may be in them."""

    server: ServerConfig
    small: dict[str, int] = {}


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


class Server:
    """One server; leaving the block ends it and all that it started."""

    def __init__(self, start: Start, log: Path) -> None:
        self.start, self.log = start, log
        self.facts: dict[str, str] = {}
        self._tree: dict[int, int] = {}
        with log.open("ab") as file:
            settings = msgspec.json.encode(start).decode()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.server", settings], cwd=ROOT,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True,
            )  # fmt: skip

    @property
    def http_url(self) -> str:
        """``http://host:port``."""
        return self.facts["http"]

    def address(self, protocol: str) -> str:
        """``host:port`` of ``http`` or ``grpc``."""
        return self.facts[protocol].rpartition("//")[2]

    @property
    def http_port(self) -> int:
        """The port of it."""
        return int(self.http_url.rpartition(":")[2])

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Return once it serves. RuntimeError with its last words if it does not."""
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], timeout_s)[0]:
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
        """Of the process of that name, or of the controller in that part, once it runs."""
        found: int = until(f"{name} runs", lambda: self.find(name), timeout_s)
        return found

    def find(self, name: str) -> int | None:
        """The same, if it runs now. Who leads the kernel knows, by the lock of the lease."""
        if name not in (LEADER, STANDBY):
            return self.pids().get(name)
        lease = (Path(self.facts["run_dir"]) / LEASE_NAME).stat()
        leader = holder_of_lock(lease.st_ino)
        both = [pid for name, pid in self.pids().items() if name.startswith("controller")]
        found = [pid for pid in both if (pid == leader) is (name == LEADER)]
        return found[0] if found and leader in both else None

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


def holder_of_lock(inode: int) -> int:
    """The process that has a file locked; 0 if none has."""
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
            return int(words[4])
    return 0


def name_of(pid: int) -> str:
    """A process's own name, or that of what it runs; empty if it is gone or none of a server's."""
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    module = next((part.decode() for part in parts if part.startswith(_MODULES)), "")
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


@contextlib.contextmanager
def started(config: ServerConfig, log: Path, timeout_s: float = START_S) -> Iterator[Server]:
    """A server in processes of its own, until the end of the block; what was stopped of it goes on then."""
    server = Server(Start(server=config), log)
    try:
        server.wait_ready(timeout_s)
        yield server
    finally:
        for pid in server.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        server.stop()
        server.close()


# The supervisor's process


def mount_small(folders: Mapping[str, int]) -> None:
    """Memory of so many bytes at each folder, for this process and its children. OSError if not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(code: int) -> None:
        if code:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    call(libc.unshare(_CLONE_NEWNS))
    call(libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None))
    for folder, size in folders.items():
        call(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()))


def may_mount() -> bool:
    """Whether this user may do that; tried in a child."""
    pid = os.fork()
    if not pid:
        try:
            mount_small({})
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _stop_at_end_of_input() -> None:
    while os.read(0, 1 << 12):  # not sys.stdin, whose lock it would hold at the interpreter's end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Run the server whose configuration is the JSON in ``argv[1]``; returns its exit status."""
    start = msgspec.json.decode(sys.argv[1], type=Start)
    if start.small:
        mount_small(start.small)
    child.configure("keeper", start.server.settings.log_level)
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()

    def announce(server: Supervisor) -> None:
        facts = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url}
        sys.stdout.write(json.dumps({**facts, "run_dir": str(server.run_dir)}) + "\n")
        sys.stdout.flush()

    try:
        return run(start.server, on_ready=announce)
    except ClockworkError as error:
        sys.stderr.write(f"cannot start: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
