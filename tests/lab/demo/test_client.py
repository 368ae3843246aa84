"""The plan of a load: the requested rate and distribution, reproducible by its seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clockwork_lab.demo.client import SLO_FACTORS, Mix, plan, refusal

CASE = {"x": np.zeros((1, 4), np.float32)}
SLOW = Mix("slow", tuple(f"slow_{i}" for i in range(5)), (CASE, CASE), 40.0)
QUICK = Mix("quick", tuple(f"quick_{i}" for i in range(20)), (CASE,), 1.0)


def test_the_device_is_used_as_asked():
    planned = plan([SLOW, QUICK], 300.0, 0.5)
    busy_ms = sum({"slow": 40.0, "quick": 1.0}[shot.model] for shot in planned.shots)
    assert busy_ms / 300_000 == pytest.approx(0.5, rel=0.1)
    assert len(planned.shots) / 300 == pytest.approx(planned.rate, rel=0.1)
    times = [shot.at_s for shot in planned.shots]
    assert times == sorted(times)
    assert times[-1] < 300


def test_arrivals_are_poisson():
    gaps = np.diff([shot.at_s for shot in plan([SLOW, QUICK], 300.0, 0.5).shots])
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.1)


def test_no_slo_is_below_the_floor():
    planned = plan([SLOW, QUICK], 100.0, 0.5)
    assert planned.floor_ms == 140.0
    for shot in planned.shots:
        own = {"slow": 40.0, "quick": 1.0}[shot.model]
        assert shot.slo_ms in {max(planned.floor_ms, factor * own) for factor in SLO_FACTORS}


def test_first_instances_are_the_popular_ones():
    asked = Counter(shot.instance for shot in plan([SLOW, QUICK], 300.0, 0.5).shots)
    assert asked["quick_0"] > asked["quick_4"] > asked["quick_19"] > 0


def test_a_seed_decides_everything():
    assert plan([SLOW, QUICK], 20.0, 0.5, seed=1) == plan([SLOW, QUICK], 20.0, 0.5, seed=1)
    assert plan([SLOW, QUICK], 20.0, 0.5, seed=1) != plan([SLOW, QUICK], 20.0, 0.5, seed=2)


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        ("429", "would miss its deadline", ("rejected", "")),
        ("StatusCode.RESOURCE_EXHAUSTED", "queue full", ("rejected", "")),
        ("503", "no worker", ("rejected", "")),
        ("504", "too late", ("late", "late")),
        ("StatusCode.DEADLINE_EXCEEDED", "gave up", ("late", "late")),
        ("500", "ValueError", ("failed", "500: ValueError")),
        ("400", "no such input", ("failed", "400: no such input")),
    ],
)
def test_refusals_are_told_apart(status, message, expected):
    assert refusal(InferenceServerException(message, status)) == expected
