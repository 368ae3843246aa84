"""End to end against a real Triton: the same Python identity model, the same lean client, in turns.

Each server has one core with all its processes, the client has the other. Ours runs twice: as it is, and as
``chrt -b 0 clockwork serve`` does, which docs/operate/operations.md advises where all processes share a core.
``make triton`` installs Triton.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final

from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest
from comparison.triton import identity, running_triton, why_not
from harness.grpc_load import Load
from harness.http_load import infer_message
from harness.lean_load import Subject, ask
from harness.machine import cpu_ns
from harness.report import Outcome, finish, parser, table
from harness.serving import serve

FLOATS: Final = 256
METHOD: Final = f"/{INFERENCE_SERVICE}/ModelInfer"
MODEL: Final = "identity"
CONNECTIONS: Final = (1, 16, 32)
SLO_MS: Final = 10_000
WANTED: Final = {"http": {1: 0.75, 16: 1.0, 32: 1.0}, "grpc": {1: 0.75, 16: 0.8, 32: 0.8}}
"""Requests/s, as a share of Triton's."""
TRITON, OURS, BATCH = "Triton", "ours", "ours, chrt -b"
FIELDS: Final = ("per_s", "us", "p50_us", "p99_us")
Found = dict[tuple[str, int, str], list[dict[str, float]]]
"""By protocol, connections and server."""
WARM_UP_S: Final = 0.2


def grpc_message() -> bytes:
    """A ``ModelInferRequest``."""
    found = ModelInferRequest(model_name=MODEL, raw_input_contents=[bytes(4 * FLOATS)])
    found.inputs.add(name="X", datatype="FP32", shape=[1, FLOATS])
    encoded: bytes = found.SerializeToString()
    return encoded


def ask_grpc(server: Subject, connections: int, seconds: float) -> dict[str, float]:
    """As :func:`ask`, over gRPC: one call at a time on each connection."""
    load = Load(int(server.address.rpartition(":")[2]), METHOD, server.message, [1] * connections)
    load.run(WARM_UP_S)
    done, failed = load.done, load.failed
    before, started = sum(map(cpu_ns, server.pids)), time.monotonic()
    load.run(seconds)
    used_ns, taken_s = sum(map(cpu_ns, server.pids)) - before, time.monotonic() - started
    requests, bad = load.done - done, load.failed - failed
    load.close()
    return {"per_s": requests / taken_s, "us": used_ns / 1e3 / requests, "bad": bad}


def measure(given: Any) -> Found:
    """Ask all servers in turns."""
    server_core, client_core = sorted(os.sched_getaffinity(0))[:2]
    model = identity(MODEL, dims=(FLOATS,))
    found: Found = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "triton").mkdir()
        model.write(folder / "ours")
        # Children keep it.
        os.sched_setaffinity(0, {server_core})
        triton = stack.enter_context(running_triton(folder / "triton", model))
        ours = stack.enter_context(serve(folder / "ours", log_level="error"))
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        batch = stack.enter_context(serve(folder / "ours", log_level="error"))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, {client_core})
        servers: tuple[tuple[str, list[int], str, str, dict[str, Any]], ...] = (
            (TRITON, triton.pids(), triton.http_url, triton.grpc_url, {}),
            (OURS, ours.pids(), ours.http_url, ours.grpc_url, {"slo_ms": SLO_MS}),
            (BATCH, batch.pids(), batch.http_url, batch.grpc_url, {"slo_ms": SLO_MS}),
        )
        for _ in range(given.rounds):
            for connections in CONNECTIONS:
                for name, pids, http_url, grpc_url, parameters in servers:
                    tensor = ("X", "FP32", (1, FLOATS), bytes(4 * FLOATS))
                    message = infer_message(http_url, MODEL, [tensor], parameters=parameters)
                    http = Subject(pids, "http", http_url.removeprefix("http://"), message)
                    shot = ask(http, client_core, connections, given.seconds)
                    found.setdefault(("http", connections, name), []).append(shot)
                    grpc = Subject(pids, "grpc", grpc_url, grpc_message())
                    shot = ask_grpc(grpc, connections, given.seconds)
                    found.setdefault(("grpc", connections, name), []).append(shot)
    return found


def judge(found: Found) -> Outcome:
    """Compare, round by round."""
    outcome = Outcome("comparison.against_triton")
    rows = []
    for (protocol, connections, name), shots in sorted(found.items(), key=lambda item: item[0][:2]):
        middle = {field: median(shot[field] for shot in shots) for field in shots[0]}
        outcome.figures[f"{protocol} {connections} {name}"] = middle
        shown = (f"{middle[field]:,.0f}" if field in middle else "" for field in FIELDS)
        rows.append((protocol, connections, name, *shown))
        if name == TRITON:
            continue
        theirs = found[protocol, connections, TRITON]
        share = WANTED[protocol][connections]
        for field, what, asked, most, least in (
            ("per_s", "requests/s", f">= {share:.2f}x", math.inf, share),
            ("us", "CPU a request", "<= 1.00x", 1.0, 0.0),
            ("p99_us", "p99", "<= 1.00x", 1.0, 0.0),
        ):
            if field in middle:
                ratio = median(own[field] / their[field] for own, their in zip(shots, theirs, strict=True))
                outcome.judge(
                    f"{name}: {protocol}, {connections} connections: {what}",
                    asked=asked, found=f"{ratio:.2f}x", good=least <= ratio <= most,
                )  # fmt: skip
        if bad := sum(shot["bad"] for shot in shots):
            outcome.judge(f"{name}: {protocol}: bad answers", asked="0", found=f"{bad:.0f}", good=False)
    print(table(("", "connections", "server", "requests/s", "us of CPU", "p50 us", "p99 us"), rows))
    return outcome


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=2.0, help="of each server in each round")
    given = options.parse_args()
    if absent := why_not():
        print(absent, file=sys.stderr)
        return 2
    return finish(judge(measure(given)), given.json)


if __name__ == "__main__":
    sys.exit(main())
