"""Players in processes of their own, what they saw, and what the server counted of it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.stalls.clients import Plan, Seen
from harness.report import Outcome
from harness.server import Server
from harness.serving import Metrics, read_metrics, total

ROOT: Final = Path(__file__).parents[2]
GOOD, REFUSED = "200", "429"
COUNTED: Final = 0.99
"""What gRPC's core tells of too late to be sure that it was sent in time counts as late."""
TICK_MS: Final = 4.0
"""The kernel tells when bytes came to a tick of 4 ms where it has 250 of them a second."""


class Player:
    """A client at work."""

    def __init__(self, plan: Plan, core: int | None = None) -> None:
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        self._process = subprocess.Popen(
            [*pinned, sys.executable, "-m", "benchmarks.stalls.clients", msgspec.json.encode(plan).decode()],
            cwd=ROOT, stdout=subprocess.PIPE,
        )  # fmt: skip

    def seen(self) -> list[Seen]:
        """All that it saw, once it is done. RuntimeError if it did not end well."""
        out, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"a client ended with {self._process.returncode}")
        return msgspec.json.decode(out, type=list[Seen])

    def close(self) -> None:
        """End it, if it is not over."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def late(seen: Iterable[Seen], status: str, by_ms: float) -> list[Seen]:
    """Those with that status that came later than their SLO by more than so much."""
    return [one for one in seen if one.status == status and one.took_ms > one.slo_ms + by_ms]


def worst_ms(seen: Iterable[Seen], status: str) -> float:
    """How late the latest with that status was; below zero if none was."""
    return max([one.took_ms - one.slo_ms for one in seen if one.status == status], default=float("-inf"))


def ends(seen: Iterable[Seen]) -> Counter[str]:
    """How many ended how; "" is not at all."""
    return Counter(one.status for one in seen)


def judge_books(outcome: Outcome, part: str, server: Server, seen: list[Seen], *, whole: bool) -> Metrics:
    """What the metrics say must be what the clients saw; ``whole``: nobody who counts was replaced."""
    metrics = read_metrics(f"{server.http_url}/metrics", 10)
    received = total(metrics, "clockwork_requests_received_total")
    ended = total(metrics, "clockwork_requests_total")
    still = total(metrics, "clockwork_requests_open")
    outcome.judge(
        f"{part}: received is the sum of outcomes",
        asked="difference 0",
        found=f"{received - ended - still:g}",
        good=received == ended + still,
    )
    if whole:
        counted, saw = total(metrics, "clockwork_requests_total", outcome="ok"), ends(seen)[GOOD]
        outcome.judge(
            f"{part}: counted as ok, of those that were 200 to a client",
            asked=f"no more, and at least {COUNTED:.0%}",
            found=f"{counted:g} of {saw}",
            good=COUNTED * saw <= counted <= saw,
        )
    return metrics
