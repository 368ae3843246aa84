"""A start with a thousand models of different graphs, from an empty cache: who is answered when, is it live.

The server is a process of its own, and this one its client: it probes it, asks for models before they are
ready, and in the end asks every model, whose answer it calculates again.
"""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from harness import repositories
from harness.ports import free_port
from harness.process_tree import cpu_s, descendants
from harness.report import Outcome, finish, parser

LIVE_LIMIT_S: Final = 10.0
FIRST_LIMIT_S: Final = 20.0
ALL_LIMIT_S: Final = 240.0
ASKED_LIMIT_S: Final = 20.0
"""For a model that is asked for again and again, as its refusals advise, while it waits."""
PROBE_LIMIT_S: Final = 1.0
PROBE_EVERY_S: Final = 0.2
ASKED_FOR: Final = 5
"""How many models are asked for before their turn."""
SLO_MS: Final = 10_000
ERROR_LIMIT: Final = 1e-4
WIDTHS: Final = 140
LEAST_WIDTH: Final = 8
"""A model has layers of one of so many widths, from that on, and one more after each round of them."""


def shape_of(kind: int) -> tuple[int, int]:
    """Width and depth of a graph."""
    return LEAST_WIDTH + kind % WIDTHS, 1 + kind // WIDTHS


def wanted(index: int, kind: int) -> repositories.Floats:
    """What model ``index`` answers to ones, by numpy."""
    width, depth = shape_of(kind)
    rng = np.random.default_rng(index)
    y = np.ones((1, width), np.float32)
    for layer in range(depth):
        y = y @ (rng.standard_normal((width, width), dtype=np.float32) / np.float32(np.sqrt(width)))
        if layer < depth - 1:
            y = np.maximum(y, 0)
    return y


class Client:
    """One connection, made again when it is lost."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def ask(self, path: str, body: object = None) -> tuple[int, Any, float]:
        """Status, JSON and the advised wait in s; status 0 where nobody answers."""
        data = None if body is None else json.dumps(body)
        try:
            self._connection.request(
                "GET" if data is None else "POST", f"/v2/{path}", data, {"x-slo-ms": str(SLO_MS)}
            )
            response = self._connection.getresponse()
            found = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return 0, None, 0.0
        return response.status, json.loads(found or b"null"), float(response.headers.get("Retry-After") or 0)

    def infer(self, index: int, kind: int) -> tuple[int, Any, float]:
        """Ask model ``index`` about ones."""
        width, _ = shape_of(kind)
        x = {"name": "x", "datatype": "FP32", "shape": [1, width], "data": [1.0] * width}
        return self.ask(f"models/m{index}/infer", {"inputs": [x]})


@dataclass(slots=True)
class Seen:
    """What the probes saw; times in s since the server was started."""

    live_s: float = 0.0
    ready_s: float = 0.0
    failed: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    probes: int = 0
    steps: list[tuple[float, int]] = field(default_factory=list)  # (when, models prepared)
    cpu_s: float = 0.0  # that the server has used until it was ready


def probe(port: int, pid: int, since: Callable[[], float], seen: Seen, over: threading.Event) -> None:
    """Probe live, and ready until it is, on two connections; ``pid`` is the server's."""
    live, ready = Client(port), Client(port)
    while not over.wait(PROBE_EVERY_S):
        before = since()
        status, _, _ = live.ask("health/live")
        took_s = since() - before
        if status == 200 and not seen.live_s:
            seen.live_s = since()
        elif seen.live_s:
            seen.probes += 1
            seen.slowest_s = max(seen.slowest_s, took_s)
            if status != 200 or took_s > PROBE_LIMIT_S:
                seen.failed.append(f"{status} after {took_s:.2f} s at {before:.1f} s")
        if seen.live_s and not seen.ready_s:
            status, body, _ = ready.ask("health/ready")
            if status == 200:
                seen.ready_s, seen.cpu_s = since(), cpu_s(descendants(pid))
            elif body and "models_prepared" in body:
                seen.steps.append((since(), body["models_prepared"]))


def until_answered(client: Client, index: int, kind: int, since: Callable[[], float]) -> float:
    """Ask a model as its refusals advise until it answers; how long that took. RuntimeError if too long."""
    begun = since()
    while since() - begun < ALL_LIMIT_S:
        status, body, wait_s = client.infer(index, kind)
        if status == 200:
            return since() - begun
        if status not in (0, 503):
            raise RuntimeError(f"m{index}: {status}: {body}")
        time.sleep(wait_s or 0.05)
    raise RuntimeError(f"m{index}: not answered within {ALL_LIMIT_S:.0f} s")


def wrong_answers(client: Client, kinds: list[int]) -> list[str]:
    """Models that do not answer, or not by their own weights."""
    wrong = []
    for index, kind in enumerate(kinds):
        status, body, _ = client.infer(index, kind)
        if status != 200:
            wrong.append(f"m{index}: {status}: {body}")
            continue
        expected = wanted(index, kind)
        found = np.array(body["outputs"][0]["data"], np.float32)
        error = float(np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-9))
        if error > ERROR_LIMIT:
            wrong.append(f"m{index}: relative error {error:.1e}")
    return wrong


@dataclass(slots=True)
class Found:
    """What one start showed."""

    seen: Seen
    first_s: float
    asked_s: list[float]
    answered_s: float
    wrong: list[str]
    profiles: int


def measure(root: Path, kinds: list[int], seed: int) -> Found:
    """Start a server on the repository, and be its client."""
    port, cache = free_port(), root.parent / "cache"
    command = [
        sys.executable, "-m", "clockwork_serve", "serve", str(root), "--cache", str(cache),
        "--http-port", str(port), "--grpc-port", "0", "--metrics-port", "0", "--log-level", "warning",
    ]  # fmt: skip
    begun = time.monotonic()

    def since() -> float:
        return time.monotonic() - begun

    seen, over = Seen(), threading.Event()
    with (root.parent / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        prober = threading.Thread(target=probe, args=(port, server.pid, since, seen, over))
        prober.start()
        try:
            client = Client(port)
            first_s = until_any(client, kinds, since)
            late = random.Random(seed).sample(range(len(kinds) // 2, len(kinds)), ASKED_FOR)
            asked_s = [until_answered(client, index, kinds[index], since) for index in late]
            while not seen.ready_s and since() < 2 * ALL_LIMIT_S:
                time.sleep(PROBE_EVERY_S)
            wrong = wrong_answers(client, kinds)
            return Found(seen, first_s, asked_s, since(), wrong, len(list(cache.rglob("profiles/*.json"))))
        finally:
            over.set()
            prober.join()
            server.terminate()
            server.wait(60)


def until_any(client: Client, kinds: list[int], since: Callable[[], float]) -> float:
    """When the first model answered: whichever it is, each is asked in turn."""
    while since() < ALL_LIMIT_S:
        status, index, _ = client.ask("repository/index", {"ready": True})
        if status == 200 and index:
            number = int(index[0]["name"][1:])
            if client.infer(number, kinds[number])[0] == 200:
                return since()
        time.sleep(0.05)
    raise RuntimeError(f"no model answered within {ALL_LIMIT_S:.0f} s")


def judged(found: Found, models: int, graphs: int) -> Outcome:
    """What was promised of a start, beside what was found."""
    seen = found.seen
    outcome = Outcome("benchmarks.start")
    outcome.at_most("live", LIVE_LIMIT_S, seen.live_s, "s", digits=1)
    outcome.none(
        "probes of live that failed",
        seen.failed,
        more=f"of {seen.probes}; slowest {1000 * seen.slowest_s:.0f} ms",
    )
    outcome.at_most("first answer", FIRST_LIMIT_S, found.first_s, "s", digits=1)
    outcome.at_most(
        "a model asked for before its turn", ASKED_LIMIT_S, max(found.asked_s), "s", digits=1,
        more=f"at most, of {', '.join(f'{each:.1f}' for each in found.asked_s)}",
    )  # fmt: skip
    outcome.at_most(
        "all served", ALL_LIMIT_S, seen.ready_s or 2 * ALL_LIMIT_S, "s", digits=1,
        more=f"after {seen.cpu_s:.0f} s of CPU",
    )  # fmt: skip
    prepared = [count for _, count in seen.steps]
    outcome.judge(
        "until then ready says how far it is", asked="rising", found=f"{len(set(prepared))} steps",
        good=prepared == sorted(prepared) and len(set(prepared)) > 1,
    )  # fmt: skip
    outcome.judge(
        "right answers", asked=f"all of {models}",
        found=f"{models - len(found.wrong)} {found.wrong[:3] or ''}".rstrip(), good=not found.wrong,
    )  # fmt: skip
    outcome.judge(
        "measurements",
        asked=f"{graphs}, one a graph",
        found=str(found.profiles),
        good=found.profiles == graphs,
    )
    outcome.figures = {
        "models": models, "graphs": graphs, "live_s": seen.live_s, "first_s": found.first_s,
        "asked_s": found.asked_s, "all_s": seen.ready_s, "cpu_s": seen.cpu_s, "probes": seen.probes,
        "slowest_probe_s": seen.slowest_s, "prepared": seen.steps,
    }  # fmt: skip
    return outcome


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--models", type=int, default=1130)
    options.add_argument(
        "--graphs", type=int, help="how many different graphs they have (default: each its own)"
    )
    given = options.parse_args()
    graphs = min(given.graphs or given.models, given.models)
    kinds = [index % graphs for index in range(given.models)]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        for index, kind in enumerate(kinds):
            width, depth = shape_of(kind)
            repositories.layers(root, f"m{index}", width=width, depth=depth, seed=index)
        found = measure(root, kinds, given.seed)
    return finish(judged(found, given.models, graphs), given.json)


if __name__ == "__main__":
    sys.exit(main())
