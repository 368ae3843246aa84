"""What tensors of 600 kB cost between machines: two gateways and two workers, each on a host of its own.

    python -m benchmarks.far_tensors [--short] [--before FILE] [--json FILE]

Hosts are network namespaces with cables to a switch, where this system permits them, else all of them are
the loopback. The server, on a host of its own too, has a device without room for the models. Beside it, in
turns: the same gateways and devices on one host. Devices are emulated: they take their time and read nothing,
but their inputs come, and their outputs go. ``--before``: what this wrote (``--json``) about an earlier
revision, on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.supervisor.server import RunningServer, ServerConfig, running_server
from clockwork_serve.serve.worker.host import WorkerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import KIB, MIB
from harness import repositories
from harness.hosts import Host, certificates, hosts
from harness.http_load import Report, Shot, closed_loop, infer_message, open_loop, poisson, run
from harness.machine import cpu_s
from harness.ports import free_port
from harness.report import Outcome, finish, in_turns, parser, quantile, table
from harness.serving import until

LARGE, SMALL = 150_000, 500
"""Elements of FP32 of an input."""
INFER_MS, RATE, EASY_RATE = 4.0, 400.0, 50.0
"""Requests a second: four of five that two devices can serve; and so few that no host is busy, for CPU."""
SLOW_MS, SLOW_RATE = 8.0, 200.0
"""Four of five again, of a model that takes twice as long: half of the CPU, for all hosts share two cores."""
SLO_MS, EASY_SLO_MS = 100.0, 2000.0
COST, HOST_US, GOODPUT, WAY_MS = 0.6, 60.0, 0.98, 0.4
LATE_SENDS: Final = 0.02
"""A client that sends more than this share late was itself the bottleneck."""
IDLE_S: Final = 4.0
"""So long nothing is asked, to tell the CPU of requests from that of heartbeats and timers."""
HOSTS: Final = ("gateway-a", "gateway-b", "worker-a", "worker-b")


@dataclass
class Arm:
    """A deployment that serves: where clients ask, and its processes."""

    urls: list[str]
    host_pids: dict[str, int]
    """Of the server's host, by name."""
    far_pids: dict[str, int]


def device(name: str, memory_bytes: int) -> DeviceConfig:
    """An emulated one with a process of its own."""
    return DeviceConfig(device=name, kind="emulated", memory_bytes=memory_bytes, apart=True)


def server_of(folder: Path, devices: tuple[DeviceConfig, ...], **settings: Any) -> ServerConfig:
    """A server of both models."""
    given = {"http_port": 0, "grpc_port": None, "metrics_port": 0, "log_level": "warning", "journal": None}
    return ServerConfig(
        settings=Settings(repository=str(folder / "models"), **given | settings),
        store=StoreConfig(cache_dir=str(folder / "cache"), shared=settings.get("store", "")), devices=devices,
    )  # fmt: skip


def pids_of(server: RunningServer) -> dict[str, int]:
    """Its processes."""
    return {name: pid for name in server.names if (pid := server.pid(name)) is not None}


@contextmanager
def one_host(folder: Path) -> Iterator[Arm]:
    """Two gateways and two devices beside the controller."""
    devices = (device("emulated:0", 64 * MIB), device("emulated:1", 64 * MIB))
    with running_server(server_of(folder, devices, gateways=2)) as server:
        yield Arm([server.http_url], pids_of(server), {})


@contextmanager
def apart(folder: Path, home: Host, others: list[Host]) -> Iterator[Arm]:
    """Each of them on a host of its own."""
    own, *theirs = certificates(folder, 1 + len(others))
    listen, at = f"{home.address}:{free_port(home.address)}", dict[str, str]()
    store = folder / "store"
    store.mkdir()
    own["store"] = str(store)
    with (
        running_server(
            server_of(folder, (device("emulated:0", 256 * KIB),), listen_machines=listen, **own)
        ) as server,
        ExitStack() as stack,
    ):
        pids = {}
        for name, host, files in zip(HOSTS, others, theirs, strict=True):
            run_dir = folder / name
            run_dir.mkdir()
            settings = Settings(
                controller=listen, cache=str(run_dir / "cache"), store=str(store), host=host.address,
                log_level="warning",
                http_port=free_port(host.address) if not host.before else 8000, grpc_port=None,
                metrics_port=None, **files,
            )  # fmt: skip
            config: Any = GatewayConfig(
                run_dir=str(run_dir), name=f"{name}.gateway-0", settings=settings, elsewhere=True
            )
            if name.startswith("worker"):
                config = WorkerConfig(
                    run_dir=str(run_dir), name=f"{name}.emulated:0", settings=settings, elsewhere=True,
                    devices=(device(f"{name}.emulated:0", 64 * MIB),),
                )  # fmt: skip
            else:
                at[name] = f"http://{host.address}:{settings.http_port}"
            kind = name.partition("-")[0]
            command = [sys.executable, "-m", f"clockwork_serve.serve.processes.{kind}"]
            process = subprocess.Popen([*host.before, *command, msgspec.json.encode(config).decode()])
            stack.callback(_end, process)
            pids[name] = process.pid
        until("all devices have joined", lambda: len(_ready(server)) == 3, 60)
        until("all gateways serve", lambda: all(map(_serves, at.values())), 60)
        yield Arm(list(at.values()), pids_of(server), pids)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ready(server: RunningServer) -> list[str]:
    devices = server.state()["controller"]["devices"]
    return [found["device"] for found in devices if not found["pending_codes"]]


def _serves(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as response:  # noqa: S310 (ours)
            return bool(response.status == 200)
    except OSError:
        return False


def message(url: str, model: str, elements: int, slo_ms: float) -> bytes:
    """A request of one row."""
    x = random.Random(elements).randbytes(4 * elements)
    return infer_message(url, model, [("x", "FP32", (1, elements), x)], slo_ms=slo_ms)


async def offered(
    arm: Arm, rate: float, slo_ms: float, seconds: float, seed: int, model: str = "large"
) -> list[Report]:
    """The load of large requests, in equal parts on all gateways."""
    loads = []
    for number, url in enumerate(arm.urls):
        large, dice = message(url, model, LARGE, slo_ms), random.Random(f"{seed} {number}")
        shots = [Shot(at_ns, large) for at_ns in poisson(rate / len(arm.urls), seconds, dice)]
        loads.append(open_loop(url, shots, connections=64 // len(arm.urls)))
    return list(await asyncio.gather(*loads))


def measured(arm: Arm, seconds: float, seed: int) -> dict[str, float]:
    """One round: what was found, by name."""
    small = message(arm.urls[0], "small", SMALL, SLO_MS)
    warm = run(offered(arm, EASY_RATE, EASY_SLO_MS, 1.0, seed))
    alone = run(closed_loop(arm.urls[0], lambda _: small, requests=round(100 * seconds), connections=1))
    processes = arm.host_pids | arm.far_pids
    idle = _cpu_of(processes)
    time.sleep(IDLE_S)
    before = _cpu_of(processes)
    idle_us = 1e6 * (sum(before.values()) - sum(idle.values())) / IDLE_S
    easy = run(offered(arm, EASY_RATE, EASY_SLO_MS, seconds, seed + 1))
    answered = sum(sample.status == 200 for report in easy for sample in report.samples)
    us = {name: 1e6 * (used_s - before[name]) / answered for name, used_s in _cpu_of(processes).items()}
    slow = run(offered(arm, SLOW_RATE, SLO_MS, seconds, seed + 3, "slow"))
    slow_good = sum(sample.status == 200 for report in slow for sample in report.samples)
    before = _cpu_of(processes)
    began_s = time.monotonic()
    reports = run(offered(arm, RATE, SLO_MS, seconds, seed + 2))
    lasted_s = time.monotonic() - began_s
    samples = [sample for report in reports for sample in report.samples]
    good = sum(sample.status == 200 for sample in samples)
    used = {name: used_s - before[name] for name, used_s in _cpu_of(processes).items()}
    return {
        "goodput": good / lasted_s,
        "good": good / len(samples),
        "good_when_easy": answered / sum(len(report.samples) for report in easy),
        "good_when_slow": slow_good / sum(len(report.samples) for report in slow),
        "cores": sum(used.values()) / lasted_s,
        "idle_us_per_s": idle_us,
        "host_us": sum(us[name] for name in arm.host_pids),
        "host_us_when_loaded": 1e6 * sum(used[name] for name in arm.host_pids) / len(samples),
        "all_us": sum(us.values()),
        "large_p50_ms": quantile([one.latency_ns for one in samples], 0.5) / 1e6,
        "small_p50_ms": quantile([one.latency_ns for one in alone.samples if one.status == 200], 0.5) / 1e6,
        "late_sends": sum(report.late_sends for report in reports) / len(samples),
        "unwell": sum(report.unanswered for report in [*warm, *easy, *slow, *reports, alone]),
        **{f"us of {name}": found for name, found in us.items()},
    }


def _cpu_of(processes: dict[str, int]) -> dict[str, float]:
    """Seconds of CPU that each has used."""
    return {name: cpu_s(pid) for name, pid in processes.items()}


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--short", action="store_true", help="a round of 3 seconds instead of three of 10")
    options.add_argument("--before", type=Path, metavar="FILE", help="the JSON of an earlier revision")
    given = options.parse_args()
    rounds, seconds = (1, 3.0) if given.short else (3, 10.0)
    outcome = Outcome("benchmarks.far_tensors")
    with (
        tempfile.TemporaryDirectory() as name,
        hosts(len(HOSTS)) as (home, others, truth),
        ExitStack() as stack,
    ):
        arms = {}
        for arm in ("one host", "apart"):
            folder = Path(name) / arm.replace(" ", "-")
            repositories.emulated(folder / "models", "large", {1: INFER_MS}, width=LARGE)
            repositories.emulated(folder / "models", "slow", {1: SLOW_MS}, width=LARGE)
            repositories.emulated(folder / "models", "small", {1: 0.5}, width=SMALL)
            made = one_host(folder) if arm == "one host" else apart(folder, home, others)
            arms[arm] = stack.enter_context(made)
        sides = {arm: (lambda arm=arm: measured(arms[arm], seconds, given.seed)) for arm in arms}
        found, medians = in_turns(sides, rounds)
    outcome.figures.update(hosts=truth, medians=medians, rounds=found)
    judge(outcome, medians, given.before)
    names = list(dict.fromkeys(name for arm in medians.values() for name in arm))
    rows = [
        (name, *(f"{arm[name]:.3f}" if name in arm else "" for arm in medians.values())) for name in names
    ]
    print(f"\nhosts are {truth}\n" + table(("median of rounds", *medians), rows))
    shutil.rmtree(name, ignore_errors=True)
    return finish(outcome, given.json)


def judge(outcome: Outcome, medians: dict[str, dict[str, float]], before: Path | None) -> None:
    """What was asked, and what was found."""
    home, far = medians["one host"], medians["apart"]
    if max(one["late_sends"] for one in medians.values()) > LATE_SENDS:
        outcome.invalid = "the client sent late: this machine has too little to spare"
    if before is not None:
        earlier = json.loads(before.read_text())["figures"]["medians"]["apart"]["all_us"]
        outcome.at_most(
            "CPU of all processes a request of 600 kB, over that before", COST, far["all_us"] / earlier,
            more=f"({far['all_us']:.0f} and {earlier:.0f} us)",
        )  # fmt: skip
    outcome.at_most("CPU of the controller's host a request", HOST_US, far["host_us"], "us", digits=0)
    outcome.at_least(
        f"goodput at {RATE:g} requests/s, over that on one host", GOODPUT, far["goodput"] / home["goodput"],
        more=f"({far['goodput']:.0f} and {home['goodput']:.0f}/s; servers took {far['cores']:.2f} and "
        f"{home['cores']:.2f} cores)",
    )  # fmt: skip
    outcome.at_least(
        f"goodput at {SLOW_RATE:g} requests/s that take twice as long, over that on one host", GOODPUT,
        far["good_when_slow"] / home["good_when_slow"],
    )  # fmt: skip
    way_ms = far["small_p50_ms"] - home["small_p50_ms"]
    outcome.at_most("a request of 2 kB takes longer than on one host, p50", WAY_MS, way_ms, "ms")
    outcome.none("requests without a response", [""] * round(home["unwell"] + far["unwell"]))


if __name__ == "__main__":
    sys.exit(main())
