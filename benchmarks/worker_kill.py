"""The worker is killed twice under load: whether each client gets one response, and how soon it is back.

20,000 requests from 200 connections in a closed loop; SIGKILL after a quarter and after half of them. The
worker's arena has 1 GB. Recovery is the time from a kill to the first good answer to a request that came
after it.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import repositories
from benchmarks.client import Report, Sample, closed_loop, infer_message, run
from benchmarks.report import Outcome, finish, milliseconds, parser
from benchmarks.serving import Metrics, Serving, serve, total
from clockwork_serve.units import GIB

MODELS, WIDTH = 8, 256
PAUSE_S = 0.1
"""What a client waits after a refusal: 200 clients send 2,000 requests a second while the worker is away."""
RECOVERY_LIMIT_NS = 1_500_000_000
ENDS = ("ok", "rejected", "expired", "cancelled", "failed")


@dataclass(slots=True)
class Kill:
    """When the worker was killed, and when the first good answer came to a request that was sent later."""

    at_ns: int
    back_ns: int | None = None


class Killer:
    """Kills the worker when certain numbers of requests have ended, but never one that is not back yet."""

    def __init__(self, serving: Serving, at: Sequence[int]) -> None:
        self._serving = serving
        self._at = list(at)
        self._ended = 0
        self.kills: list[Kill] = []

    def on_sample(self, sample: Sample) -> None:
        """Called with each request's end."""
        self._ended += 1
        last = self.kills[-1] if self.kills else None
        if last is not None and last.back_ns is None and sample.status == 200 and sample.sent_ns > last.at_ns:
            last.back_ns = sample.done_ns
        if self._at and self._ended >= self._at[0] and (last is None or last.back_ns is not None):
            self._at.pop(0)
            self.kills.append(Kill(time.monotonic_ns()))
            os.kill(self._serving.worker_pid(), signal.SIGKILL)


def conclude(report: Report, sent: int, kills: Sequence[Kill], metrics: Metrics) -> Outcome:
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
    for number, kill in enumerate(kills, 1):
        took_ns = math.inf if kill.back_ns is None else kill.back_ns - kill.at_ns
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
    killer = Killer(serving, (requests // 4, requests // 2))
    load = closed_loop(
        url,
        lambda index: messages[index % MODELS],
        requests=requests,
        connections=connections,
        pause_s=PAUSE_S,
        on_sample=killer.on_sample,
    )
    report = run(load)
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
