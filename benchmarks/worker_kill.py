"""The worker is killed twice under load: whether each client gets one response, and how soon it is back.

20,000 requests from 200 connections in a closed loop; SIGKILL at a third and at two thirds of them. The
worker's arena has 1 GB. Recovery is the time from a kill to the first good answer to a request that came
after it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import repositories
from benchmarks.client import Report, Sample, closed_loop, infer_message, run
from benchmarks.report import Outcome, finish, milliseconds, parser
from benchmarks.serving import Metrics, Serving, serve, total
from clockwork_serve.units import GIB

MODELS, WIDTH = 8, 256
RECOVERY_LIMIT_NS = 1_500_000_000
ENDS = ("ok", "rejected", "expired", "cancelled", "failed")


class Killer:
    """Kills the worker when certain requests are about to be sent."""

    def __init__(self, serving: Serving, at: Sequence[int]) -> None:
        self._serving = serving
        self._at = list(at)
        self.kills: list[tuple[int, int]] = []
        """(instant, pid) of each."""

    def before(self, index: int) -> None:
        """Called with each request's number."""
        if self._at and index >= self._at[0]:
            self._at.pop(0)
            asyncio.get_running_loop().call_soon(self._kill)

    def _kill(self) -> None:
        import time

        pid = self._serving.worker_pid()
        self.kills.append((time.monotonic_ns(), pid))
        os.kill(pid, signal.SIGKILL)


def recovery_ns(kill_ns: int, samples: Sequence[Sample]) -> float:
    """From the kill to the first good answer to a request sent after it."""
    return min(
        (one.done_ns - kill_ns for one in samples if one.status == 200 and one.sent_ns > kill_ns),
        default=float("inf"),
    )


def conclude(report: Report, sent: int, kills: Sequence[tuple[int, int]], metrics: Metrics) -> Outcome:
    """The promises."""
    outcome = Outcome("benchmarks.worker_kill")
    outcome.judge("kills", asked="2", found=str(len(kills)), good=len(kills) == 2)
    outcome.judge(
        "responses", asked=f"{sent}, one each",
        found=f"{len(report.samples) - report.unanswered}, {report.unexpected_bytes} bytes too many",
        good=len(report.samples) == sent and not report.unanswered and not report.unexpected_bytes,
    )  # fmt: skip
    received = int(total(metrics, "clockwork_requests_received_total"))
    counts = {end: int(total(metrics, "clockwork_requests_total", outcome=end)) for end in ENDS}
    outcome.judge(
        "received = " + " + ".join(ENDS), asked=str(received), found=f"{sum(counts.values())}: {counts}",
        good=received == sum(counts.values()) and received >= sent,
    )  # fmt: skip
    twice = int(total(metrics, "clockwork_answers_unmatched_total"))
    outcome.judge("answered twice", asked="0", found=str(twice), good=twice == 0)
    for number, (kill_ns, _) in enumerate(kills, 1):
        took_ns = recovery_ns(kill_ns, report.samples)
        outcome.judge(
            f"kill {number}: works again after", asked="<= 1.5 s", found=milliseconds(took_ns),
            good=took_ns <= RECOVERY_LIMIT_NS,
        )  # fmt: skip
    outcome.figures = {"sent": sent, "ends": dict(report.ends()), "counted_by_server": counts}
    print(f"  clients saw {dict(report.ends())}")
    return outcome


def measure(serving: Serving, requests: int, connections: int, slo_ms: float) -> Outcome:
    """Load, kill, judge."""
    x = [("x", "FP32", (1, WIDTH), bytes(4 * WIDTH))]
    url = serving.http_url
    messages = [infer_message(url, f"m{index}", x, slo_ms=slo_ms) for index in range(MODELS)]
    run(closed_loop(url, lambda index: messages[index % MODELS], requests=5 * MODELS, connections=1))
    killer = Killer(serving, (requests // 3, 2 * requests // 3))

    def message(index: int) -> bytes:
        killer.before(index)
        return messages[index % MODELS]

    report = run(closed_loop(url, message, requests=requests, connections=connections))
    return conclude(report, requests, killer.kills, serving.metrics())


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=20_000)
    options.add_argument("--connections", type=int, default=200)
    options.add_argument("--slo-ms", type=float, default=500)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        for index in range(MODELS):
            repositories.layers(root, f"m{index}", width=WIDTH, depth=4, seed=index)
        with serve(root, memory_bytes=GIB) as serving:
            outcome = measure(serving, given.requests, given.connections, given.slo_ms)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
