"""The HTTP front end alone, against the least that such a server can do, on one core.

1 kB: a server of httptools on uvloop that parses the same JSON header and answers at once. 600 kB: an echo of
length-prefixed frames. All servers are up all the time and are asked in turns; the client and the
controller's stand-in have another core.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Final

import msgspec

from clockwork_serve.config import Settings
from clockwork_serve.serve.gateway.settings import GatewayConfig
from harness.http_load import infer_message
from harness.lean_load import LENGTHS, Subject, ask
from harness.report import Outcome, finish, parser, table

OURS: Final = "ours"
SMALL_FLOATS, LARGE_FLOATS = 256, 150_000
SMALL_SHARE, LARGE_SHARE = 0.4, 0.7


@contextmanager
def process(core: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A module of ours on one core."""
    command = ["taskset", "-c", str(core), sys.executable, "-m", *arguments]
    found = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        yield found
    finally:
        found.kill()
        found.wait()
        assert found.stdout is not None
        found.stdout.close()


@contextmanager
def yardstick(core: int, kind: str, given: str = "-") -> Iterator[tuple[int, str]]:
    """One of :mod:`benchmarks.http_front_end.yardsticks`; its process and address."""
    with process(core, "benchmarks.http_front_end.yardsticks", kind, given) as found:
        assert found.stdout is not None
        yield found.pid, found.stdout.readline().decode().strip()


@contextmanager
def gateway(core: int, floats: int, run_dir: str) -> Iterator[tuple[int, str]]:
    """A gateway whose controller answers at once; its process and address. TimeoutError."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config = GatewayConfig(
        settings=Settings(http_port=port, grpc_port=None, metrics_port=None, log_level="warning"),
        run_dir=run_dir,
        name="g0",
    )
    with yardstick(1 - core, "controller", f"{run_dir}:{floats}"):
        text = msgspec.json.encode(config).decode()
        with process(core, "clockwork_serve.serve.processes.gateway", text) as found:
            end = time.monotonic() + 30
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).close()
                except OSError:
                    if time.monotonic() > end:
                        raise TimeoutError("the gateway did not start") from None
                    time.sleep(0.1)
                else:
                    break
            yield found.pid, f"127.0.0.1:{port}"


def compare(floats: int, connections: int, given: Any) -> dict[str, list[dict[str, float]]]:
    """Both servers in turns."""
    server_core, client_core = sorted(os.sched_getaffinity(0))[:2]
    small = floats < LARGE_FLOATS
    with ExitStack() as stack:
        run_dir = stack.enter_context(tempfile.TemporaryDirectory())
        bare_pid, bare = stack.enter_context(yardstick(server_core, "http" if small else "frames"))
        our_pid, ours = stack.enter_context(gateway(server_core, floats, run_dir))
        data = bytes(4 * floats)
        request = infer_message(
            f"http://{ours}", "m", [("x", "FP32", (1, floats), data)], parameters={"slo_ms": 10_000}
        )
        head = msgspec.msgpack.encode({"inputs": [{"name": "x", "shape": [1, floats], "datatype": "FP32"}]})
        frame = LENGTHS.pack(len(head), len(data)) + head + data
        turns = {
            "bare": Subject([bare_pid], *(("http", bare, request) if small else ("frames", bare, frame))),
            OURS: Subject([our_pid], "http", ours, request),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in turns}
        for _ in range(given.rounds):
            for name, server in turns.items():
                found[name].append(ask(server, client_core, connections, given.seconds))
    return found


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=2.0, help="of each server in each round")
    given = options.parse_args()
    outcome = Outcome("benchmarks.http_front_end")
    rows = []
    for what, floats, connections, share in (
        ("1 kB, 32 connections", SMALL_FLOATS, 32, SMALL_SHARE),
        ("600 kB, 1 connection", LARGE_FLOATS, 1, LARGE_SHARE),
        ("600 kB, 8 connections", LARGE_FLOATS, 8, LARGE_SHARE),
    ):
        found = compare(floats, connections, given)
        middle = {
            name: {field: median(shot[field] for shot in shots) for field in shots[0]}
            for name, shots in found.items()
        }
        rows += [
            (
                what,
                name,
                f"{one['per_s']:,.0f}",
                *(f"{one[field]:.1f}" for field in ("us", "p50_us", "p99_us")),
            )
            for name, one in middle.items()
        ]
        ratio = median(
            ours["per_s"] / bare["per_s"] for ours, bare in zip(found[OURS], found["bare"], strict=True)
        )
        outcome.judge(
            f"{what}: requests/s", asked=f">= {share:.2f}x", found=f"{ratio:.2f}x", good=ratio >= share
        )
        outcome.figures[what] = {"median": middle, "shots": found}
        bad = sum(shot["bad"] for shot in found[OURS])
        outcome.judge(f"{what}: bad answers", asked="0", found=f"{bad:.0f}", good=bad == 0)
    print(table(("", "server", "requests/s", "us of CPU", "p50 us", "p99 us"), rows))
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
