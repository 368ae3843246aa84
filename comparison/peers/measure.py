"""One run of a load against a server: starts it, checks its answers, plays the load, reads what it cost."""

from __future__ import annotations

import http.client
import json
import os
import resource
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from comparison.peers import record
from comparison.peers.loads import Load
from comparison.peers.models import Kinds
from comparison.peers.peer import HOST, Answer, Floats, Peer, Setup, differs
from comparison.peers.record import Played
from harness import process_tree as processes
from harness.machine import TICK_S
from harness.process_tree import Server
from harness.serving import Metrics, read_metrics

SERVER_CORE, CLIENT_CORE = 0, 1
PORT: Final = 9100
TAIL_LINES: Final = 20


class Failed(RuntimeError):
    """It could not be measured; says why."""


# ------------------------------------------------------------
# One request at a time: whether answers are right, and to warm the server.

WRONG: Final = 1e-3
"""Relative to the largest output: more is another model's answer, or none."""
WAIT_S: Final = 60.0
GOOD: Final = 200
PATIENCE_S: Final = 20.0
"""So long all models together are asked again, if they refuse."""
PAUSE_S: Final = 0.25


class WrongAnswer(RuntimeError):
    """A server does not serve what it should; says which model, and what came."""


class Line:
    """To one server."""

    def __init__(self, asked: Peer, setup: Setup, x: Floats) -> None:
        self._request = asked.request(setup, x)
        self._connection = http.client.HTTPConnection(HOST, setup.port, timeout=WAIT_S)

    def ask(self, model: str) -> Answer:
        """One answer. Status -1: the server hung up."""
        path = self._request.path.replace("{model}", model)
        try:
            self._connection.request("POST", path, self._request.body, dict(self._request.headers))
            got = self._connection.getresponse()
            headers = {name.lower(): value for name, value in got.getheaders()}
            return Answer(got.status, headers, got.read())
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return Answer(-1, {}, repr(error).encode())

    def close(self) -> None:
        """End it."""
        self._connection.close()


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of asking all models: the worst error of answers, and who refused to the end."""

    worst: float
    silent: tuple[str, ...]


def check(asked: Peer, setup: Setup, x: Floats, expected: Floats, *, rounds: int = 1) -> Checked:
    """Ask every model in turn. :class:`WrongAnswer` if an answer is wrong, or if there is none at all.

    A model is asked again where it refuses: at first nothing is warm, and some servers' times are up.
    """
    line, worst = Line(asked, setup, x), 0.0
    patience_s = time.monotonic() + PATIENCE_S
    answer = Answer(-1, {}, b"")
    silent = set(setup.names)
    try:
        for _ in range(rounds):
            for row, name in enumerate(setup.names):
                answer = line.ask(name)
                while answer.status != GOOD and time.monotonic() < patience_s:
                    time.sleep(PAUSE_S)
                    answer = line.ask(name)
                if answer.status != GOOD:
                    continue
                silent.discard(name)
                worst = max(worst, differs(asked.output(answer), expected[row]))
                if worst > WRONG:
                    raise WrongAnswer(f"the answer of {name} differs from the right one by {worst:.2g}")
    finally:
        line.close()
    if len(silent) == len(setup.names):
        raise WrongAnswer(f"no model answered; the last said {answer.status}: {answer.body[:300]!r}")
    return Checked(worst, tuple(sorted(silent)))


# ------------------------------------------------------------
# A server that is up, and whose answers are right.


class Meter:
    """CPU time from its making on: of the server, and of all others on the two cores."""

    def __init__(self, server: Server) -> None:
        self._began_s = time.monotonic()
        self._server = processes.cpu_s(server.tree())
        self._busy = busy_s()
        self._own = own_s()

    def read(self, server: Server) -> dict[str, Any]:
        """Since then."""
        seconds = time.monotonic() - self._began_s
        tree = server.tree()
        used, own = processes.cpu_s(tree) - self._server, own_s() - self._own
        others = busy_s() - self._busy - used - own
        return {
            "seconds": seconds, "server_cpu_s": used, "client_cpu_s": own, "processes": len(tree),
            "server_core_share": used / seconds, "others_share": max(0.0, others / seconds / 2),
        }  # fmt: skip


def own_s() -> float:
    """CPU of this program and of its children that have ended: the load generators."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def busy_s() -> float:
    """Seconds that the two cores ran anything since boot, as ``/proc/stat`` says."""
    total = 0.0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in {f"cpu{SERVER_CORE}", f"cpu{CLIENT_CORE}"}:
            user, nice, system, _idle, _wait, irq, soft, steal = map(int, fields[:8])
            total += (user + nice + system + irq + soft + steal) * TICK_S
    return total


def cores() -> str:
    """Why there are too few cores; "" if there are enough."""
    have = os.sched_getaffinity(0)
    needed = {SERVER_CORE, CLIENT_CORE} <= have
    return "" if needed else f"cores 0 and 1 are needed, this process may use {sorted(have)}"


def free_port() -> int:
    """The first of some ports in a row that are free."""
    for port in range(PORT, PORT + 2000, 10):
        sockets: list[socket.socket] = []
        try:
            sockets.extend(socket.create_server((HOST, port + more)) for more in range(6))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
        return port
    raise Failed("no free ports")


@dataclass(slots=True)
class Serving:
    """A server that is up, and whose answers are right. ``checked``: before the load, and after it."""

    asked: Peer
    setup: Setup
    x: Floats
    server: Server
    about: dict[str, Any]
    """How it was started, how long that took, and its memory then."""
    checked: list[Checked] = field(default_factory=list)
    used: dict[str, Any] = field(default_factory=dict)
    """What :meth:`metered` measured."""

    @property
    def url(self) -> str:
        """Of its HTTP port."""
        return f"http://{HOST}:{self.setup.port}"

    @property
    def grpc(self) -> str:
        """Of its gRPC port."""
        return f"{HOST}:{self.setup.port + 1}"

    def metrics(self) -> Metrics:
        """All that ours counts, by name and labels."""
        return read_metrics(f"http://{HOST}:{self.setup.port + 2}/metrics")

    def pss_bytes(self) -> int:
        """Memory of all of its processes."""
        return processes.pss_bytes(self.server.tree())

    def play(self, load: Load, seed: int) -> Played:
        """Play a load from the client's core."""
        path = self.setup.folder / "load.toml"
        path.write_text(load.text)
        return record.play(self.asked, self.setup, path, self.x, seed=seed, core=CLIENT_CORE)

    @contextmanager
    def metered(self) -> Iterator[None]:
        """What is measured within is what the run's CPU times are about."""
        meter = Meter(self.server)
        yield
        self.used.update(meter.read(self.server))


@contextmanager
def serving(
    asked: Peer, setup: Setup, kinds: Kinds, *, cores: Sequence[int] = (SERVER_CORE,), rounds: int = 2
) -> Iterator[Serving]:
    """The server; its answers are checked before the block, and after it if nothing went wrong in it.

    Nothing of it is left afterwards.
    """
    x = kinds.input(setup.kind)
    expected = kinds.expected(setup.kind, setup.names, x)
    # Names of sockets have at most 107 bytes, so they do not go into a folder of any length.
    with tempfile.TemporaryDirectory(prefix="peers-") as sockets:
        command = list(asked.command(setup))
        environment = {**asked.environment(setup), "TMPDIR": sockets}
        server = Server(command, environment, setup.folder / "server.log", *cores)
        try:
            about = {
                "command": command, "environment": environment,
                "start_s": _await_ready(asked, setup, server),
                "idle_pss_bytes": processes.pss_bytes(server.tree()),
            }  # fmt: skip
            up = Serving(asked, setup, x, server, about)
            up.checked.append(check(asked, setup, x, expected, rounds=rounds))
            if setup.emulated:
                os.truncate(setup.device_log, 0)  # it is open in the server's processes
            yield up
            up.checked.append(check(asked, setup, x, expected))
        finally:
            server.stop(asked.stop_s)
            for path in asked.left_behind(setup):
                path.unlink(missing_ok=True)


def _await_ready(asked: Peer, setup: Setup, server: Server) -> float:
    """How long it took until it said that it is ready."""
    began_s = time.monotonic()
    while True:
        if server.ended() is not None:
            raise Failed(f"it ended with status {server.ended()}; it said:\n{tail(server.log)}")
        if time.monotonic() > began_s + asked.start_s:
            raise Failed(f"it was not ready within {asked.start_s:g} s; it said:\n{tail(server.log)}")
        with suppress(OSError, ValueError):
            if asked.ready(setup):
                return time.monotonic() - began_s
        time.sleep(0.1)


def tail(log: Path) -> str:
    """The last of what a server said."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


# ------------------------------------------------------------
# Has models loaded and unloaded by calls while a load is played: one thread that mostly sleeps.

HELD: Final = 20
"""So many of the models stay loaded."""


class LoadCalls:
    """Each turn unloads a model and loads another; a turn that comes late is not left out."""

    def __init__(self, asked: Peer, setup: Setup, names: Sequence[str], per_s: float) -> None:
        self._peer = asked
        self._port = setup.port
        self._names = names
        self._every_s = 1 / per_s
        self._held = setup.memory_models or HELD
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load calls")
        self._done = self._failed = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """End; how many loads went well, and how many did not."""
        self._over.set()
        self._thread.join()
        return {"loads": self._done, "loads_failed": self._failed}

    def _run(self) -> None:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=30)
        next_s, number = time.monotonic(), 0
        while not self._over.wait(max(0.0, next_s - time.monotonic())):
            next_s += self._every_s
            gone, come = turn(self._names, self._held, number)
            number += 1
            if gone:
                self._call(connection, self._peer.load_path(gone, unload=True))
            if self._call(connection, self._peer.load_path(come)):
                self._done += 1
            else:
                self._failed += 1
        connection.close()

    def _call(self, connection: http.client.HTTPConnection, path: str) -> bool:
        try:
            connection.request("POST", path)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return False
        return response.status == 200


def turn(names: Sequence[str], held: int, number: int) -> tuple[str, str]:
    """Which model goes ("" while there is room) and which comes."""
    gone = names[(number - held) % len(names)] if number >= held else ""
    return gone, names[number % len(names)]


# ------------------------------------------------------------
# A point of the comparison.


@dataclass(frozen=True, slots=True)
class Point:
    """What is measured: a server, a load, a repeat."""

    server: str
    load: Load
    repeat: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.load.name}/{self.server}-{self.repeat}"


def setup_of(load: Load, folder: Path, kinds: Kinds) -> Setup:
    """What the server shall serve."""
    return kinds.setup(
        load.kind, load.model_names(), slo_ms=load.slo_ms, folder=folder, port=free_port(),
        memory_mib=load.memory_mib,
    )  # fmt: skip


def measure(point: Point, asked: Peer, kinds: Kinds, out: Path) -> dict[str, Any]:
    """All that there is to say of one point. :class:`RuntimeError` says why there is nothing."""
    folder = out / "work" / point.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    setup = setup_of(point.load, folder, kinds)
    with serving(asked, setup, kinds) as up:
        played, loads = _played(point, up)
        pss_bytes, counted = up.pss_bytes(), asked.counted(setup)
        device = setup.device_log.read_text().splitlines() if setup.emulated else []
    raw = out / "raw" / f"{point.name}.cwbench"
    raw.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "record", raw)
    before, after = up.checked
    result = {
        "scenario": point.load.text, "seed": point.repeat,
        "figures": record.figures(played), "reasons": record.reasons(played), **up.about,
        "silent": {"before": before.silent, "after": after.silent},
        "worst_error": max(before.worst, after.worst),
        "cpu_ms_per_request": 1e3 * up.used["server_cpu_s"] / max(1, len(played.table)), **up.used, **loads,
        "pss_bytes": pss_bytes, "counted": counted, **played.about, "device": record.device(device),
        "settings": json.loads((folder / "models.json").read_text()),
    }  # fmt: skip
    result["noise"] = record.noise(result)
    if not result["noise"]:
        shutil.rmtree(folder)
    return result


def _played(point: Point, up: Serving) -> tuple[Played, dict[str, Any]]:
    """The load, and what calls have loaded meanwhile where the server loads nothing by itself."""
    comers = point.load.comers
    if comers is None or up.asked.loads_on_demand:
        with up.metered():
            return up.play(point.load, point.repeat), {}
    calls = LoadCalls(up.asked, up.setup, point.load.model_names(*comers["models"]), comers["rate_rps"])
    with up.metered():
        calls.start()
        try:
            played = up.play(point.load.without_comers(), point.repeat)
        finally:
            loads = calls.stop()
    return played, loads
