"""The workload that the scheduler's cost is measured on."""

from __future__ import annotations

from benchmarks.scheduler_cost import Bench, Part, measure


def test_every_request_is_answered_and_every_model_is_placed() -> None:
    found = measure(2, 6, "paper", seed=1, requests=200)
    assert found["missing_when_warm"] == 0
    assert sum(found["warm"]["outcomes"].values()) == 200
    assert found["warm"]["outcomes"]["ok"] == 200
    assert found["warm"]["calls_per_request"] > 1
    assert found["warm"]["us_per_request"] > 0


def test_the_same_seed_asks_for_the_same_decisions() -> None:
    parts = []
    for _ in range(2):
        bench = Bench(2, 6, "paper", 7)
        parts.append(bench.traffic(100, timed=True))
    assert parts[0].actions == parts[1].actions
    assert len(parts[0].calls_ns) == len(parts[1].calls_ns)


def test_the_better_half_leaves_out_what_was_disturbed() -> None:
    part = Part(requests=10, calls_ns=[1000] * 9 + [100_000])
    figures = part.figures()
    assert figures["better_half_us"] == 1.0
    assert figures["us_per_request"] == 10.9
