"""The latency of one isolated HTTP request above the bare model run.

Requests and runs of a plain ONNX Runtime session, on the same graph and input, alternate, so that both see
the same machine. There are three clients: a raw socket, the public ``tritonclient``, and our own.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import onnxruntime as ort
import tritonclient.http

from clockwork_serve import Client
from harness import repositories
from harness.http_load import infer_message
from harness.lean_load import Connection, http_answer
from harness.report import Outcome, finish, in_turns, milliseconds, parser, quantile, table
from harness.serving import Serving, serve

MODEL, WIDTH, DEPTH = "layers", 512, 8
LIMIT_MS = 0.8
PAUSE_S = 0.002
WARM_UP = 20
"""Turns that do not count."""


def bare_run(graph: Path, x: repositories.Floats) -> Callable[[], None]:
    """A plain session's run, one thread, as the server's."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def triton_run(url: str, x: repositories.Floats) -> tuple[Callable[[], None], Callable[[], None]]:
    """A request through the public client, and how to close it."""
    client = tritonclient.http.InferenceServerClient(urlsplit(url).netloc)
    tensor = tritonclient.http.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return lambda: client.infer(MODEL, [tensor]), client.close


def our_run(url: str, x: repositories.Floats) -> tuple[Callable[[], None], Callable[[], None]]:
    """A request through our own client, and how to close it."""
    client = Client(url)

    def one() -> None:
        client.infer(MODEL, {"x": x}, slo_ms=1000)

    return one, client.close


def timed(run: Callable[[], object]) -> dict[str, float]:
    """How long it takes after a pause, in ns."""
    time.sleep(PAUSE_S)
    started = time.monotonic_ns()
    run()
    return {"ns": time.monotonic_ns() - started}


def measure(serving: Serving, graph: Path, times: int) -> Outcome:
    """Ask in turns and compare medians."""
    x = np.random.default_rng(0).standard_normal((1, WIDTH), dtype=np.float32)
    message = infer_message(serving.http_url, MODEL, [("x", "FP32", x.shape, x.tobytes())], slo_ms=1000)
    address = urlsplit(serving.http_url)
    raw = Connection(address.hostname or "", address.port or 80)
    triton, close_triton = triton_run(serving.http_url, x)
    ours, close_ours = our_run(serving.http_url, x)
    runs: dict[str, Callable[[], object]] = {
        "bare run": bare_run(graph, x),
        "raw HTTP": lambda: raw.ask_once(message, http_answer),
        "tritonclient": triton,
        "Client": ours,
    }
    sides = {name: functools.partial(timed, one) for name, one in runs.items()}
    found, _ = in_turns(sides, WARM_UP + times)
    taken = {name: [each["ns"] for each in shots[WARM_UP:]] for name, shots in found.items()}
    raw.socket.close()
    close_triton()
    close_ours()
    outcome = Outcome("benchmarks.http_overhead")
    bare_ns = quantile(taken["bare run"], 0.5)
    for name in ("raw HTTP", "tritonclient", "Client"):
        extra_ns = quantile(taken[name], 0.5) - bare_ns
        outcome.at_most(f"{name}: p50 over the bare run", LIMIT_MS, extra_ns / 1e6, "ms")
    shares = (0.5, 0.9, 0.99)
    rows = [(name, *(milliseconds(quantile(ns, share)) for share in shares)) for name, ns in taken.items()]
    print(table(("", "p50", "p90", "p99"), rows))
    outcome.figures = {
        f"{name} ms": {str(share): quantile(ns, share) / 1e6 for share in shares}
        for name, ns in taken.items()
    }
    return outcome


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=1000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        repositories.layers(root, MODEL, width=WIDTH, depth=DEPTH)
        with serve(root) as serving:
            outcome = measure(serving, root / MODEL / "1" / "model.onnx", given.requests)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
