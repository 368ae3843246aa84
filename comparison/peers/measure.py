"""One run of a load against a server: starts it, checks its answers, plays the load, reads what it cost."""

from __future__ import annotations

import http.client
import json
import os
import resource
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clockwork_serve.workload.scenario import Scenario, read_scenario
from clockwork_serve.workload.stream import build
from comparison.peers import load, summary
from comparison.peers.ask import check
from comparison.peers.models import Kinds
from comparison.peers.peer import HOST, Floats, Peer, Setup
from harness import process_tree as processes
from harness.machine import TICK_S
from harness.process_tree import Server

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


SERVER_CORE, CLIENT_CORE = 0, 1
PORT: Final = 9100
TAIL_LINES: Final = 20


@dataclass(frozen=True, slots=True)
class Point:
    """What is measured: a server, a load, a repeat."""

    server: str
    load: Path
    repeat: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.load.stem}/{self.server}-{self.repeat}"


class Failed(RuntimeError):
    """It could not be measured; says why."""


def setup_of(point: Point, scenario: Scenario, folder: Path, kinds: Kinds) -> Setup:
    """What the server shall serve."""
    models = build(scenario, point.repeat).models
    named = {kind for _, kind in models}
    if len(named) != 1:
        raise Failed(f"a load is of one kind of model, found {sorted(named)}")
    (kind,) = named
    bytes_limit = scenario.cluster.memory_mib
    return kinds.setup(
        kind, [name for name, _ in models], slo_ms=min(load.slo_ms or 1e3 for load in scenario.loads),
        folder=folder, port=free_port(), memory_mib=bytes_limit,
    )  # fmt: skip


def free_port() -> int:
    """The first of some ports in a row that are free."""
    for port in range(PORT, PORT + 2000, 10):
        sockets: list[socket.socket] = []
        try:
            sockets.extend(socket.create_server(("127.0.0.1", port + more)) for more in range(6))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
        return port
    raise Failed("no free ports")


def measure(point: Point, asked: Peer, kinds: Kinds, out: Path) -> dict[str, Any]:
    """All that there is to say of one point. :class:`RuntimeError` says why there is nothing."""
    scenario = read_scenario(point.load)
    folder = out / "work" / point.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    setup = setup_of(point, scenario, folder, kinds)
    x = kinds.input(setup.kind)
    expected = kinds.expected(setup.kind, setup.names, x)
    command = list(asked.command(setup))
    environment = asked.environment(setup)
    with running(asked, setup, command, environment) as (server, start_s):
        idle_pss = processes.pss_bytes(server.tree())
        before = check(asked, setup, x, expected, rounds=2)
        if setup.emulated:
            os.truncate(setup.device_log, 0)  # it is open in the server's processes
        played = _played(point, asked, setup, scenario, server, x)
        device = setup.device_log.read_text().splitlines() if setup.emulated else []
        after = check(asked, setup, x, expected)
    head, table, ends = load.read(folder / "record", asked)
    raw = out / "raw" / f"{point.name}.cwbench"
    raw.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "record", raw)
    result = {
        "scenario": point.load.read_text(), "seed": point.repeat,
        "figures": summary.figures(head, table, ends), "reasons": summary.reasons(head, table),
        "start_s": start_s,
        "silent": {"before": before.silent, "after": after.silent}, "idle_pss_bytes": idle_pss,
        "worst_error": max(before.worst, after.worst),
        "cpu_ms_per_request": 1e3 * played["server_cpu_s"] / max(1, len(table)), **played,
        "generator": load.generator(folder / "bench.json"),
        "device": summary.device(device),
        "command": command, "environment": environment,
        "settings": json.loads((folder / "models.json").read_text()),
    }  # fmt: skip
    result["noise"] = summary.noise(result)
    if not result["noise"]:
        shutil.rmtree(folder)
    return result


@contextmanager
def running(
    asked: Peer,
    setup: Setup,
    command: Sequence[str],
    environment: dict[str, str],
    cores: Sequence[int] = (SERVER_CORE,),
) -> Iterator[tuple[Server, float]]:
    """The server, once it says that it is ready, and how long that took. Nothing of it is left afterwards."""
    began_s = time.monotonic()
    server = Server(command, environment, setup.folder / "server.log", *cores)
    try:
        while True:
            if server.ended() is not None:
                raise Failed(f"it ended with status {server.ended()}; it said:\n{tail(server.log)}")
            if time.monotonic() > began_s + asked.start_s:
                raise Failed(f"it was not ready within {asked.start_s:g} s; it said:\n{tail(server.log)}")
            with suppress(OSError, ValueError):
                if asked.ready(setup):
                    break
            time.sleep(0.1)
        yield server, time.monotonic() - began_s
    finally:
        server.stop(asked.stop_s)
        for path in asked.left_behind(setup):
            path.unlink(missing_ok=True)


def tail(log: Path) -> str:
    """The last of what a server said."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def _played(
    point: Point, asked: Peer, setup: Setup, scenario: Scenario, server: Server, x: Floats
) -> dict[str, Any]:
    path, calls = point.load, None
    comers = next((one for one in scenario.loads if one.name == "comers"), None)
    if comers is not None and not asked.loads_on_demand:
        path = setup.folder / path.name
        path.write_text(load.without_comers(point.load.read_text()))
        sets = {entry.name for entry in scenario.models if entry.name in comers.models}
        names = [name for name in setup.names if name.rpartition("-")[0] in sets]
        calls = LoadCalls(asked, setup, names, comers.rate_rps or 0.0)
    given = load.command(asked, setup, path, x, seed=point.repeat, core=CLIENT_CORE)
    before = Meter(server)
    if calls:
        calls.start()
    load.play(given, setup.folder / "bench.log")
    loads = calls.stop() if calls else {}
    return {
        **before.read(server), "pss_bytes": processes.pss_bytes(server.tree()), **loads,
        "load_command": given,
    }  # fmt: skip


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
    return (
        ""
        if {SERVER_CORE, CLIENT_CORE} <= have
        else f"cores 0 and 1 are needed, this process may use {sorted(have)}"
    )
