"""Runs all servers, loads and repeats, alternating servers on the same schedule; finished parts are kept."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from clockwork_serve.workload.scenario import read_scenario
from comparison.peers import served
from comparison.peers.ask import WrongAnswer, check
from comparison.peers.install import MARK, packages, version
from comparison.peers.measure import CLIENT_CORE, Failed, Point, cores, free_port, measure, running, setup_of
from comparison.peers.models import Kinds
from comparison.peers.peer import INSTALLED, Peer
from comparison.peers.registry import NAMES, peer
from comparison.peers.summary import main_figures
from harness import process_tree as processes
from harness.launch import adopt
from harness.machine import machine_line, wait_for_peace

LOADS: Final = Path(__file__).parent / "loads"
SHORT_LOADS: Final = ("gpu_15_models", "gpu_bursts", "mobilenet_one")
SHORT_SERVERS: Final = ("clockwork", "triton")
SETTLE_S: Final = 2.0
"""Between two runs: what the last one left dirty is written and forgotten."""
PEACE_SHARE: Final = 0.1
"""A run begins once others use no more of a core, or after a while all the same; then it is marked."""
PATIENCE_S: Final = 20.0


def load_names() -> list[str]:
    """The loads there are."""
    return sorted(path.stem for path in LOADS.glob("*.toml"))


def load_paths(names: Sequence[str]) -> list[Path]:
    """Their files. :class:`Failed` names one that does not exist."""
    for name in names:
        if name not in load_names():
            raise Failed(f"--loads: expected some of {', '.join(load_names())}; found {name}")
    return [LOADS / f"{name}.toml" for name in names]


def points(servers: Sequence[str], loads: Sequence[Path], repeats: int) -> list[Point]:
    """All that is to be measured: servers take turns, and each repeat begins with another."""
    found = []
    for repeat in range(1, repeats + 1):
        for load in loads:
            first = (repeat - 1) % len(servers)
            found += [Point(name, load, repeat) for name in (*servers[first:], *servers[:first])]
    return found


def result_path(out: Path, point: Point) -> Path:
    """Where a point's result is."""
    return out / "results" / f"{point.name}.json"


def done(path: Path, *, again_noisy: bool = False) -> bool:
    """Whether a point need not be measured: it was, or it cannot be. A run that failed is tried again."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    if again_noisy and found.get("noise"):
        return False
    return found.get("status") in {"measured", "left out"}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """The whole file, or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1, default=str))
    partial.rename(path)


def line_of(result: dict[str, Any]) -> str:
    """What a result says, in a line."""
    if result["status"] != "measured":
        return f"{result['status']}: {str(result['why']).splitlines()[0]}"
    found = main_figures(result)
    late = "-" if found["p99_ms"] is None else f"{found['p99_ms']:.0f} ms"
    noisy = f"; DISTURBED: {'; '.join(result['noise'])}" if result["noise"] else ""
    return (
        f"{found['in_time_per_s']:.1f} of {found['asked_per_s']:.1f}/s in time "
        f"({found['in_time_share']:.1%}), p99 {late}, "
        f"{result['cpu_ms_per_request']:.2f} ms of CPU a request, "
        f"{result['pss_bytes'] / 2**20:.0f} MiB, others {result['others_share']:.1%}{noisy}"
    )


def run(given: Namespace, *, isolated: bool) -> int:
    """The comparison; the exit status."""
    if why := cores():
        print(f"error: {why}", file=sys.stderr)
        return 2
    out = given.out.resolve()
    servers, loads, repeats = chosen(given)
    todo = points(servers, loads, repeats)
    left = [point for point in todo if not done(result_path(out, point), again_noisy=given.again_noisy)]
    print(f"{len(todo)} runs of {', '.join(servers)}; {len(todo) - len(left)} are done", flush=True)
    write_facts(out, servers)
    adopt()
    # Whoever ends this program ends the server that it has started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.sched_setaffinity(0, {CLIENT_CORE})
    kinds = Kinds()
    began_s, failed = time.monotonic(), 0
    for number, point in enumerate(left):
        asked = peer(point.server)
        said = f"[{number + 1}/{len(left)}] {point.load.stem:<22} {point.server:<12} repeat {point.repeat}: "
        print(said, end="", flush=True)
        result = one(point, asked, kinds, out, isolated=isolated)
        write_result(result_path(out, point), result)
        failed += result["status"] == "failed"
        spent_s = time.monotonic() - began_s
        rest_s = spent_s / (number + 1) * (len(left) - number - 1)
        print(f"{line_of(result)}; {rest_s / 60:.0f} min left", flush=True)
    from comparison.peers import table

    print(table.write(out, None))
    return 1 if failed else 0


def chosen(given: Namespace) -> tuple[list[str], list[Path], int]:
    """Servers, loads and repeats that were asked for."""
    short = given.short
    servers = given.servers or (list(SHORT_SERVERS) if short else [name for name in NAMES if installed(name)])
    names = given.loads.split(",") if given.loads else list(SHORT_LOADS) if short else load_names()
    return servers, load_paths(names), given.repeats


def installed(name: str) -> bool:
    """Whether it can be started."""
    return name == "clockwork" or (INSTALLED / name / MARK).is_file()


def one(point: Point, asked: Peer, kinds: Kinds, out: Path, *, isolated: bool) -> dict[str, Any]:
    """Measure a point, or say why not."""
    facts: dict[str, Any] = {"server": point.server, "load": point.load.stem, "repeat": point.repeat}
    try:
        setup = setup_of(point, read_scenario(point.load), out, kinds)
        if why := asked.why_not(setup, isolated=isolated) or cannot(point, asked):
            return {**facts, "status": "left out", "why": why}
        time.sleep(SETTLE_S)
        wait_for_peace(PEACE_SHARE, PATIENCE_S)
        return {**facts, "status": "measured", **version(asked), **measure(point, asked, kinds, out)}
    except (RuntimeError, OSError) as error:
        return {**facts, "status": "failed", "why": str(error)}


def cannot(point: Point, asked: Peer) -> str:
    """Why a server has nothing to do with a load; "" if it has."""
    comes = any(load.name == "comers" for load in read_scenario(point.load).loads)
    if comes and not (asked.loads_on_demand or asked.loads_by_call):
        return "models neither come nor go while it runs"
    return ""


def write_facts(out: Path, servers: Sequence[str]) -> None:
    """What all runs have in common: the machine, and each server's packages and configuration in words."""
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "machine": machine_line(), "kernel": platform.version(), "command": sys.argv,
        "device": f"{served.BASE_MS:g} + {served.EACH_MS:g} n ms, one for all models",
        "servers": {
            name: {
                "configured": peer(name).configured, "source": peer(name).source, "note": peer(name).note,
                "protocol": peer(name).protocol, **version(peer(name)), "packages": packages(peer(name)),
            }
            for name in servers
        },
    }  # fmt: skip
    path = out / "facts.json"
    before = json.loads(path.read_text()) if path.is_file() else {"servers": {}}
    facts["servers"] = {**before["servers"], **facts["servers"]}  # type: ignore[dict-item]
    path.write_text(json.dumps(facts, indent=1))


def check_all(servers: Sequence[str], kinds_wanted: Sequence[str], folder: Path, *, isolated: bool) -> int:
    """Each server serves each kind right; the exit status."""
    adopt()
    kinds, worst = Kinds(), 0
    for name in servers:
        asked = peer(name)
        for kind in kinds_wanted:
            said = _checked(asked, kind, kinds, folder / f"{name}-{kind}", isolated=isolated)
            worst |= said.startswith("FAILED")
            print(f"{name:<12} {kind:<20} {said}", flush=True)
    return worst


def _checked(asked: Peer, kind: str, kinds: Kinds, folder: Path, *, isolated: bool) -> str:
    if why := asked.why_not(isolated=isolated):
        return f"left out: {why}"
    folder.mkdir()
    names = [f"m-{row:04d}" for row in range(2)]
    setup = kinds.setup(kind, names, slo_ms=1000.0, folder=folder, port=free_port(), memory_mib=None)
    x = kinds.input(kind)
    try:
        command = asked.command(setup)
        with running(asked, setup, command, asked.environment(setup)) as (server, start_s):
            found = check(asked, setup, x, kinds.expected(kind, names, x))
            pids = server.tree()
            memory = processes.pss_bytes(pids) / 2**20
    except (Failed, WrongAnswer) as error:
        return f"FAILED: {error}"
    cost = f"up in {start_s:.1f} s, {len(pids)} processes, {memory:.0f} MiB"
    if found.silent:
        return f"FAILED: {', '.join(found.silent)} did not answer"
    return f"right answers, worst error {found.worst:.1e}; {cost}"
