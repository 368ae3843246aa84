"""More work than a device can do: a no that comes in time, and no answer that comes late."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.client import open_loop, run
from benchmarks.serving import Serving, total

from benchmarks import overload, repositories

Start = Callable[..., AbstractContextManager[Serving]]

TOLD_BY_NS = 100_000_000
"""Far above what is promised (10 ms), for machines are shared; far below a timeout."""


def test_hopeless_requests_hear_at_once_and_the_rest_is_served(tmp_path: Path, start: Start) -> None:
    root, journal = tmp_path / "models", tmp_path / "journal"
    repositories.emulated(root, overload.MODEL, {1: 200})
    with start(root, device="emulated", journal=journal) as serving:
        shots = overload.shots(serving.http_url, rate=15, seconds=4, slos_ms=(40, 260, 520), seed=3)
        samples = overload.load(serving, shots)
        metrics = serving.metrics()
    found = overload.judge(samples, overload.runs_of(journal, samples))

    assert not found.other_ends
    assert found.late <= 1
    assert sorted(found.lags_ns)[int(0.9 * len(found.lags_ns))] < TOLD_BY_NS
    assert found.good >= 0.7 * found.best
    assert total(metrics, "clockwork_requests_total", reason="would_miss_deadline") == len(found.lags_ns)
    assert total(metrics, "clockwork_requests_received_total") == len(samples) + 1


def test_a_refusal_says_when_to_come_back(tmp_path: Path, start: Start) -> None:
    root = tmp_path / "models"
    repositories.emulated(root, overload.MODEL, {1: 200})
    with start(root, device="emulated") as serving:
        shots = overload.shots(serving.http_url, rate=40, seconds=1, slos_ms=(260,), seed=3)
        report = run(open_loop(serving.http_url, shots))
    refused = [sample for sample in report.samples if sample.status == 429]
    assert refused
    assert all(b"retry-after:" in sample.headers.lower() for sample in refused)
