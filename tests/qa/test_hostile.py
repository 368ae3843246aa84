"""The attacker's dice and what is concluded of a run; what it does to a server is another test."""

from __future__ import annotations

import random
from collections import Counter

from clockwork_serve.units import MIB
from harness.server import Held
from qa.books import tracebacks
from qa.hostile import frames as hostile_frames
from qa.hostile import http as hostile_http
from qa.hostile.__main__ import GROWTH_BYTES, Findings, Window, conclude, growth

EVERY = (*hostile_http.ATTACKS, hostile_http.bombs, *hostile_frames.ATTACKS, *hostile_frames.BEYOND_GRPCIO)


def window(hostile: bool, mib: float, p99_ms: float = 1.0) -> Window:
    attacker = {"attacks": 5, "cpu_s": 0.1, "sent": {"nothing": 5}, "ends": {"closed": 5}} if hostile else {}
    latencies = [round(p99_ms * 1e6)]
    held = {"gateway-0": Held(1, round(mib * MIB), 20, 3, frozenset())}
    return Window(hostile, 10.0, latencies, latencies, Counter(), 1.0, attacker, held)


def windows(*mib: float, hostile_p99_ms: float = 1.0) -> list[Window]:
    return [
        window(bool(number % 2), each, hostile_p99_ms if number % 2 else 1.0)
        for number, each in enumerate(mib)
    ]


def missed(found: Findings) -> list[str]:
    return [one.question for one in conclude(found).verdicts if not one.good]


def test_a_seed_decides_what_is_sent() -> None:
    assert len({make.__name__ for make in EVERY}) == len(EVERY)
    for make in EVERY:
        plans = [[make(random.Random(seed)) for seed in range(20)] for _ in range(2)]
        assert plans[0] == plans[1]
        assert all(len(b"".join(plan.pieces)) < 1 << 20 for plan in plans[0])


def test_memory_that_stays_is_no_growth_and_memory_that_goes_on_is() -> None:
    assert growth(windows(60, 70, 100, 110, 110, 110, 110, 110))["gateway-0"] == (0, 0, 0)
    grown = 2 * GROWTH_BYTES / MIB
    assert missed(Findings(windows(60, 60, 60, 60 + grown), [], {}, [])) == ["gateway-0: growth"]


def test_what_is_not_as_promised_is_told() -> None:
    good = windows(60, 60, 60, 60, hostile_p99_ms=1.05)
    assert missed(Findings(good, [], {"region bytes used": 0}, [])) == []
    assert missed(Findings(good, ["gateway-0"], {"region bytes used": 1}, ["error: ValueError"])) == [
        "processes that ended", "tracebacks in logs", "region bytes used",
    ]  # fmt: skip
    slow = windows(60, 60, 60, 60, hostile_p99_ms=1.2)
    assert len(missed(Findings(slow, [], {}, []))) == 2
    good[1].wrong["another answer"] = 1
    assert missed(Findings(good, [], {}, [])) == ["honest answers: 8"]


def test_a_traceback_is_told_by_what_was_said_before_it_and_its_last_line() -> None:
    log = [
        "info gateway-0: listening",
        "error gateway-0: reading a request failed",
        "Traceback (most recent call last):",
        "  x",
        "ValueError: 1",
        "info gateway-0: stopped",
    ]
    assert tracebacks(log) == ["error gateway-0: reading a request failed: ValueError: 1"]
    assert not tracebacks(log[:2])
