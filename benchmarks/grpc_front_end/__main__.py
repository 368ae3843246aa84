"""The gRPC front end alone, against bare echoes of the same messages: CPU a request, requests a second.

The server has one core, the client and the controller's stand-in another. All servers are up all the time
and are asked in turns, so that they see the same machine.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Final

from benchmarks.grpc_front_end import sides as grpc_sides
from harness.grpc_load import ROOM_BYTES, Load
from harness.machine import cpu_s
from harness.report import Outcome, finish, parser, table

SHARE: Final = 0.75
OURS: Final = "ours"
FALL_BACK: Final = "fall-back"
FALL_BACK_SHARE: Final = 1.5
BARE: Final = {"sync": "bare grpc.server, 8 threads", "aio": "bare grpc.aio"}
NAMES: Final = {**BARE, OURS: "our gateway", FALL_BACK: "our gateway on grpc.aio"}
CONNECTIONS: Final = 4
WARM_UP_S: Final = 0.3


@contextmanager
def side(name: str, core: int, *arguments: object) -> Iterator[tuple[int, int]]:
    """A process on one core; its id and port."""
    command = [sys.executable, "-m", "benchmarks.grpc_front_end.sides", name, *map(str, (core, *arguments))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.pid, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def wait_until_up(port: int, message: bytes) -> None:
    """Until an answer comes. Raises TimeoutError."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            load = Load(port, grpc_sides.METHOD, message, [1])
            load.run(0.2)
        except OSError:
            time.sleep(0.1)
            continue
        load.close()
        if load.done > load.failed:
            return
    raise TimeoutError(f"no answer from port {port}")


def shot(pid: int, port: int, message: bytes, in_flight: int, seconds: float) -> dict[str, float]:
    """What a server does for a while."""
    per_connection = [in_flight // CONNECTIONS] * CONNECTIONS
    load = Load(port, grpc_sides.METHOD, message, per_connection)
    load.run(WARM_UP_S)
    done, used_s, started = load.done, cpu_s(pid), time.monotonic()
    load.run(seconds)
    requests = load.done - done
    taken_s, used_s = time.monotonic() - started, cpu_s(pid) - used_s
    load.close()
    return {"us": used_s / requests * 1e6, "per_s": requests / taken_s, "failed": load.failed}


def measure(given: Any) -> dict[str, list[dict[str, float]]]:
    """Every server in turns."""
    cores = os.sched_getaffinity(0)
    server_core, client_core = sorted(cores)[:2]
    message = grpc_sides.request(given.bytes)
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, {client_core})
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(side("stand-in", client_core, folder, 0, given.bytes))
        ours = {OURS: grpc_sides.GATEWAY} | ({FALL_BACK: grpc_sides.FALL_BACK} if given.fall_back else {})
        up = {name: stack.enter_context(side(name, server_core, folder, 0, given.bytes)) for name in BARE} | {
            name: stack.enter_context(side(kind, server_core, folder, free_port(), given.bytes))
            for name, kind in ours.items()
        }
        for _, at in up.values():
            wait_until_up(at, message)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in up}
        for _ in range(given.rounds):
            for name, (pid, at) in up.items():
                found[name].append(shot(pid, at, message, given.in_flight, given.seconds))
    return found


def judge(found: dict[str, list[dict[str, float]]]) -> Outcome:
    """Compare medians."""
    outcome = Outcome("benchmarks.grpc_front_end")
    middle = {
        name: {field: median(shot[field] for shot in shots) for field in ("us", "per_s")}
        for name, shots in found.items()
    }
    rows = [
        (
            NAMES[name],
            f"{each['us']:.1f}",
            f"{1e6 / each['us']:,.0f}",
            f"{each['per_s']:,.0f}",
        )
        for name, each in middle.items()
    ]
    print(table(("", "us of CPU a request", "requests/s a core could do", "requests/s done"), rows))
    fastest = min(BARE, key=lambda name: middle[name]["us"])
    ratio = middle[fastest]["us"] / middle[OURS]["us"]
    outcome.judge(
        f"requests a core can do, against the {BARE[fastest]}",
        asked=f">= {SHARE:.2f}x", found=f"{ratio:.2f}x", good=ratio >= SHARE,
    )  # fmt: skip
    most = max(BARE, key=lambda name: middle[name]["per_s"])
    ratio = middle[OURS]["per_s"] / middle[most]["per_s"]
    outcome.judge(
        f"requests done, against the {BARE[most]}",
        asked=f">= {SHARE:.2f}x", found=f"{ratio:.2f}x", good=ratio >= SHARE,
    )  # fmt: skip
    if FALL_BACK in middle:
        for what, ratio in (
            ("can do", middle[FALL_BACK]["us"] / middle[OURS]["us"]),
            ("does", middle[OURS]["per_s"] / middle[FALL_BACK]["per_s"]),
        ):
            outcome.judge(
                f"requests a core {what}, against {NAMES[FALL_BACK]}",
                asked=f">= {FALL_BACK_SHARE:.2f}x", found=f"{ratio:.2f}x", good=ratio >= FALL_BACK_SHARE,
            )  # fmt: skip
    failed = sum(shot["failed"] for shots in found.values() for shot in shots)
    outcome.judge("requests that failed", asked="0", found=f"{failed:.0f}", good=failed == 0)
    outcome.figures = {"median": middle, "shots": found}
    return outcome


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=2.0, help="of each server in each round")
    options.add_argument("--in-flight", type=int, default=32, help="calls open at any time")
    options.add_argument(
        "--fall-back", action="store_true", help="ask our gateway on grpc.aio, too, and compare"
    )
    options.add_argument("--bytes", type=int, default=1024, help="of a request's tensor and of its answer's")
    given = options.parse_args()
    if given.bytes * given.in_flight > ROOM_BYTES * CONNECTIONS:
        options.error(
            f"bytes x in-flight: expected at most {ROOM_BYTES * CONNECTIONS}; ask for less of either"
        )
    if len(os.sched_getaffinity(0)) < 2:
        outcome = Outcome("benchmarks.grpc_front_end", invalid="it needs two cores")
        return finish(outcome, given.json)
    return finish(judge(measure(given)), given.json)


if __name__ == "__main__":
    sys.exit(main())
