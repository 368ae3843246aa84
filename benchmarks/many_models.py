"""A thousand models on a worker that holds fifty: whether each answers from its own weights.

Each model is one matrix, made from its number, so every answer can be calculated again. The server starts
twice: the first start compiles, the second shows what registration alone takes. At the end it idles and is
watched.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from clockwork_serve.units import MIB
from harness import machine, repositories
from harness.http_load import Report, closed_loop, infer_message, run
from harness.report import Outcome, finish, milliseconds, parser, quantile
from harness.serving import Serving, serve, total

ROWS, COLUMNS = 1024, 512
"""2 MiB of float32."""
REGISTRATION_LIMIT_S = 30.0
IDLE_LIMIT = 2.0
"""Per cent of a core."""
ERROR_LIMIT = 1e-5


def x_of(index: int) -> repositories.Floats:
    """The input that the ``index``-th request sends."""
    return np.random.default_rng(10_000_000 + index).standard_normal((1, ROWS), dtype=np.float32)


def wrong_answers(report: Report, models: list[int]) -> list[str]:
    """Requests whose answer is not that of their own model's weights."""
    wrong = []
    for sample in report.samples:
        index = int(sample.name)
        if sample.status != 200:
            continue
        found = np.frombuffer(sample.body[-4 * COLUMNS :], np.float32)
        wanted = (x_of(index) @ repositories.matrix_of(models[index], ROWS, COLUMNS))[0]
        error = float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))
        if error > ERROR_LIMIT:
            wrong.append(f"request {index} to m{models[index]}: relative error {error:.1e}")
    return wrong


def idle_share(pids: list[int], seconds: float) -> float:
    """CPU that the processes use while nobody asks anything, as a share of one core."""
    time.sleep(1)
    before = sum(machine.cpu_s(pid) for pid in pids)
    time.sleep(seconds)
    return (sum(machine.cpu_s(pid) for pid in pids) - before) / seconds


def ask_all(serving: Serving, models: int, seed: int) -> tuple[Report, list[int]]:
    """Ask every model twice, in an order that never finds the weights by chance."""
    order = [*range(models), *range(models)]
    random.Random(seed).shuffle(order)

    def message(index: int) -> bytes:
        x = x_of(index)
        return infer_message(
            serving.http_url, f"m{order[index]}", [("x", "FP32", x.shape, x.tobytes())], slo_ms=2000
        )

    return run(closed_loop(serving.http_url, message, requests=len(order), connections=4)), order


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--models", type=int, default=1000)
    options.add_argument("--held", type=int, default=50)
    options.add_argument("--idle-seconds", type=float, default=30)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        for index in range(given.models):
            repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, ROWS, COLUMNS))
        memory = given.held * 4 * ROWS * COLUMNS
        assert memory % MIB == 0
        started = time.monotonic()
        with serve(root, memory_bytes=memory):
            compiled_s = time.monotonic() - started
        started = time.monotonic()
        with serve(root, memory_bytes=memory) as serving:
            registered_s = time.monotonic() - started
            report, order = ask_all(serving, given.models, given.seed)
            metrics = serving.metrics()
            idle = idle_share(serving.pids(), given.idle_seconds)
    outcome = Outcome("benchmarks.many_models")
    good = [sample for sample in report.samples if sample.status == 200]
    wrong = wrong_answers(report, order)
    outcome.judge(
        "answers from the model's own weights", asked=f"all of {len(order)}",
        found=f"{len(good) - len(wrong)}; {dict(report.ends())}; {wrong[:3]}",
        good=len(good) == len(order) and not wrong,
    )  # fmt: skip
    what = f"start with {given.models} compiled models"
    beside = f"(first start, compiling: {compiled_s:.1f} s)"
    outcome.at_most(what, REGISTRATION_LIMIT_S, registered_s, "s", digits=1, more=beside)
    outcome.at_most("idle server", IDLE_LIMIT, 100 * idle, "% of a core")
    latencies = [sample.latency_ns for sample in good]
    print("  latency p50, p99:", *(milliseconds(quantile(latencies, share)) for share in (0.5, 0.99)))
    outcome.figures = {
        "models": given.models, "held": given.held, "compiled_s": compiled_s, "registered_s": registered_s,
        "loads": total(metrics, "clockwork_actions_total", action="load", status="ok"), "idle_share": idle,
        "latency_ms": {str(share): quantile(latencies, share) / 1e6 for share in (0.5, 0.99)},
    }  # fmt: skip
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
