"""240 clients in a closed loop that ask again at once after a refusal: 602 kB each, a server on one core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Final

from benchmarks.stalls.clients import Plan, Seen
from benchmarks.stalls.judge import GOOD, REFUSED, TICK_MS, Player, ends, judge_books, late, worst_ms
from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness.report import Outcome
from harness.repositories import convolutions
from harness.server import Server
from harness.server_process import Start

MODELS, CLIENTS = 15, 240
SIDE: Final = 224
SLO_MS: Final = 100
SHARE: Final = 0.01


@contextmanager
def served(folder: Path, core: int) -> Iterator[Server]:
    """A server that has one core for all its processes."""
    for model in range(MODELS):
        convolutions(folder / "models", f"m{model}", side=SIDE, channels=8, depth=5, seed=model)
    config = ServerConfig(
        settings=Settings(
            repository=str(folder / "models"), http_port=0, grpc_port=None, metrics_port=0, log_level="error"
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=(DeviceConfig(device="cpu:0", kind="cpu", memory_bytes=256 * MIB),),
    )
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        server = Server(Start(server=config), folder / "server.log")
    finally:
        os.sched_setaffinity(0, before)
    try:
        server.wait_ready(300)
        yield server
    finally:
        server.stop()
        server.close()


def rows(outcome: Outcome, folder: Path, seconds: float) -> None:
    """What was late by the client's clock, and was not said to be."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        outcome.invalid = "clients need a core of their own"
        return
    with served(folder, cores[0]) as server:
        plan = Plan(
            protocol="http", address=server.http_url.partition("//")[2], models=MODELS,
            floats=3 * SIDE * SIDE, slos_ms=(SLO_MS,), seconds=seconds, connections=CLIENTS,
        )  # fmt: skip
        seen = Player(plan, cores[1]).seen()
        judge(outcome, seen)
        judge_books(outcome, "hasty", server, seen, whole=False)


def judge(outcome: Outcome, seen: list[Seen]) -> None:
    """Of all that was seen."""
    counts, good = ends(seen), [one for one in seen if one.status == GOOD]
    over = late(seen, GOOD, 0)
    outcome.judge(
        "hasty: 200 though late", asked=f"at most {SHARE:.0%}",
        found=f"{len(over)} of {len(good)}, at most {worst_ms(seen, GOOD):+.1f} ms; {dict(counts)}",
        good=len(good) > 0 and len(over) <= SHARE * len(good),
    )  # fmt: skip
    refused = late(seen, REFUSED, TICK_MS)
    outcome.judge(
        "hasty: refused after the SLO, by more than a tick of the kernel", asked="0",
        found=f"{len(refused)} of {counts[REFUSED]}, at most {worst_ms(seen, REFUSED):+.1f} ms",
        good=not refused,
    )  # fmt: skip
    own = sorted(one.own_ns / 1e6 for one in seen if one.ended_ns)
    outcome.figures["hasty"] = {
        "ends": dict(counts), "late_200": len(over), "late_429": len(late(seen, REFUSED, 0)),
        "took_ms": quantiles([one.took_ms for one in good], n=100)[49::49] if len(good) > 1 else [],
        "own_ms_p50_p99_max": [own[len(own) // 2], own[len(own) * 99 // 100], own[-1]] if own else [],
    }  # fmt: skip
