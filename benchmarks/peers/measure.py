"""One run of one load against one server: starts it, checks its answers, plays the load, reads what it cost."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import numpy as np

from benchmarks.machine import TICK_S
from benchmarks.peers import processes, served, summary
from benchmarks.peers.models import Kinds
from benchmarks.peers.peer import ROOT, Answer, Floats, Peer, Setup, differs
from benchmarks.peers.play import WRONG, Record, write_plan
from benchmarks.peers.processes import Server
from benchmarks.peers.wires import NO_ANSWER, wire
from clockwork_serve.workload.scenario import Scenario, read_scenario
from clockwork_serve.workload.stream import build

SERVER_CORE, CLIENT_CORE = 0, 1
PORT: Final = 9100
CHECKED: Final = 3
LOADS_PER_S: Final = 25.0
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
        sockets = []
        try:
            for more in range(6):
                sockets.append(socket.create_server(("127.0.0.1", port + more)))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
        return port
    raise Failed("no free ports")


def measure(point: Point, asked: Peer, kinds: Kinds, out: Path) -> dict[str, Any]:
    """All that there is to say of one point."""
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
        worst = check(asked, setup, x, expected)
        played = _played(point, asked, setup, scenario, server, x, expected)
    records = msgspec.json.decode((folder / "records.json").read_bytes(), type=list[Record])
    kept = out / "raw" / f"{point.name}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / "records.json", kept)
    loads = [load.name for load in scenario.loads]
    found = summary.figures(
        records, seconds=scenario.seconds, warmup_s=scenario.warmup_s, loads=loads
    )
    log = setup.device_log
    result = {
        "server": point.server, "load": point.load.stem, "repeat": point.repeat, "seed": point.repeat,
        "scenario": point.load.read_text(), "figures": found, "start_s": start_s,
        "idle_pss_bytes": idle_pss, "worst_error": worst,
        "cpu_ms_per_request": 1e3 * played["server_cpu_s"] / max(1, len(records)), **played,
        "device": summary.device(log.read_text().splitlines()) if log.is_file() else {},
        "command": command, "environment": environment, "settings": json.loads((folder / "models.json").read_text()),
    }  # fmt: skip
    result["noise"] = summary.noise(result)
    return result


@contextmanager
def running(
    asked: Peer, setup: Setup, command: Sequence[str], environment: dict[str, str]
) -> Iterator[tuple[Server, float]]:
    """The server, once it says that it is ready, and how long that took. Nothing of it is left afterwards."""
    began_s = time.monotonic()
    server = Server(command, environment, SERVER_CORE, setup.folder / "server.log")
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
        asked.clean(setup)


def tail(log: Path) -> str:
    """The last of what a server said."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def check(asked: Peer, setup: Setup, x: Floats, expected: Floats) -> float:
    """Ask some models once; the worst error of their answers. :class:`Failed` if one is wrong or there is none."""

    async def ask() -> list[tuple[int, Answer]]:
        line = wire(asked.protocol, asked.request(setup, x), setup.port, setup.names)
        try:
            rows = range(0, len(setup.names), max(1, len(setup.names) // CHECKED))
            return [(row, await _insist(asked, line.ask, setup.names[row])) for row in rows]
        finally:
            await line.close()

    worst = 0.0
    for row, answer in asyncio.run(ask()):
        if answer is NO_ANSWER or asked.judge(answer).kind != "ok":
            raise Failed(f"{setup.names[row]} answered {answer.status}: {answer.body[:300]!r}")
        worst = max(worst, differs(asked.output(answer), expected[row]))
    if worst > WRONG:
        raise Failed(f"an answer differs from the right one by {worst:.2g}")
    return worst


async def _insist(asked: Peer, ask: Any, name: str) -> Answer:
    """The first answers may be refused: nothing is warm, and some servers time out."""
    answer: Answer = NO_ANSWER
    for _ in range(20):
        answer, _sent = await ask(name, 30.0)
        if answer is not NO_ANSWER and asked.judge(answer).kind == "ok":
            return answer
        await asyncio.sleep(0.25)
    return answer


def _played(
    point: Point, asked: Peer, setup: Setup, scenario: Scenario, server: Server, x: Floats, expected: Floats
) -> dict[str, Any]:
    np.save(setup.folder / "expected.npy", expected)
    more: dict[str, Any] = {
        "seed": point.repeat, "expected": str(setup.folder / "expected.npy"),
        "records": str(setup.folder / "records.json"), "core": CLIENT_CORE,
        **load_calls(asked, setup, scenario),
    }  # fmt: skip
    plan = write_plan(setup, asked, point.load, x, more)
    log = (setup.folder / "player.log").open("wb")
    player = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peers.play", str(plan)], stdout=subprocess.PIPE, stderr=log, cwd=ROOT,
    )  # fmt: skip
    assert player.stdout is not None
    try:
        _line(player.stdout, setup)
        before = Meter(server)
        over = _line(player.stdout, setup)
        found = before.read(server, over["cpu_s"])
        found["pss_bytes"] = processes.pss_bytes(server.tree())
        player.wait(60)
    finally:
        player.kill()
        player.wait()
        log.close()
    return {**found, "loads": over["loads"], "loads_failed": over["loads_failed"]}


def load_calls(asked: Peer, setup: Setup, scenario: Scenario) -> dict[str, Any]:
    """Where models shall come and go and the server has to be told to: calls take the place of that load."""
    comers = next((load for load in scenario.loads if load.name == "comers"), None)
    if comers is None or asked.loads_on_demand:
        return {}
    sets = {entry.name for entry in scenario.models if entry.name in comers.models}
    names = tuple(name for name in setup.names if name.rpartition("-")[0] in sets)
    return {"leave_out": ("comers",), "load_calls": names, "load_calls_per_s": comers.rate_rps or LOADS_PER_S}


def _line(output: IO[bytes], setup: Setup) -> dict[str, Any]:
    line = output.readline()
    if not line:
        raise Failed(f"the load generator ended; it said:\n{tail(setup.folder / 'player.log')}")
    found: dict[str, Any] = json.loads(line)
    return found


class Meter:
    """CPU time from its making on: of the server, and of all others on the two cores."""

    def __init__(self, server: Server) -> None:
        self._began_s = time.monotonic()
        self._server = processes.cpu_s(server.tree())
        self._busy = busy_s()
        self._own = time.process_time()

    def read(self, server: Server, player_s: float) -> dict[str, Any]:
        """Since then. ``player_s`` is what the load generator used."""
        seconds = time.monotonic() - self._began_s
        tree = server.tree()
        used = processes.cpu_s(tree) - self._server
        others = busy_s() - self._busy - used - player_s - (time.process_time() - self._own)
        return {
            "seconds": seconds, "server_cpu_s": used, "player_cpu_s": player_s, "processes": len(tree),
            "server_core_share": used / seconds, "others_share": max(0.0, others / seconds / 2),
        }  # fmt: skip


def busy_s() -> float:
    """Seconds that the two cores ran anything since boot, as ``/proc/stat`` says."""
    total = 0.0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in {f"cpu{SERVER_CORE}", f"cpu{CLIENT_CORE}"}:
            user, nice, system, _idle, _wait, irq, soft, steal = map(int, fields[:8])
            total += (user + nice + system + irq + soft + steal) * TICK_S
    return total


def emulated(kind: str) -> bool:
    """Whether it is the device that uses no core."""
    return kind == served.DEVICE


def cores() -> str:
    """Why there are too few cores; "" if there are enough."""
    have = os.sched_getaffinity(0)
    return "" if {SERVER_CORE, CLIENT_CORE} <= have else f"cores 0 and 1 are needed, this process may use {sorted(have)}"
