"""Runs all servers, loads and repeats, alternating servers on the same schedule; finished parts are kept."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from clockwork_serve.errors import ClockworkError
from comparison.peers import served, table
from comparison.peers.install import packages, version
from comparison.peers.loads import LOADS, Load, names
from comparison.peers.measure import CLIENT_CORE, Failed, Point, cores, free_port, measure, serving, setup_of
from comparison.peers.models import Kinds
from comparison.peers.peer import INSTALLED, MARK, Peer
from comparison.peers.record import main_figures
from comparison.peers.servers import PEERS
from harness.launch import adopt
from harness.machine import machine_line, wait_for_peace

SHORT_LOADS: Final = ("gpu_15_models", "gpu_bursts", "mobilenet_one")
SHORT_SERVERS: Final = ("clockwork", "triton")
SETTLE_S: Final = 2.0
"""Between two runs: what the last one left dirty is written and forgotten."""
PEACE_SHARE: Final = 0.1
"""A run begins once others use no more of a core, or after a while all the same; then it is marked."""
PATIENCE_S: Final = 20.0
INTERRUPTED: Final = 130
Result = dict[str, Any]
T = TypeVar("T")

# ------------------------------------------------------------
# A network that has nothing but loopback, for servers that listen on all interfaces.

_MARK: Final = "PEERS_ISOLATED"
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1


def isolated() -> bool:
    """Whether this process has such a network."""
    return os.environ.get(_MARK) == "1"


def isolate(module: str = "comparison.peers") -> str:
    """Become a process that has one, by starting ``module`` anew. "" in one that has it, else why not."""
    if isolated():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            asked = struct.pack("16sh14x", b"lo", 0)
            flags = struct.unpack_from("h", fcntl.ioctl(any_socket, _GET_FLAGS, asked), 16)[0]
            fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))
        return ""
    unshare = unshare_command()
    if why := why_not_isolated(unshare):
        return why
    os.environ[_MARK] = "1"
    return os.execvp(unshare[0], [*unshare, sys.executable, "-m", module, *sys.argv[1:]])  # noqa: S606


def unshare_command() -> list[str]:
    """What starts a program in a network of its own; empty if nothing does."""
    path = shutil.which("unshare")
    if path is None:
        return []
    return [path, "--net"] if os.geteuid() == 0 else [path, "--map-root-user", "--net"]


def why_not_isolated(unshare: Sequence[str]) -> str:
    """Why that cannot be; "" if it can."""
    if not unshare:
        return "no network namespace can be made: there is no program unshare"
    done = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no network namespace can be made: {done.stderr.strip()}"


# ------------------------------------------------------------
# Runs, one after the other, each with a file of its own.


def turns(of: Sequence[T], repeat: int) -> tuple[T, ...]:
    """The same in turns: each repeat, from 1 on, begins with another."""
    first = (repeat - 1) % len(of)
    return (*of[first:], *of[:first])


def done(path: Path, *, again_noisy: bool = False) -> bool:
    """Whether a run need not be measured: it was, or it cannot be. One that failed is tried again."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    if again_noisy and found.get("noise"):
        return False
    return found.get("status") in {"measured", "left out"}


def write_result(path: Path, result: Result) -> None:
    """The file, whole or as before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1, default=str))
    partial.rename(path)


def attempt(facts: Result, work: Callable[[], Result], patience_s: float = PATIENCE_S) -> Result:
    """Measure once the machine is left alone, or say why that failed."""
    try:
        time.sleep(SETTLE_S)
        wait_for_peace(PEACE_SHARE, patience_s)
        return {**facts, "status": "measured", **work()}
    except (RuntimeError, OSError, ClockworkError) as error:
        return {**facts, "status": "failed", "why": str(error)}


def run_all(
    runs: Sequence[T], work: Callable[[T], Result], words: Callable[[T], str], path: Callable[[T], Path],
    line: Callable[[Result], str],
) -> int:  # fmt: skip
    """Each in turn, with what came of it in a line; the exit status: 0, 1 if one failed, 130 after Ctrl-C."""
    if not runs:
        return 0
    adopt()
    # Whoever ends this program ends the server that it has started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CLIENT_CORE})
    began_s, failed = time.monotonic(), 0
    try:
        for number, one in enumerate(runs, 1):
            print(f"[{number}/{len(runs)}] {words(one)}: ", end="", file=sys.stderr, flush=True)
            result = work(one)
            write_result(path(one), result)
            failed += result["status"] == "failed"
            rest_s = (time.monotonic() - began_s) / number * (len(runs) - number)
            print(f"{line(result)}; {rest_s / 60:.0f} min left", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured is kept", file=sys.stderr)
        return INTERRUPTED
    finally:
        os.sched_setaffinity(0, before)
    return 1 if failed else 0


def why_in_a_line(result: Result) -> str:
    """What became of a run that was not measured."""
    return f"{result['status']}: {str(result['why']).splitlines()[0]}"


# ------------------------------------------------------------
# The comparison.


def points(servers: Sequence[str], loads: Iterable[Load], repeats: int) -> list[Point]:
    """All that is to be measured."""
    return [
        Point(name, load, repeat)
        for repeat in range(1, repeats + 1)
        for load in loads
        for name in turns(servers, repeat)
    ]


def result_path(out: Path, point: Point) -> Path:
    """Where a point's result is."""
    return out / "results" / f"{point.name}.json"


def line_of(result: Result) -> str:
    """What a result says, in a line."""
    if result["status"] != "measured":
        return why_in_a_line(result)
    found = main_figures(result)
    late = "-" if found["p99_ms"] is None else f"{found['p99_ms']:.0f} ms"
    noisy = f"; DISTURBED: {'; '.join(result['noise'])}" if result["noise"] else ""
    return (
        f"{found['in_time_per_s']:.1f} of {found['asked_per_s']:.1f}/s in time "
        f"({found['in_time_share']:.1%}), p99 {late}, "
        f"{result['cpu_ms_per_request']:.2f} ms of CPU a request, "
        f"{result['pss_bytes'] / 2**20:.0f} MiB, others {result['others_share']:.1%}{noisy}"
    )


def run_points(todo: Sequence[Point], out: Path, *, again_noisy: bool = False) -> int:
    """Those that are not there yet; the exit status."""
    if why := cores():
        print(f"error: {why}", file=sys.stderr)
        return 2
    servers = list(dict.fromkeys(point.server for point in todo))
    left = [point for point in todo if not done(result_path(out, point), again_noisy=again_noisy)]
    print(f"{len(todo)} runs of {', '.join(servers)}; {len(todo) - len(left)} are done", flush=True)
    write_facts(out, servers)
    kinds = Kinds()
    return run_all(
        left,
        lambda point: one(point, kinds, out),
        lambda point: f"{point.load.name:<22} {point.server:<12} repeat {point.repeat}",
        lambda point: result_path(out, point),
        line_of,
    )


def run(given: Namespace) -> int:
    """The comparison; the exit status."""
    out = given.out.resolve()
    servers, loads = chosen(given)
    status = run_points(points(servers, loads, given.repeats), out, again_noisy=given.again_noisy)
    if status != 2:
        print(table.write(out, None))
    return status


def chosen(given: Namespace) -> tuple[list[str], list[Load]]:
    """Servers and loads that were asked for. :class:`Failed` names a load that does not exist."""
    here = (name for name in PEERS if name == "clockwork" or (INSTALLED / name / MARK).is_file())
    servers = given.servers or list(SHORT_SERVERS if given.short else here)
    wanted = given.loads.split(",") if given.loads else SHORT_LOADS if given.short else ["all"]
    wanted = sorted(LOADS) if wanted == ["all"] else wanted
    for name in wanted:
        if name not in LOADS:
            raise Failed(f"--loads: expected all, or some of {', '.join(sorted(LOADS))}; found {name}")
    return servers, [LOADS[name] for name in wanted]


def one(point: Point, kinds: Kinds, out: Path) -> Result:
    """Measure a point, or say why not."""
    asked = PEERS[point.server]
    facts: Result = {"server": point.server, "load": point.load.name, "repeat": point.repeat}
    setup = setup_of(point.load, out, kinds)
    if why := asked.why_not(setup, isolated=isolated()) or cannot(point.load, asked):
        return {**facts, "status": "left out", "why": why}
    return attempt(facts, lambda: {**version(asked), **measure(point, asked, kinds, out)})


def cannot(load: Load, asked: Peer) -> str:
    """Why a server has nothing to do with a load; "" if it has."""
    if load.comers is not None and not (asked.loads_on_demand or asked.loads_by_call):
        return "models neither come nor go while it runs"
    return ""


def write_facts(out: Path, servers: Sequence[str]) -> None:
    """What all runs have in common: the machine, and each server's packages and configuration in words."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "facts.json"
    told = json.loads(path.read_text())["servers"] if path.is_file() else {}
    for asked in (PEERS[name] for name in servers):
        told[asked.name] = {
            "configured": asked.configured, "source": asked.source, "note": asked.note,
            **version(asked), "packages": packages(asked),
        }  # fmt: skip
    facts = {
        "machine": machine_line(), "kernel": platform.version(), "command": sys.argv,
        "device": f"{served.BASE_MS:g} + {served.EACH_MS:g} n ms, one for all models", "servers": told,
    }  # fmt: skip
    path.write_text(json.dumps(facts, indent=1))


def check_all(servers: Sequence[str], kinds_wanted: Sequence[str], folder: Path) -> int:
    """Each server serves each kind right; the exit status."""
    adopt()
    kinds, worst = Kinds(), 0
    for name in servers:
        for kind in kinds_wanted:
            said = _checked(PEERS[name], kind, kinds, folder / f"{name}-{kind}")
            worst |= said.startswith("FAILED")
            print(f"{name:<12} {kind:<20} {said}", flush=True)
    return worst


def _checked(asked: Peer, kind: str, kinds: Kinds, folder: Path) -> str:
    if why := asked.why_not(isolated=isolated()):
        return f"left out: {why}"
    folder.mkdir()
    setup = kinds.setup(kind, names(2), slo_ms=1000.0, folder=folder, port=free_port(), memory_mib=None)
    try:
        with serving(asked, setup, kinds, rounds=1) as up:
            (found,), pids, memory = up.checked, up.server.tree(), up.pss_bytes() / 2**20
    except RuntimeError as error:
        return f"FAILED: {error}"
    if found.silent:
        return f"FAILED: {', '.join(found.silent)} did not answer"
    cost = f"up in {up.about['start_s']:.1f} s, {len(pids)} processes, {memory:.0f} MiB"
    return f"right answers, worst error {found.worst:.1e}; {cost}"
